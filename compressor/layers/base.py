"""What every stored form offers to the engine, the artifact writer and the loader."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn


class Layer(nn.Module):
    """One weight (out_features, in_features) in its stored form; also a drop-in for nn.Linear."""

    form: ClassVar[str]
    weight_only: ClassVar[bool] = True  # True: forward is a dense multiply by matrix(); the engine may write it back

    in_features: int
    out_features: int

    def spec(self) -> dict[str, Any]:
        """JSON settings that, with the tensors and the shape, rebuild this layer."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """Suffix -> tensor as stored in the checkpoint, without the bias; e.g. {"weight_packed": ...}."""
        raise NotImplementedError

    @classmethod
    def from_tensors(cls, spec: dict[str, Any], tensors: dict[str, Tensor], bias: Tensor | None = None) -> Self:
        """Rebuild from what `spec` and `tensors` returned."""
        raise NotImplementedError

    @classmethod
    def planned(
        cls, shape: tuple[int, int], spec: dict[str, Any], dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Suffix -> (dtype, shape) of the tensors a weight of this shape would store; no data needed."""
        raise NotImplementedError

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The weight (out_features, in_features) that the stored tensors stand for."""
        raise NotImplementedError
