"""Finds by running a block how its branches are called. `rotated_block` needs this.

A branch is a chain of one or more modules that reads a norm's output and writes to the residual stream. A probe model
with random weights shows which modules these are, and their other arguments. An argument is the norm's output, one of
the block's own arguments (the same object, or the same value under the same name), or a constant. A proof shows that
nothing was missed: every block runs branch by branch with identity matrices on the residual path, and the probe model's
logits must stay the same.

Time: a few forward passes of each kind of block in float64.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compressor.analysis.block_calls import ModuleCall, is_one_tensor, recorded_calls
from compressor.analysis.float64_probe import float64_probe_model
from compressor.analysis.lifting import found_on_narrow
from compressor.analysis.perturbation import TOLERANCE, InDouble, size
from compressor.errors import ModelError
from compressor.layers.structural.placing import reshape
from compressor.layers.structural.rms_norm import RmsNorm
from compressor.layers.structural.rotated_block import ARGUMENT, CONSTANT, INPUT, RotatedBlock
from compressor.model.block_runner import Batch, Call, Pieces, output_of
from compressor.model.narrow_probe import Probe
from compressor.model.probe_model import Kind, example_batch, signature
from compressor.model.recorded_modules import recorded_outputs
from compressor.model.residual_records import InputProjection, Residual, ResidualNorm, ResidualSublayer, ResidualWrite
from compressor.model.structure import Structure

HINT = "Leave slicegpt out for this model; gptq, rtn and llm_int8 don't need this."
PROBE = "compressor_probe"  # an argument that no model has; it shows where a block passes on unknown arguments
CONSTANTS = (type(None), bool, int, float, str)

FormatParams = dict[str, Any]
_Edges = list[
    tuple[InputProjection | ResidualWrite | ResidualNorm, int]
]  # a read or write of the stream, and the stream's width there


@dataclass
class _Record:
    """What one run of a block showed.

    known  the arguments that its forward declares, by name
    rest   the other arguments
    calls  in the order in which they begin; their tensors stay alive, so that addresses identify them
    """

    known: dict[str, Any]
    rest: dict[str, Any]
    calls: list[ModuleCall] = field(default_factory=list)
    output: Any = None


def find_branches(structure: Structure, residual: Residual) -> dict[Kind, FormatParams]:
    """The settings of a rotated_block for each kind of block (`compressor.model.probe_model.signature`).

    residual  what `read_residual` found in this structure
    raises    ModelError naming the block and the reason
    """
    model, pieces = structure.model, structure.pieces

    def find(probe: Probe) -> dict[Kind, FormatParams]:
        made = float64_probe_model(model, pieces, probe)
        found = branches_of(made, pieces.blocks_path, residual)
        blocks = Pieces(made, pieces.blocks_path).blocks
        return {kind: found[signature(made.config, blocks[at], at)] for at, kind in enumerate(probe.kinds)}

    return found_on_narrow("branches", structure.probes, find, lambda all_params, _narrow, _wider: all_params)


def branches_of(probe: PreTrainedModel, path: str, residual: Residual) -> dict[Kind, FormatParams]:
    """The same for a float64 probe model with random weights. `path` is that of its blocks, the model's first ones."""
    pieces = Pieces(probe, path)
    found: dict[Kind, FormatParams] = {}
    with InDouble(), torch.no_grad():
        hidden, calls = _run_embeddings(pieces)
        for index, (block, call) in enumerate(zip(pieces.blocks, calls)):
            kind = signature(probe.config, block, index)
            if kind not in found:
                record = _record(block, hidden, call)
                found[kind] = _format_params(block, record, residual.blocks[index], f"{path}.{index}")
        _prove(probe, path, found)
    return found


def check_widths(
    structure: Structure,
    residual: Residual,
    all_params: Mapping[Kind, FormatParams],
    widths: Sequence[Sequence[int]],
    embeddings: int | None = None,
) -> None:
    """Check by running that every kind of block, the embeddings and the output head work at other widths.

    Some experts can only write as many values as they read, and GPT-2 must end with the width that it begins with.

    widths      of each block: before each of its sublayers, and after the last
    embeddings  width of the embeddings, if a sublayer without branches is between them and the first of these
    raises      ModelError naming the block and its widths, or the model's class
    """
    narrowed = structure.probes.narrowest
    probe = float64_probe_model(structure.model, structure.pieces, narrowed)
    path = structure.pieces.blocks_path
    pieces = Pieces(probe, path)
    done: set[Any] = set()
    with InDouble(), torch.no_grad():
        hidden, calls = pieces.embeddings(example_batch(probe, torch.device("cpu")))  # without a cache that would grow
        width = hidden.shape[-1]
        for number, kind in enumerate(structure.kinds):
            index, shape = narrowed.first_of(kind), tuple(widths[number])
            if (kind, shape) in done:
                continue
            done.add((kind, shape))
            sizes = _in_proportion(shape, residual.width, width)
            narrow = copy.deepcopy(pieces.blocks[index])
            _narrow(narrow, _block_edges(residual.blocks[index], sizes), f"{path}.{index}.", width)
            RotatedBlock.wrap(narrow, sizes, all_params[kind])
            try:
                narrow(hidden[..., : sizes[0]], *calls[index].args, **calls[index].kwargs)
            except (RuntimeError, ValueError, IndexError) as error:
                raise ModelError(
                    f"its branches can't read {shape[:-1]} values and write {shape[1:]} ({error})",
                    where=f"{path}.{number}",
                    hint="Set schedule: uniform, or orientation: global, or leave slicegpt out.",
                    data={"takes": list(shape[:-1]), "gives": list(shape[1:]), "cause": str(error)},
                ) from error
        _check_ends(probe, path, residual, embeddings or widths[0][0], widths[-1][-1], width)


def _in_proportion(widths: Sequence[int], whole: int, narrow: int) -> tuple[int, ...]:
    """Widths of a stream of `narrow` values for those of one of `whole`: ordered alike, and equal where they are."""
    sizes = {whole: narrow}
    for width in sorted({*widths} - {whole}, reverse=True):
        sizes[width] = width if whole == narrow else max(1, min(-(-width * narrow // whole), min(sizes.values()) - 1))
    return tuple(sizes[width] for width in widths)


def _check_ends(probe: PreTrainedModel, path: str, residual: Residual, first: int, last: int, width: int) -> None:
    """Run a model without blocks whose embeddings have `first` values and whose output head reads `last`.

    It changes the probe model, whose stream has `width` values.

    raises  ModelError if it can't run
    """
    begin, end = _in_proportion((first, last), residual.width, width)
    edges: _Edges = [(write, begin) for write in residual.embeddings]
    edges += [(residual.end, end), *((consumer, end) for consumer in residual.end.consumers)]
    _narrow(probe, edges, "", width)
    for block in Pieces(probe, path).blocks:
        block.forward = lambda x, *_args, **_kwargs: x.new_zeros(*x.shape[:-1], end)
    try:
        probe(**example_batch(probe, torch.device("cpu")))
    except (RuntimeError, ValueError, IndexError) as error:
        raise ModelError(
            f"a residual stream that begins with {first} values can't end with {last} ({error})",
            where=type(probe).__name__,
            hint="Set orientation: global, or leave slicegpt out for this model.",
            data={"first": first, "last": last, "cause": str(error)},
        ) from error


def _block_edges(sublayers: Sequence[ResidualSublayer], widths: Sequence[int]) -> _Edges:
    edges: _Edges = []
    for sublayer, before, after in zip(sublayers, widths, widths[1:]):
        edges += [(norm, before) for norm in sublayer.norms]
        edges += [(consumer, before) for norm in sublayer.norms for consumer in norm.consumers]
        edges += [(write, after) for write in sublayer.writes]
    return edges


def _narrow(module: nn.Module, edges: _Edges, prefix: str, width: int) -> None:
    """Give matrices and norms random values at the new widths of the stream."""
    shapes: dict[str, list[int]] = {}
    norms: dict[str, dict[str, Any]] = {}
    for edge, kept in edges:
        if isinstance(edge, ResidualNorm):
            format_params = {"width": width, "eps": edge.formula.eps}
            norms[edge.module.removeprefix(prefix)] = {
                "form": RmsNorm.format_name,
                "spec": format_params,
                "shape": [kept],
            }
            continue
        name = edge.parameter.removeprefix(prefix)
        shapes.setdefault(name, list(module.get_parameter(name).shape))[edge.axis] = kept
    reshape(module, shapes, norms, {RmsNorm.format_name: RmsNorm})


def _run_embeddings(pieces: Pieces) -> tuple[Tensor, list[Call]]:
    """The arguments of the blocks, with a cache and padding if the model has them, since None shows nothing."""
    batch = example_batch(pieces.model, torch.device("cpu"))
    if "input_ids" in batch:
        mask = torch.ones_like(batch["input_ids"])
        mask[0, :2] = 0
        try:
            return pieces.embeddings({**batch, "attention_mask": mask, "use_cache": True})  # type: ignore[dict-item]
        except (TypeError, ValueError):  # it has no cache, or only one of attention
            pass
    return pieces.embeddings(batch)


def _record(block: nn.Module, hidden: Tensor, call: Call) -> _Record:
    """Run a block and record the calls that it makes itself, not those of its modules."""
    parameters = inspect.signature(block.forward).parameters
    takes_more = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    kwargs = {**call.kwargs, PROBE: object()} if takes_more else dict(call.kwargs)
    bound = inspect.signature(block.forward).bind(hidden, *call.args, **kwargs)
    bound.apply_defaults()
    known = dict(list(bound.arguments.items())[1:])
    rest: dict[str, Any] = {}
    for parameter in parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            rest = known.pop(parameter.name)
        elif parameter.kind is parameter.VAR_POSITIONAL and known.pop(parameter.name):
            raise ModelError(
                "its forward takes *args, so its arguments have no names", where=type(block).__name__, hint=HINT
            )

    with recorded_calls(block) as calls:
        try:
            output = block(hidden, *call.args, **kwargs)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"it can't be run alone ({error})",
                where=type(block).__name__,
                hint=HINT,
                data={"reason": "not-on-its-own", "cause": str(error)},
            ) from error
    return _Record(known, rest, calls, output)


def _format_params(
    block: nn.Module, record: _Record, sublayers: Sequence[ResidualSublayer], where: str
) -> FormatParams:
    found = []
    for sublayer in sublayers:
        names = [norm.module.removeprefix(where + ".") for norm in sublayer.norms]
        ways = []
        for name in names:
            norm = next((call for call in record.calls if call.name == name), None)
            if norm is None:
                raise ModelError(
                    "this norm is called by another module than its block", where=f"{where}.{name}", hint=HINT
                )
            ways += [
                {"norm": name, "steps": _steps(first, norm.output, record, where)}
                for first in _consumers(norm, norm.output, record)
            ]
        if not ways:
            raise ModelError("no module reads the whole output of this norm", where=f"{where}.{names[0]}", hint=HINT)
        found.append({"norm": names, "shortcut": True, "branches": ways})
    output = record.output
    if isinstance(output, tuple) and any(part is not None for part in output[1:]):
        raise ModelError(
            "it returns other tensors beside the residual stream",
            where=where,
            hint=HINT,
            data={"reason": "returns-more"},
        )
    return {"sites": found, "returns": len(output) if isinstance(output, tuple) else None}


def _steps(call: ModuleCall, x: Tensor, record: _Record, where: str) -> list[dict[str, Any]]:
    """The chain of modules that reads `x`, beginning with `call`."""
    steps = []
    while True:
        output, take = call.output, None
        if isinstance(output, tuple):
            output, take = output[0], 0
        if not isinstance(output, Tensor):
            raise ModelError(
                f"returns a {type(output).__name__}",
                where=f"{where}.{call.name}",
                hint=HINT,
                data={"type": type(output).__name__},
            )
        place = f"{where}.{call.name}"
        args = [_reference(name, value, x, record, place) for name, value in call.positional()]
        hands_on = PROBE in call.kwargs
        own = {k: v for k, v in call.kwargs.items() if not (hands_on and k in record.rest and v is record.rest[k])}
        kwargs = {name: _reference(name, value, x, record, place) for name, value in own.items()}
        steps.append({"call": call.name, "args": args, "kwargs": kwargs, "rest": hands_on, "take": take})
        following = _consumers(call, output, record)
        if not following:
            return steps
        if len(following) > 1:
            names = " and ".join(other.name for other in following)
            raise ModelError(
                f"its output is read by {names}, so the branch is not one chain of modules",
                where=place,
                hint=HINT,
                data={"reason": "two-readers", "names": str(names)},
            )
        call, x = following[0], output


def _consumers(source: ModuleCall, value: Any, record: _Record) -> list[ModuleCall]:
    """Calls after `source` whose argument is its output `value`, in any shape."""
    found = []
    for call in record.calls[next(i for i, call in enumerate(record.calls) if call is source) + 1 :]:
        if any(is_one_tensor(other, value) for other in call.values):
            found.append(call)
            if is_one_tensor(call.output, value):  # dropout in eval mode returns its input: later calls read its output
                break
    return found


def _reference(name: str, value: Any, x: Tensor, record: _Record, where: str) -> list[Any]:
    """The source of an argument of a module."""
    if is_one_tensor(value, x):
        return [INPUT]
    if name in record.known and record.known[name] is value:
        return [ARGUMENT, name]
    if isinstance(value, CONSTANTS):
        return [CONSTANT, value]
    for other, given in record.known.items():
        if given is value:
            return [ARGUMENT, other]
    shown = f"the argument {name!r}" if name else "an argument"
    raise ModelError(
        f"gets {shown}, which is neither its norm's output nor an argument of its block",
        where=where,
        hint=HINT,
        data={"reason": "foreign-argument", "argument": name or None},
    )


def _prove(probe: PreTrainedModel, path: str, all_params: Mapping[Kind, FormatParams]) -> None:
    """raises ModelError naming the first block whose output differs when it runs by its spec"""
    batch = example_batch(probe, torch.device("cpu"))
    rotated = copy.deepcopy(probe)
    for index, block in enumerate(Pieces(rotated, path).blocks):
        format_params = all_params[signature(probe.config, block, index)]
        width = _stream(probe, path, batch)[0].shape[-1]
        RotatedBlock.wrap(block, (width,) * (len(format_params["sites"]) + 1), format_params)
    found: list[Tensor] = []
    expected = _stream(probe, path, batch)
    names = [*(f"{path}.{index}" for index in range(len(expected) - 1)), "output head"]
    try:
        _stream(rotated, path, batch, found)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ModelError(
            f"it can't be run branch by branch ({error})",
            where=names[len(found)],
            hint=HINT,
            data={"reason": "no-branches", "cause": str(error)},
        ) from error
    for name, before, after in zip(names, expected, found):
        if before.shape != after.shape or not size(before - after) <= TOLERANCE * size(before):
            raise ModelError(
                "run branch by branch, it gives other outputs",
                where=name,
                hint=HINT,
                data={"reason": "other-values"},
            )


def _stream(model: PreTrainedModel, path: str, batch: Batch, outputs: list[Tensor] | None = None) -> list[Tensor]:
    """The output of each block of a run, and of the model; they are appended to `outputs` during the run."""
    outputs = [] if outputs is None else outputs

    def keep(output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output).clone())

    with recorded_outputs(dict(enumerate(Pieces(model, path).blocks)), keep):
        outputs.append(output_of(model(**batch)))
    return outputs
