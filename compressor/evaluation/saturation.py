"""Counts how many input values of a layer are outside the range that was found on calibration data."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from compressor.artifact.manifest import read_manifest
from compressor.evaluation.sections import RangeRow, Saturation
from compressor.storage.file_names import MANIFEST


@dataclass
class RangeCounts:
    """Counts the values that modules read, and those outside of their range.

    counts   module -> values read, and values outside; only modules that have a range
    watched  names of all modules that were asked
    """

    counts: dict[str, list[int]] = field(default_factory=dict)
    watched: set[str] = field(default_factory=set)

    def watch(self, module: Any, prefix: str = "") -> None:
        """Begin counting for each module inside this one that has a method `outside(x)` (see `Layer.outside`).

        prefix  the path of this module in the model, with a dot at its end
        """
        for name, inner in module.named_modules():
            if callable(getattr(inner, "outside", None)):
                self.watched.add(prefix + name)
                inner.register_forward_pre_hook(partial(self._count, prefix + name), with_kwargs=True)

    def _count(self, name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        found = module.outside(x)
        if found is not None:
            seen = self.counts.setdefault(name, [0, 0])
            seen[0] += x.numel()
            seen[1] += int(found)


def saturation(directory: Path, counted: RangeCounts) -> Saturation:
    """The report's section. A layer that replaces a weight has the weight's name."""
    manifest = read_manifest(directory) if (directory / MANIFEST).is_file() else None
    entries = {} if manifest is None else manifest["weights"]
    module_of = {name: entry["parameter"].removesuffix(".weight") for name, entry in entries.items()}
    silent = [name for name, module in module_of.items() if module not in counted.watched]
    reason = None
    if manifest is not None and silent:
        reason = (
            f"{len(silent)} stored weights, such as {silent[0]}, run in the loader's own layers ({manifest['route']}), "
            "which don't report values outside a range"
        )
    elif not counted.counts:
        reason = "no layer has a range for its input"
    named = {module: name for name, module in module_of.items()}
    rows: list[RangeRow] = [
        {"name": named.get(module, module), "values": values, "outside": outside}
        for module, (values, outside) in sorted(counted.counts.items())
    ]
    return {"reason": reason, "layers": rows}


def uncounted(reason: str) -> Saturation:
    """The section if nothing was counted."""
    return {"reason": reason, "layers": []}
