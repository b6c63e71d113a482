"""Reads headers of safetensors files strictly, and writes such files tensor by tensor.

The header is checked here, before any library maps the file, so that an incomplete or wrong file gives a clear error.
The writer copies tensors one by one, so a file of any size is written in constant memory. Its bytes equal those of the
safetensors library for the same tensors. Format: docs/format.md.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.errors import ModelError
from compressor.process.resources import disk_full
from compressor.process.utf8 import halves, parse_json

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
COPY_BYTES = 1 << 24
# Every dtype of the format by its name there, in the library's order: it writes tensors of later ones first.
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Dtypes with less than a byte per element -> bits. torch has none with the file's shape, so they are read as bytes
# and only copied.
SMALL_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
RANK = {name: number for number, name in enumerate([*SMALL_BITS, *DTYPES])}


class HasDtype:
    """A tensor in a file, or to write.

    small  the name of a dtype in SMALL_BITS; `dtype` is then uint8, that of the bytes
    """

    dtype: torch.dtype
    small: str | None

    @property
    def stored_as(self) -> str:
        """The dtype's name in the file."""
        return self.small or NAMES[self.dtype]


@dataclass(frozen=True)
class TensorInfo(HasDtype):
    """The place of a tensor: `offset` is absolute in `file`, sizes are in bytes.

    decode  reads a tensor that is stored quantized, and dequantizes it; `dtype`, `shape` and `nbytes` are then those
            of the result. None: the bytes are the tensor
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    small: str | None = None
    decode: Callable[[], Tensor] | None = None

    @property
    def is_sliced(self) -> bool:
        """Whether it is so large that it is copied slice by slice, as that of all experts (experts, rows, columns)."""
        return len(self.shape) == 3 and self.nbytes > COPY_BYTES and self.small is None


@dataclass(frozen=True)
class Entry(HasDtype):
    """A tensor to write.

    read  gives the tensor when it is written, or its slices along the first dimension one after the other; for a dtype
          in SMALL_BITS its bytes
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Iterable[Tensor]]
    small: str | None = None

    @property
    def nbytes(self) -> int:
        return _nbytes(self.stored_as, self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of a file, in the order of the header.

    raises  ModelError with the reason if the file is not valid
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length < 2 or length > min(MAX_HEADER_BYTES, size - 8):
                raise _bad(path, f"its header claims {length} bytes, the file has {size}")
            text = file.read(length)
    except OSError as error:
        raise ModelError(
            f"can't be read ({error.strerror})",
            where=path.name,
            hint="Give yourself read permission for it (chmod +r).",
            data={"reason": "not-read", "cause": error.strerror},
        ) from error
    header = _parse(path, text)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _bad(path, "its __metadata__ is not a map of strings")
    begin_of_data = 8 + length
    tensors = {name: _entry(path, name, entry, begin_of_data) for name, entry in header.items()}
    at = begin_of_data
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != at:
            message = f"the bytes of {name!r} start at {info.offset}, {at} expected (gap or overlap)"
            raise _bad(path, message, "gap", tensor=name, begin=info.offset, expected=at)
        at += info.nbytes
    if at != size:
        raise _bad(path, f"its tensors end at byte {at}, the file at {size}", "wrong-size", end=at, size=size)
    return tensors


def write_file(path: Path, entries: Iterable[Entry]) -> None:
    """Write tensors in the library's order with metadata {"format": "pt"}, then sync the file.

    raises  PassError if the disk is full. After any error no file is left
    """
    ordered = sorted(entries, key=lambda entry: (-RANK[entry.stored_as], entry.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in ordered:
        header[entry.name] = {
            "dtype": entry.stored_as,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    try:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for entry in ordered:
                _write_tensor(file, entry)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise disk_full(path, offset) from error
        raise


def header_bytes(entries: Iterable[tuple[str, str, tuple[int, ...]]]) -> int:
    """Number of bytes before the data in a file with these tensors (name, name of the dtype, shape)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, stored_as, shape in sorted(entries, key=lambda entry: (-RANK[entry[1]], entry[0])):
        nbytes = _nbytes(stored_as, shape)
        header[name] = {"dtype": stored_as, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + length + -length % 8


def read_bytes(info: TensorInfo) -> Tensor:
    """Read one tensor with one seek. No file stays mapped. For a dtype in SMALL_BITS: its bytes (nbytes,).

    A tensor that is stored quantized is dequantized.
    """
    if info.decode is not None:
        return info.decode()
    buffer = bytearray(info.nbytes)
    with info.file.open("rb") as file:
        file.seek(info.offset)
        if file.readinto(buffer) != info.nbytes:
            raise _bad(info.file, "it became shorter while it was read")
    shape = info.shape if info.small is None else (info.nbytes,)
    if not buffer:
        return torch.empty(shape, dtype=info.dtype)
    return torch.frombuffer(buffer, dtype=info.dtype).reshape(shape)


def read_slices(info: TensorInfo) -> Iterator[Tensor]:
    """The slices of a tensor along its first dimension, one after the other. Each is a private copy.

    A tensor that is stored quantized is dequantized as a whole.
    """
    if info.decode is not None or info.small is not None:
        yield from (part.clone() for part in read_bytes(info))
        return
    size = info.nbytes // max(1, info.shape[0])
    for number in range(info.shape[0]):
        yield read_bytes(replace(info, shape=info.shape[1:], offset=info.offset + number * size, nbytes=size))


def read_pieces(info: TensorInfo) -> Iterator[Tensor]:
    """A tensor as `Entry.read` gives it."""
    if info.is_sliced:
        yield from read_slices(info)
    else:
        yield read_bytes(info)


def same_bytes(first: TensorInfo, second: TensorInfo) -> bool:
    """Whether two tensors of the same dtype and shape are equal bit for bit. They are read piece by piece."""
    if (first.stored_as, first.shape) != (second.stored_as, second.shape):
        return False
    if first.decode is not None or second.decode is not None:
        return torch.equal(*(read_bytes(info).reshape(-1).view(torch.uint8) for info in (first, second)))
    with first.file.open("rb") as one, second.file.open("rb") as other:
        one.seek(first.offset)
        other.seek(second.offset)
        left = first.nbytes
        while left:
            size = min(left, COPY_BYTES)
            if one.read(size) != other.read(size):
                return False
            left -= size
    return True


def _write_tensor(file: Any, entry: Entry) -> None:
    shape = tuple(entry.shape) if entry.small is None else (entry.nbytes,)
    written = 0
    for tensor in entry.read():
        if tensor.dtype != entry.dtype or tuple(tensor.shape) not in (shape, shape[1:]):
            raise ValueError(f"{entry.name}: {tensor.dtype} {tuple(tensor.shape)} was read, {entry} was announced")
        if tensor.numel():
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        written += tensor.nbytes
    if written != entry.nbytes:
        raise ValueError(f"{entry.name}: {written} bytes were read, {entry} was announced")


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a name appears twice")
        return result

    if not text.startswith(b"{"):
        raise _bad(path, "its header is not JSON")
    try:
        header = parse_json(text, unique)
    except (ValueError, RecursionError) as error:
        raise _bad(
            path, f"its header is not valid JSON ({error})", "bad-json", cause=str(error), **halves(error)
        ) from error
    return header


def _entry(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _bad(path, f"the entry of {name!r} is malformed")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in RANK:
        raise _bad(path, f"{name!r} has the unknown dtype {dtype!r}")
    if not (isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2):
        raise _bad(path, f"the entry of {name!r} is malformed")
    if not all(type(value) is int and 0 <= value < 1 << 62 for value in [*shape, *offsets]):
        raise _bad(path, f"the entry of {name!r} has sizes that are not whole numbers")
    if dtype in SMALL_BITS and math.prod(shape) * SMALL_BITS[dtype] % 8:
        raise _bad(path, f"{name!r} of shape {shape} in {dtype} isn't whole bytes")
    nbytes = _nbytes(dtype, shape)
    if offsets[1] - offsets[0] != nbytes:
        raise _bad(path, f"{name!r} of shape {shape} needs {nbytes} bytes, its offsets span {offsets[1] - offsets[0]}")
    small = dtype if dtype in SMALL_BITS else None
    return TensorInfo(path, DTYPES.get(dtype, torch.uint8), tuple(shape), start + offsets[0], nbytes, small)


def _nbytes(stored_as: str, shape: Iterable[int]) -> int:
    bits = SMALL_BITS[stored_as] if stored_as in SMALL_BITS else 8 * DTYPES[stored_as].itemsize
    return math.prod(shape) * bits // 8


def _bad(path: Path, what: str, reason: str = "unsound", **values: Any) -> ModelError:
    return ModelError(
        f"is not a valid safetensors file: {what}",
        where=path.name,
        hint="Download or copy this file again.",
        data={"reason": reason, **values},
    )
