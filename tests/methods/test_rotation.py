"""Folding, centring and orthogonal matrices keep what they promise, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from raising import raises

from compressor.errors import PassError
from compressor.methods.rotation.rotation import (
    Covariance,
    center,
    fold_gain,
    fold_shift,
    orthogonality_error,
    pca,
    random_orthogonal,
    randomized_hadamard,
    rotate,
)
from compressor.model.norms import Norm, apply_norm

SIGNAL = [[2, 1, 0, 1], [1, 2, 1, 0], [3, 2, 1, 1], [0, 1, -1, 0.5], [1, 1, 0.5, 0.2], [-1, -2, 0, -0.3]]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def randn(generator):
    return lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)


def close(a, b, rtol=1e-12):
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


# -- folding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "offset"), [("layer", 0.0), ("rms", 0.0), ("rms", 1.0)])
def test_a_folded_norm_and_its_reader_give_what_they_gave(kind, offset, randn):
    x, weight, shift, consumer, bias = randn(5, 8) + 1, randn(8), randn(8), randn(6, 8), randn(6)
    norm = Norm(kind, offset, 0.1, 8, has_weight=True, has_bias=kind == "layer")
    c = shift if norm.has_bias else None
    expected = apply_norm(x, weight, c, norm) @ consumer.t() + bias
    folded_bias = bias + (fold_shift(consumer, shift, 1) if norm.has_bias else 0)
    folded = fold_gain(consumer, offset + weight, 1)
    plain = Norm("rms", 0.0, 0.1, 8, has_weight=False, has_bias=False)
    signal = center(x, -1) if kind == "layer" else x
    close(apply_norm(signal, None, None, plain) @ folded.t() + folded_bias, expected)


def test_the_shift_is_multiplied_by_the_weight_as_it_was(randn):
    """The trap: after the gain is folded in, W c would count it twice."""
    consumer, gain, shift = randn(6, 8), randn(8), randn(8)
    assert not torch.allclose(fold_shift(fold_gain(consumer, gain, 1), shift, 1), fold_shift(consumer, shift, 1))
    close(fold_shift(consumer, shift, 1), consumer @ shift)


def test_folding_works_along_any_axis(randn):
    consumer, gain, shift = randn(6, 8), randn(8), randn(8)
    close(fold_gain(consumer.t(), gain, 0), fold_gain(consumer, gain, 1).t())
    close(fold_shift(consumer.t(), shift, 0), fold_shift(consumer, shift, 1))
    experts = randn(3, 6, 8)
    for expert, folded, moved in zip(experts, fold_gain(experts, gain, 2), fold_shift(experts, shift, 2)):
        close(folded, expert * gain)
        close(moved, expert @ shift)


def test_centred_writers_and_tables_write_what_the_centred_stream_holds(randn):
    table, weight, bias, branch = randn(9, 8), randn(8, 5), randn(8), randn(9, 5)
    stream = table + branch @ weight.t() + bias
    centred = center(table, 1) + branch @ center(weight, 0).t() + center(bias, 0)
    close(centred, center(stream, -1))
    assert centred.mean(-1).abs().max() < 1e-15
    close(center(randn(8, 3, 2, 2), 0).mean(0), torch.zeros(3, 2, 2, dtype=torch.float64))


def test_centring_before_an_rms_norm_changes_what_it_gives(randn):
    x = randn(5, 8) + 1
    norm = Norm("rms", 0.0, 1e-6, 8, has_weight=False, has_bias=False)
    assert not torch.allclose(apply_norm(center(x, -1), None, None, norm), apply_norm(x, None, None, norm), rtol=0.1)


# -- rotation --------------------------------------------------------------------------------------------------------


def test_an_rms_norm_commutes_with_a_rotation_at_any_eps(randn, generator):
    x, q = randn(5, 8), random_orthogonal(8, generator)
    norm = Norm("rms", 0.0, 0.1, 8, has_weight=False, has_bias=False)
    close(apply_norm(x @ q, None, None, norm), apply_norm(x, None, None, norm) @ q)


def test_projections_and_an_embedding_are_rotated_along_their_axis(randn, generator):
    q = random_orthogonal(8, generator)
    consumer, write, bias, table, experts = randn(6, 8), randn(8, 5), randn(8), randn(9, 8), randn(3, 8, 5)
    close(rotate(consumer, q, 1), consumer @ q)
    close(rotate(write, q, 0), q.t() @ write)
    close(rotate(bias, q, 0), q.t() @ bias)
    close(rotate(table, q, 1), table @ q)
    close(rotate(experts, q, 1), torch.stack([q.t() @ expert for expert in experts]))
    assert rotate(write, q[:, :3], 0).shape == (3, 5)


def test_two_rotations_with_a_shortcut_between_them_change_nothing(randn, generator):
    """The residual branch of a block whose sublayers have rotations of their own: x Q_a · Q_aᵀ Q_b."""
    a, b = random_orthogonal(8, generator), random_orthogonal(8, generator)
    x, write, branch = randn(4, 8), randn(8, 5), randn(4, 5)
    shortcut = a.t() @ b
    assert orthogonality_error(shortcut) < 1e-12
    close((x @ a) @ shortcut + branch @ rotate(write, b, 0).t(), (x + branch @ write.t()) @ b)


# -- orthogonal matrices ---------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 48), seed=st.integers(0, 2**31))
def test_random_matrices_are_orthogonal_and_follow_their_seed(n, seed):
    for make in (random_orthogonal, randomized_hadamard):
        q = make(n, torch.Generator().manual_seed(seed))
        assert q.shape == (n, n) and q.dtype == torch.float64
        assert orthogonality_error(q) < 1e-12 and orthogonality_error(q.t()) < 1e-12
        assert torch.equal(q, make(n, torch.Generator().manual_seed(seed)))


def test_random_orthogonal_is_uniform(generator):
    """Entries have mean 0 and variance 1/n, and the trace has variance 1; QR without its signs fails the first."""
    samples = torch.stack([random_orthogonal(3, generator) for _ in range(4000)])
    # standard errors: sqrt(1/3/4000) = 0.009 for the mean, about 0.005 for the variance, 0.022 for the trace's
    assert samples.mean(0).abs().max() < 0.045
    assert (samples.var(0) - 1 / 3).abs().max() < 0.025
    assert abs(float(samples.diagonal(dim1=1, dim2=2).sum(-1).var()) - 1) < 0.1


def test_a_hadamard_matrix_spreads_one_direction_over_all(generator):
    q = randomized_hadamard(64, generator)
    close(q.abs(), torch.full_like(q, 1 / 8))
    assert not torch.equal(q, randomized_hadamard(64, generator)), "signs are drawn anew"
    q = randomized_hadamard(896, generator)  # 2^7 * 7
    assert q.abs().max() < 2**0.5 / 896**0.5 + 1e-12
    odd = randomized_hadamard(7, generator)
    assert odd.abs().max() < (2 / 7) ** 0.5 + 1e-12


def test_no_dimensions_are_an_error(generator):
    with pytest.raises(ValueError, match="dimensions"):
        randomized_hadamard(0, generator)


# -- covariance ------------------------------------------------------------------------------------------------------


def test_the_covariance_is_the_sum_of_outer_products():
    found = Covariance.zeros(4).add(torch.tensor(SIGNAL))
    expected = [[16, 13, 4.5, 5.5], [13, 15, 3.5, 4.3], [4.5, 3.5, 3.25, 0.6], [5.5, 4.3, 0.6, 2.38]]
    close(found.matrix, torch.tensor(expected, dtype=torch.float64), rtol=1e-7)  # 0.2 and 0.3 are float32 here
    assert found.tokens == 6 and found.matrix.dtype == torch.float64


def test_masked_tokens_change_nothing_bit_for_bit(randn):
    x = randn(2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    padded = x.clone()
    padded[1, 3:] = torch.nan
    plain = Covariance.zeros(8).add(torch.cat([x[0], x[1, :3]]))
    masked = Covariance.zeros(8).add(padded, mask)
    assert torch.equal(masked.matrix, plain.matrix) and masked.tokens == plain.tokens == 8


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(0, 40), seed=st.integers(0, 1000))
def test_how_tokens_are_split_and_ordered_does_not_matter(cut, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 8, dtype=torch.float64, generator=generator)
    whole = Covariance.zeros(8).add(x).matrix
    shuffled = x[torch.randperm(40, generator=generator)]
    parts = Covariance.zeros(8).add(shuffled[cut:]).add(shuffled[:cut]).matrix
    assert (parts - whole).abs().max() < 1e-12 * whole.abs().max()


def test_normalised_tokens_count_alike_however_large(randn):
    x = randn(6, 8)
    large = x * torch.tensor([1.0, 1, 1000, 1, 0.01, 1], dtype=torch.float64)[:, None]
    close(Covariance.zeros(8).add(large, normalised=True).matrix, Covariance.zeros(8).add(x, normalised=True).matrix)


def test_a_token_of_zeros_adds_nothing_also_where_tokens_are_normalised():
    """As nn.Embedding looks up for a padding token."""
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([x, torch.zeros(2, 8, dtype=torch.float64)])
    for normalised in (False, True):
        found = Covariance.zeros(8).add(padded, normalised=normalised)
        assert torch.equal(found.matrix, Covariance.zeros(8).add(x, normalised=normalised).matrix) and found.tokens == 7


def test_a_token_that_is_not_finite_is_an_error_unless_masked(randn):
    x = randn(3, 8)
    x[1, 2] = torch.inf
    with raises(PassError, reason="signal-not-finite"):
        Covariance.zeros(8).add(x)
    assert Covariance.zeros(8).add(x, torch.tensor([True, False, True])).tokens == 2


# -- principal components --------------------------------------------------------------------------------------------


def test_the_worked_example_of_four_dimensions():
    x = torch.tensor(SIGNAL, dtype=torch.float64)
    values, q = pca(Covariance.zeros(4).add(x).matrix)
    vectors = [
        [0.693075, -0.497542, -0.298146, -0.428028],
        [0.653280, 0.700755, 0.282903, 0.046189],
        [0.197128, -0.508314, 0.739399, 0.395029],
        [0.232407, -0.054872, -0.533259, 0.811548],
    ]
    # both given to six decimals
    torch.testing.assert_close(q, torch.tensor(vectors, dtype=torch.float64), rtol=0, atol=1e-6)
    expected = torch.tensor([31.377777, 2.894354, 2.341895, 0.015974], dtype=torch.float64)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-6)
    for kept, residue in ((3, 0.0159742), (2, 2.3578695), (1, 5.2522230)):
        projected = x @ q[:, :kept] @ q[:, :kept].t()
        assert float((x - projected).square().sum()) == pytest.approx(residue, abs=1e-7)


def test_what_is_lost_is_the_sum_of_dropped_eigenvalues_and_nothing_does_better(randn, generator):
    x = randn(200, 16) * torch.linspace(3, 0.1, 16, dtype=torch.float64)
    values, q = pca(x.t() @ x)
    assert orthogonality_error(q) < 1e-12 and bool((values.diff() <= 0).all())
    for kept in (4, 12):
        lost = float((x - x @ q[:, :kept] @ q[:, :kept].t()).square().sum())
        assert lost == pytest.approx(float(values[kept:].sum()), rel=1e-10)
        for _ in range(50):
            other = random_orthogonal(16, generator)[:, :kept]
            assert float((x - x @ other @ other.t()).square().sum()) > lost


def test_a_signal_in_few_dimensions_loses_nothing_at_that_many_and_something_at_one_less(randn):
    x = randn(100, 5) @ randn(5, 16)
    _, q = pca(x.t() @ x)
    lost = [float((x - x @ q[:, :k] @ q[:, :k].t()).square().sum() / x.square().sum()) for k in (5, 4)]
    assert lost[0] < 1e-24 < 1e-4 < lost[1]


def test_a_centred_signal_has_one_empty_direction(randn):
    x = center(randn(100, 16), -1)
    values, _ = pca(x.t() @ x)
    assert abs(float(values[-1])) < 1e-14 * float(values[0])


def test_signs_are_settled_by_the_largest_entry(randn, generator):
    x = randn(50, 12)
    _, q = pca(x.t() @ x)
    assert bool((q.gather(0, q.abs().argmax(0)[None]) > 0).all())
    # the same covariance computed in another order of tokens
    shuffled = x[torch.randperm(50, generator=generator)]
    torch.testing.assert_close(pca(shuffled.t() @ shuffled)[1], q, rtol=0, atol=1e-9)


def test_equal_eigenvalues_still_give_an_orthogonal_matrix():
    values, q = pca(torch.eye(6, dtype=torch.float64) * 2)
    assert torch.equal(values, torch.full((6,), 2.0, dtype=torch.float64)) and orthogonality_error(q) < 1e-12
    values, q = pca(torch.zeros(3, 3))
    assert float(values.abs().max()) == 0 and orthogonality_error(q) < 1e-12


def test_a_covariance_with_nan_is_an_error():
    with raises(PassError, where=None, reason="covariance-not-finite"):
        pca(torch.full((3, 3), torch.nan))
