"""Reads a Hugging Face checkpoint directory: headers first, tensors one at a time, never a pickle.

Nothing outside the directory is touched: an index that names `../x`, or a link that leads out, is refused. The one
exception is the Hugging Face cache, whose snapshots are links into `blobs/` of the same model's folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.errors import ModelError
from compressor.files import file_sha256
from compressor.model_card import Licence, read_licence
from compressor.model_files import check_directory, regular_file
from compressor.safetensors_file import TensorInfo, read_bytes, read_header
from compressor.side_files import SideFiles, find_side_files

HUB_NAME = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*", re.ASCII)  # owner/name, or a name alone as of gpt2
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")


@dataclass(frozen=True)
class Checkpoint:
    """directory  the model's folder
    config     config.json, parsed
    tensors    checkpoint name -> where it lies
    """

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def read(self, name: str) -> Tensor:
        """One tensor in its stored dtype; a private copy."""
        return read_bytes(self.tensors[name])

    @property
    def architecture(self) -> str | None:
        names = self.config.get("architectures") or [None]
        return names[0]

    @property
    def needs_remote_code(self) -> bool:
        return bool(self.config.get("auto_map"))

    @property
    def is_compressed_artifact(self) -> bool:
        """Whether this tool wrote it, and not as a plain checkpoint that can be compressed further."""
        is_ours = (self.directory / "compress_manifest.json").is_file()
        return "compressed_weights" in self.config or (is_ours and self.quantization_config is not None)

    @property
    def quantization_config(self) -> dict[str, Any] | None:
        return self.config.get("quantization_config")

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def weight_file_bytes(self) -> int:
        """Size of the files that hold the weights, headers included."""
        return sum(file.stat().st_size for file in {info.file for info in self.tensors.values()})

    @cached_property
    def content_sha256(self) -> str:
        """Hash over config.json and every weight file's own hash; reads the whole checkpoint once."""
        files = sorted({info.file for info in self.tensors.values()} | {self.directory / "config.json"})
        lines = "\n".join(f"{file.name} {file_sha256(file)}" for file in files)
        return hashlib.sha256(lines.encode()).hexdigest()

    @cached_property
    def side_files(self) -> SideFiles:
        """The files that an artifact takes over beside the weights, and those that it doesn't, with the reason."""
        return find_side_files(self.directory, self.config)

    @property
    def carried_config(self) -> dict[str, Any]:
        """config.json with what stays of its `auto_map`: the artifact's class is one of transformers, or its own."""
        values = {key: value for key, value in self.config.items() if key != "auto_map"}
        return {**values, "auto_map": self.side_files.auto_map} if self.side_files.auto_map else values

    @cached_property
    def licence(self) -> Licence:
        """What the model card says."""
        return read_licence(self.directory)

    @property
    def license(self) -> str | None:
        """Its identifiers in one line, for the report."""
        return ", ".join(self.licence.identifiers) or None


def open_checkpoint(directory: Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """Read config.json and every safetensors header.

    raises ModelError for anything missing, torn, unsafe, or stored as a pickle
    """
    if not directory.is_dir():
        kind = "a file" if directory.exists() else "nothing"
        raise ModelError(f"{kind} is there, a checkpoint directory is needed", where=str(directory))
    check_directory(directory)
    config = _read_json(regular_file(directory, directory / "config.json"))
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if index.exists():
        tensors = _sharded(directory, _read_json(regular_file(directory, index)))
    elif single.exists():
        tensors = read_header(regular_file(directory, single))
    else:
        raise _no_weights(directory)
    if not tensors:
        raise ModelError("the checkpoint holds no tensors", where=directory.name, hint="Download the model again.")
    return Checkpoint(directory, config, tensors)


def resolve_model(name: str) -> Path:
    """The directory of a model given as `demo`, a path, or the name of one in the local Hugging Face cache."""
    if name == "demo":
        from compressor.data import demo_path

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
            "no such directory, and no name that a hub model can have",
            where=repr(name[:200]),
            hint="Give a checkpoint directory, the name of a model in the local Hugging Face cache, or demo.",
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            "is neither a directory nor in the local Hugging Face cache",
            where=name,
            hint=f"Download it first: hf download {name}",
        ) from error


def model_label(name: str) -> str:
    """What a report calls a model: its hub name, `demo`, or the last part of its path."""
    path = Path(os.path.expanduser(name))
    return Path(os.path.abspath(path)).name if name != "demo" and path.exists() else name


def check_finite(name: str, tensor: Tensor) -> None:
    """raises ModelError with the count and the first place of NaN or Inf"""
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        bad = (~finite).nonzero()
        raise ModelError(
            f"{len(bad)} of {tensor.numel()} values are NaN or Inf, the first at {bad[0].tolist()}",
            where=name,
            hint="The checkpoint is damaged, or was trained to overflow; download it again.",
        )


def _sharded(directory: Path, index: dict[str, Any]) -> dict[str, TensorInfo]:
    mapping = index.get("weight_map")
    if not isinstance(mapping, dict) or not all(isinstance(value, str) for value in mapping.values()):
        raise ModelError("has no usable `weight_map`", where="model.safetensors.index.json", hint="Download it again.")
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(mapping.values())):
        if "/" in shard or "\\" in shard or shard in ("", ".", ".."):
            raise ModelError(
                f"names the file {shard!r}, which is not a plain name in this directory",
                where="model.safetensors.index.json",
                hint="Refused: a checkpoint must not reach outside its directory.",
            )
        path = directory / shard
        if not path.is_file():
            raise ModelError("shard is missing", where=shard, hint="Download the model again; the index names it.")
        held = read_header(regular_file(directory, path))
        wanted = {name for name, file in mapping.items() if file == shard}
        for problem, names in (("lacks", wanted - set(held)), ("holds unindexed", set(held) - wanted)):
            if names:
                raise ModelError(
                    f"{problem} {len(names)} tensors, such as {min(names)}",
                    where=shard,
                    hint="Index and shards are not of one model.",
                )
        tensors.update(held)
    return tensors


def _no_weights(directory: Path) -> ModelError:
    pickles = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
    if pickles:
        return ModelError(
            f"only pickled weights were found ({', '.join(pickles[:3])}); loading one can run any code",
            where=directory.name,
            hint="Convert it where you trust it: transformers' save_pretrained(DIR) writes safetensors.",
        )
    return ModelError("no model.safetensors or index was found", where=directory.name, hint="Download the model again.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ModelError(f"can't be read ({error.strerror})", where=path.name, hint="Check the file.") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"is not valid JSON ({error})", where=path.name, hint="Download it again.") from error
    if not isinstance(value, dict):
        raise ModelError("is not a JSON object", where=path.name, hint="Download it again.")
    return value
