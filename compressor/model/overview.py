"""What `inspect` shows of a model: its parts, with their tensors, bytes and weight groups."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressor.model.ledger import Ledger


@dataclass(frozen=True)
class WeightView:
    name: str
    shape: list[int]
    role: str
    format_name: str = "dense"


@dataclass(frozen=True)
class PartOverview:
    """One part. groups: weights that read the same input are in one"""

    name: str
    tensors: int
    bytes: int
    groups: tuple[tuple[WeightView, ...], ...]


@dataclass(frozen=True)
class Overview:
    """A whole model.

    blocks     path of the list of blocks
    tied       parameter -> the one whose storage it shares
    ledger     what becomes of every tensor of the checkpoint when it is read, or of the artifact's source; None for an
               artifact of an earlier release
    quantized  a sentence if the files store weights quantized, which are shown as they are dequantized
    """

    architecture: str
    dtype: str
    blocks: str
    block_count: int
    tied: dict[str, str]
    parts: tuple[PartOverview, ...]
    quantized: str | None = None
    ledger: Ledger | None = None

    def to_json(self) -> dict[str, Any]:
        """A key for each field, down to the weights; `parts` for the parts."""
        values = asdict(self)
        return values
