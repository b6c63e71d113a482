"""Finds the code that is bundled with a model, and prevents it from running without permission.

No file of a model's directory is imported unless the user passes --trust-remote-code. The one exception is the modeling
file of a custom artifact: if its text is exactly what this release generates for that config, the compared text runs
(`run_generated`). It is found by its own path and never through `auto_map`.

transformers imports code of a directory in two ways only: an entry of an `auto_map`, and `custom_generate/generate.py`.
Both need `trust_remote_code=True`. Without an explicit False it asks on a terminal, so every call here passes one of
the two.
"""

from __future__ import annotations

import ast
import hashlib
import linecache
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from compressor.errors import ArtifactError, Because, ModelError
from compressor.model.model_files import entries, regular_file
from compressor.process.utf8 import parse_json

CODE = (".py", ".pyc", ".pyd", ".so", ".dll", ".dylib")
CUSTOM_GENERATE = "custom_generate"  # folder whose generate.py replaces a model's `generate`
FLAG = "Read that code, then pass --trust-remote-code to run it."
MAX_JSON_BYTES = 64 << 20  # of a settings file; the largest seen are below 1 MiB


def is_code(name: str | Path) -> bool:
    """Whether a file could be imported."""
    return Path(name).suffix.lower() in CODE


def code_files(directory: Path) -> list[str]:
    """Sorted paths, relative to the directory, of every file that could be imported. No file is opened."""
    return sorted(path.relative_to(directory).as_posix() for path in entries(directory) if is_code(path))


def auto_map(values: dict[str, Any], where: str) -> dict[str, list[str]]:
    """An `auto_map` as a map from the name of an Auto class to references such as "modeling_x.XForCausalLM".

    raises  ModelError if it is not such a map, or a reference is not to a module beside it
    """
    found = values.get("auto_map") or {}
    if isinstance(found, list):  # the older form of tokenizers: the slow class and the fast one
        found = {"AutoTokenizer": found}
    if not isinstance(found, dict):
        raise ModelError(
            "`auto_map` is not a map",
            where=where,
            hint='Write a map such as {"AutoModel": "modeling_x.XModel"}, or download the file again.',
            data={"reason": "auto-map"},
        )
    result: dict[str, list[str]] = {}
    for name, value in found.items():
        references = [item for item in (value if isinstance(value, list) else [value]) if item is not None]
        for reference in references:
            if not isinstance(reference, str) or not _is_reference(reference):
                raise ModelError(
                    f"`auto_map` has {reference!r} for {name}; the name of a module beside it and of a class is needed",
                    where=where,
                    hint="Write an entry such as modeling_x.XForCausalLM, or download the file again.",
                    data={"reason": "auto-map-entry", "name": name, "value": repr(reference)},
                )
        result[name] = references
    return result


def is_model_entry(name: str) -> bool:
    """Whether an entry of an `auto_map` is for a model or its config, not for code that prepares its inputs."""
    return name.startswith(("AutoConfig", "AutoModel")) or name.startswith("TFAuto") or name.startswith("FlaxAuto")


def file_of(reference: str) -> str:
    """The file that a reference of an `auto_map` names, with the repository in front if it is another one."""
    repository, _, rest = reference.rpartition("--")
    file = rest.rpartition(".")[0].replace(".", "/") + ".py"
    return f"{repository}--{file}" if repository else file


def files_behind(directory: Path, references: list[str]) -> set[str]:
    """The existing files that references name, and those that these import from their folder. None of them runs."""
    waiting = [file_of(reference) for reference in references]
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in found or "--" in name or not (directory / name).is_file():
            continue
        found.add(name)
        folder = Path(name).parent
        waiting += [
            (folder / other).as_posix() for other in _relative_imports(regular_file(directory, directory / name))
        ]
    return found


def required_code(directory: Path, references: list[str]) -> str:
    """The files that must run for a class that transformers doesn't have, as text for a message."""
    names = sorted({file_of(reference) for reference in references})
    is_there = {name: "--" in name or (directory / name).is_file() for name in names}
    return ", ".join(name if is_there[name] else f"{name} (which is missing)" for name in names)


def tokenizer_code(directory: Path) -> tuple[str, list[str]]:
    """(file that names them, references to a tokenizer's own code); no references if transformers has the class.

    transformers reads only the `auto_map` of tokenizer_config.json. That of config.json is used if a class is named
    that is found nowhere else.

    raises  ModelError for a tokenizer_config.json or config.json that can't be read
    """
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    settings, config = (read_settings(directory, name) for name in ("tokenizer_config.json", "config.json"))
    where, references = "tokenizer_config.json", auto_map(settings, "tokenizer_config.json").get("AutoTokenizer", [])
    stated = settings.get("tokenizer_class") or config.get("tokenizer_class")
    if not references and stated:
        where, references = "config.json", auto_map(config, "config.json").get("AutoTokenizer", [])
    name = stated.removesuffix("Fast") if isinstance(stated, str) else ""
    known = name and (tokenizer_class_from_name(name) or tokenizer_class_from_name(name + "Fast"))
    return where, [] if known else references


def carried_code_problems(directory: Path, source: Path | None, trust: bool, own: re.Pattern[str]) -> list[str]:
    """Problems with code of an artifact (except its model's) that `run` did not copy, or that the user does not trust.

    source  the checkpoint that it was made from: its code is copied byte for byte. None: it is not available
    trust   the user has read the code
    own     names of modeling files, which are compared with what this release writes
    """
    if source is not None:
        carried = [name for name in code_files(directory) if not own.fullmatch(name)]
        return [
            Because(f"{name} is code that the source doesn't have", reason="not-of-source", file=name)
            for name in carried
            if not _same(name, directory, source)
        ]
    where, references = tokenizer_code(directory)
    if trust or not references:
        return []
    code = required_code(directory, references)
    message = f"{where} names code for the tokenizer, {code}. Compare it with its --source, or: {FLAG}"
    return [Because(message, reason="tokenizer-code", where=where, code=str(code))]


def _same(name: str, directory: Path, source: Path) -> bool:
    """Whether two directories have the same file under this name."""
    both = (directory / name, source / name)
    if not all(path.is_file() for path in both):
        return False
    here, there = (regular_file(folder, path).read_bytes() for folder, path in zip((directory, source), both))
    return here == there


def check_kernels(config: Any, where: str = "config.json") -> None:
    """Attention of another repository (`"attn_implementation": "owner/kernel"`) is code too.

    raises  ModelError if a config, or a config inside it, names one
    """
    if not isinstance(config, dict):
        return
    for key, value in config.items():
        if key.lstrip("_").startswith(("attn_implementation", "experts_implementation")):
            named = value.values() if isinstance(value, dict) else [value]
            if any(isinstance(name, str) and "/" in name for name in named):
                raise ModelError(
                    f"{key} {value!r} names code of another repository",
                    where=where,
                    hint="Remove the key from config.json; transformers then uses its own attention.",
                    data={"reason": "code-elsewhere", "key": key, "value": str(value)},
                )
        check_kernels(value, where)


def read_settings(directory: Path, name: str) -> dict[str, Any]:
    """A JSON settings file; {} if there is none. raises ModelError if it can't be read"""
    path = directory / name
    if not path.is_symlink() and not path.exists():
        return {}
    if regular_file(directory, path).stat().st_size > MAX_JSON_BYTES:
        raise ModelError(
            f"is larger than {MAX_JSON_BYTES:,} bytes",
            where=name,
            hint="Download this file again: hf download NAME.",
            data={"reason": "too-large", "limit": MAX_JSON_BYTES},
        )
    try:
        value = parse_json(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"is not valid JSON ({error})",
            where=name,
            hint="Download this file again: hf download NAME.",
            data={"reason": "no-json", "cause": str(error)},
        ) from error
    if not isinstance(value, dict):
        raise ModelError("is not a JSON object", where=name, hint="Download this file again: hf download NAME.")
    return value


def read_generated(directory: Path, name: str, expected: str) -> str:
    """The text of a modeling file, if it is exactly the expected one.

    raises  ArtifactError for another text, which does not run
    """
    text = regular_file(directory, directory / name).read_bytes()
    if text != expected.encode():
        raise ArtifactError(
            "is not the modeling file that this release writes",
            where=name,
            hint="Verify it with the release that wrote it (compress_manifest.json names it). compressor.load needs "
            "no modeling file; nothing of this one was run.",
            data={"reason": "changed-code"},
        )
    return expected


def run_generated(text: str, path: Path) -> ModuleType:
    """The module from a text that `read_generated` returned. The file is not opened again.

    path  where transformers may look up the source of a class
    """
    digest = hashlib.sha256(f"{path}\n{text}".encode()).hexdigest()
    module = ModuleType(f"compressor_generated_{digest[:16]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # classes are looked up by the name of their module
    linecache.cache[str(path)] = (len(text), None, text.splitlines(keepends=True), str(path))  # for inspect
    exec(compile(text, str(path), "exec", dont_inherit=True), module.__dict__)
    return module


def _is_reference(reference: str) -> bool:
    repository, separator, rest = reference.rpartition("--")
    parts = rest.split(".")
    return len(parts) >= 2 and all(part.isidentifier() for part in parts) and bool(repository) == bool(separator)


def _relative_imports(path: Path) -> Iterator[str]:
    """Files, relative to the module's folder, that a module imports with a leading dot."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):  # it can't be imported, so it imports nothing
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        above = "../" * (node.level - 1)
        for module in [node.module] if node.module else [alias.name for alias in node.names]:
            yield f"{above}{module.replace('.', '/')}.py"
