"""Writes and loads the deployable result. Knows layers, never passes. Format: docs/format.md.

The weight files are streamed from the unit files; the manifest with the hash of every file is written last, so a
directory without a manifest is not an artifact.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from compressor.artifact_files import check_files as check_files
from compressor.artifact_files import file_facts
from compressor.artifact_files import owned_files as owned_files
from compressor.artifact_files import remove_artifact as remove_artifact
from compressor.attention import choose_plain
from compressor.binding import Bindings, bind, fill, read_parameter
from compressor.checkpoint import Checkpoint, open_checkpoint
from compressor.classes import class_for
from compressor.errors import ArtifactError, CompressError, UsageError
from compressor.export import Route, artifact_config
from compressor.file_names import MANIFEST as MANIFEST
from compressor.file_names import REPORT_FILES as REPORT_FILES
from compressor.kernels.prepared import prepare
from compressor.layers import find_layer
from compressor.manifest import BAD_HINT, FORMAT_VERSION, model_class
from compressor.manifest import read_manifest as read_manifest
from compressor.modelling import VERSION, modelling_file
from compressor.resources import ran_out
from compressor.safetensors_file import NAMES, Entry, TensorInfo, read_bytes, read_header, write_file
from compressor.structure import Structure, skeleton
from compressor.trusted_code import check_kernels
from compressor.units import Form
from compressor.unused_tensors import Unused

KERNELS = ("auto", "strict", "reference")


@dataclass(frozen=True)
class Named:
    """A tensor of the result before it has a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    small: str | None = None  # as in TensorInfo

    @property
    def stored_as(self) -> str:
        return self.small or NAMES[self.dtype]


def assign_shards(tensors: Sequence[Named], shard_bytes: int) -> dict[str, list[str]]:
    """File name -> tensor names. Tensors of one module stay together; files fill up in the order given."""
    modules: dict[str, list[Named]] = {}
    for tensor in tensors:
        modules.setdefault(tensor.name.rpartition(".")[0], []).append(tensor)
    shards: list[list[str]] = [[]]
    used = 0
    for members in modules.values():
        size = sum(member.nbytes for member in members)
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1] += [member.name for member in members]
        used += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}


def carried(structure: Structure) -> list[Unused]:
    """Tensors of the source that fill nothing in the model and go into the artifact as they are, bit for bit."""
    return [unused for unused in structure.bindings.unused if unused.is_carried]


def carried_tensors(structure: Structure) -> dict[str, TensorInfo]:
    """Where the carried tensors lie, by name."""
    return {unused.tensor: structure.checkpoint.tensors[unused.tensor] for unused in carried(structure)}


def untied_copies(structure: Structure, forms: Sequence[Form], untied: bool) -> dict[str, str]:
    """Parameter -> the tensor that it shared and has a copy of, where config.json comes to say that nothing is tied."""
    own = {form.weight.parameter for form in forms}
    bindings = structure.bindings
    shared = {} if not untied else {name: source for name, source in bindings.tied.items() if name not in own}
    return {name: bindings.sources[source][0].tensor for name, source in shared.items()}


def write_artifact(
    directory: Path,
    structure: Structure,
    units: Sequence[Path],
    forms: Sequence[Form],
    route: Route,
    shard_bytes: int,
    untied: bool,
    recipe_yaml: str,
) -> None:
    """Weights, config, tokenizer and recipe into a new directory; reports, card and manifest come later.

    units  one file per unit, in order; every tensor of the result exactly once
    """
    directory.mkdir()
    infos: dict[str, TensorInfo] = {}
    for unit in units:
        infos.update(read_header(unit))
    infos |= {name: infos[tensor] for name, tensor in untied_copies(structure, forms, untied).items()}
    infos |= carried_tensors(structure)
    named = [Named(name, info.dtype, info.shape, info.nbytes, info.small) for name, info in infos.items()]
    shards = assign_shards(named, shard_bytes)
    for file, names in shards.items():
        entries = [
            Entry(name, infos[name].dtype, infos[name].shape, partial(read_bytes, infos[name]), infos[name].small)
            for name in names
        ]
        write_file(directory / file, entries)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(info.nbytes for info in infos.values())},
            "weight_map": dict(sorted((name, file) for file, names in shards.items() for name in names)),
        }
        write_json(directory / "model.safetensors.index.json", index)
    dtype = str(structure.dtype).removeprefix("torch.")
    config = artifact_config(structure.checkpoint.carried_config, route, forms, structure.model, dtype, untied)
    write_json(directory / "config.json", config)
    if route.name == "custom":
        text = modelling_file(structure.model, (form.form for form in forms))
        (directory / f"modeling_{config['model_type']}.py").write_text(text)
    for relative in structure.checkpoint.side_files.carried:
        (directory / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(structure.checkpoint.directory / relative, directory / relative)
    (directory / "recipe.yaml").write_text(recipe_yaml)


def seal(
    directory: Path,
    *,
    architecture: str,
    route: Route,
    forms: Sequence[Form],
    source: dict[str, Any],
    carried: Sequence[Unused] = (),
) -> None:
    """Write the manifest over everything that lies in the directory; the last act of writing an artifact."""
    manifest = {
        "format_version": FORMAT_VERSION,
        "tool": {"name": "compress-model", "version": VERSION},
        "architecture": architecture,
        "route": route.name,
        "reason": route.reason,
        "source": source,
        "weights": {form.weight.name: form.to_dict() for form in forms},
        "carried": {unused.tensor: list(unused.reported) for unused in carried},
        "layers": {form.form: find_layer(form.form).__module__.partition(".")[0] for form in forms},
        "files": file_facts(directory),
    }
    write_json(directory / MANIFEST, manifest)


def load(
    directory: str | Path,
    *,
    device: str = "cpu",
    check_hashes: bool = True,
    kernels: str = "auto",
    activations: str | None = None,
) -> transformers.PreTrainedModel:
    """The model of an artifact as its stock class, or that one reshaped, with stored forms in place of weights.

    Never runs code from the directory. Experts are rebuilt as dense weights.

    kernels      auto: the fastest of this machine (`compressor.kernels.explain` says which); strict: the same, and an
                 error where a layer has none; reference: dequantize and multiply
    activations  int8: inputs are rounded to int8, see `compressor.kernels.prepare`
    raises       ArtifactError for anything that isn't as the manifest says, KernelError with strict
    """
    if kernels not in KERNELS:
        raise UsageError(
            f"kernels {kernels!r}", hint="Use one of: " + ", ".join(KERNELS), data={"kernels": str(kernels)}
        )
    directory = Path(directory)
    manifest = read_manifest(directory)
    if check_hashes and (problems := check_files(directory, manifest)):
        raise ArtifactError(
            "; ".join(problems[:4]),
            where=directory.name,
            hint="Copy or build the artifact again.",
            data={"reason": "not-as-written", "problems": list(problems)},
        )
    checkpoint = open_checkpoint(directory)
    with _told_of(directory.name):
        model = _filled_model(checkpoint, manifest)
    model = model.to(torch.device(device))  # type: ignore[arg-type]
    if kernels != "reference":
        prepare(model, activations=activations, strict=kernels == "strict")
    return model


def _filled_model(checkpoint: Checkpoint, manifest: dict[str, Any]) -> transformers.PreTrainedModel:
    """The model of an artifact on the CPU, with stored forms in place of weights."""
    beside = manifest.get("carried", {})  # tensors that are nothing of this model's
    own = {name: info for name, info in checkpoint.tensors.items() if name not in beside}
    checkpoint = replace(checkpoint, tensors=own)
    forms = {name: Form.from_dict(entry) for name, entry in manifest["weights"].items()}
    model = empty_model(checkpoint, manifest)
    dtype = _dtype(checkpoint)
    layers = {name: _read_layer(checkpoint, form) for name, form in forms.items()}

    held = {form.bias: name for name, form in forms.items() if form.bias is not None}

    def read(tensor: str) -> Tensor:
        if tensor in held:
            return layers[held[tensor]].vector(dtype)
        form = forms.get(tensor.removesuffix(".weight"))
        if form is None:
            return checkpoint.read(tensor)
        matrix = layers[form.weight.name].matrix(dtype)
        return matrix.t() if form.weight.transposed else matrix

    bindings = bind(model, _dense_view(checkpoint, forms, dtype), dtype)
    _check_places(forms, bindings)
    modules = {
        form.weight.parameter.removesuffix(".weight"): name
        for name, form in forms.items()
        if form.weight.expert is None
    }
    for name in bindings.sources:
        if name.removesuffix(".weight") not in modules or not name.endswith(".weight"):
            value = read_parameter(name, bindings, read, model)
            fill(name, value.to(bindings.dtypes[name]), model)
    for target, origin in bindings.tied.items():
        owner, _, leaf = target.rpartition(".")
        model.get_submodule(owner)._parameters[leaf] = model.get_parameter(origin)
    for form in sorted({form.form for form in forms.values()}):
        find_layer(form).prepare(model)
    for module, name in modules.items():
        owner, _, leaf = module.rpartition(".")
        if not (forms[name].weight.is_function or forms[name].weight.role == "shortcut"):
            model.get_submodule(module)  # a matrix takes the place of a module, a shortcut's that of a parameter
        if forms[name].bias is None:
            layers[name].bias = getattr(getattr(model.get_submodule(owner), leaf, None), "bias", None)
        layers[name].dtype = dtype
        setattr(model.get_submodule(owner), leaf, layers[name])
    tensors = (*model.named_parameters(), *model.named_buffers())
    if (left := next((name for name, value in tensors if value.is_meta), None)) is not None:
        raise ArtifactError(f"the manifest leaves {left} without a value", where=MANIFEST, hint=BAD_HINT)
    return model


def _check_places(forms: dict[str, Form], bindings: Bindings) -> None:
    """A stored matrix fills what transformers fills with its tensor, and nothing else.

    raises ArtifactError for a weight whose manifest entry says another parameter, or another part of it
    """
    placed = {
        source.tensor: (name, source.expert, source.rows)
        for name, sources in bindings.sources.items()
        for source in sources
    }
    for name, form in forms.items():
        weight = form.weight
        if weight.is_function or weight.role == "shortcut":
            continue
        filled, expert, rows = placed.get(weight.tensor, (None, None, None))
        names = [bindings.tied.get(parameter, parameter) for parameter in (filled, weight.parameter) if parameter]
        if len(set(names)) != 1 or filled is None or (expert, rows) != (weight.expert, weight.rows):
            raise ArtifactError(
                f"the manifest puts {weight.tensor!r} into {_part(weight.parameter, weight.expert, weight.rows)}, "
                f"and transformers into {_part(filled, expert, rows)}",
                where=name,
                hint=BAD_HINT,
            )


def _part(parameter: str | None, expert: int | None, rows: tuple[int, int] | None) -> str:
    """A parameter or a part of one, for a message."""
    within = "" if expert is None and rows is None else f" (expert {expert}, rows {rows})"
    return f"{parameter or 'nothing'}{within}"


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def empty_model(checkpoint: Checkpoint, manifest: dict[str, Any]) -> transformers.PreTrainedModel:
    """The model of an artifact on the meta device. raises ArtifactError for a config that makes none"""
    cls: Any = model_class(manifest["architecture"], MANIFEST)
    check_kernels(checkpoint.config)
    left_out = ("quantization_config", "auto_map", "model_type", "compressed_weights")
    with _told_of("config.json", holds_values=False):
        # as transformers reads config.json, where infinite numbers may be written as {"__float__": "Infinity"}
        read, _ = cls.config_class.get_config_dict(checkpoint.directory, local_files_only=True)
        values = {key: value for key, value in read.items() if key not in left_out}
        config = cls.config_class(**values)
        choose_plain(config, values)
        model = skeleton(class_for(cls, config), config, _dtype(checkpoint), cached=True)
        if model.can_generate() and (checkpoint.directory / "generation_config.json").is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(checkpoint.directory)
    return model


@contextmanager
def _told_of(where: str, *, holds_values: bool = True) -> Iterator[None]:
    """Whatever a class raises while it is built from what an artifact says, as an error that names the place.

    holds_values  what is built takes memory; where it is empty, running out says that the sizes are absurd

    raises  ArtifactError, PassError if memory ran out
    """
    try:
        yield
    except CompressError:
        raise
    except Exception as error:
        if holds_values and (lack := ran_out(error)) is not None:
            raise lack from error
        raise ArtifactError(
            f"makes no model ({type(error).__name__}: {str(error)[:300]})",
            where=where,
            hint="Copy or build the artifact again.",
        ) from error


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    name = checkpoint.config.get("dtype")
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise ArtifactError(f"dtype {name!r} is none of torch's", where="config.json", hint="Build the artifact again.")
    return dtype


def _read_layer(checkpoint: Checkpoint, form: Form) -> Any:
    prefix = form.weight.name + "."
    tensors = {name.removeprefix(prefix): checkpoint.read(name) for name in _stored_names(checkpoint, form)}
    with _told_of(form.weight.name):
        return find_layer(form.form).from_tensors(form.spec, tensors)


def _stored_names(checkpoint: Checkpoint, form: Form) -> list[str]:
    """Tensors of a weight's stored form. A dense bias beside it, which may have been tied before, is none of them."""
    prefix = form.weight.name + "."
    has_dense_bias = not (form.weight.is_function or find_layer(form.form).holds_bias(form.spec))
    dense = {form.weight.bias, f"{prefix}bias" if has_dense_bias else None}
    return [name for name in checkpoint.tensors if name.startswith(prefix) and name not in dense]


def _dense_view(checkpoint: Checkpoint, forms: dict[str, Form], dtype: torch.dtype) -> Checkpoint:
    """The checkpoint with each stored weight under its dense name and shape, for translating names."""
    tensors = dict(checkpoint.tensors)
    for form in forms.values():
        stored = _stored_names(checkpoint, form)
        if not stored:
            raise ArtifactError("none of its stored tensors is there", where=form.weight.name)
        if form.weight.bias is not None and form.bias is None and form.weight.bias not in checkpoint.tensors:
            raise ArtifactError(f"its bias {form.weight.bias!r} is not there", where=form.weight.name)
        shape = form.weight.shape[::-1] if form.weight.transposed else form.weight.shape
        dense = replace(tensors[stored[0]], shape=shape, dtype=dtype)
        for name in stored:
            del tensors[name]
        if form.weight.tensor:
            tensors[form.weight.tensor] = dense
        if form.bias is not None:
            tensors[form.bias] = replace(dense, shape=(form.weight.out_features,))
    return replace(checkpoint, tensors=tensors)


def weight_files(directory: Path) -> Iterable[Path]:
    return sorted(directory.glob("*.safetensors"))
