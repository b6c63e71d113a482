"""Collects what `inspect` shows of a checkpoint or an artifact, from the headers of its files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from compressor.artifact.loader import dense_view, empty_model
from compressor.artifact.manifest import read_manifest
from compressor.model.checkpoint import open_checkpoint
from compressor.model.ledger_accounts import make_ledger
from compressor.model.model_names import resolve_model
from compressor.model.overview import Overview, PartOverview, WeightView
from compressor.model.stored_weight import StoredWeight
from compressor.model.structure import read_structure, structure_of
from compressor.storage.file_names import MANIFEST


def inspect_path(path: str, trust_remote_code: bool = False) -> Overview:
    """The parts with their tensors, bytes and weight groups. Weights of an artifact have their quantization formats."""
    directory = resolve_model(path)
    if (directory / MANIFEST).is_file():
        return _inspect_artifact(directory)
    structure = read_structure(directory, trust_remote_code=trust_remote_code)
    return replace(structure.overview(), ledger=make_ledger(structure, structure, ()))


def _inspect_artifact(directory: Path) -> Overview:
    manifest, checkpoint = read_manifest(directory), open_checkpoint(directory)
    formats = {name: StoredWeight.from_dict(entry) for name, entry in manifest["weights"].items()}
    model = empty_model(checkpoint, manifest)
    structure = structure_of(dense_view(checkpoint, formats, model, model.dtype), type(model), model.config)
    found, held = structure.overview(), structure.part_by_tensor
    sizes = [0] * len(found.parts)
    for name in checkpoint.tensors.keys() - manifest.get("carried", {}).keys():
        stored = formats.get(name.rpartition(".")[0])
        part = held.get(name, 0) if stored is None else structure.part_of(stored.weight.parameter)
        sizes[part] += checkpoint.tensors[name].nbytes
    parts = tuple(
        replace(shown, bytes=size, groups=_as_stored(shown, formats))
        for shown, size in zip(found.parts, sizes, strict=True)
    )
    return replace(found, parts=parts, ledger=manifest.get("ledger"))


def _as_stored(part: PartOverview, formats: dict[str, StoredWeight]) -> tuple[tuple[WeightView, ...], ...]:
    """The weight groups of a part, each weight with its quantization format."""
    return tuple(
        tuple(replace(weight, format_name=_described(formats.get(weight.name), weight.format_name)) for weight in group)
        for group in part.groups
    )


def _described(stored: StoredWeight | None, otherwise: str) -> str:
    return otherwise if stored is None else stored.described
