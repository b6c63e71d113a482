"""Finds the directory of a model by the name that a user gave.

Nothing here imports torch, which takes seconds: a name that is wrong is answered at once.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from compressor.errors import ModelError
from compressor.model.model_files import demo_path

HUB_NAME = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*", re.ASCII)  # owner/name, or a name alone as of gpt2


def resolve_model(name: str) -> Path:
    """The directory of a model that is given as `demo`, a path, or a name in the local Hugging Face cache.

    raises ModelError if there is none
    """
    if name == "demo":
        return demo_path()
    if name and "\0" not in name and os.path.lexists(path := Path(os.path.expanduser(name))):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        if not HUB_NAME.fullmatch(name):
            raise HFValidationError
        return Path(snapshot_download(name, local_files_only=True))
    except HFValidationError as error:
        raise ModelError(
            "there is no such directory, and a hub model can't have this name",
            where=name[:200] if name.isprintable() and name else repr(name[:200]),
            hint="Pass --model with a checkpoint directory, the name of a model in the local hub cache, or demo.",
            data={"reason": "no-model-name"},
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            "is neither a directory nor in the local Hugging Face cache",
            where=name,
            hint=f"Download it first: hf download {name}",
            data={"reason": "not-in-cache", "name": name},
        ) from error


def model_label(name: str) -> str:
    """The name of a model in a report: its hub name, `demo`, or the last part of its path."""
    path = Path(os.path.expanduser(name))
    return Path(os.path.abspath(path)).name if name != "demo" and path.exists() else name
