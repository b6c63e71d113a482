"""Finds the reads and writes of a model's residual stream on a probe model, and proves them by rotating the stream.

For each block: the norms on the stream, the matrices that read each norm, and every parameter that adds to the stream.
The same for the embeddings and the output head. No model family is named anywhere; `perturbation` has the two tests
that decide. A proof shows that nothing was missed: with the norms folded and all reads and writes rotated by one random
orthogonal matrix, the probe model's logits must stay the same (Ashkboos et al. 2024, arXiv 2401.15024, theorem 1 and
section 3.1). If they change, the model is refused.

The probe model is a narrow one (`lifting`). Time: some tens of forward passes of each kind of block in float64; memory:
the probe model in float64, two blocks or a few.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from compressor.analysis.float64_probe import float64_probe_model
from compressor.analysis.lifting import Unliftable, factor, found_on_narrow
from compressor.analysis.perturbation import (
    TOLERANCE,
    Answer,
    InDouble,
    Plane,
    answering,
    axes,
    factor_along,
    perturbed,
    points_along,
    reads,
    rounded,
    size,
    unit,
)
from compressor.analysis.rotation_proof import HINT, prove_invariance
from compressor.errors import ModelError
from compressor.layers.structural.rotated_block import RotatedBlock
from compressor.model.block_runner import Pieces
from compressor.model.narrow_probe import Probe, Probes
from compressor.model.norms import Norm, describe_norm
from compressor.model.probe_model import PROBE_SEED, example_batch, signature
from compressor.model.reshaped_class import reshaping
from compressor.model.residual_records import (
    InputProjection,
    Residual,
    ResidualNorm,
    ResidualSublayer,
    ResidualWrite,
    renamed,
)
from compressor.model.structure import Structure

Kinds = dict[
    tuple[Any, ...], tuple[int, tuple[ResidualSublayer, ...]]
]  # signature -> first such block, and its sublayers


def read_residual(structure: Structure) -> Residual:
    """Find all reads and writes of the residual stream, and prove on a probe model that none is missing.

    raises  ModelError naming the module, if the stream of this model can't be rotated
    """
    return _read_residual(structure.probes)


def residual_of(model: PreTrainedModel, pieces: Pieces) -> Residual:
    """The same for a model, which may be on the meta device, and its pieces. Its weights are not read."""
    return _read_residual(Probes(model, pieces, model.dtype))


def _read_residual(probes: Probes) -> Residual:
    model, pieces = probes.model, probes.pieces
    for name, entry in reshaping(model.config)[1].items():
        if entry["form"] == RotatedBlock.format_name:
            raise ModelError(
                "this block of a sliced model has its own rotation matrices already",
                where=name,
                hint="Use slicegpt once, and put fuse_norms and rotate before it.",
                data={"reason": "sliced-already"},
            )
    whole, path = probes.whole, pieces.blocks_path

    def find(probe: Probe) -> Residual:
        made = float64_probe_model(model, pieces, probe)
        found = find_residual(made, path)
        prove_invariance(made, path, found)
        return found

    residual = found_on_narrow("residual", probes, find, _lifted)
    kinds = {kind: (whole.first_of(kind), residual.blocks[whole.first_of(kind)]) for kind in whole.kinds}
    return replace(residual, blocks=_every_block(kinds, model.config, pieces.blocks, path))


def _lifted(residual: Residual, narrow: Probe, wider: Probe) -> Residual:
    """What was found on a narrow probe model for one of other widths. raises Unliftable"""
    edges = [(consumer.parameter, consumer.axis) for norm in residual.norms() for consumer in norm.consumers]
    edges += [(write.parameter, write.axis) for write in residual.writes()]
    divisors = {factor(narrow, wider, parameter, axis) for parameter, axis in edges}
    if len(divisors) > 1:
        raise Unliftable("the axes of the stream were divided by several numbers")
    (by,) = divisors
    width = residual.width * by

    def of_norm(norm: ResidualNorm) -> ResidualNorm:
        formula = norm.formula
        divisor = None if formula.divisor is None else formula.divisor * by
        return replace(norm, formula=replace(formula, width=formula.width * by, divisor=divisor))

    def of_write(write: ResidualWrite) -> ResidualWrite:
        is_root = write.scale is not None and abs(write.scale - residual.width**0.5) < TOLERANCE * write.scale
        return replace(write, scale=rounded(width**0.5)) if is_root else write

    def of_sublayer(sublayer: ResidualSublayer) -> ResidualSublayer:
        return ResidualSublayer(tuple(map(of_norm, sublayer.norms)), tuple(map(of_write, sublayer.writes)))

    return replace(
        residual,
        width=width,
        embeddings=tuple(map(of_write, residual.embeddings)),
        blocks=tuple(tuple(map(of_sublayer, block)) for block in residual.blocks),
        end=of_norm(residual.end),
    )


def find_residual(probe: PreTrainedModel, path: str) -> Residual:
    """The reads and writes of the stream of a float64 model with random weights. `path` is that of its block list.

    raises  ModelError naming the module that prevents it
    """
    pieces = Pieces(probe, path)
    batch = example_batch(probe, torch.device("cpu"))
    outside = {name: p for name, p in probe.named_parameters() if not name.startswith(path + ".")}
    modules = {name: module for name, module in probe.named_modules() if not name.startswith(path + ".")}
    kinds: Kinds = {}
    with InDouble():
        hidden, calls = pieces.embeddings(batch)
        for index, call in enumerate(calls):
            block, prefix = pieces.blocks[index], f"{path}.{index}."
            kind = signature(probe.config, block, index)
            if kind in kinds:
                continue
            runner = _Runner(
                partial(pieces.block, index, call=call),
                {prefix + name: module for name, module in block.named_modules() if name},
                {prefix + name: parameter for name, parameter in block.named_parameters()},
                hidden,
            )
            kinds[kind] = index, _find_sublayers(runner, f"{path}.{index}")
        embeddings = _find_embeddings(lambda: pieces.embeddings(batch)[0], modules, outside, hidden.shape[-1])
        end = _find_end(_Runner(partial(pieces.output_head, batch), modules, outside, hidden), probe)
    residual = Residual(
        hidden.shape[-1], end.formula.kind, embeddings, _every_block(kinds, probe.config, pieces.blocks, path), end
    )
    for norm in residual.norms():
        if norm.formula.kind != residual.kind:
            raise ModelError(
                "both LayerNorm and RMSNorm read the residual stream",
                where=norm.module,
                hint=HINT,
                data={"reason": "two-kinds-of-norm"},
            )
    return residual


def _every_block(
    kinds: Kinds, config: PretrainedConfig, blocks: Sequence[nn.Module], path: str
) -> tuple[tuple[ResidualSublayer, ...], ...]:
    """The sublayers of each block, copied from the first block of its kind."""
    found = []
    for index, block in enumerate(blocks):
        first, sublayers = kinds[signature(config, block, index)]
        found.append(tuple(renamed(sublayer, f"{path}.{first}.", f"{path}.{index}.") for sublayer in sublayers))
    return tuple(found)


class _Runner:
    """A block, or the output head, as a function of the stream at its input, with its norms of the stream's width.

    `states` runs it with some of those norms restricted to their planes.
    """

    def __init__(
        self,
        run: Callable[[Tensor], Tensor],
        modules: Mapping[str, nn.Module],
        parameters: Mapping[str, nn.Parameter],
        example: Tensor,
    ) -> None:
        self.run = run
        self.parameters = parameters
        self.width = example.shape[-1]
        self.generator = torch.Generator().manual_seed(PROBE_SEED)
        self.x = torch.randn(example.shape, dtype=torch.float64, generator=self.generator)
        self.direction = unit(self.width, self.generator)
        self.norms = _norms(modules, self.width)
        self.modules = {name: modules[name] for name in self.norms}
        self.planes = {name: Plane(self.width, self.generator) for name in self.norms}

    def states(self, held: Mapping[str, Answer], x: Tensor | None = None) -> dict[str, Tensor]:
        """The input of each norm in forward order, then the output under ""; each of shape (tokens, features).

        raises  ModelError if a norm runs twice
        """
        with answering(self.modules, held) as calls:
            output = self.run(self.x if x is None else x)
        states: dict[str, Tensor] = {}
        for name, seen in calls:
            if name in states:
                raise ModelError(
                    "this norm runs more than once in a forward pass of its block",
                    where=name,
                    hint=HINT,
                    data={"reason": "norm-twice"},
                )
            states[name] = _rows(seen)
        return {**states, "": _rows(output)}

    def pushed(self) -> Tensor:
        """The input, perturbed along the direction by another amount at each token."""
        rest = torch.randn(*self.x.shape[:-1], 1, dtype=torch.float64, generator=self.generator)
        return self.x + rest * self.direction

    def rest(self, parameter: Tensor, axis: int) -> Tensor:
        shape = [n for i, n in enumerate(parameter.shape) if i != axis]
        return torch.randn(shape, dtype=torch.float64, generator=self.generator)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])  # some families flatten the tokens of all samples inside a block


def _norms(modules: Mapping[str, nn.Module], width: int) -> dict[str, Norm]:
    described = {name: describe_norm(module) for name, module in modules.items()}
    return {name: norm for name, norm in described.items() if norm is not None and norm.width == width}


def _find_embeddings(
    run: Callable[[], Tensor], modules: Mapping[str, nn.Module], parameters: Mapping[str, nn.Parameter], width: int
) -> tuple[ResidualWrite, ...]:
    norms = _norms(modules, width)
    with answering({name: modules[name] for name in norms}, {}) as calls:
        before = run()
    if calls:
        raise ModelError(
            "this norm is applied to the embeddings before the first block",
            where=calls[0][0],
            hint=HINT,
            data={"reason": "norm-before-blocks"},
        )
    direction = unit(width, torch.Generator().manual_seed(PROBE_SEED))
    writes = []
    for name, parameter in parameters.items():
        for axis in axes(parameter, width):
            with perturbed(parameter, axis, direction, torch.ones_like(parameter.select(axis, 0))):
                change = run() - before
            if size(change) > TOLERANCE and points_along(change, direction):
                writes.append(ResidualWrite(name, axis, factor_along(change, direction)))
    return tuple(writes)


def _find_sublayers(runner: _Runner, where: str) -> tuple[ResidualSublayer, ...]:
    """The sublayers of one block in forward order."""
    on_stream = _norms_on_stream(runner, where)
    held = {name: runner.planes[name] for name in on_stream}
    pushed = runner.pushed()
    before, moved = runner.states(held), runner.states(held, pushed)
    for name in (*on_stream, ""):
        if not _same(moved[name] - before[name], _rows(pushed - runner.x)):
            raise ModelError(
                "a layer reads the residual stream without a norm, or scales it",
                where=name or where,
                hint=HINT,
                data={"reason": "past-norms-or-scaled"},
            )
    groups: list[list[str]] = []  # norms that read the same stream
    for name in on_stream:
        if groups and torch.equal(before[groups[-1][0]], before[name]):
            groups[-1].append(name)
        else:
            groups.append([name])
    writes = _find_writes(runner, held, [group[0] for group in groups])
    sublayers = []
    for group, written in zip(groups, writes):
        norms = tuple(_find_norm(runner, name, held) for name in group)
        if not written:
            raise ModelError(
                "what the branches after this norm write is scaled before it is added to the residual stream",
                where=group[0],
                hint=HINT,
                data={"reason": "scaled-branches"},
            )
        sublayers.append(ResidualSublayer(norms, written))
    return tuple(sublayers)


def _norms_on_stream(runner: _Runner, where: str) -> list[str]:
    """Norms of the block whose input is the stream itself, in forward order."""
    before, moved = runner.states(runner.planes), runner.states(runner.planes, runner.pushed())
    for name in before:
        if not name:
            continue
        answers: dict[str, Answer] = {**runner.planes, name: runner.planes[name].moved(runner.direction)}
        change = runner.states(answers)[""] - before[""]
        if size(change) > TOLERANCE * size(before[""]) and points_along(change, runner.direction):
            passes = size(moved[""] - before[""]) <= TOLERANCE * size(before[""])
            raise ModelError(
                "the residual stream passes through this norm (post-norm)"
                if passes
                else "this norm is applied to a branch's output, so its gain acts on the residual stream itself",
                where=name,
                hint=HINT,
                data={"reason": "post-norm" if passes else "norm-on-branch"},
            )
    names = [
        name
        for name in before
        if name
        and size(moved[name] - before[name]) > TOLERANCE * size(before[name])
        and points_along(moved[name] - before[name], runner.direction)
    ]
    if not names:
        raise ModelError(
            "no LayerNorm or RMSNorm reads the residual stream in this block",
            where=where,
            hint=HINT,
            data={"reason": "no-norm"},
        )
    return names


def _find_writes(runner: _Runner, held: Mapping[str, Plane], firsts: list[str]) -> list[tuple[ResidualWrite, ...]]:
    """The writes between the norm of one sublayer and that of the next. `firsts` names a norm of each sublayer."""
    before = runner.states(held)
    found: list[list[ResidualWrite]] = [[] for _ in firsts]
    for name, parameter in runner.parameters.items():
        for axis in axes(parameter, runner.width):
            with perturbed(parameter, axis, runner.direction, torch.ones_like(parameter.select(axis, 0))):
                after = runner.states(held)
            changes = [after[state] - before[state] for state in (*firsts, "")]
            moved = [index for index, change in enumerate(changes) if size(change) > TOLERANCE]
            if not moved or not points_along(changes[moved[0]], runner.direction):
                continue
            if moved[0] == 0:
                raise ModelError(
                    "its output is added to the residual stream before the first norm",
                    where=name,
                    hint=HINT,
                    data={"reason": "added-before-norm"},
                )
            if not all(_same(change, changes[moved[0]]) for change in changes[moved[0] :]):
                raise ModelError(
                    "what it adds to the residual stream is changed later in the block",
                    where=name,
                    hint=HINT,
                    data={"reason": "does-not-stay"},
                )
            found[moved[0] - 1].append(ResidualWrite(name, axis, factor_along(changes[moved[0]], runner.direction)))
    return [tuple(writes) for writes in found]


def _same(change: Tensor, wanted: Tensor) -> bool:
    """Whether two changes are equal up to rounding."""
    return size(change - wanted) <= TOLERANCE * size(wanted)


def _find_norm(runner: _Runner, name: str, held: Mapping[str, Plane]) -> ResidualNorm:
    """A norm with its consumers. raises ModelError if it has none"""
    plane = held[name]

    def run() -> Tensor:
        return runner.states(held)[""]

    before = run()
    consumers = []
    for parameter_name, parameter in runner.parameters.items():
        for axis in axes(parameter, runner.width):
            rest = runner.rest(parameter, axis)
            if reads(run, before, parameter, axis, plane, rest):
                bias = _bias(runner, run, parameter_name, axis, plane, rest)
                consumers.append(InputProjection(parameter_name, axis, bias))
    if not consumers:
        raise ModelError(
            "no matrix reads the output of this norm", where=name, hint=HINT, data={"reason": "norm-unread"}
        )
    return ResidualNorm(name, runner.norms[name], tuple(consumers))


def _bias(runner: _Runner, run: Callable[[], Tensor], name: str, axis: int, plane: Plane, rest: Tensor) -> str | None:
    """The bias of parameter `name`: perturbing it has the effect of perturbing W along plane.base."""
    owner = name.rpartition(".")[0]
    parameter = runner.parameters[name]
    for other, candidate in runner.parameters.items():
        if other == name or other.rpartition(".")[0] != owner or candidate.shape != rest.shape:
            continue
        with perturbed(parameter, axis, plane.base / runner.width**0.5, rest):
            through_weight = run()
        before = candidate.clone()
        candidate.add_(rest)
        through_bias = run()
        candidate.copy_(before)
        if _same(through_weight, through_bias):
            return other
    return None


def _find_end(runner: _Runner, probe: PreTrainedModel) -> ResidualNorm:
    where = type(probe).__name__
    seen = [name for name in runner.states({}) if name]
    if len(seen) != 1:
        found = f"{len(seen)} norms" if seen else "no LayerNorm or RMSNorm"
        raise ModelError(
            f"{found} of the residual stream's width after the last block; exactly one norm is needed",
            where=where,
            hint=HINT,
            data={"reason": "norms-at-end", "count": len(seen)},
        )
    held = {seen[0]: runner.planes[seen[0]]}
    before, moved = runner.states(held), runner.states(held, runner.pushed())
    if size(moved[""] - before[""]) > TOLERANCE * size(before[""]):
        raise ModelError(
            "the output head reads the residual stream without its norm",
            where=where,
            hint=HINT,
            data={"reason": "head-past-norm"},
        )
    if not points_along(moved[seen[0]] - before[seen[0]], runner.direction):
        raise ModelError(
            "the input of this norm is not the residual stream itself",
            where=seen[0],
            hint=HINT,
            data={"reason": "norm-beside-stream"},
        )
    return _find_norm(runner, seen[0], held)
