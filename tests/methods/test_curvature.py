"""The curvature of the loss along masks, and the noise at which loss and bottleneck balance."""

from __future__ import annotations

import model_in_memory
import pytest
import tiny
import torch
from raising import raises

from compressor.errors import PassError
from compressor.methods.pruning.curvature import Curvature, likelihood_slope
from compressor.methods.pruning.mask_training import Course, balanced, train_masks
from compressor.methods.pruning.masked_forward import Places
from compressor.methods.pruning.size_budget import STREAM, Part, Size
from compressor.methods.pruning.variational_masks import Masks, kl_divergence

LABELS = [torch.tensor([0, 1, 1]), torch.tensor([1, 0, 1])]


def sizes_of(placed):
    sizes = {projection.name: int(projection.columns.max()) + 1 for projection in placed.projections}
    return sizes | {projection.switch: 1 for projection in placed.projections if projection.switch}


def streams(whole, batch):
    with whole.loaded(0), torch.no_grad():
        return {batch: whole.embeddings(batch)}


def test_squared_slopes_are_those_of_a_mask_at_each_position():
    model = tiny.build("bert", dtype=torch.float64)
    batches = model_in_memory.token_batches(2, 3, 7)
    placed = model_in_memory.places("bert", model, switches=True)
    sizes = sizes_of(placed)
    found = Curvature(sizes, True, 0)
    whole = model_in_memory.Whole(model, batches, LABELS)
    found.add(whole, placed, streams(whole, 0))
    found.add(whole, placed, streams(whole, 1))
    assert whole.most_loaded == 1
    expected = {name: torch.zeros(count, dtype=torch.float64) for name, count in sizes.items()}
    for batch, labels in zip(batches, LABELS, strict=True):
        z = {name: torch.ones(3, 7, n, dtype=torch.float64, requires_grad=True) for name, n in sizes.items()}
        hooks = []
        for projection in placed.projections:

            def multiply(_module, args, projection=projection, z=z):
                return (args[0] * z[projection.name][..., projection.columns] * z[projection.switch], *args[1:])

            hooks.append(model.get_submodule(projection.module).register_forward_pre_hook(multiply))
        torch.nn.functional.cross_entropy(model(**batch).logits, labels, reduction="sum").backward()
        for hook in hooks:
            hook.remove()
        for name, mask in z.items():
            expected[name] += mask.grad.square().sum((0, 1))
    for name in sizes:  # the sums are float32
        assert found.total[name].double() == pytest.approx(expected[name], rel=1e-4), name
    assert found.predictions == 6


@pytest.mark.parametrize("family", ["llama", "bert_base"])
def test_curvature_is_the_second_derivative_of_the_distance_from_the_dense_model(family):
    model = tiny.build(family, dtype=torch.float64)
    rows, tokens, step = 400, 5, 1e-3
    ids = model_in_memory.token_batches(1, 1, tokens)[0]["input_ids"]
    projection = model_in_memory.places("llama" if family == "llama" else "bert", model).projections[-1]
    curvature = Curvature({projection.name: 64}, False, 0)
    whole = model_in_memory.Whole(model, [{"input_ids": ids.expand(rows, tokens)}])
    curvature.add(whole, Places((projection,)), streams(whole, 0))
    found = curvature.mean().double()
    # differences of the distance: a row for each position and unit, whose signal is scaled there, by both signs
    wanted = torch.zeros(64, dtype=torch.float64)
    with torch.no_grad():
        dense = model(input_ids=ids)[0]
        for sign in (-1, 1):
            scales = (1 + sign * step * torch.eye(tokens * 64, dtype=torch.float64)).view(-1, tokens, 64)
            hook = model.get_submodule(projection.module).register_forward_pre_hook(
                lambda _module, args, scales=scales: (args[0] * scales, *args[1:])
            )
            moved = distance(dense, model(input_ids=ids.expand(len(scales), tokens))[0], family)
            hook.remove()
            wanted += moved.view(tokens, 64).sum(0) / step**2 / tokens
    # squares of normal numbers in 400 rows deviate from their mean by sqrt(2 / 400) = 7 %, less over 5 positions
    assert float(found.sum()) == pytest.approx(float(wanted.sum()), rel=0.05)
    assert torch.allclose(found, wanted, rtol=0.35, atol=1e-3 * float(wanted.max()))


def distance(dense, found, family):
    """(rows,)"""
    if family == "llama":
        p = dense.log_softmax(-1)
        return (p.exp() * (p - found.log_softmax(-1))).sum((-2, -1))
    return (dense - found).square().mean(-1).sum(-1) / dense.var()


def test_drawn_labels_have_the_covariance_of_the_softmax():
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]], dtype=torch.float64)
    p = logits.softmax(-1)[0]
    slope = likelihood_slope(logits.expand(20000, 4), torch.Generator().manual_seed(0))
    # 20,000 draws: each entry deviates by less than 0.5 / sqrt(20000) = 0.0035
    assert torch.allclose(slope.t() @ slope / 20000, p.diag() - p.outer(p), atol=0.015)


def test_loss_and_bottleneck_balance_at_the_start():
    curvature, charges = torch.tensor([1e-3, 1e-2, 1e-3]), torch.tensor([1.0, 1.0, 16.0])
    masks = Masks.fresh({"a": 2, "b": 1}, torch.Generator().manual_seed(0))
    found = balanced(masks, curvature, charges, 1e-6)
    assert found.mean.tolist() == [1, 1, 1] and found.scores()["a"][0] < found.scores()["a"][1]
    noise = found.log_variance.clone().requires_grad_()
    (0.5 * curvature * noise.exp() + 1e-6 * charges * kl_divergence(torch.ones(3), noise)).sum().backward()
    # the bottleneck's slope is that of -log sigma up to a factor of 1 / (1 + sigma²), with sigma² of at most 0.016
    assert bool((noise.grad.abs() <= 0.02 * 0.5 * 1e-6 * charges).all())


def test_units_that_change_nothing_are_the_first_to_go_and_their_noise_is_finite():
    masks = Masks.fresh({"a": 3}, torch.Generator().manual_seed(0))
    found = balanced(masks, torch.tensor([0.0, 1.0, 2.0]), torch.ones(3), 0.0)
    assert bool(torch.isfinite(found.log_variance).all())
    assert found.scores()["a"] == sorted(found.scores()["a"])


def trainable(seed=0):
    model = tiny.build("llama")
    whole = model_in_memory.Whole(model, model_in_memory.token_batches(5, 3, 6), seed=seed)
    placed = model_in_memory.places("llama", model)
    sizes = sizes_of(placed)
    parts = [Part(name, "heads" if n < 10 else "ffn", 0, n, 3072 if n < 10 else 96) for name, n in sizes.items()]
    return whole, placed, Size(tuple(parts), 0), sizes, dict.fromkeys(sizes, 1.0)


@pytest.mark.parametrize("steps", [0, 3])
def test_a_start_that_was_interrupted_goes_on_bit_by_bit(steps):
    course = Course(0.4, steps, 3, save_every=2, start="balanced")
    whole, *rest = trainable()
    full = train_masks(whole, *rest, course)
    assert [step for step, _ in whole.states] == [2, 4] + [2] * (steps > 0)
    assert len(full.losses) == steps
    for state in whole.states:
        again, *rest = trainable()
        again.state = state
        resumed = train_masks(again, *rest, course)
        assert resumed.masks.log_variance.equal(full.masks.log_variance) and resumed.masks.mean.equal(full.masks.mean)
    other, *rest = trainable(seed=1)
    assert not train_masks(other, *rest, course).masks.log_variance.equal(full.masks.log_variance)


def test_channels_of_the_stream_have_a_curvature_too():
    model = tiny.build("llama", dtype=torch.float64)
    found = Curvature({STREAM: 32}, False, 0)
    whole = model_in_memory.Whole(model, model_in_memory.token_batches(1, 2, 5))
    found.add(whole, Places((), model_in_memory.stream_norms(model)), streams(whole, 0))
    assert found.predictions == 10 and float(found.total[STREAM].min()) > 0


def test_slopes_that_are_not_finite_end_the_run():
    model = tiny.build("llama")
    with torch.no_grad():
        model.lm_head.weight[5, 3] = float("nan")
    whole = model_in_memory.Whole(model, model_in_memory.token_batches(1, 2, 5))
    placed = model_in_memory.places("llama", model)
    with raises(PassError, where="mask curvature", reason="not-finite"):
        Curvature(sizes_of(placed), False, 0).add(whole, placed, streams(whole, 0))
