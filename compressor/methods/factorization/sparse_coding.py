"""Approximates a matrix by sparse combinations of few atoms, with orthogonal matching pursuit and dictionary updates.

W (out, in) is divided into blocks of B columns, W_b = S_b D_b with atoms D_b (m, B) and coefficients S_b (out, m), k in
each row. The blocks are solved one after the other. The error is E of `low_rank`. For block b with the others fixed it
is, up to a constant,

    ‖(R_b - S_b D_b) L_b‖²    R_b = W_b + (Σ_{c≠b} (W_c - S_c D_c) H_cb) H_bb⁻¹    H_bb = L_b L_bᵀ
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from compressor.lazy import torch
from compressor.methods.factorization.low_rank import SCALE_BYTES, Metric, value_bytes

RIDGE = 1e-6  # relative to the atoms' squared norm (least squares on a support), or to the mean diagonal (atoms)
VALUES_AT_ONCE = (
    1 << 20
)  # values of the largest temporary of a pursuit: 4 MB, which fit into caches; larger ones are slower


@dataclass
class SparseFactors:
    """atoms   (blocks, m, B) float
    values  (out, blocks, k)
    index   (out, blocks, k) int64, ascending in each row, < m
    """

    atoms: torch.Tensor
    values: torch.Tensor
    index: torch.Tensor

    def block(self, b: int) -> torch.Tensor:
        """S_b D_b (out, B)"""
        return spread(self.values[:, b], self.index[:, b], self.atoms.shape[1]) @ self.atoms[b]

    def matrix(self) -> torch.Tensor:
        """(out, in)"""
        return torch.cat([self.block(b) for b in range(len(self.atoms))], 1)


def spread(values: torch.Tensor, index: torch.Tensor, atoms: int) -> torch.Tensor:
    """Stored coefficients (rows, k) as a matrix (rows, m)."""
    return values.new_zeros(len(values), atoms).scatter_(1, index, values)


def pursue(targets: torch.Tensor, atoms: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Batched orthogonal matching pursuit: k atoms for each target, each time the one most parallel to the residual.

    After every choice it solves least squares (with a ridge) on the atoms chosen so far, as in Pati, Rezaiifar and
    Krishnaprasad 1993. Everything is computed from G = A Aᵀ: with the orthonormalised chosen atoms q_j, p_j = A q_j
    follows from earlier ones, and c_j p_j is subtracted from the residual's products with all atoms. The p_j at the
    chosen atoms are a Cholesky factor of G there, which gives the coefficients at the end.

    targets  (rows, B)
    atoms    (m, B), of any norm; an atom of zeros is chosen last
    returns  values (rows, k), index (rows, k) int64 ascending
    """
    step = max(1, VALUES_AT_ONCE // (k * len(atoms)))
    parts = [_pursue(part, atoms, k) for part in targets.split(step)]
    return torch.cat([values for values, _ in parts]), torch.cat([index for _, index in parts])


def _pursue(targets: torch.Tensor, atoms: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    count, rows = len(atoms), len(targets)
    norms = atoms.norm(dim=1)
    unit = atoms / torch.where(norms > 0, norms, torch.ones_like(norms))[:, None]
    gram = unit @ unit.t()
    gram.diagonal().add_(RIDGE)
    products = targets @ unit.t()  # products of the target's residual with each atom
    directions = targets.new_zeros(rows, k, count)  # p_j
    amounts = targets.new_zeros(rows, k)  # c_j
    index = torch.zeros(rows, k, dtype=torch.int64, device=targets.device)
    free = torch.ones(rows, count, dtype=torch.bool, device=targets.device)
    for j in range(k):
        chosen = products.abs().masked_fill(~free, -1).argmax(1, keepdim=True)  # (rows, 1)
        before = directions[:, :j]
        own = before.gather(2, chosen[:, None].expand(-1, j, 1))  # (rows, j, 1), the part along earlier directions
        rest = gram[chosen[:, 0]] - torch.bmm(own.transpose(1, 2), before)[:, 0]
        size = rest.gather(1, chosen).clamp(min=RIDGE).sqrt()
        directions[:, j] = rest / size
        amount = products.gather(1, chosen) / size
        products -= amount * directions[:, j]
        amounts[:, j : j + 1], index[:, j : j + 1] = amount, chosen
        free.scatter_(1, chosen, False)
    # factor[i, j] = p_j at the i-th chosen atom; G there is factor factorᵀ, so factorᵀ values = amounts
    factor = directions.gather(2, index[:, None].expand(-1, k, k)).transpose(1, 2)
    values = torch.linalg.solve_triangular(factor.transpose(1, 2), amounts[:, :, None], upper=True)[:, :, 0]
    values = torch.where(norms[index] > 0, values / norms[index].clamp(min=1e-30), torch.zeros_like(values))
    order = index.argsort(1)
    return values.gather(1, order), index.gather(1, order)


def refit(targets: torch.Tensor, atoms: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Least squares of targets (rows, B) on the atoms of their supports (rows, k). Returns values (rows, k)."""
    gram = atoms @ atoms.t()
    small = gram[index[:, :, None], index[:, None, :]]
    diagonal = small.diagonal(dim1=1, dim2=2)
    diagonal.add_(RIDGE * diagonal.mean(1, keepdim=True).clamp(min=1e-30))
    sides = (targets @ atoms.t()).gather(1, index)
    return torch.linalg.solve(small, sides[:, :, None])[:, :, 0]


def improve_atoms(
    targets: torch.Tensor, values: torch.Tensor, index: torch.Tensor, atoms: torch.Tensor, lower: torch.Tensor
) -> torch.Tensor:
    """The best atoms for given coefficients, D = (SᵀS + εI)⁻¹ Sᵀ R; the metric L cancels from these equations.

    An atom that no row uses is replaced by the target with the largest error.
    """
    coefficients = spread(values, index, len(atoms))
    normal = coefficients.t() @ coefficients
    normal.diagonal().add_(RIDGE * normal.diagonal().mean().clamp(min=1e-30))
    found = torch.linalg.solve(normal, coefficients.t() @ targets)
    unused = (coefficients == 0).all(0).nonzero()[:, 0]
    if len(unused):
        left = ((targets - coefficients @ found) @ lower).square().sum(1)
        worst = left.argsort(descending=True, stable=True)[: len(unused)]
        found[unused[: len(worst)]] = targets[worst]
    return found


def first_atoms(target: torch.Tensor, lower: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """First atoms (count, B): V_rᵀ L⁻¹ of R L = U Σ Vᵀ, and rows of the target R if those are too few."""
    seen = target @ lower
    if count <= min(seen.shape):
        _, _, right = torch.linalg.svd(seen, full_matrices=False)
        return torch.linalg.solve_triangular(lower, right[:count], upper=False, left=False)
    return target[spread_rows(seen, count, generator)]


def spread_rows(rows: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Numbers (count,) of rows with distant directions: k-means++ with distance 1 - cos², which ignores the sign.

    Numbers repeat if there are fewer directions than `count`.
    """
    unit = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)
    alive = (rows != 0).any(1)
    far = torch.ones(len(rows), dtype=rows.dtype, device=rows.device)
    chosen: list[int] = []
    for _ in range(count):
        odds = far.clamp(min=0).double() * alive
        if float(odds.sum()) <= 1e-9:
            odds = alive.double()
        number = int(torch.multinomial(odds.cpu(), 1, generator=generator))
        chosen.append(number)
        far = torch.minimum(far, 1 - (unit @ unit[number]).square())
        far = torch.where(far > 1e-6, far, torch.zeros_like(far))  # the same direction, except for rounding
    return torch.tensor(chosen, device=rows.device)


def block_bytes(shape: Sequence[int], block: int, atoms: int, k: int, values: str) -> int:
    """Bytes of the stored factors of a weight (out, in); `compressor.layers.sparse_factor_linear` has the formula."""
    out, columns = shape
    blocks, v = columns // block, value_bytes(values)
    scales = SCALE_BYTES * (blocks * atoms + out) if values == "int8" else 0
    index = -(-out * blocks * min(k * max(1, (atoms - 1).bit_length()), atoms) // 8)
    return v * atoms * columns + v * out * blocks * k + index + scales


@lru_cache(maxsize=1024)
def choose_shape(
    shape: tuple[int, ...], block: int, size: int, density: float, values: str, tolerance: float = 0.01
) -> tuple[int, int] | None:
    """(atoms, k) of at most `size` bytes; None if not even one atom fits.

    Candidates use all of `size` except `tolerance`; if there are none, they are the largest ones. Of these, k / atoms
    is nearest to `density` on a logarithmic scale. There are never more atoms than outputs.
    """
    found: list[tuple[bool, float, int, int]] = []
    for k in range(1, shape[0] + 1):
        if block_bytes(shape, block, k, k, values) > size:
            break
        low, high = k, shape[0]
        while low < high:  # the largest number of atoms that fits
            middle = (low + high + 1) // 2
            low, high = (middle, high) if block_bytes(shape, block, middle, k, values) <= size else (low, middle - 1)
        used = block_bytes(shape, block, low, k, values) / size
        near = abs(math.log(k / low / density))
        found.append((used < 1 - tolerance, near if used >= 1 - tolerance else -used, low, k))
    if not found:
        return None
    return min(found)[2:]


def factorize(
    matrix: torch.Tensor,
    metric: Metric,
    block: int,
    atoms: int,
    k: int,
    sweeps: int,
    rounds: int,
    generator: torch.Generator,
    watch: Callable[[float], None] = lambda error: None,
) -> SparseFactors:
    """Solve the blocks one after the other by alternating pursuit and closed-form atoms. A change must decrease E.

    Blocks that are not solved yet count as W itself, so each block corrects the errors of earlier ones. (With zeros in
    their place, the first blocks would compensate for the missing later ones: twice the final error.)

    The first atoms of a block are the directions of its SVD, in the metric. If more atoms are needed, they are rows of
    its target with distant directions.

    matrix  (out, in) float32 or float64, in divisible by `block`
    rounds  pursuits per block and sweep
    watch   called with E after each accepted change, once all blocks are solved; for tests
    """
    out, blocks = len(matrix), matrix.shape[1] // block
    rest = torch.zeros_like(matrix)  # W - W'
    found = SparseFactors(
        matrix.new_zeros(blocks, atoms, block),
        matrix.new_zeros(out, blocks, k),
        torch.arange(k, device=matrix.device).expand(out, blocks, k).contiguous(),
    )
    for sweep in range(sweeps):
        for b in range(blocks):
            columns = slice(b * block, (b + 1) * block)
            target, lower = block_target(matrix, rest, metric, columns)
            seen = target @ lower
            if not bool(seen.any()):
                continue
            best = math.inf
            if sweep:
                best = float(((target - matrix[:, columns] + rest[:, columns]) @ lower).square().sum())
            start = found.atoms[b] if sweep else first_atoms(target, lower, atoms, generator)
            for _ in range(rounds):
                values, index = pursue(seen, start @ lower, k)
                start = improve_atoms(target, values, index, start, lower)
                product = spread(values, index, atoms) @ start
                error = float(((target - product) @ lower).square().sum())
                if error < best:
                    best = error
                    found.atoms[b], found.values[:, b], found.index[:, b] = start, values, index
                    rest[:, columns] = matrix[:, columns] - product
                    if sweep or b == blocks - 1:
                        watch(metric.error(rest))
    return found


def block_target(
    matrix: torch.Tensor, rest: torch.Tensor, metric: Metric, columns: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """R_b (out, B) and L_b (B, B); rest = W - W' (out, in)."""
    hessian = metric.hessian.to(matrix.dtype)
    own = hessian[columns, columns]
    lower = torch.linalg.cholesky(metric.hessian[columns, columns]).to(matrix.dtype)
    beside = rest @ hessian[:, columns] - rest[:, columns] @ own
    return matrix[:, columns] + torch.cholesky_solve(beside.t(), lower).t(), lower


def refit_values(matrix: torch.Tensor, metric: Metric, found: SparseFactors) -> SparseFactors:
    """The best values for given atoms and index, block after block. They correct the rounding of the atoms."""
    block = found.atoms.shape[2]
    rest, values = matrix - found.matrix(), found.values.clone()
    for b in range(len(found.atoms)):
        columns = slice(b * block, (b + 1) * block)
        target, lower = block_target(matrix, rest, metric, columns)
        values[:, b] = refit(target @ lower, found.atoms[b] @ lower, found.index[:, b])
        product = spread(values[:, b], found.index[:, b], found.atoms.shape[1]) @ found.atoms[b]
        rest[:, columns] = matrix[:, columns] - product
    return SparseFactors(found.atoms, values, found.index)


def balance(found: SparseFactors) -> SparseFactors:
    """The same matrix with coefficients of equal mean square for every atom, which rounds with a smaller error."""
    atoms, values = found.atoms.clone(), found.values.clone()
    for b in range(len(atoms)):
        sizes = spread(values[:, b], found.index[:, b], atoms.shape[1]).square().mean(0).sqrt()
        sizes = torch.where(sizes > 0, sizes, torch.ones_like(sizes))
        atoms[b] *= sizes[:, None]
        values[:, b] /= sizes[found.index[:, b]]
    return SparseFactors(atoms, values, found.index)
