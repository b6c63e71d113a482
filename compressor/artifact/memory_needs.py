"""Says how much memory a process needs that loads a model, before it loads it.

What is counted was measured: transformers maps the weight files, and their pages become resident when they are read, so
a dense model needs its size once. compressed-tensors dequantizes all weights in the first forward pass.
"""

from __future__ import annotations

import math
from pathlib import Path

import psutil

from compressor.artifact.manifest import read_manifest
from compressor.model.checkpoint import Checkpoint, open_checkpoint
from compressor.model.mapped_tensors import MappedTensors, expert_parameters
from compressor.model.quantized_source import dequantized
from compressor.model.streamed import StreamedModel
from compressor.storage.file_names import MANIFEST

INTERPRETER_BYTES = 420 << 20  # resident size of Python with torch and transformers loaded; our measurement
MEMORY_SHARE = 0.9  # of the free memory, if no limit is set
TWO_BLOCKS_BYTES = 128 << 20  # beside two blocks that are compared; we measured 93 MiB at a width of 1024
CHUNK_BYTES = 256 << 20  # of working copies of logits, which are compared a few positions at a time


def limit_bytes(limit: int | None) -> int:
    """The memory that a process may use: `limits.memory`, or most of what is free."""
    return int(psutil.virtual_memory().available * MEMORY_SHARE) if limit is None else limit


def gibibytes(size: float) -> str:
    """A number of bytes for a message."""
    return f"{size / 2**30:.1f} GiB"


def dense_bytes(directory: Path) -> int:
    """Bytes of a model's weights in memory after stock transformers has loaded them, all dequantized."""
    checkpoint = open_checkpoint(directory)
    if not (directory / MANIFEST).is_file():
        return dequantized(checkpoint).nbytes
    size = 0
    stored = set()
    for name, entry in read_manifest(directory)["weights"].items():
        stored.add(name + ".")
        size += math.prod(entry["shape"]) * _itemsize(checkpoint)
    return size + sum(
        info.nbytes for name, info in checkpoint.tensors.items() if name[: name.rfind(".") + 1] not in stored
    )


def verification_bytes(directory: Path, source: Path | None) -> float:
    """Memory for verifying an artifact with whole models.

    The stock loader holds it as stored and dequantized, `compressor.load` as stored, and the source is beside them.
    """
    beside = 0 if source is None else dense_bytes(source)
    return whole_verification_bytes(dense_bytes(directory), open_checkpoint(directory).nbytes, beside)


def whole_verification_bytes(dense: float, stored: int, source: int) -> float:
    """The same from bytes of the artifact's dequantized weights, of its stored ones, and of the source's."""
    return INTERPRETER_BYTES + dense + 2 * stored + source


def speed_bytes(held: float) -> float:
    """Memory for measuring the speed of a model that holds so many bytes."""
    return INTERPRETER_BYTES + held + CHUNK_BYTES


def two_blocks_bytes(outside: int, block: int) -> int:
    """Memory of a process that holds a block of two models at once, and the parts outside of blocks."""
    return INTERPRETER_BYTES + outside + 2 * block + TWO_BLOCKS_BYTES


def map_large_experts(streamed: StreamedModel, mapped: MappedTensors, limit: int) -> bool:
    """Let the experts of a model lie in mapped files if two of its blocks don't fit beside everything else.

    limit    bytes of memory that the process may use
    returns  whether they do
    """
    sizes = {part: sum(map(streamed.nbytes_of, names)) for part, names in streamed.parts.items()}
    blocks = [size for part, size in sizes.items() if part.startswith(streamed.blocks_path + ".")]
    needed = two_blocks_bytes(sum(sizes.values()) - sum(blocks), max(blocks))
    names = [name for members in streamed.parts.values() for name in members]
    if needed > limit and expert_parameters(streamed.model, names):
        streamed.filler.mapped = mapped
    return streamed.filler.mapped is not None


def _itemsize(checkpoint: Checkpoint) -> int:
    return 4 if checkpoint.config.get("dtype") == "float32" else 2
