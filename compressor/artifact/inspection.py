"""Collects what `inspect` shows of a checkpoint or an artifact, from the headers of its files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from compressor.artifact.loader import dense_view, empty_model
from compressor.artifact.manifest import read_manifest
from compressor.model.checkpoint import open_checkpoint, resolve_model
from compressor.model.overview import Overview, PartOverview, WeightView
from compressor.model.stored_weight import StoredWeight
from compressor.model.structure import inspect_model, structure_of
from compressor.storage.file_names import MANIFEST


def inspect_path(path: str, trust_remote_code: bool = False) -> Overview:
    """The parts with their tensors, bytes and weight groups. Weights of an artifact have their quantization formats."""
    directory = resolve_model(path)
    if not (directory / MANIFEST).is_file():
        return inspect_model(directory, trust_remote_code)
    return _inspect_artifact(directory)


def _inspect_artifact(directory: Path) -> Overview:
    manifest, checkpoint = read_manifest(directory), open_checkpoint(directory)
    formats = {name: StoredWeight.from_dict(entry) for name, entry in manifest["weights"].items()}
    model = empty_model(checkpoint, manifest)
    found = structure_of(dense_view(checkpoint, formats, model, model.dtype), type(model), model.config).overview()
    owners = {weight.name: part.name for part in found.parts for group in part.groups for weight in group}
    sizes = dict.fromkeys((part.name for part in found.parts), 0)
    for name, info in checkpoint.tensors.items():
        owner = owners.get(name.rpartition(".")[0])
        part = name.split(".")
        if owner is None:
            blocks = found.blocks.split(".")
            numbers = [p for p in part if p.isdigit()]
            owner = f"block {numbers[0]}" if numbers and blocks[-1] in part else "embeddings"
        sizes[owner] += info.nbytes
    parts = tuple(replace(part, bytes=sizes[part.name], groups=_as_stored(part, formats)) for part in found.parts)
    return replace(found, parts=parts)


def _as_stored(part: PartOverview, formats: dict[str, StoredWeight]) -> tuple[tuple[WeightView, ...], ...]:
    """The weight groups of a part, each weight with its quantization format."""
    return tuple(
        tuple(replace(weight, format_name=_described(formats.get(weight.name), weight.format_name)) for weight in group)
        for group in part.groups
    )


def _described(stored: StoredWeight | None, otherwise: str) -> str:
    if stored is None:
        return otherwise
    return (
        f"{stored.format_name} {stored.format_params['bits']} bits"
        if "bits" in stored.format_params
        else stored.format_name
    )
