"""Loads an artifact through transformers alone, without importing code of its directory.

A stock artifact is loaded by its class of transformers. A custom artifact is loaded by the class of its modeling file,
which runs only if its text is what this release generates (`trusted_code`). transformers gets the class itself and
`trust_remote_code=False`. So it follows no `auto_map` and looks for no `custom_generate`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compressor.artifact.artifact_config import auto_classes, custom_auto_map
from compressor.artifact.loader import empty_model
from compressor.artifact.manifest import Loadable
from compressor.artifact.modeling_file import custom_type, modeling_source
from compressor.artifact.stock_formats import FAMILIES
from compressor.errors import ArtifactError, Because, CompressError, DependencyError, data_of
from compressor.model.attention import plain_options
from compressor.model.checkpoint import Checkpoint, open_checkpoint
from compressor.model.reshaped_class import stock_class
from compressor.model.trusted_code import (
    CUSTOM_GENERATE,
    auto_map,
    code_files,
    file_of,
    is_model_entry,
    read_generated,
    run_generated,
)
from compressor.process.resources import ran_out
from compressor.storage.file_names import MANIFEST

OFFLINE: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True, "use_safetensors": True}


def load_stock(directory: Path, manifest: Loadable, *, is_older: bool = False) -> tuple[Any, dict[str, Any]]:
    """The model in eval mode, and what transformers reports about its keys (`output_loading_info`).

    is_older  another release wrote it: run the modeling file that this release writes, not the artifact's own
    raises ArtifactError for code that this release would not write, and for a config that asks for such code
    """
    checkpoint = open_checkpoint(directory)
    empty = empty_model(checkpoint, manifest)
    _check_export_format(checkpoint, manifest["route"])
    if problems := code_problems(checkpoint, manifest, empty):
        raise ArtifactError(
            "; ".join(problems),
            where=directory.name,
            hint="None of this code was run. Load the artifact only from a source you trust, or build it again.",
            data={"reason": "foreign-code", **data_of(problems)},
        )
    is_custom = manifest["route"] == "custom"
    cls: Any = _generated_class(directory, manifest, empty, is_older) if is_custom else stock_class(empty)
    options: dict[str, Any] = {**plain_options(checkpoint.config)}
    if FAMILIES.get(manifest["route"]) and FAMILIES[manifest["route"]].forward:
        options["device_map"] = {"": "cpu"}  # such a loader moves the model to a GPU by itself
    with stock_works(directory):
        model, info = cls.from_pretrained(directory, output_loading_info=True, **OFFLINE, **options)
    return model.eval(), info


@contextmanager
def stock_works(
    directory: Path, refusal: type[CompressError] = ArtifactError, who: str = "stock transformers"
) -> Iterator[None]:
    """Turn any error of transformers while it loads or runs a model into an error about the artifact.

    who     name of what loads or runs it, for the message
    raises  `refusal` with the message of transformers; DependencyError if a package is missing; PassError if memory or
            disk ran out
    """
    try:
        yield
    except CompressError:
        raise
    except ImportError as error:
        hint = "Install the package that the message names with pip."
        raise DependencyError(
            f"{who} can't load it ({error})", where=directory.name, hint=hint, data={"loader": who, "cause": str(error)}
        ) from error
    except Exception as error:
        if (lack := ran_out(error)) is not None:
            raise lack from error
        message = f"{type(error).__name__}: {error}"[:600]
        raise refusal(f"{who} fails on it ({message})", where=directory.name) from error


def _check_export_format(checkpoint: Checkpoint, export_format: str) -> None:
    """raises ArtifactError for an export format that this release can't write, or a config.json that needs another"""
    if export_format not in ("dense", "custom", *FAMILIES):
        raise ArtifactError(
            f"export format {export_format!r} is unknown to this release",
            where=MANIFEST,
            hint="Run pip install -U compress-model, or build the artifact again with this release.",
            data={"reason": "unknown-export-format", "route": export_format},
        )
    asked = checkpoint.quantization_config
    method = asked.get("quant_method") if isinstance(asked, dict) else asked
    if method != (export_format if export_format in FAMILIES else None):
        raise ArtifactError(
            f"quantization_config has the method {method!r}, but the manifest has {export_format}",
            where="config.json",
            hint="Copy the artifact again from where it was written, or build it again.",
            data={"reason": "other-export-format", "asked": str(method), "route": export_format},
        )


def code_problems(checkpoint: Checkpoint, manifest: Mapping[str, Any], empty: Any) -> list[str]:
    """Problems with code of the artifact that would run with trust_remote_code=True, beyond what this release writes.

    empty  the model on the meta device, as `compressor.artifact.loader.empty_model` makes it
    """
    problems: list[str] = []
    is_custom = manifest["route"] == "custom"
    own = _modeling_name(empty) if is_custom else None
    expected = custom_auto_map(custom_type(empty.config.model_type), empty) if is_custom else {}
    named = auto_map(checkpoint.config, "config.json")
    found = {name: references for name, references in named.items() if is_model_entry(name)}
    for name in sorted({*expected, *found}):
        references = found.get(name, [])
        if references != ([expected[name]] if name in expected else []):
            files = ", ".join(sorted({file_of(reference) for reference in references})) or "nothing"
            should = file_of(expected[name]) if name in expected else "nothing"
            message = f"config.json: auto_map names {files} for {name}, but compress-model writes {should}"
            problems.append(Because(message, reason="other-auto-map", entry=name))
    for name in code_files(checkpoint.directory):
        if name == own:
            continue
        if name.partition("/")[0] == CUSTOM_GENERATE:
            message = f"{name} replaces the model's generate() if code is trusted"
            problems.append(Because(message, reason="replaces-generate", file=name))
        elif name not in manifest["files"]:
            problems.append(
                Because(f"{name} is code that compress-model did not write", reason="other-code", file=name)
            )
    return problems


def _generated_class(directory: Path, manifest: Loadable, empty: Any, is_older: bool) -> Any:
    name = _modeling_name(empty)
    entries = manifest["weights"].values()
    experts = any(entry.get("expert") is not None for entry in entries)
    expected = modeling_source(empty, (entry["form"] for entry in entries), experts=experts)
    text = expected if is_older else read_generated(directory, name, expected)
    module = run_generated(text, directory / name)
    cls = getattr(module, f"Compressed{type(empty).__name__}")
    cls.register_for_auto_class(auto_classes(empty)[0])  # marks the class like one loaded through auto_map
    return cls


def _modeling_name(empty: Any) -> str:
    return f"modeling_{custom_type(empty.config.model_type)}.py"
