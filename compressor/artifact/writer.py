"""Writes an artifact: shards, config, side files and the manifest. It knows layers, but not passes. See docs/format.md.

The weight files are streamed from the part files. The manifest, with the hash of every file, is written last. So a
directory without a manifest is not an artifact.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from compressor._version import __version__
from compressor.artifact.artifact_config import artifact_config
from compressor.artifact.export_format import ExportFormat
from compressor.artifact.files import file_facts
from compressor.artifact.manifest import FORMAT_VERSION, Manifest, Source
from compressor.artifact.modeling_file import modeling_source
from compressor.layers import find_layer
from compressor.model.ledger import Ledger
from compressor.model.stored_weight import StoredWeight, has_experts
from compressor.model.structure import Structure
from compressor.model.unused_tensors import Unused
from compressor.storage.file_names import MANIFEST
from compressor.storage.safetensors_file import Entry, HasDtype, TensorInfo, read_header, read_pieces, write_file


@dataclass(frozen=True)
class Named(HasDtype):
    """A tensor of the result before it is assigned to a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    small: str | None = None


def assign_shards(tensors: Sequence[Named], shard_bytes: int) -> dict[str, list[str]]:
    """File name -> tensor names. Tensors of one module stay together. Files are filled in the given order."""
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
    """Tensors of the source that the model doesn't use and that are copied into the artifact, bit for bit."""
    return [unused for unused in structure.bindings.unused if unused.is_carried]


def carried_tensors(structure: Structure) -> dict[str, TensorInfo]:
    """Where the carried tensors lie, by name."""
    return {unused.tensor: structure.checkpoint.tensors[unused.tensor] for unused in carried(structure)}


def untied_copies(structure: Structure, formats: Sequence[StoredWeight], untied: bool) -> dict[str, str]:
    """Parameter -> the tensor that it shared and now has a copy of, if the new config.json unties everything."""
    own = {stored.weight.parameter for stored in formats}
    bindings = structure.bindings
    shared = {} if not untied else {name: source for name, source in bindings.tied.items() if name not in own}
    return {name: bindings.sources[source][0].tensor for name, source in shared.items()}


def write_artifact(
    directory: Path,
    structure: Structure,
    parts: Sequence[Path],
    formats: Sequence[StoredWeight],
    export_format: ExportFormat,
    shard_bytes: int,
    untied: bool,
    recipe_yaml: str,
) -> None:
    """Write weights, config, tokenizer and recipe into a new directory. Reports, card and manifest follow later.

    parts  one file per part, in order, with every tensor of the result exactly once
    """
    directory.mkdir()
    infos: dict[str, TensorInfo] = {}
    for part in parts:
        infos.update(read_header(part))
    infos |= {name: infos[tensor] for name, tensor in untied_copies(structure, formats, untied).items()}
    infos |= carried_tensors(structure)
    named = [Named(name, info.dtype, info.shape, info.nbytes, info.small) for name, info in infos.items()]
    shards = assign_shards(named, shard_bytes)
    for file, names in shards.items():
        entries = [
            Entry(name, infos[name].dtype, infos[name].shape, partial(read_pieces, infos[name]), infos[name].small)
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
    config = artifact_config(
        structure.checkpoint.carried_config, export_format, formats, structure.model, dtype, untied
    )
    write_json(directory / "config.json", config)
    if export_format.name == "custom":
        text = modeling_source(
            structure.model, (stored.format_name for stored in formats), experts=has_experts(formats)
        )
        (directory / f"modeling_{config['model_type']}.py").write_text(text)
    for relative in structure.checkpoint.side_files.carried:
        (directory / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(structure.checkpoint.directory / relative, directory / relative)
    (directory / "recipe.yaml").write_text(recipe_yaml)


def seal(
    directory: Path,
    *,
    architecture: str,
    export_format: ExportFormat,
    formats: Sequence[StoredWeight],
    source: Source,
    ledger: Ledger | None = None,
    carried: Sequence[Unused] = (),
) -> None:
    """Write the manifest over all files of the directory. This is the last step of writing an artifact."""
    manifest: Manifest = {
        "format_version": FORMAT_VERSION,
        "tool": {"name": "compress-model", "version": __version__},
        "architecture": architecture,
        "route": export_format.name,
        "reason": export_format.reason,
        "source": source,
        "weights": {stored.weight.name: stored.to_dict() for stored in formats},
        "carried": {unused.tensor: list(unused.reported) for unused in carried},
        "layers": {
            stored.format_name: find_layer(stored.format_name).__module__.partition(".")[0] for stored in formats
        },
        "files": file_facts(directory),
    }
    if ledger is not None:
        manifest["ledger"] = ledger
    write_json(directory / MANIFEST, manifest)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
