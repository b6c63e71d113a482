"""Reads a Hugging Face checkpoint directory: headers first, tensors one at a time, never a pickle.

Of several weight files it reads those that transformers' from_pretrained reads, and reports the others.

No file outside the directory is opened: an index that names `../x`, or a link that leads out, is refused. The one
exception is the Hugging Face cache, whose snapshots are links into `blobs/` of the same model's folder.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.errors import Because, ModelError
from compressor.model.model_card import Licence, read_licence
from compressor.model.model_files import check_directory, regular_file
from compressor.model.quantized_weight import Quantization
from compressor.model.side_files import SideFiles, find_side_files
from compressor.process.utf8 import halves, parse_json, printable
from compressor.storage.files import file_sha256
from compressor.storage.safetensors_file import TensorInfo, read_bytes, read_header

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")  # transformers' own name for its parts
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")


@dataclass(frozen=True)
class Checkpoint:
    """directory  the model's folder
    config     config.json, parsed
    tensors    checkpoint name -> its place in the files
    metadata   the metadata in the index of a sharded checkpoint
    unread     a sentence for each other set of weights in the directory, which transformers doesn't read either
    quantized  how the files store the weights that `tensors` and `read` give dequantized (`quantized_source`)
    stored     every tensor of the files that are read, as they have it and under its name there
    shadowed   FILE:NAME of a tensor that another shard has too -> its place; that of the last shard is read
    renamed    name in the files -> name in `tensors`, of a tensor that parameters share (`empty_model`)
    """

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    metadata: dict[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    quantized: Quantization | None = None
    stored: Mapping[str, TensorInfo] = field(default_factory=dict)
    shadowed: Mapping[str, TensorInfo] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)

    def read(self, name: str) -> Tensor:
        """One tensor in its stored dtype, or dequantized; a private copy."""
        return read_bytes(self.tensors[name])

    @property
    def architecture(self) -> str | None:
        names = self.config.get("architectures") or [None]
        return names[0]

    @property
    def is_compressed_artifact(self) -> bool:
        """Whether it is an artifact, except a dense one, which can be compressed further."""
        is_ours = (self.directory / "compress_manifest.json").is_file()
        return "compressed_weights" in self.config or (is_ours and self.quantization_config is not None)

    @property
    def quantization_config(self) -> dict[str, Any] | None:
        return self.config.get("quantization_config")

    @property
    def in_files(self) -> dict[str, TensorInfo]:
        """Every tensor of the files, also those of which another shard's is read."""
        return {**self.stored, **self.shadowed}

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def weight_files(self) -> set[Path]:
        return {info.file for info in self.stored.values()}

    @property
    def weight_file_bytes(self) -> int:
        """Size of the weight files, headers included."""
        return sum(file.stat().st_size for file in self.weight_files)

    @cached_property
    def content_sha256(self) -> str:
        """Hash of config.json and of every weight file's hash. Reads the whole checkpoint once."""
        files = sorted(self.weight_files | {self.directory / "config.json"})
        lines = "\n".join(f"{file.name} {file_sha256(file)}" for file in files)
        return hashlib.sha256(lines.encode()).hexdigest()

    @cached_property
    def side_files(self) -> SideFiles:
        """The files beside the weights that are copied to an artifact, and those that are not, with the reason."""
        return find_side_files(self.directory, self.config)

    @property
    def carried_config(self) -> dict[str, Any]:
        """config.json for the artifact. Its `auto_map` has no model, since the artifact has another class.

        The name of the source's weight file is removed, since the artifact's files have other names.
        """
        values = {key: value for key, value in self.config.items() if key not in ("auto_map", "transformers_weights")}
        return {**values, "auto_map": self.side_files.auto_map} if self.side_files.auto_map else values

    @cached_property
    def licence(self) -> Licence:
        """The licence in the model card."""
        return read_licence(self.directory)

    @property
    def license(self) -> str | None:
        """The licence's identifiers in one line, for the report."""
        return ", ".join(self.licence.identifiers) or None


def open_checkpoint(directory: Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """Read config.json and every safetensors header.

    raises  ModelError for anything that is missing, incomplete, unsafe or stored as a pickle
    """
    if not directory.is_dir():
        kind = "a file" if directory.exists() else "nothing"
        raise ModelError(
            f"{kind} is there, a checkpoint directory is needed",
            where=str(directory),
            hint="Name the directory that holds config.json and the weights, or download the model: hf download NAME.",
            data={"reason": "no-directory", "found": kind},
        )
    check_directory(directory)
    _refuse_adapter(directory)
    config = _read_json(regular_file(directory, directory / "config.json"))
    name = _weights_file(directory, config)
    metadata: dict[str, Any] = {}
    unread: list[str] = []
    shadowed: dict[str, TensorInfo] = {}
    if name.endswith(".index.json"):
        index = _read_json(regular_file(directory, directory / name))
        tensors, files, shadowed = _sharded(directory, name, index)
        metadata = index["metadata"] if isinstance(index.get("metadata"), dict) else {}
        if shadowed:
            first = min(shadowed).partition(":")[2]
            last = tensors[first].file.name
            message = f"tensors lie in two shards, such as {first}; that of {last} is read, as transformers does"
            values = {"tensors": len(shadowed), "first": first, "read": last}
            unread.append(Because(f"{len(shadowed)} {message}", **values))
    else:
        tensors, files = read_header(regular_file(directory, directory / name)), {name}
    if not tensors:
        raise ModelError(
            "the checkpoint contains no tensors",
            where=directory.name,
            hint="Download the model again: hf download NAME.",
        )
    if others := _other_weights(directory, files):
        shown = ", ".join(others[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else "")
        text = f"{name} is read, as transformers does; {shown} contain weights too and are not read"
        unread.append(Because(text, read=name, others=others))
    return Checkpoint(directory, config, tensors, metadata, tuple(unread), stored=tensors, shadowed=shadowed)


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite. NaN is in the extremes too, and they need no copy of what is read."""
    return not tensor.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def check_finite(name: str, tensor: Tensor) -> None:
    """raises ModelError with the number of NaN and Inf values and the first position"""
    if not is_finite(tensor):
        bad = (~torch.isfinite(tensor)).nonzero()
        raise ModelError(
            f"{len(bad)} of {tensor.numel()} values are NaN or Inf, the first at {bad[0].tolist()}",
            where=name,
            hint="Download the model again; if the values are the same, choose another checkpoint.",
            data={"reason": "not-finite", "bad": len(bad), "values": tensor.numel(), "first": bad[0].tolist()},
        )


def _refuse_adapter(directory: Path) -> None:
    if (directory / "adapter_config.json").exists():
        raise ModelError(
            "the directory contains an adapter, which transformers adds to the weights if peft is installed",
            where=f"{directory.name}/adapter_config.json",
            hint="Merge it into the weights first (peft: merge_and_unload, then save_pretrained), "
            "or pass a directory without it.",
            data={"reason": "adapter"},
        )


def _weights_file(directory: Path, config: dict[str, Any]) -> str:
    """The file that transformers' from_pretrained opens first. raises ModelError if there is none"""
    if parts := sorted(path.name for path in directory.glob("shard-*.safetensors") if DISTRIBUTED.match(path.name)):
        raise ModelError(
            f"the weights are stored as shards of a distributed run ({parts[0]})",
            where=directory.name,
            hint="Load the model with transformers and save it with save_pretrained(DIR).",
            data={"reason": "distributed", "file": parts[0]},
        )
    stated = config.get("transformers_weights")
    if stated is not None:
        plain = isinstance(stated, str) and Path(stated).name == stated
        if not plain or not stated.endswith((".safetensors", ".safetensors.index.json")):
            raise ModelError(
                f"transformers_weights is {stated!r}, not the name of a safetensors file or index of this directory",
                where="config.json",
                hint="Correct transformers_weights, or remove the key to read model.safetensors.",
                data={"reason": "transformers-weights", "value": repr(stated)},
            )
        return str(stated)
    for name in (SINGLE, INDEX):
        if (directory / name).is_file():
            return name
    raise _no_weights(directory)


def _other_weights(directory: Path, read: set[str]) -> list[str]:
    """Sorted names of further weight files of torch that are not read."""
    found = {path.name for pattern in ("*.safetensors", "pytorch_model*.bin") for path in directory.glob(pattern)}
    return sorted(map(printable, found - read))


def _sharded(
    directory: Path, where: str, index: dict[str, Any]
) -> tuple[dict[str, TensorInfo], set[str], dict[str, TensorInfo]]:
    """Every tensor of the files in the index, the files, and `Checkpoint.shadowed`.

    As in transformers, the last file by name wins, and the index entries of single tensors are not used.
    """
    mapping = index.get("weight_map")
    if not isinstance(mapping, dict) or not all(isinstance(value, str) for value in mapping.values()):
        raise ModelError("has no usable `weight_map`", where=where, hint="Download this file again: hf download NAME.")
    tensors: dict[str, TensorInfo] = {}
    files = sorted(set(mapping.values()))
    shadowed: dict[str, TensorInfo] = {}
    for shard in files:
        if "/" in shard or "\\" in shard or shard in ("", ".", ".."):
            raise ModelError(
                f"names the file {shard!r}, which is not a plain name in this directory",
                where=where,
                hint="Download the model again from a source you trust, or correct the name in the index.",
                data={"reason": "no-plain-name", "file": shard},
            )
        path = directory / shard
        if not path.is_file():
            raise ModelError(
                "the index names this shard, but the file is missing",
                where=shard,
                hint="Download the missing file, or the model again: hf download NAME.",
                data={"reason": "missing-shard"},
            )
        held = read_header(regular_file(directory, path))
        twice = sorted(held.keys() & tensors.keys())
        shadowed |= {f"{tensors[name].file.name}:{name}": tensors[name] for name in twice}
        tensors.update(held)
    if lost := [name for name in mapping if name not in tensors]:
        raise ModelError(
            f"has none of {len(lost)} tensors that the index expects there, such as {min(lost)}",
            where=mapping[min(lost)],
            hint="Download the index and all shards again from one revision: hf download NAME.",
            data={"reason": "lacks-tensors", "count": len(lost), "first": min(lost)},
        )
    return tensors, set(files), shadowed


def _no_weights(directory: Path) -> ModelError:
    pickles = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
    if pickles:
        return ModelError(
            f"only pickled weights were found ({', '.join(pickles[:3])}); loading one can run any code",
            where=directory.name,
            hint="If you trust its source, load it with transformers and write safetensors with save_pretrained(DIR).",
            data={"reason": "only-pickles", "names": pickles[:3]},
        )
    return ModelError(
        "no model.safetensors or model.safetensors.index.json was found",
        where=directory.name,
        hint="Check the path, or download the model again: hf download NAME.",
        data={"reason": "no-weights"},
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(path.read_text("utf-8"))
    except OSError as error:
        raise ModelError(
            f"can't be read ({error.strerror})",
            where=path.name,
            hint="Give yourself read permission for it (chmod +r).",
            data={"reason": "unreadable", "cause": error.strerror},
        ) from error
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"is not valid JSON ({error})",
            where=path.name,
            hint="Correct the file at that place, or download it again.",
            data={"reason": "bad-json", "cause": str(error), **halves(error)},
        ) from error
    if not isinstance(value, dict):
        raise ModelError(
            "is not a JSON object",
            where=path.name,
            hint="Download this file again: hf download NAME.",
            data={"reason": "no-json-object"},
        )
    return value
