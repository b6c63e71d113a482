"""Masks on a running model: their gradients block by block, their training, and what it leaves behind."""

from __future__ import annotations

import math

import model_in_memory
import pytest
import tiny
import torch
from raising import raises

from compressor.errors import PassError
from compressor.methods.pruning.mask_training import Course, train_masks
from compressor.methods.pruning.masked_forward import (
    Dense,
    Draw,
    Places,
    distilled,
    gradients,
    labelled,
    masked_norm,
)
from compressor.methods.pruning.size_budget import STREAM, Part, Size
from compressor.model.norms import Norm, apply_norm


def whole_gradients(model, placed, batch, masks, loss_of):
    """One plain backward pass through the whole model, masks multiplied in by hooks written here."""
    hooks = []
    for projection in placed.projections:
        z = masks[projection.name][:, projection.columns]
        if projection.switch:
            z = z * masks[projection.switch]

        def multiply(_module, args, z=z):
            rows = z.repeat_interleave(args[0].numel() // z.numel(), 0).view_as(args[0])
            return (args[0] * rows, *args[1:])

        hooks.append(model.get_submodule(projection.module).register_forward_pre_hook(multiply))
    value = loss_of(model(**batch).logits)
    value.backward()
    for hook in hooks:
        hook.remove()
    return float(value.detach()), {name: z.grad for name, z in masks.items()}


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "bert"])
def test_gradients_block_by_block_are_those_of_one_backward_pass(family):
    model = tiny.build(family, dtype=torch.float64)
    batches = model_in_memory.token_batches(2, 3, 7)
    whole = model_in_memory.Whole(model, batches, [torch.tensor([0, 1, 1])] * 2)
    placed = model_in_memory.places(family, model, switches=True)
    dense = Dense.of(whole)
    task = family == "bert"
    draws = [
        Draw(n, {k: z.detach().double().requires_grad_() for k, z in model_in_memory.masks(placed, 3, n).items()})
        for n in (0, 1)
    ]
    found = gradients(whole, draws, placed, dense.before, labelled(whole) if task else distilled(whole, dense), 0.5)
    assert whole.most_loaded == 1 and all(p.grad is None for p in model.parameters())
    total = 0.0
    for draw, batch in zip(draws, batches):
        with torch.no_grad():
            wanted = model(**batch).logits

        def loss_of(logits, wanted=wanted):
            if task:
                return 0.5 * torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 1]), reduction="sum")
            p = wanted.softmax(-1)
            return 0.5 * (p * (p.log() - logits.log_softmax(-1))).sum()

        again = {name: z.detach().clone().requires_grad_() for name, z in draw.masks.items()}
        value, grads = whole_gradients(model, placed, batch, again, loss_of)
        total += value
        for name, z in draw.masks.items():
            assert z.grad.abs().max() > 0
            # float64, in another order
            assert torch.allclose(z.grad, grads[name], rtol=1e-8, atol=1e-11 * float(grads[name].abs().max())), name
    assert found == pytest.approx(total, rel=1e-9)


def test_masks_of_one_leave_the_model_as_it_is():
    model = tiny.build("llama", dtype=torch.float64)
    whole = model_in_memory.Whole(model, model_in_memory.token_batches(1, 2, 5))
    placed = model_in_memory.places("llama", model)
    dense = Dense.of(whole)
    ones = {
        name: torch.ones_like(z, dtype=torch.float64).requires_grad_()
        for name, z in model_in_memory.masks(placed, 2).items()
    }
    assert gradients(whole, [Draw(0, ones)], placed, dense.before, distilled(whole, dense)) == 0.0


def test_a_base_model_is_compared_by_its_hidden_states():
    model = tiny.build("bert_base", dtype=torch.float64)
    whole = model_in_memory.Whole(model, model_in_memory.token_batches(1, 2, 5))
    dense = Dense.of(whole)
    (same, half) = (
        next(
            distilled(whole, dense)(
                0, dense.after[0], lambda part, f=f: whole.output_head(0, dense.after[0][part] * f, part)
            )
        )
        for f in (1, 0.5)
    )
    wanted = model(**whole.inputs[0]).last_hidden_state
    slow = float(((wanted * 0.5 - wanted).square().mean() / wanted.var()) * 10)  # summed over ten tokens
    assert same.tolist() == [0.0, 0.0] and float(half.sum()) == pytest.approx(slow, rel=1e-5)


def test_labels_that_are_missing_or_do_not_fit_are_errors():
    whole = model_in_memory.Whole(tiny.build("bert"), model_in_memory.token_batches(1, 2, 5))
    hidden = Dense.of(whole).after[0]

    def output_head(samples):
        return whole.output_head(0, hidden[samples], samples)

    with raises(PassError, where="loss: task", reason="no-labels"):
        next(labelled(whole)(0, hidden, output_head))
    whole.given_labels = [torch.tensor([0, 5])]
    with raises(PassError, where="loss: task", reason="labels", largest=5, shape=[2]):
        next(labelled(whole)(0, hidden, output_head))
    empty = model_in_memory.Whole(tiny.build("bert"), [])
    with raises(PassError, where="data", reason="no-batch"):
        Dense.of(empty)


# the residual stream


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_a_masked_norm_is_that_of_the_kept_channels(kind):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*s, 8, generator=generator, dtype=torch.float64) for s in ((2, 3), (), ()))
    kept, z = [0, 1, 3, 4, 5, 7], torch.ones(1, 1, 8, dtype=torch.float64)
    z[..., [2, 6]] = 0
    norm = Norm(kind, 0.0, 1e-5, 8, True, kind == "layer")
    found = masked_norm(x, z, weight, bias if kind == "layer" else None, norm)
    assert bool((found[..., [2, 6]] == 0).all())
    if kind == "rms":  # gain times sqrt(8/6), eps times 6/8... seen the other way: the old width as divisor
        wanted = apply_norm(x[..., kept], weight[kept], None, Norm(kind, 0.0, 1e-5, 6, True, False, divisor=8))
        narrow = Norm(kind, 0.0, 1e-5 * 8 / 6, 6, True, False)
        assert torch.allclose(wanted, apply_norm(x[..., kept], weight[kept] * (8 / 6) ** 0.5, None, narrow), atol=1e-15)
    else:
        wanted = apply_norm(x[..., kept], weight[kept], bias[kept], Norm(kind, 0.0, 1e-5, 6, True, True))
    assert torch.allclose(found[..., kept], wanted, rtol=0, atol=1e-14)
    assert torch.allclose(masked_norm(x, torch.ones_like(z), weight, bias, norm), apply_norm(x, weight, bias, norm))


def test_gradients_reach_the_mask_of_the_stream_through_every_norm():
    model = tiny.build("llama", dtype=torch.float64)
    whole = model_in_memory.Whole(model, model_in_memory.token_batches(1, 2, 5))
    dense = Dense.of(whole)
    placed = Places((), model_in_memory.stream_norms(model))
    z = torch.ones(2, 32, dtype=torch.float64)
    z[:, 5] = 0.9
    leaf = z.clone().requires_grad_()
    base = gradients(whole, [Draw(0, {STREAM: leaf})], placed, dense.before, distilled(whole, dense))
    step, values = 1e-4, []
    for sign in (1, -1):
        moved = z.clone()
        moved[0, 5] += sign * step
        draw = Draw(0, {STREAM: moved.requires_grad_()})
        values.append(gradients(whole, [draw], placed, dense.before, distilled(whole, dense)))
    assert base > 0
    assert float(leaf.grad[0, 5]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


# training


def course(**changes):
    values = {"target": 0.4, "steps": 12, "samples": 4, "mask_rate": 0.5, "multiplier_rate": 1.0, "save_every": 4}
    return Course(**{**values, **changes})


def trainable(family="llama", labels=None, seed=0):
    model = tiny.build(family)
    whole = model_in_memory.Whole(model, model_in_memory.token_batches(3, 3, 6), labels, seed)
    placed = model_in_memory.places(family, model)
    sizes = {projection.name: int(projection.columns.max()) + 1 for projection in placed.projections}
    parts = [Part(name, "heads" if n < 10 else "ffn", 0, n, 3072 if n < 10 else 96) for name, n in sizes.items()]
    return whole, placed, Size(tuple(parts), 0), sizes, dict.fromkeys(sizes, 1.0)


def test_the_same_seed_trains_the_same_masks_and_another_seed_others():
    first, second, other = (train_masks(*trainable(seed=seed), course()) for seed in (5, 5, 6))
    assert first.masks.mean.equal(second.masks.mean) and first.masks.log_variance.equal(second.masks.log_variance)
    assert not first.masks.mean.equal(other.masks.mean)
    assert first.losses == second.losses and len(first.losses) == 12


def test_training_that_goes_on_from_a_saved_state_is_bit_by_bit_the_uninterrupted_one():
    whole, *rest = trainable()
    full = train_masks(whole, *rest, course())
    assert [step for step, _ in whole.states] == [4, 8]
    for state in whole.states:
        again, *rest = trainable()
        again.state = (state[0], {name: value.clone() for name, value in state[1].items()})
        resumed = train_masks(again, *rest, course())
        assert resumed.masks.mean.equal(full.masks.mean) and resumed.masks.log_variance.equal(full.masks.log_variance)
        assert resumed.losses == full.losses[state[0] :]


def test_soft_masks_come_near_what_is_asked_for():
    """The bottleneck has to bring masks to where the soft keep has a slope; a random model's loss is far below 1e-6."""
    trained = train_masks(*trainable(), course(steps=40, mask_rate=0.5, kl_factor=1e-3, save_every=1000))
    assert trained.removed == pytest.approx(0.4, abs=0.15)  # the multipliers pull; the cut makes it exact
    assert trained.losses[0] < 1e-4 < trained.losses[-1]  # nearly without noise at first


def test_training_on_labels_sees_the_labels():
    labels = [torch.tensor([0, 1, 1])] * 3
    first = train_masks(*trainable("bert", labels), course(loss="task"))
    second = train_masks(*trainable("bert", [1 - label for label in labels]), course(loss="task"))
    assert not first.masks.mean.equal(second.masks.mean)
    assert first.losses[0] > 0.1  # cross-entropy, not a distance from the dense model


class Broken(model_in_memory.Whole):
    """Gives NaN in these calls of the head with gradients."""

    bad, seen = (), -1

    def output_head(self, batch, hidden, samples=slice(None)):
        found = super().output_head(batch, hidden, samples)
        self.seen += found.requires_grad
        return found * math.nan if found.requires_grad and self.seen in self.bad else found


def test_a_loss_of_nan_goes_back_to_the_last_finite_masks_at_half_the_rate():
    def run(*bad):
        whole, *rest = trainable()
        whole.__class__ = Broken
        whole.bad, whole.seen = bad, -1
        return train_masks(whole, *rest, course(save_every=1000, samples=3))

    assert len(run().losses) == 12
    found = run(3, 7)
    assert len(found.losses) == 10 and bool(torch.isfinite(found.masks.mean).all())
    with raises(PassError, where="mask training", reason="not-finite", step=6, returns=3):
        run(1, 3, 4, 5)
