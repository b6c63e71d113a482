"""Decides which files of an artifact matter, and which may be removed.

An artifact from a hub repository or a git clone has more files than were written, and its model card may have been
edited. Neither changes what a loader makes of it. So there are two kinds of files:

- Files that matter: weights, settings and code, that is, what a loader of models or tokenizers opens. Each must be
  exactly as the manifest lists it, and there may be no file of this kind that the manifest doesn't list.
- Documentation: all other files, such as the model card, licences, reports, images, and every name that begins with a
  dot. A change of documentation is reported and is not an error.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from compressor.artifact.manifest import FileFacts, Manifest, read_manifest
from compressor.errors import ArtifactError, Because, ModelError, UsageError
from compressor.model.model_files import entries, is_hidden, regular_file
from compressor.model.trusted_code import is_code
from compressor.storage.file_names import CARD, MANIFEST, RECIPE, REPORT_FILES, is_weight_file
from compressor.storage.files import file_sha256

DOCUMENTATION = {CARD, RECIPE, *REPORT_FILES}
# settings that loaders of models, tokenizers and processors read, by words in their file names
SETTINGS = re.compile(r"config|token|vocab|merges|template|process|index|modules|adapter|special|params", re.I)
TOKENIZER = (".model", ".tiktoken", ".spm", ".bpe", ".jinja", ".vocab")


def matters(name: str) -> bool:
    """Whether a loader of models or tokenizers may open a file of this name, relative to the artifact."""
    path = Path(name)
    if is_hidden(path) or name in DOCUMENTATION:
        return False
    if is_weight_file(path) or is_code(path) or path.suffix in TOKENIZER:
        return True
    return path.suffix in (".json", ".txt") and SETTINGS.search(path.name) is not None


def file_facts(directory: Path) -> dict[str, FileFacts]:
    """The `files` of a manifest: every file below the directory with its bytes and hash, except the manifest itself."""
    return {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path != directory / MANIFEST
    }


def compare_files(directory: Path, manifest: Manifest) -> tuple[list[str], list[str]]:
    """Differences from the manifest, each as a sentence: (problems, changes of the documentation)."""
    problems: list[str] = []
    notes: list[str] = []
    for name, facts in manifest["files"].items():
        found = problems if matters(name) else notes
        path = directory / name
        if not path.is_symlink() and not path.exists():
            found.append(Because(f"{name} is missing", reason="missing", file=name))
            continue
        try:
            regular_file(directory, path)
        except ModelError as error:
            problems.append(Because(str(error), **error.data))
            continue
        if path.stat().st_size != facts["bytes"] or file_sha256(path) != facts["sha256"]:
            message = f"{name} was changed after it was written (its hash differs)"
            found.append(Because(message, reason="changed", file=name))
    try:
        present = [path for path in entries(directory) if path.is_symlink() or not path.is_dir()]
    except ModelError as error:
        return [*problems, Because(str(error), **error.data)], notes
    for path in present:
        name = path.relative_to(directory).as_posix()
        if name not in manifest["files"] and name != MANIFEST:
            message = f"{name} is not in the manifest"
            (problems if matters(name) else notes).append(Because(message, reason="not-listed", file=name))
    return problems, notes


def check_files(directory: Path, manifest: Manifest) -> list[str]:
    """Problems with the files that matter. Documentation may differ from the manifest."""
    return compare_files(directory, manifest)[0]


def remove_artifact(directory: Path) -> None:
    """Delete an artifact. raises UsageError, before deleting, if it holds anything that this tool didn't write"""
    for path in owned_files(directory):
        path.unlink(missing_ok=True)
    for folder, _, _ in os.walk(directory, topdown=False):
        os.rmdir(folder)


def owned_files(directory: Path) -> list[Path]:
    """Every file of an artifact, each as this tool wrote it.

    raises UsageError if the directory is a symbolic link or no artifact, or if it holds a link, an unlisted file, or a
    file that was changed after it was written: it could be the only copy
    """
    if directory.is_symlink():
        raise UsageError(
            "is a symbolic link, not a directory",
            where=str(directory),
            hint="Pass the directory itself, or choose another --output.",
            data={"reason": "is-link"},
        )
    try:
        manifest = read_manifest(directory)
    except (ArtifactError, ModelError) as error:
        raise UsageError(
            f"exists and is not an artifact of compress-model ({error})",
            where=str(directory),
            hint="Choose another --output.",
            data={"reason": "no-artifact", "cause": str(error)},
        ) from error
    listed: dict[str, FileFacts | None] = {**manifest["files"], MANIFEST: None}
    owned, foreign, changed = [], [], []
    for folder, folders, files in os.walk(directory):
        for name in [*files, *(name for name in folders if os.path.islink(os.path.join(folder, name)))]:
            path = Path(folder, name)
            relative = path.relative_to(directory).as_posix()
            if relative not in listed or not stat.S_ISREG(path.lstat().st_mode):
                foreign.append(relative)
            elif not _is_as_written(path, listed[relative]):
                changed.append(relative)
            else:
                owned.append(path)
    for names, what, reason in (
        (foreign, "holds files that compress-model did not write", "foreign-files"),
        (changed, "holds files that were changed", "changed-files"),
    ):
        if names:
            raise UsageError(
                f"{what} ({', '.join(sorted(names)[:3])})",
                where=str(directory),
                hint="Move these files to another directory, or choose another --output.",
                data={"reason": reason, "names": sorted(names)},
            )
    return sorted(owned)


def _is_as_written(path: Path, facts: FileFacts | None) -> bool:
    """Whether a file is byte for byte as the manifest lists it. An equal size is not enough."""
    if facts is None:  # the manifest itself
        return True
    return path.stat().st_size == facts["bytes"] and file_sha256(path) == facts["sha256"]
