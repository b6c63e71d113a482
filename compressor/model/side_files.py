"""Selects the files of a checkpoint that are copied to its artifact beside the weights.

Every file is copied unless a rule here gives a reason against it, because other loaders need files that no list can
know: the modules of sentence-transformers, the vocabulary of a tokenizer, or the code of a processor. The files that
are left out are reported with the reason.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from compressor.errors import ModelError
from compressor.model.model_files import entries, regular_file
from compressor.model.trusted_code import (
    CUSTOM_GENERATE,
    auto_map,
    file_of,
    files_behind,
    is_model_entry,
    read_settings,
)
from compressor.process.utf8 import is_utf8, parse_json, printable
from compressor.storage.file_names import (
    CARD,
    MANIFEST,
    QUANTIZATION_FILES,
    RECIPE,
    REPORT_FILES,
    is_plain,
    is_weight_file,
    is_weight_index,
)

MODULES = "modules.json"  # of sentence-transformers: the folders of its modules
OWN_MODELING = re.compile(r"modeling_compressed_\w+\.py")
HIDDEN = "hidden: of git, a download or an editor"
WEIGHTS = "weights, or tensors for another program; copy by hand what another program needs"
OTHER_WEIGHTS = "a folder with weights in another format, or of another model"
ADAPTER = "settings of an adapter, whose weights aren't compressed"
OWN = "the artifact has its own file of this name"
MODEL_CODE = "code of a model class; the artifact uses that of transformers, and its config.json names no other"
GENERATE = "code that takes the place of the model's generate()"
QUANTIZATION = "says how the weights of the source are quantized; config.json says it for the artifact"
CACHE = "compiled Python"
NOT_UTF8 = "the name contains bytes that are not UTF-8"
ODD_NAME = "control characters or a backslash in the name, which not every system can write"


class LeftOutRow(TypedDict):
    reason: str
    files: list[str]


class SideFilesRow(TypedDict):
    """`SideFiles` as plan and report say it."""

    carried: list[str]
    left_out: list[LeftOutRow]


@dataclass(frozen=True)
class SideFiles:
    """carried   paths relative to the checkpoint, sorted
    left_out  reason -> names, a folder as "name/"
    auto_map  the entries that config.json keeps: code that prepares the model's inputs
    """

    carried: list[Path]
    left_out: dict[str, list[str]] = field(default_factory=dict)
    auto_map: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> SideFilesRow:
        """JSON values for the plan and the report."""
        return {
            "carried": [path.as_posix() for path in self.carried],
            "left_out": [{"reason": reason, "files": names} for reason, names in self.left_out.items()],
        }


def find_side_files(directory: Path, config: dict[str, Any]) -> SideFiles:
    """The files of a checkpoint to copy, and the others with the reason. Only settings files are opened.

    config  config.json, parsed
    raises  ModelError for a link that leads out, a file that is not regular, or a settings file that can't be read
    """
    modules = _module_folders(directory)
    kept_map, unused = _code(directory, config)
    found = [path for path in entries(directory) if path.is_symlink() or not path.is_dir()]
    relatives = sorted(path.relative_to(directory) for path in found)
    folders = {path.parts[0] for path in relatives if len(path.parts) > 1 and is_weight_file(path)} - modules
    carried: list[Path] = []
    reasons: dict[str, set[str]] = {}
    for path in relatives:
        reason = _why_not(path, modules, folders, unused)
        if reason is None:
            regular_file(directory, directory / path)
            carried.append(path)
        else:
            whole = len(path.parts) > 1 and reason in (OTHER_WEIGHTS, GENERATE)
            reasons.setdefault(reason, set()).add(_shown(f"{path.parts[0]}/" if whole else path.as_posix()))
    hidden = {_shown(name) for name in os.listdir(directory) if name.startswith(".")}
    if hidden:
        reasons[HIDDEN] = hidden
    return SideFiles(carried, {reason: sorted(names) for reason, names in sorted(reasons.items())}, kept_map)


def _why_not(path: Path, modules: set[str], folders: set[str], unused: set[str]) -> str | None:
    name, top = path.as_posix(), path.parts[0]
    if not is_utf8(name):
        return NOT_UTF8
    if not is_plain(name):
        return ODD_NAME
    if len(path.parts) > 1 and top in modules:
        return None  # with its weights, which are not part of the compressed model
    if len(path.parts) > 1 and top in folders:
        return OTHER_WEIGHTS
    if is_weight_file(path) or is_weight_index(path):
        return WEIGHTS
    if top == CUSTOM_GENERATE:
        return GENERATE
    if name in (MANIFEST, CARD, RECIPE, "config.json", *REPORT_FILES) or OWN_MODELING.fullmatch(name):
        return OWN
    if name in QUANTIZATION_FILES:
        return QUANTIZATION
    if path.name.startswith("adapter_"):
        return ADAPTER
    if "__pycache__" in path.parts or path.suffix == ".pyc":
        return CACHE
    return MODEL_CODE if name in unused else None


def _shown(name: str) -> str:
    """A name for the plan and the report, escaped if they can't contain it unchanged."""
    if is_plain(name):
        return name
    return name.encode("unicode_escape").decode("ascii") if is_utf8(name) else printable(name)


def _module_folders(directory: Path) -> set[str]:
    """Folders that modules.json names. raises ModelError if it is not a list of modules"""
    path = directory / MODULES
    if not path.is_symlink() and not path.exists():
        return set()
    try:
        modules = parse_json(regular_file(directory, path).read_text("utf-8"))
        return {Path(module["path"]).parts[0] for module in modules if module["path"]}
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise ModelError(
            f"is not a list of modules ({type(error).__name__}: {error})",
            where=MODULES,
            hint="Download it again, or remove it if the model is not of sentence-transformers.",
            data={"reason": "no-module-list", "cause": f"{type(error).__name__}: {error}"},
        ) from error


def _code(directory: Path, config: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """(the `auto_map` that stays in config.json, code files that nothing names any more)."""
    dropped: list[str] = []
    kept: dict[str, Any] = {}
    for name, references in auto_map(config, "config.json").items():
        if is_model_entry(name):
            dropped += references
        elif all("--" in reference or (directory / file_of(reference)).is_file() for reference in references):
            kept[name] = config["auto_map"][name]
    needed = [ref for name in kept for ref in auto_map({"auto_map": kept}, "config.json")[name]]
    for path in sorted(directory.glob("*config.json")):
        if path.name != "config.json" and path.name in SETTINGS:
            settings = read_settings(directory, path.name)
            needed += [ref for refs in auto_map(settings, path.name).values() for ref in refs]
    return kept, files_behind(directory, dropped) - files_behind(directory, needed)


SETTINGS = (
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "image_processor_config.json",
)  # settings files of transformers that may have an `auto_map`, beside config.json
