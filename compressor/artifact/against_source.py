"""Compares an artifact with its source, as stock transformers loads the source.

This package's own reader doesn't read the source here. So an error of the reader (another file, rounded parameters,
codes read as weights, a dropped tensor) is found and not repeated. What can be compared depends on the steps that made
the artifact (`source.changes` in the manifest):

- If no step changed the model itself: every tensor that no step changed is bit-identical to the source's. Every stored
  weight, and every dense tensor that a step has rescaled, has the distance from the source's that the run recorded. And
  the source's model with all of these in it computes what the artifact computes.
- If a step rewrote parameters: this package's reading of the source is bit-identical to stock transformers', and the
  distance of the outputs is reported. This distance is judged only if the steps keep the function (fuse_norms, rotate)
  and nothing was quantized.

If the source doesn't fit into memory, transformers loads it to disk, and it is run and compared part by part.

Of a quantized source, transformers gets the dense tensors that `quantized_source` makes, and does everything else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import align_module_device
from torch import Tensor

from compressor.artifact.findings import TensorComparison
from compressor.artifact.manifest import Change, Manifest
from compressor.artifact.stock_loading import OFFLINE
from compressor.errors import ArtifactError, Because
from compressor.layers import find_layer
from compressor.model.attention import plain_options
from compressor.model.checkpoint import Checkpoint
from compressor.model.empty_model import bound_model
from compressor.model.model_class import class_of, config_and_class
from compressor.model.module_names import tensor_named
from compressor.model.quantized_source import load_dequantized
from compressor.model.reshaped_class import is_reshaped
from compressor.model.stored_weight import StoredWeight, relative_distance
from compressor.model.streamed import DenseFiller, StreamedModel, streamed_of
from compressor.model.structure import find_blocks, read_structure
from compressor.model.weight_names import read_parameter
from compressor.model.weights import Weight, part_of
from compressor.storage.file_names import MANIFEST

MEMORY_SHARE = 0.8  # share of the available memory; a larger source is loaded to disk
ERROR_TOLERANCE = 1e-3  # of a recorded error, for sums in another order
# If each parameter is rounded to its dtype once, outputs move by about a unit in the last place per block, and a
# rotation adds its own sums. A wrong rotation moves outputs by about their own size.
ROUNDING_UNITS = 8

Print = tuple[str, str]  # dtype and shape of a tensor, SHA-256 of its bytes


def load_source(
    directory: Path, checkpoint: Checkpoint, dtype: torch.dtype, *, trust_remote_code: bool, offload: Path | None
) -> Any:
    """The source by `from_pretrained`, in eval mode. A quantized one is read through `checkpoint`, dequantized.

    dtype    dtype of the artifact; transformers keeps some parameters in float32 regardless of it
    offload  an empty directory: parameters stay on disk until a module runs. None: all parameters are in memory
    raises   ModelError if its class is code of the checkpoint and that code isn't trusted
    """
    cls: Any = class_of(checkpoint, trust_remote_code)
    options: dict[str, Any] = {"dtype": dtype, **OFFLINE, **plain_options(checkpoint.config)}
    if offload is not None:
        options |= {"device_map": {"": "disk"}, "offload_folder": str(offload)}
    if checkpoint.quantized is not None:
        config, _ = config_and_class(checkpoint, trust_remote_code)
        return load_dequantized(cls, checkpoint, config, offload, **options).eval()
    return cls.from_pretrained(directory, **options).eval()


def stream_source(checkpoint: Checkpoint, dtype: torch.dtype, *, trust_remote_code: bool) -> StreamedModel:
    """The source read by this package, whose blocks are in memory while they run. The model's dtype is `dtype`."""
    config, cls = config_and_class(checkpoint, trust_remote_code)
    name = str(dtype).removeprefix("torch.")
    checkpoint, model, bindings, _ = bound_model(checkpoint, cls, config, name, cached=True)
    return StreamedModel(DenseFiller(checkpoint, model, bindings), find_blocks(model))


def does_not_fit(checkpoint: Checkpoint, dtype: torch.dtype, limit: int | None) -> bool:
    """Whether the source in `dtype` is larger than `limit` bytes, or than most of the available memory."""
    size = sum(info.nbytes // info.dtype.itemsize for info in checkpoint.tensors.values()) * dtype.itemsize
    return size > (MEMORY_SHARE * psutil.virtual_memory().available if limit is None else limit)


def read_changes(manifest: Manifest) -> tuple[list[Change], dict[str, float | None]]:
    """The steps that changed the model itself, and the recorded error of each stored weight.

    raises ArtifactError for an artifact whose manifest doesn't have them
    """
    source = manifest["source"]
    changes = source.get("changes")
    if changes is None:
        raise ArtifactError(
            "has no record of the changes between the artifact and its source",
            where=MANIFEST,
            hint="Verify without --source, or build the artifact again with this release.",
        )
    return changes, source.get("relative_errors", {})


def why_not_comparable(checkpoint: Checkpoint) -> str | None:
    """Why stock transformers can't load this source; None if it can."""
    if is_reshaped(checkpoint.config):
        return "the source's config.json has shapes or layers that stock transformers doesn't know"
    return None


@dataclass(frozen=True)
class Prints:
    """Prints of a model's parameters and buffers that no step changed, under each of their names.

    is_unchanged  of a name. Prints of other tensors would not be compared
    """

    model: Any
    is_unchanged: Callable[[str], bool]
    found: dict[str, Print] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any, manifest: Manifest) -> Prints:
        """A streamed model is printed while it runs: its parts must be in memory for both."""
        prints = cls(model, unchanged(manifest))
        if (streamed := streamed_of(model)) is not None:
            streamed.placed.append(prints._add_part)
        return prints

    def all(self) -> dict[str, Print]:
        """All prints, once the model has run."""
        known: dict[int, Print] = {}
        for name, value in _tensors(self.model):
            if value.is_meta or value.device.type != "cpu" or not self.is_unchanged(name):
                continue
            if id(value) not in known:
                known[id(value)] = _print(value)
            self.found[name] = known[id(value)]
        if (streamed := streamed_of(self.model)) is not None:
            for part in streamed.parts:  # those that did not run
                if any(self._lacks(name) for name in streamed.parts[part]):
                    with streamed.holding(part):
                        pass
        return self.found

    def _lacks(self, name: str) -> bool:
        return self.is_unchanged(name) and name not in self.found

    def _add_part(self, part: str) -> None:
        streamed = streamed_of(self.model)
        assert streamed is not None
        for name in filter(self._lacks, streamed.parts.get(part, ())):
            self.found[name] = _print(tensor_named(self.model, name))


def unchanged(manifest: Manifest) -> Callable[[str], bool]:
    """Whether a tensor of the model, by its name, is one that no step changed."""
    formats = [StoredWeight.from_dict(entry) for entry in manifest["weights"].values()]
    changed = _stored_parameters(formats) | _rewritten(manifest).keys()
    functions = tuple(_module(stored.weight) + "." for stored in formats if stored.weight.is_function)
    return lambda name: name not in changed and not name.startswith(functions)


def ties_of(model: Any) -> set[frozenset[str]]:
    """Names of parameters that share one storage. For a model on disk: those that transformers tied."""
    if any(value.is_meta for value in model.parameters()):
        tied: dict[str, set[str]] = {}
        for target, origin in model.all_tied_weights_keys.items():
            tied.setdefault(origin, {origin}).add(target)
        return {frozenset(group) for group in tied.values()}
    names: dict[int, set[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(value), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def compare_tensors(
    source: Any,
    own: Any,
    dtype: torch.dtype,
    prints: dict[str, Print],
    ties: set[frozenset[str]],
    manifest: Manifest,
) -> tuple[TensorComparison, list[str]]:
    """Compare every tensor of an artifact with the source's.

    source  the source's model, by stock transformers
    own     the artifact, by `compressor.load`
    dtype   dtype of the artifact, in which errors were recorded
    prints  prints of the artifact's model by its stock loader, and `ties` of the same model
    returns the numbers of compared tensors with the largest difference from a recorded error; the problems
    """
    _, errors = read_changes(manifest)
    formats = [StoredWeight.from_dict(entry) for entry in manifest["weights"].values()]
    stored, rewritten = _stored_parameters(formats), _rewritten(manifest)
    equal, problems = _compare_dense(source, unchanged(manifest), prints)
    problems += _compare_rewritten(source, own, rewritten)
    problems += _tie_problems(source, formats, stored, ties)
    largest, found = _compare_stored(source, own, formats, errors, rewritten, dtype)
    problems += found
    return TensorComparison(equal, len(formats), largest), problems


def _stored_parameters(formats: Sequence[StoredWeight]) -> set[str]:
    """Parameters that were replaced by stored weights, or by biases in them."""
    matrices = [stored for stored in formats if not stored.weight.is_function]
    biases = {_module(stored.weight) + ".bias" for stored in matrices if stored.bias is not None}
    return {stored.weight.parameter for stored in matrices} | biases


def _compare_dense(source: Any, is_unchanged: Callable[[str], bool], prints: dict[str, Print]) -> tuple[int, list[str]]:
    """Compare tensors that no step changed. Returns the number of equal ones, and the problems."""
    problems: list[str] = []
    equal = 0
    for name, meant in _each_held(source, [name for name, _ in _tensors(source) if is_unchanged(name)]):
        found, expected = prints.get(name), _print(meant)
        equal += found == expected
        if found is None:
            problems.append(Because(f"{name} of the source is missing in the artifact", reason="missing", tensor=name))
        elif found[0] != expected[0]:
            message = f"{name} is {found[0]}, and {expected[0]} in the source"
            problems.append(Because(message, reason="other-dtype-or-shape", tensor=name))
        elif found != expected:
            message = f"{name} differs from the source, although no step changed it"
            problems.append(Because(message, reason="changed", tensor=name))
    return equal, problems


def _rewritten(manifest: Manifest) -> dict[str, float]:
    """Dense parameters with new values -> the distance from the source's that the run recorded."""
    return manifest["source"].get("rewritten", {})


def _compare_rewritten(source: Any, own: Any, rewritten: dict[str, float]) -> list[str]:
    """Compare the distance of these parameters from the source's with the recorded one. Returns the problems."""
    problems: list[str] = []
    names = {name for name, _ in own.named_parameters(remove_duplicate=False)}
    for name, recorded in rewritten.items():
        if name not in names:
            message = f"{name} has new values according to the manifest, but the artifact has no such tensor"
            problems.append(Because(message, reason="missing", tensor=name))
            continue
        with _held(source, name) as meant, _held(own, name) as value:
            same_shape = value.shape == meant.shape and value.dtype == meant.dtype
            error = relative_distance(value, meant) if same_shape else float("inf")
        problems += _error_problems(name, error, recorded)
    return problems


def _tie_problems(
    source: Any, formats: Sequence[StoredWeight], stored: set[str], ties: set[frozenset[str]]
) -> list[str]:
    """Parameters that share one tensor in only one of the two models."""
    problems: list[str] = []
    own_modules = tuple(
        f"{_module(stored_weight.weight)}." for stored_weight in formats
    )  # an untied output head has its own bias, too
    for group in sorted(map(sorted, ties_of(source))):
        is_parted = any(name in stored or name.startswith(own_modules) for name in group)
        if not is_parted and frozenset(group) not in ties:
            message = f"{' and '.join(group)} share one tensor in the source, but not in the artifact"
            problems.append(Because(message, reason="not-shared", parameters=group))
    for group in sorted(map(sorted, ties)):
        if frozenset(group) not in ties_of(source):
            message = f"{' and '.join(group)} share one tensor in the artifact, but not in the source"
            problems.append(Because(message, reason="shared", parameters=group))
    return problems


def _compare_stored(
    source: Any,
    own: Any,
    formats: Sequence[StoredWeight],
    errors: dict[str, float | None],
    rewritten: Collection[str],
    dtype: torch.dtype,
) -> tuple[float, list[str]]:
    """Compare stored weights with the source's. Returns the largest difference from a recorded error; the problems.

    A parameter of many experts, and a block of a streamed model, are read once for all of their weights.
    """
    problems: list[str] = []
    largest = 0.0
    for parameter, weights in _by_parameter((own, source), formats):
        with _held(source, parameter) as whole:
            for weight in weights:
                error, recorded = _distance(own, weight, part_of(whole, weight), dtype), errors.get(weight.name)
                largest = max(largest, 0.0 if recorded is None else abs(error - recorded))
                problems += _error_problems(weight.name, error, recorded)
            experts = [weight for weight in weights if weight.expert is not None and parameter not in rewritten]
            if experts and not _equal_elsewhere(whole, own.get_parameter(parameter), experts):
                message = f"{parameter} differs from the source in experts that no step changed"
                problems.append(Because(message, reason="changed-experts", tensor=parameter))
    return largest, problems


def _by_parameter(models: Sequence[Any], formats: Sequence[StoredWeight]) -> Iterator[tuple[str, list[Weight]]]:
    """The stored weights of each parameter, whose block is in memory meanwhile in models that are streamed."""
    streamed_models = [streamed for model in models if (streamed := streamed_of(model)) is not None]
    parts: dict[str, dict[str, list[Weight]]] = {}
    for weight in (stored.weight for stored in formats if not stored.weight.is_function):
        part = streamed_models[0].part_of_name(weight.parameter) if streamed_models else ""
        parts.setdefault(part, {}).setdefault(weight.parameter, []).append(weight)
    for part, parameters in parts.items():
        with ExitStack() as stack:
            for streamed in streamed_models:
                stack.enter_context(streamed.holding(part))
            yield from parameters.items()


def _error_problems(name: str, error: float, recorded: float | None) -> list[str]:
    """The problem of a weight, or of a parameter with new values, that isn't as far from the source's as recorded."""
    if recorded is None:
        is_near = error < 1  # 1 is the error of a zero weight; NaN fails too
        message = f"is not an approximation of the source's weight (relative error {error:.3g})"
    else:
        is_near = _is_as_recorded(error, recorded)
        message = f"has a relative error of {error:.4g} against the source, the run recorded {recorded:.4g}"
    values = {"reason": "other-error", "tensor": name, "error": error, "recorded": recorded}
    return [] if is_near else [Because(f"{name} {message}", **values)]


def _is_as_recorded(error: float, recorded: float) -> bool:
    """NaN is not."""
    return abs(error - recorded) <= ERROR_TOLERANCE * recorded + 1e-5


def _distance(own: Any, weight: Weight, meant: Tensor, dtype: torch.dtype) -> float:
    """Relative distance of a stored weight from the source's; infinite if the shapes differ."""
    if weight.expert is None:
        built = own.get_submodule(_module(weight)).matrix(dtype)
    else:
        built = part_of(own.get_parameter(weight.parameter), weight)
    return relative_distance(built, meant) if built.shape == meant.shape else float("inf")


def put_layers(source: Any, own: Any, manifest: Manifest) -> None:
    """Put the artifact's stored layers, its experts and its dense tensors with new values into the source's model.

    Those of a streamed model are lent: they are in memory while a module of the source's model runs.
    """
    if streamed_of(own) is not None:
        _lend_layers(source, own, manifest)
        return
    for name in _rewritten(manifest):
        _fetch(source.get_submodule(name.rpartition(".")[0]))
        tensor_named(source, name).data.copy_(own.get_parameter(name))
    formats = [StoredWeight.from_dict(entry) for entry in manifest["weights"].values()]
    for kind in sorted({stored.format_name for stored in formats}):
        find_layer(kind).prepare(source)
    for path in sorted({f.weight.parameter.rpartition(".")[0] for f in formats if f.weight.expert is not None}):
        _fetch(source.get_submodule(path))
    for stored in formats:
        owner, _, leaf = _module(stored.weight).rpartition(".")
        if stored.weight.expert is not None:
            part_of(source.get_parameter(stored.weight.parameter).data, stored.weight).copy_(
                part_of(own.get_parameter(stored.weight.parameter), stored.weight)
            )
            continue
        layer, parent = own.get_submodule(_module(stored.weight)), source.get_submodule(owner)
        before = getattr(parent, leaf, None)
        if stored.bias is None:
            if before is not None and getattr(before, "bias", None) is not None:
                with align_module_device(before):
                    layer.bias = torch.nn.Parameter(before.bias.detach().clone(), requires_grad=False)
            else:
                layer.bias = None
        setattr(parent, leaf, layer)


def _lend_layers(source: Any, own: Any, manifest: Manifest) -> None:
    """`put_layers` for a streamed model. Each of its blocks is in memory while the same block of the source runs."""
    streamed = streamed_of(own)
    assert streamed is not None
    for name, _ in own.get_submodule(streamed.blocks_path).named_children():
        _hold_while_running(source, streamed, f"{streamed.blocks_path}.{name}")
    formats = [StoredWeight.from_dict(entry) for entry in manifest["weights"].values()]
    for kind in sorted({stored.format_name for stored in formats}):
        find_layer(kind).prepare(source)
    experts = {stored.weight.parameter for stored in formats if stored.weight.expert is not None}
    for path in sorted({name.rpartition(".")[0] for name in (*_rewritten(manifest), *experts)}):
        _lend_parameters(source.get_submodule(path), own, path)
    for stored in formats:
        if stored.weight.expert is None:
            owner, _, leaf = _module(stored.weight).rpartition(".")
            setattr(source.get_submodule(owner), leaf, _Lent(own, _module(stored.weight)))
    if (filled := streamed_of(source)) is not None:
        modules = [_module(stored.weight) for stored in formats if stored.weight.expert is None]
        filled.leave_out({*experts, *_rewritten(manifest)}, modules)


def _hold_while_running(source: Any, streamed: StreamedModel, path: str) -> None:
    """Keep a block of a streamed model filled while the source's block of the same path runs."""
    block, stack = source.get_submodule(path), ExitStack()
    block.register_forward_pre_hook(lambda _module, _args: stack.enter_context(streamed.holding(path)))
    block.register_forward_hook(lambda _module, _args, _output: stack.close(), always_call=True)


class _Lent(torch.nn.Module):
    """Stands for a module of a streamed model, which is in memory while it runs."""

    def __init__(self, model: Any, path: str) -> None:
        super().__init__()
        object.__setattr__(self, "_lender", (model, path))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        model, path = object.__getattribute__(self, "_lender")
        with _present(model, path):
            return model.get_submodule(path)(*args, **kwargs)


def _lend_parameters(module: torch.nn.Module, own: Any, path: str) -> None:
    """Let a module of the source's model run with the parameters of the streamed model's module at this path."""
    remove_hook_from_module(module)
    stack = ExitStack()

    def lend(_module: Any, _args: Any) -> None:
        stack.enter_context(_present(own, f"{path}."))
        for name, value in own.get_submodule(path).named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(value, requires_grad=False))

    def take_back(_module: Any, _args: Any, _output: Any) -> None:
        for name, value in own.get_submodule(path).named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(value.to("meta"), requires_grad=False))
        stack.close()

    module.register_forward_pre_hook(lend)
    module.register_forward_hook(take_back, always_call=True)


def compare_reading(source: Any, directory: Path, dtype: torch.dtype, trust_remote_code: bool) -> list[str]:
    """Compare what this package reads of a checkpoint with what stock transformers loads. Returns the problems."""
    structure = read_structure(directory, dtype=str(dtype).removeprefix("torch."), trust_remote_code=trust_remote_code)
    problems: list[str] = []
    meant = dict(_tensors(source))
    for name in structure.bindings.sources:
        value = read_parameter(name, structure.bindings, structure.read, structure.model)
        if name not in meant:
            message = f"{name} was read from the source, but stock transformers has no such tensor"
            problems.append(Because(message, reason="not-of-stock", tensor=name))
            continue
        with _held(source, name) as expected:
            if _print(value) != _print(expected):
                message = f"{name} was read from the source with other values than stock transformers reads"
                problems.append(Because(message, reason="read-otherwise", tensor=name))
    tied = {name for group in ties_of(source) for name in group}
    known = {*structure.bindings.sources, *structure.bindings.tied, *tied}
    unread = [name for name, _ in source.named_parameters() if name not in known]
    problems += [Because(f"{name} of the source was not read", reason="not-read", tensor=name) for name in unread]
    return problems


def compare_outputs(found: Tensor, meant: Tensor) -> float | None:
    """Relative distance of two models' outputs; None if their shapes differ, as after dropped tokens."""
    return relative_distance(found, meant) if found.shape == meant.shape else None


def _equal_elsewhere(meant: Tensor, found: Tensor, members: list[Weight]) -> bool:
    """Whether two parameters are equal outside the slices that these weights are."""
    by_expert: dict[int | None, list[Weight]] = {}
    for weight in members:
        by_expert.setdefault(weight.expert, []).append(replace(weight, expert=None))
    for number, (one, other) in enumerate(zip(meant, found, strict=True)):
        outside = torch.ones(one.shape, dtype=torch.bool)
        for weight in by_expert.get(number, ()):
            part_of(outside, weight).fill_(False)
        if not bool((one.eq(other) | ~outside).all()):
            return False
    return meant.dtype == found.dtype


def _fetch(module: torch.nn.Module) -> None:
    """Load a module's own parameters from disk into memory permanently. Does nothing if they are in memory."""
    with align_module_device(module):
        values = {name: value.detach().clone() for name, value in module.named_parameters(recurse=False)}
    remove_hook_from_module(module)
    for name, value in values.items():
        setattr(module, name, torch.nn.Parameter(value, requires_grad=False))


def _module(weight: Weight) -> str:
    return weight.parameter.removesuffix(".weight")


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _each_held(model: Any, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of a model, loaded if they aren't in memory. A block is loaded once for all of its own."""
    streamed = streamed_of(model)
    for part, members in groupby(names, lambda name: "" if streamed is None else streamed.part_of_name(name)):
        with nullcontext() if streamed is None else streamed.holding(part):
            for name in members:
                with _held(model, name) as value:
                    yield name, value


@contextmanager
def _held(model: Any, name: str) -> Iterator[Tensor]:
    """A parameter or buffer of a model, loaded from disk if it lies there."""
    with _present(model, name), align_module_device(model.get_submodule(name.rpartition(".")[0])):
        yield tensor_named(model, name).detach()


@contextmanager
def _present(model: Any, name: str) -> Iterator[None]:
    """Inside this context the part of a streamed model that has this parameter or module is in memory."""
    streamed = streamed_of(model)
    with nullcontext() if streamed is None else streamed.holding(streamed.part_of_name(name)):
        yield


def _print(value: Tensor) -> Print:
    described = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    found = hashlib.sha256()
    # Experts are copied one after the other: a hash reads pages of a mapped file that only torch would give back.
    for piece in map(torch.clone, value.detach()) if value.dim() == 3 else (value.detach(),):
        found.update(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return described, found.hexdigest()
