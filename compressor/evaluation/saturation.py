"""Counts how many input values of a layer are outside the range that was found on calibration data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compressor.artifact.manifest import read_manifest
from compressor.evaluation.sections import RangeRow, Saturation
from compressor.storage.file_names import MANIFEST


def watch_ranges(model: Any) -> dict[str, list[int]]:
    """Begin counting, for each module: values read, and values outside its range.

    Every module with a method `outside(x)` is asked (see `Layer.outside`); None means that it has no range.
    """
    counts: dict[str, list[int]] = {}

    def count(name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        found = module.outside(x)
        if found is not None:
            seen = counts.setdefault(name, [0, 0])
            seen[0] += x.numel()
            seen[1] += int(found)

    for name, module in model.named_modules():
        if _says_outside(module):
            module.register_forward_pre_hook(
                lambda module, args, kwargs, name=name: count(name, module, args, kwargs), with_kwargs=True
            )
    return counts


def saturation(directory: Path, model: Any, counts: dict[str, list[int]]) -> Saturation:
    """The report's section, from the counts of `watch_ranges`. A layer that replaces a weight has the weight's name."""
    manifest = read_manifest(directory) if (directory / MANIFEST).is_file() else None
    entries = {} if manifest is None else manifest["weights"]
    module_of = {name: entry["parameter"].removesuffix(".weight") for name, entry in entries.items()}
    modules = dict(model.named_modules())
    silent = [name for name, module in module_of.items() if not _says_outside(modules.get(module))]
    reason = None
    if manifest is not None and silent:
        reason = (
            f"{len(silent)} stored weights, such as {silent[0]}, run in the loader's own layers ({manifest['route']}), "
            "which don't report values outside a range"
        )
    elif not counts:
        reason = "no layer has a range for its input"
    named = {module: name for name, module in module_of.items()}
    rows: list[RangeRow] = [
        {"name": named.get(module, module), "values": values, "outside": outside}
        for module, (values, outside) in sorted(counts.items())
    ]
    return {"reason": reason, "layers": rows}


def uncounted(reason: str) -> Saturation:
    """The section if nothing was counted."""
    return {"reason": reason, "layers": []}


def _says_outside(module: Any) -> bool:
    return callable(getattr(module, "outside", None))
