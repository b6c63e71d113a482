"""Low-rank and dense-sparse factorizations of matrices, against slow obvious versions and worked figures."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from raising import raises

from compressor.errors import PassError
from compressor.layers.low_rank_linear import LowRankLinear
from compressor.layers.sparse_factor_linear import SparseFactorLinear
from compressor.methods.factorization.low_rank import (
    dense_bytes,
    largest_rank,
    least_error,
    low_rank_bytes,
    metric_of,
    spectrum,
)
from compressor.methods.factorization.sparse_coding import (
    Coder,
    SparseFactors,
    balance,
    block_bytes,
    block_target,
    choose_shape,
    factorize,
    first_atoms,
    improve_atoms,
    largest,
    refit_values,
    solve_block,
)
from compressor.passes.low_rank import share_out

# six rows that three atoms represent exactly, one each; singular values 5.202986 and 3.595682
EXAMPLE = torch.tensor([[2.0, 0], [0, 3], [1, 1], [-2, -2], [0, -1], [4, 0]], dtype=torch.float64)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def correlated(inputs, rows=400, seed=1):
    """Second moments of inputs that a random matrix has mixed."""
    x = random(rows, inputs, seed=seed) @ random(inputs, inputs, seed=seed + 1)
    return x.t() @ x / rows


def solve(matrix, metric, block, atoms, k, sweeps=2, rounds=5, seed=0, watch=None):
    return factorize(matrix, metric, block, atoms, k, sweeps, rounds, torch.Generator().manual_seed(seed), watch)


@pytest.mark.parametrize("out", [24, 16, 10])
def test_weighted_svd_leaves_the_tail_of_its_spectrum_and_beats_the_plain_one(out):
    matrix, metric = random(out, 16), metric_of(correlated(16), 16, 0.01, "w")
    found, plain = spectrum(matrix, metric), spectrum(matrix, metric_of(None, 16, 0.01, "w"))
    values = torch.linalg.svdvals(matrix @ metric.lower)
    assert torch.allclose(found.values, values)
    for rank in (1, 5, min(out, 16)):
        left, right = found.factors(rank)
        error = metric.error(matrix - left @ right)
        assert error == pytest.approx(float(found.values[rank:].square().sum()), rel=1e-9, abs=1e-9)
        assert float(found.tails()[rank]) == pytest.approx(metric.relative_error(matrix, left @ right), abs=1e-12)
        other_left, other_right = plain.factors(rank)
        assert error <= metric.error(matrix - other_left @ other_right) * (1 + 1e-9) + 1e-9


def test_the_least_error_of_a_rank_is_that_of_its_factors():
    for shape in ((24, 16), (10, 16)):
        matrix, metric = random(*shape), metric_of(correlated(16), 16, 0.01, "w")
        left, right = spectrum(matrix, metric).factors(5)
        assert least_error(matrix, metric, 5) == pytest.approx(metric.relative_error(matrix, left @ right), rel=1e-9)


def test_energy_takes_the_least_rank_that_reaches_it():
    found = spectrum(random(24, 16), metric_of(correlated(16), 16, 0.01, "w"))
    for energy in (0.1, 0.5, 0.9, 0.999):
        rank = found.rank_of_energy(energy)
        kept = 1 - found.tails()
        assert kept[rank] >= energy and (rank == 1 or kept[rank - 1] < energy)


@pytest.mark.parametrize(("shape", "rank"), [((768, 768), 384), ((3072, 768), 614)])
def test_low_rank_breaks_even_where_the_formula_says(shape, rank):
    assert largest_rank(shape, dense_bytes(shape), "float16") == rank
    assert low_rank_bytes(shape, rank, "float16") <= dense_bytes(shape) < low_rank_bytes(shape, rank + 1, "float16")


def test_second_moments_that_cannot_be_used_are_named():
    with raises(PassError, where="fc", reason="not-finite"):
        metric_of(torch.full((2, 2), float("nan")), 2, 0.01, "fc")
    with raises(PassError, where="fc", reason="not-positive-definite", damping=10):
        metric_of(torch.tensor([[1.0, 1e9], [1e9, 1.0]]), 2, 0.01, "fc")
    singular = metric_of(torch.ones(4, 4), 4, 0.01, "fc")
    assert singular.damping == 0.01 and singular.name == "output"
    unseen = metric_of(torch.zeros(3, 3), 3, 0.01, "fc")
    assert unseen.name == "weight" and unseen.error(torch.ones(1, 3)) == 3.0


def slow_pursuit(target, atoms, k):
    """One row: the atom most along the residual, then least squares with torch's own solver, k times."""
    chosen, residual = [], target
    for _ in range(k):
        along = [
            -1.0 if j in chosen or not bool(atom.any()) else abs(float(residual @ atom / atom.norm()))
            for j, atom in enumerate(atoms)
        ]
        chosen.append(max(range(len(atoms)), key=along.__getitem__))
        found = torch.linalg.lstsq(atoms[chosen].t(), target[:, None], driver="gelsd").solution[:, 0]
        residual = target - found @ atoms[chosen]
    return residual, chosen, found


def slow_solve(targets, atoms, k, rounds):
    """The error of rounds of matching pursuit, row by row, and least squares for the atoms."""
    for _ in range(rounds):
        sparse = torch.zeros(len(targets), len(atoms), dtype=torch.float64)
        for row, target in enumerate(targets):
            _, chosen, found = slow_pursuit(target, atoms, k)
            sparse[row, chosen] = found
        atoms = torch.linalg.lstsq(sparse, targets, driver="gelsd").solution
    return float((targets - sparse @ atoms).square().sum())


@pytest.mark.parametrize(("count", "k"), [(6, 2), (12, 4), (12, 8), (20, 3)])
def test_rounds_by_products_end_below_as_many_of_slow_pursuit(count, k):
    targets = random(60, 12) @ correlated(12)
    start = first_atoms(targets, count, torch.Generator().manual_seed(0))
    solved = solve_block(targets, start, targets.new_zeros(60, count), k, rounds=6)
    assert bool((solved.support.sum(1) == k).all()) and not bool(solved.sparse[solved.support == 0].any())
    product = solved.sparse @ solved.atoms
    assert solved.error == pytest.approx(float((targets - product).square().sum()), rel=1e-6)
    assert solved.error < slow_solve(targets, start, k, rounds=3)


def test_values_are_least_squares_on_their_supports():
    targets, atoms = random(40, 12), random(9, 12, seed=3) * torch.arange(1, 10)[:, None]
    support = largest(random(40, 9, seed=4), 4)
    found = Coder.of(atoms).refit(targets, targets.new_zeros(40, 9), support)
    for row, target in enumerate(targets):
        chosen = support[row].nonzero()[:, 0]
        best = torch.linalg.lstsq(atoms[chosen].t(), target[:, None], driver="gelsd").solution[:, 0]
        assert torch.allclose(found[row, chosen], best, atol=1e-4)  # the ridge of 1e-6
        assert int(found[row].count_nonzero()) == 4


def test_closed_form_atoms_are_least_squares_and_unused_ones_start_anew():
    targets, sparse = random(30, 8), random(30, 5, seed=1)
    sparse[:, 4] = 0
    found = improve_atoms(targets, sparse, sparse.t() @ sparse, sparse.t() @ targets)
    best = torch.linalg.lstsq(sparse[:, :4], targets).solution
    assert torch.allclose(found[:4], best, atol=1e-4)
    assert any(torch.equal(found[4], row) for row in targets)


def test_the_worked_example_is_exact_where_rank_one_is_not():
    metric = metric_of(None, 2, 0.01, "w")
    found = solve(EXAMPLE, metric, block=2, atoms=3, k=1, sweeps=1, rounds=10)
    assert metric.relative_error(EXAMPLE, found.matrix()) < 1e-10
    svd = spectrum(EXAMPLE, metric)
    assert svd.values.tolist() == pytest.approx([5.202986, 3.595682], abs=1e-6)
    assert float(svd.tails()[1]) ** 0.5 == pytest.approx(0.568527, abs=1e-6)
    assert block_bytes((24, 2), 2, 3, 1, "float16") == 12 + 48 + 6 == 66
    assert largest_rank((24, 2), 66, "float16") == 1
    assert block_bytes((6, 2), 2, 3, 1, "float16") == 26 > dense_bytes((6, 2)) == 24


def test_errors_only_fall_and_end_below_the_rival_at_no_more_bytes():
    """The specification's run: correlated inputs, W 48 x 32, B = 16, m = 12, k = 3, three sweeps."""
    matrix, metric = random(48, 32), metric_of(correlated(32), 32, 0.01, "w")
    errors = []
    found = solve(matrix, metric, 16, 12, 3, sweeps=3, watch=errors.append)
    assert len(errors) == 5 and all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(errors))
    assert errors[-1] == pytest.approx(metric.error(matrix - found.matrix()), rel=1e-9)
    size = block_bytes((48, 32), 16, 12, 3, "float16")
    assert size == 768 + 576 + 144 == 1488 and largest_rank((48, 32), size, "float16") == 9
    left, right = spectrum(matrix, metric).factors(9)
    assert errors[-1] < 0.8 * metric.error(matrix - left @ right)


def test_the_target_of_a_block_is_where_its_gradient_vanishes():
    matrix, metric = random(6, 12), metric_of(correlated(12), 12, 0.01, "w")
    rest = random(6, 12, seed=5)
    columns = slice(4, 8)
    target, _ = block_target(matrix, rest, metric, columns, 12)
    moved = rest.clone()
    moved[:, columns] = matrix[:, columns] - target
    gradient = (moved @ metric.hessian)[:, columns]
    assert float(gradient.abs().max()) < 1e-9 * float((rest @ metric.hessian).abs().max())


def test_a_complete_basis_is_exact_and_one_full_block_is_the_svd():
    matrix, metric = random(20, 16), metric_of(correlated(16), 16, 0.01, "w")
    complete = solve(matrix, metric, block=8, atoms=8, k=8)
    assert metric.relative_error(matrix, complete.matrix()) < 1e-10
    plain = metric_of(None, 16, 0.01, "w")
    full = solve(matrix, plain, block=16, atoms=5, k=5, sweeps=1, rounds=20)
    best = float(spectrum(matrix, plain).tails()[5])
    assert best * (1 - 1e-9) <= plain.relative_error(matrix, full.matrix()) <= 1.01 * best


def test_columns_of_zeros_get_atoms_of_zeros():
    matrix = random(10, 12)
    matrix[:, 4:8] = 0
    found = solve(matrix, metric_of(None, 12, 0.01, "w"), 4, 3, 2)
    assert not bool(found.atoms[1].any()) and not bool(found.values[:, 1].any())
    assert found.index[:, 1].tolist() == [[0, 1]] * 10


def test_balancing_keeps_the_matrix_and_new_values_never_hurt():
    matrix, metric = random(30, 16), metric_of(correlated(16), 16, 0.01, "w")
    found = solve(matrix, metric, 8, 6, 2, sweeps=1, rounds=2)
    even = balance(found)
    assert torch.allclose(even.matrix(), found.matrix())
    shaken = SparseFactors(even.atoms, even.values + 0.1, even.index)
    assert metric.error(matrix - refit_values(matrix, metric, shaken).matrix()) < metric.error(matrix - shaken.matrix())


@pytest.mark.parametrize("shape", [(768, 768), (3072, 768), (384, 1536), (256, 640), (2048, 512)])
@pytest.mark.parametrize("values", ["float16", "int8"])
def test_a_ratio_is_met_within_one_percent(shape, values):
    for ratio, block in itertools.product((0.1, 0.25, 0.5), (128, 256, 512)):
        block = math.gcd(block, shape[1])
        wanted = int(ratio * dense_bytes(shape))
        atoms, k = choose_shape(shape, block, wanted, 0.6, values)
        size = block_bytes(shape, block, atoms, k, values)
        assert 0.99 * wanted <= size <= wanted and k <= atoms <= shape[0]


def test_sizes_are_those_of_the_stored_tensors():
    for values, (block, atoms, k) in itertools.product(("float16", "int8"), ((8, 5, 1), (4, 12, 3), (16, 3, 3))):
        format_params = {"block": block, "atoms": atoms, "k": k, "values": values}
        planned = SparseFactorLinear.planned((6, 16), format_params, torch.float32)
        stored = sum(dtype.itemsize * math.prod(shape) for dtype, shape in planned.values())
        assert stored == block_bytes((6, 16), block, atoms, k, values)
        thin = LowRankLinear.planned((6, 16), {"rank": k, "values": values}, torch.float32)
        stored = sum(dtype.itemsize * math.prod(shape) for dtype, shape in thin.values())
        assert stored == low_rank_bytes((6, 16), k, values)
    # of the specification's table, those whose indices are less as numbers than as bits, and one that is not
    assert block_bytes((768, 768), 64, 64, 8, "float16") == 98304 + 147456 + 55296 == 301056
    assert block_bytes((768, 768), 64, 32, 8, "float16") == 242688 - 768 * 12 * (40 - 32) // 8


def test_a_budget_is_shared_out_as_a_search_over_all_ranks_would():
    shapes = {"a": (8, 8), "b": (12, 8)}
    tails = {name: spectrum(random(*shape, seed=n), metric_of(None, 8, 0.01, "w")).tails().tolist()
             for n, (name, shape) in enumerate(shapes.items())}  # fmt: skip
    dense = {name: 4 * math.prod(shape) for name, shape in shapes.items()}
    for budget in (100, 150, 200, 220):
        ranks, size = share_out(tails, shapes, dense, budget, "float16")
        options = itertools.product(range(1, 4), range(1, 5))  # both break even there
        fits = [(a, b) for a, b in options if 32 * a + 40 * b <= budget]
        best = min(tails["a"][a] + tails["b"][b] for a, b in fits)
        assert size == 32 * ranks["a"] + 40 * ranks["b"] <= budget
        assert tails["a"][ranks["a"]] + tails["b"][ranks["b"]] <= best * 1.15  # greedy: the last step may not fit
    ranks, size = share_out(tails, shapes, dense, 10**6, "float16")
    assert ranks == {"a": None, "b": None} and size == sum(dense.values())
