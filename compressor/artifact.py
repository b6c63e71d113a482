"""Writes and loads the deployable result. Knows layers, never passes. Format: docs/format.md.

The weight files are streamed from the unit files; the manifest with the hash of every file is written last, so a
directory without a manifest is not an artifact.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from compressor.binding import bind, fill, read_parameter
from compressor.checkpoint import Checkpoint, open_checkpoint
from compressor.classes import class_for
from compressor.errors import ArtifactError, UsageError
from compressor.export import Route, artifact_config
from compressor.files import file_sha256
from compressor.kernels.prepared import prepare
from compressor.layers import find_layer
from compressor.modelling import VERSION, modelling_file
from compressor.safetensors_file import Entry, TensorInfo, read_bytes, read_header, write_file
from compressor.structure import Structure, skeleton
from compressor.units import Form

MANIFEST = "compress_manifest.json"
FORMAT_VERSION = 1
KERNELS = ("auto", "strict", "reference")
REPORT_FILES = ("report.json", "report.md", "report.html", "junit.xml")


@dataclass(frozen=True)
class Named:
    """A tensor of the result before it has a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


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
    named = [Named(name, info.dtype, info.shape, info.nbytes) for name, info in infos.items()]
    shards = assign_shards(named, shard_bytes)
    for file, names in shards.items():
        entries = [
            Entry(name, infos[name].dtype, infos[name].shape, partial(read_bytes, infos[name])) for name in names
        ]
        write_file(directory / file, entries)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(info.nbytes for info in infos.values())},
            "weight_map": dict(sorted((name, file) for file, names in shards.items() for name in names)),
        }
        write_json(directory / "model.safetensors.index.json", index)
    dtype = str(structure.dtype).removeprefix("torch.")
    config = artifact_config(structure.checkpoint.config, route, forms, structure.model, dtype, untied)
    write_json(directory / "config.json", config)
    if route.name == "custom":
        text = modelling_file(structure.model, (form.form for form in forms))
        (directory / f"modeling_{config['model_type']}.py").write_text(text)
    for relative in structure.checkpoint.files_to_carry():
        (directory / relative).parent.mkdir(exist_ok=True)
        shutil.copyfile(structure.checkpoint.directory / relative, directory / relative)
    (directory / "recipe.yaml").write_text(recipe_yaml)


def seal(directory: Path, *, architecture: str, route: Route, forms: Sequence[Form], source: dict[str, Any]) -> None:
    """Write the manifest over everything that lies in the directory; the last act of writing an artifact."""
    files = {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    manifest = {
        "format_version": FORMAT_VERSION,
        "tool": {"name": "compress-model", "version": VERSION},
        "architecture": architecture,
        "route": route.name,
        "reason": route.reason,
        "source": source,
        "weights": {form.weight.name: form.to_dict() for form in forms},
        "layers": {form.form: find_layer(form.form).__module__.partition(".")[0] for form in forms},
        "files": files,
    }
    write_json(directory / MANIFEST, manifest)


def read_manifest(directory: Path) -> dict[str, Any]:
    """raises ArtifactError if there is none or it can't be read"""
    path = directory / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"has no {MANIFEST}, so it is not a finished artifact", where=str(directory))
    try:
        manifest = json.loads(path.read_text())
        if manifest["format_version"] != FORMAT_VERSION:
            raise ArtifactError(
                f"format version {manifest['format_version']}, this release reads {FORMAT_VERSION}",
                where=directory.name,
                hint="Update compress-model.",
            )
        return manifest
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"is damaged ({error})", where=MANIFEST) from error


def check_files(directory: Path, manifest: dict[str, Any]) -> list[str]:
    """Every file as the manifest says, and none beside them; returns the problems."""
    problems = []
    for name, facts in manifest["files"].items():
        path = directory / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != facts["bytes"] or file_sha256(path) != facts["sha256"]:
            problems.append(f"{name} is not what was written (its hash differs)")
    present = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    problems += [f"{name} is not in the manifest" for name in sorted(present - set(manifest["files"]) - {MANIFEST})]
    return problems


def remove_artifact(directory: Path) -> None:
    """Delete what the manifest lists. raises UsageError if anything else lies there, before deleting"""
    for path in owned_files(directory):
        path.unlink(missing_ok=True)
    for folder in sorted((path for path in directory.rglob("*") if path.is_dir()), reverse=True):
        folder.rmdir()
    directory.rmdir()


def owned_files(directory: Path) -> list[Path]:
    """Every file of an artifact. raises UsageError if it isn't one of ours, or holds anything else"""
    try:
        manifest = read_manifest(directory)
    except ArtifactError as error:
        raise UsageError(
            "exists and is not an artifact of this tool", where=str(directory), hint="Choose another --output."
        ) from error
    listed = {*manifest["files"], MANIFEST}
    foreign = sorted(
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if path.is_file() and path.relative_to(directory).as_posix() not in listed
    )
    if foreign:
        raise UsageError(
            f"holds files this tool did not write ({', '.join(foreign[:3])})",
            where=str(directory),
            hint="Move them away first.",
        )
    return [directory / name for name in sorted(listed)]


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
        raise UsageError(f"kernels {kernels!r}", hint="Use one of: " + ", ".join(KERNELS))
    directory = Path(directory)
    manifest = read_manifest(directory)
    if check_hashes and (problems := check_files(directory, manifest)):
        raise ArtifactError("; ".join(problems[:4]), where=directory.name, hint="Copy or build the artifact again.")
    checkpoint = open_checkpoint(directory)
    forms = {name: Form.from_dict(entry) for name, entry in manifest["weights"].items()}
    model = _empty_model(checkpoint, manifest)
    dtype = getattr(torch, checkpoint.config["dtype"])
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

    bindings = bind(model, _dense_view(checkpoint, forms))
    modules = {
        form.weight.parameter.removesuffix(".weight"): name
        for name, form in forms.items()
        if form.weight.expert is None
    }
    for name in bindings.sources:
        if name.removesuffix(".weight") not in modules or not name.endswith(".weight"):
            value = read_parameter(name, bindings, read, model)
            fill(name, value.to(dtype) if value.is_floating_point() else value, model)
    for target, origin in bindings.tied.items():
        owner, _, leaf = target.rpartition(".")
        model.get_submodule(owner)._parameters[leaf] = model.get_parameter(origin)
    for form in sorted({form.form for form in forms.values()}):
        find_layer(form).prepare(model)
    for module, name in modules.items():
        owner, _, leaf = module.rpartition(".")
        if forms[name].bias is None:
            layers[name].bias = getattr(getattr(model.get_submodule(owner), leaf, None), "bias", None)
        layers[name].dtype = dtype
        setattr(model.get_submodule(owner), leaf, layers[name])
    model = model.to(torch.device(device))  # type: ignore[arg-type]
    if kernels != "reference":
        prepare(model, activations=activations, strict=kernels == "strict")
    return model


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _empty_model(checkpoint: Checkpoint, manifest: dict[str, Any]) -> transformers.PreTrainedModel:
    cls = getattr(transformers, manifest["architecture"])
    values = {key: value for key, value in checkpoint.config.items() if key not in ("quantization_config", "auto_map")}
    values.pop("model_type")
    values.pop("compressed_weights", None)
    config = cls.config_class(**values)
    model = skeleton(class_for(cls, config), config, cached=True)
    if model.can_generate() and (checkpoint.directory / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(checkpoint.directory)
    return model


def _read_layer(checkpoint: Checkpoint, form: Form) -> Any:
    prefix = form.weight.name + "."
    tensors = {
        name.removeprefix(prefix): checkpoint.read(name)
        for name in checkpoint.tensors
        if name.startswith(prefix) and name != form.weight.bias
    }
    try:
        return find_layer(form.form).from_tensors(form.spec, tensors)
    except (KeyError, AttributeError) as error:
        raise ArtifactError(f"its stored tensors are incomplete ({error})", where=form.weight.name) from error


def _dense_view(checkpoint: Checkpoint, forms: dict[str, Form]) -> Checkpoint:
    """The checkpoint with each stored weight under its dense name and shape, for translating names."""
    tensors = dict(checkpoint.tensors)
    for form in forms.values():
        prefix = form.weight.name + "."
        stored = [name for name in tensors if name.startswith(prefix) and name != form.weight.bias]
        if not stored:
            raise ArtifactError("none of its stored tensors is there", where=form.weight.name)
        shape = form.weight.shape[::-1] if form.weight.transposed else form.weight.shape
        dense = replace(tensors[stored[0]], shape=shape)
        for name in stored:
            del tensors[name]
        if form.weight.tensor:
            tensors[form.weight.tensor] = dense
        if form.bias is not None:
            tensors[form.bias] = replace(dense, shape=(form.weight.out_features,))
    return replace(checkpoint, tensors=tensors)


def weight_files(directory: Path) -> Iterable[Path]:
    return sorted(directory.glob("*.safetensors"))
