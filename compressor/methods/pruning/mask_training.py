"""Finds masks of a frozen model for a target size, with task loss, information bottleneck and Lagrangian.

The noise can start where loss and bottleneck balance while it is small. There the loss of a mask's noise is 1/2 c
sigma², with the curvature c (`curvature`), and the bottleneck's term is -kl_factor charge log sigma. The minimum of
their sum is sigma² = kl_factor charge / c. So log alpha orders the units by charge / c before any training step.

Every random number follows from (seed, step, batch, mask), and the state between two steps is a few vectors. So a
training that resumes from a saved state gives the same bits as an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compressor.errors import PassError
from compressor.lazy import torch
from compressor.methods.pruning.curvature import Curvature
from compressor.methods.pruning.masked_forward import (
    KEPT_BLOCK_BYTES,
    Dense,
    Draw,
    Places,
    check_batches,
    distilled,
    gradients,
    labelled,
    predictions,
)
from compressor.methods.pruning.size_budget import STREAM, Size
from compressor.methods.pruning.variational_masks import (
    TINY,
    Masks,
    kl_divergence,
    lagrangian,
    log_alpha,
    noise,
    soft_keep,
    warmed,
)

if TYPE_CHECKING:
    from compressor.protocol import RunnableModel

RETRIES = 3  # how often a loss of NaN resets the masks to the last finite ones, at half the rate
LEAST_CURVATURE = 1e-8  # of the mean: units below it, such as dead neurons, are equally noisy
BETAS, EPS = (0.9, 0.999), 1e-8  # Adam's, as in the authors' code


@dataclass(frozen=True)
class Course:
    """target       share of the size to remove
    steps           of training; 0 leaves the masks at their start
    samples         smallest number per step
    warmup          share of the steps over which the target rises from 0
    kl_factor       weight of the bottleneck's term; each mask has its own factor too
    save_every      steps between two saved states
    start           balanced: noise by the curvature of the loss. equal: nearly no noise in any mask
    """

    target: float
    steps: int
    samples: int
    mask_rate: float = 0.05
    multiplier_rate: float = 0.1
    warmup: float = 0.1
    kl_factor: float = 1e-6
    save_every: int = 50
    loss: str = "distill"
    start: str = "equal"


@dataclass(frozen=True)
class Trained:
    """removed  share of the size that the soft masks remove at the end
    losses   task loss of each step since the last start, per prediction; empty without steps
    """

    masks: Masks
    removed: float
    losses: tuple[float, ...]


def train_masks(
    model: RunnableModel,
    places: Places,
    size: Size,
    sizes: Mapping[str, int],
    charges: Mapping[str, float],
    course: Course,
) -> Trained:
    """Find masks of a frozen model that remove a share of its size.

    sizes    units of each mask, by name: those of the output projections, their switches, and STREAM
    charges  factor of the bottleneck's term of each mask
    raises   PassError if the loss stays NaN or infinite, or slopes are
    """
    seed = model.generator.initial_seed()
    model.keep_blocks(KEPT_BLOCK_BYTES)
    every = torch.cat([torch.full((sizes[name],), charges[name]) for name in sizes])
    masks = Masks.fresh(dict(sizes), torch.Generator().manual_seed(seed))
    saved = model.saved()
    is_begun = saved is not None and "retries" in saved[1]
    if course.start == "balanced" and not is_begun:
        curvature = _curvature(model, places, sizes, course, saved)
        masks = balanced(masks, curvature, every, course.kl_factor)
    losses = _train(model, places, size, every, course, masks, saved if is_begun else None) if course.steps else []
    with torch.no_grad():
        removed = float(_removed(masks, size, places))
    return Trained(masks, removed, tuple(losses))


def balanced(masks: Masks, curvature: torch.Tensor, charges: torch.Tensor, kl_factor: float) -> Masks:
    """Masks of mean 1 with sigma² = kl_factor charge / curvature.

    Curvatures are at least LEAST_CURVATURE of their mean, and kl_factor at least TINY, so that the noise is finite.
    """
    least = max(LEAST_CURVATURE * float(curvature.mean()), TINY)
    noise = (max(kl_factor, TINY) * charges / curvature.clamp(min=least)).log()
    return Masks(torch.ones_like(masks.mean), noise, masks.names, masks.sizes)


def _curvature(
    model: RunnableModel,
    places: Places,
    sizes: Mapping[str, int],
    course: Course,
    saved: tuple[int, Mapping[str, torch.Tensor]] | None,
) -> torch.Tensor:
    """(all units,) from every calibration batch once, as many at a time as in a training step."""
    found, done = Curvature(sizes, course.loss == "task", model.generator.initial_seed()), 0
    if saved is not None:
        done = saved[0]
        found.load(saved[1])
    check_batches(model)
    with model.loaded(0), torch.no_grad():
        streams = [model.embeddings(batch) for batch in range(model.batches)]
    groups = list(_groups([len(stream) for stream in streams], course.samples))
    for number in range(done, len(groups)):
        model.progress(f"curvature {number + 1} of {len(groups)}", number / len(groups))
        found.add(model, places, {batch: streams[batch] for batch in groups[number]})
        if (number + 1) % course.save_every == 0 and number + 1 < len(groups):
            model.save(number + 1, found.tensors())
    return found.mean()


def _train(
    model: RunnableModel,
    places: Places,
    size: Size,
    every: torch.Tensor,
    course: Course,
    masks: Masks,
    saved: tuple[int, Mapping[str, torch.Tensor]] | None,
) -> list[float]:
    """Train the masks in place, from a saved state on if there is one, and return the loss of each step."""
    state, begun = _State.fresh(masks, course), 0
    if saved is not None:
        begun = saved[0]
        state.load(saved[1])
    seed, dense = model.generator.initial_seed(), Dense.of(model)
    counts = [
        predictions(model, dense, batch) if course.loss == "distill" else len(dense.before[batch])
        for batch in range(model.batches)
    ]
    objective = distilled(model, dense) if course.loss == "distill" else labelled(model)
    losses: list[float] = []
    for step, batches in enumerate(_schedule(dense, course, seed)):
        if step < begun:
            continue
        model.progress(f"step {step + 1} of {course.steps}", step / course.steps)
        weight = 1 / sum(counts[batch] for batch in batches)
        draws, leaves = _draw(state.masks, dense, batches, places, model.device, (seed, step))
        loss = gradients(model, draws, places, [dense.before[batch] for batch in batches], objective, weight)
        state.regularize(size, places, every, course, step)
        if math.isfinite(loss):
            _collect(state.masks, leaves)
        if not math.isfinite(loss) or not state.has_finite_gradients():
            state.step_back(step)
        else:
            state.advance(course, step)
            losses.append(loss)
        if (step + 1) % course.save_every == 0 and step + 1 < course.steps:
            model.save(step + 1, state.tensors())
    return losses


@dataclass
class _State:
    """The state between two steps."""

    masks: Masks
    multipliers: torch.Tensor
    optimizer: torch.optim.Adam
    last_finite: tuple[torch.Tensor, torch.Tensor]
    retries: int = 0

    @classmethod
    def fresh(cls, masks: Masks, course: Course) -> _State:
        masks.mean.requires_grad_()
        masks.log_variance.requires_grad_()
        multipliers = torch.zeros(2, requires_grad=True)
        groups = [
            {"params": [masks.mean, masks.log_variance], "lr": course.mask_rate},
            {"params": [multipliers], "lr": course.multiplier_rate, "maximize": True},
        ]
        optimizer = torch.optim.Adam(groups, betas=BETAS, eps=EPS)
        return cls(masks, multipliers, optimizer, (masks.mean.detach().clone(), masks.log_variance.detach().clone()))

    @property
    def _parameters(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.masks.mean, self.masks.log_variance, self.multipliers

    def regularize(self, size: Size, places: Places, charges: torch.Tensor, course: Course, step: int) -> None:
        """Set the gradients of all terms except the task loss."""
        self.optimizer.zero_grad()
        target = warmed(course.target, step, math.ceil(course.warmup * course.steps))
        with torch.enable_grad():
            bottleneck = (charges * kl_divergence(self.masks.mean, self.masks.log_variance)).sum()
            held = lagrangian(_removed(self.masks, size, places), target, self.multipliers)
            (course.kl_factor * bottleneck + held).backward()

    def has_finite_gradients(self) -> bool:
        return all(bool(torch.isfinite(p.grad).all()) for p in self._parameters if p.grad is not None)

    def advance(self, course: Course, step: int) -> None:
        self.last_finite = (self.masks.mean.detach().clone(), self.masks.log_variance.detach().clone())
        left = 1 - step / course.steps  # linearly to 0, as in the authors' code
        self.optimizer.param_groups[0]["lr"] = course.mask_rate * left * 0.5**self.retries
        self.optimizer.step()

    def step_back(self, step: int) -> None:
        """Return to the last finite masks. raises PassError the fourth time"""
        if self.retries == RETRIES:
            raise PassError(
                f"the loss is NaN or infinite at step {step + 1}, after {RETRIES} resets to the last finite masks",
                where="mask training",
                hint="Set a smaller mask_rate or model.dtype: float32, or check the model's outputs on this data.",
                data={"reason": "not-finite", "step": step + 1, "returns": RETRIES},
            )
        self.retries += 1
        with torch.no_grad():
            self.masks.mean.copy_(self.last_finite[0])
            self.masks.log_variance.copy_(self.last_finite[1])

    def tensors(self) -> dict[str, torch.Tensor]:
        found = {"retries": torch.tensor(self.retries)}
        found |= {f"last_finite_{number}": value for number, value in enumerate(self.last_finite)}
        for number, parameter in enumerate(self._parameters):
            found[f"parameter_{number}"] = parameter.detach().clone()
            for key, value in self.optimizer.state[parameter].items():
                found[f"adam_{number}_{key}"] = value.detach().clone()
        return found

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.retries = int(tensors["retries"])
        self.last_finite = (tensors["last_finite_0"], tensors["last_finite_1"])
        for number, parameter in enumerate(self._parameters):
            with torch.no_grad():
                parameter.copy_(tensors[f"parameter_{number}"])
            start = f"adam_{number}_"
            self.optimizer.state[parameter] = {
                key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)
            }


def _removed(masks: Masks, size: Size, places: Places) -> torch.Tensor:
    """Share of the size that the soft masks remove."""
    keep = masks.split(soft_keep(log_alpha(masks.mean, masks.log_variance)))
    counts: dict[str, torch.Tensor | int] = {part.name: part.units for part in size.parts}
    for projection in places.projections:
        if projection.name in keep:
            counts[projection.name] = keep[projection.name].sum()
        if projection.switch is not None:
            counts[projection.name] = counts[projection.name] * keep[projection.switch].squeeze()
    width = keep[STREAM].sum() if STREAM in keep else None
    return 1 - size.of(counts, width) / size.full


def _draw(
    masks: Masks, dense: Dense, batches: list[int], places: Places, device: torch.device, seeds: tuple[int, int]
) -> tuple[list[Draw], list[list[tuple[torch.Tensor, torch.Tensor]]]]:
    """Draws with new noise for each sample, and (z, noise) of each draw and mask in the order of the masks."""
    means = masks.split(masks.mean.detach())
    deviations = masks.split((0.5 * masks.log_variance.detach()).exp())
    draws, leaves = [], []
    for position, batch in enumerate(batches):
        rows, found = len(dense.before[batch]), []
        for number, name in enumerate(masks.names):
            drawn = noise(rows, len(means[name]), *seeds, position, number)
            found.append(((means[name] + deviations[name] * drawn).to(device).requires_grad_(), drawn))
        leaves.append(found)
        draws.append(Draw(batch, {name: z for name, (z, _) in zip(masks.names, found, strict=True)}))
    return draws, leaves


def _collect(masks: Masks, leaves: list[list[tuple[torch.Tensor, torch.Tensor]]]) -> None:
    """Add the gradients of z = mu + exp(l / 2) eps to those of mu and l."""
    assert masks.mean.grad is not None and masks.log_variance.grad is not None
    half = 0.5 * (0.5 * masks.log_variance.detach()).exp()
    for found in leaves:
        slopes = [torch.zeros_like(drawn) if z.grad is None else z.grad.cpu() for z, drawn in found]
        masks.mean.grad += torch.cat([slope.sum(0) for slope in slopes])
        along = torch.cat([(slope * drawn).sum(0) for slope, (_, drawn) in zip(slopes, found, strict=True)])
        masks.log_variance.grad += half * along


def _schedule(dense: Dense, course: Course, seed: int) -> Iterator[list[int]]:
    """The batches of each step: all of them, in another order each round, and at least `samples` samples per step."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    for _ in range(course.steps):
        chosen: list[int] = []
        while sum(len(dense.before[batch]) for batch in chosen) < course.samples:
            if not waiting:
                if chosen and len(chosen) >= len(dense.before):
                    break
                waiting = torch.randperm(len(dense.before), generator=generator).tolist()
            chosen.append(waiting.pop())
        yield chosen


def _groups(rows: Sequence[int], samples: int) -> Iterator[list[int]]:
    """All batches in order, with at least `samples` samples in each group but the last.

    rows  samples of each batch
    """
    group: list[int] = []
    count = 0
    for batch, own in enumerate(rows):
        group.append(batch)
        count += own
        if count >= samples or batch == len(rows) - 1:
            yield group
            group, count = [], 0
