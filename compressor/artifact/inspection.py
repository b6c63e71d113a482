"""What `inspect` shows of a checkpoint or an artifact, from headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compressor.artifact.loader import dense_view, empty_model
from compressor.artifact.manifest import read_manifest
from compressor.model.checkpoint import open_checkpoint, resolve_model
from compressor.model.stored_weight import StoredWeight
from compressor.model.structure import inspect_model, structure_of
from compressor.storage.file_names import MANIFEST


def inspect_path(path: str, trust_remote_code: bool = False) -> dict[str, Any]:
    """Units with their tensors, bytes and weight groups; an artifact's weights carry their stored forms."""
    directory = resolve_model(path)
    if not (directory / MANIFEST).is_file():
        return inspect_model(directory, trust_remote_code)
    return _inspect_artifact(directory)


def _inspect_artifact(directory: Path) -> dict[str, Any]:
    manifest, checkpoint = read_manifest(directory), open_checkpoint(directory)
    forms = {name: StoredWeight.from_dict(entry) for name, entry in manifest["weights"].items()}
    model = empty_model(checkpoint, manifest)
    found = structure_of(dense_view(checkpoint, forms, model.dtype), type(model), model.config).to_dict()
    for unit in found["units"]:
        for group in unit["groups"]:
            for weight in group:
                if (form := forms.get(weight["name"])) is not None:
                    weight["form"] = f"{form.form} {form.spec['bits']} bits" if "bits" in form.spec else form.form
        unit["bytes"] = 0
    units = {unit["name"]: unit for unit in found["units"]}
    owners = {name: unit for unit in found["units"] for group in unit["groups"] for name in (w["name"] for w in group)}
    for name, info in checkpoint.tensors.items():
        owner = owners.get(name.rpartition(".")[0])
        part = name.split(".")
        if owner is None:
            blocks = found["blocks"].split(".")
            numbers = [p for p in part if p.isdigit()]
            owner = units[f"block {numbers[0]}"] if numbers and blocks[-1] in part else units["stem"]
        owner["bytes"] += info.nbytes
    return found
