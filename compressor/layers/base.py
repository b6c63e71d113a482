"""Defines the interface of a quantization format to the engine, the artifact writer and the loader."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from compressor.errors import ShapeError

DAMAGED_HINT = "Copy the artifact again from where it was written, or build it again."


@dataclass(frozen=True)
class Stock:
    """The entry of config.json with which stock transformers reads the tensors of a format.

    family    the quant_method of config.json: compressed-tensors | bitsandbytes (see `stock_formats`)
    settings  the family's description of one weight; weights of equal settings are described once
    """

    family: str
    settings: dict[str, Any] = field(default_factory=dict)


def integer_scheme(bits: int, group_size: int, symmetric: bool) -> dict[str, Any]:
    """The `weights` of a compressed-tensors config group. group_size -1 is one scale per row."""
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "dynamic": False,
        "actorder": None,
    }


@cache
def standing_for(layer: type[nn.Module], block: type[nn.Module]) -> type[nn.Module]:
    """The class of a block that a layer changes in place: a subclass of both.

    It has the block's name, so that code that looks for the block's class or its name still finds it.
    """
    return type(block.__name__, (layer, block), {"__module__": block.__module__})


class Layer(nn.Module):
    """One weight (out_features, in_features), or one function of the model, in its quantization format.

    format_name  the format's name in the manifest and in config.json
    stands_for   the kind of module that it replaces: linear (nn.Linear), embedding (nn.Embedding, whose rows are looked
                 up), activation, norm, or attention (see `compressor.layers.block_attention`). Structural layers
                 replace a block, a module, or a module's attributes (see `compressor.layers.structural.placing`)
    weight_only  True: forward is a matmul with matrix(), so the engine may write matrix() into the dense module.
                 False: forward does more, such as quantizing its input, and the running model needs the layer itself
    helpers      other modules whose functions it uses when it runs; their source is copied to the modeling file of a
                 custom artifact
    """

    format_name: ClassVar[str]
    stands_for: ClassVar[str] = "linear"
    weight_only: ClassVar[bool] = True
    helpers: ClassVar[tuple[str, ...]] = ()

    in_features: int
    out_features: int
    dtype: torch.dtype = torch.float32  # of dense values; a loader sets it for layers whose input does not determine it

    @classmethod
    def prepare(cls, model: nn.Module) -> None:
        """Prepare a model before it gets layers of this format. Most formats need nothing."""

    @classmethod
    def empty(cls, shape: tuple[int, ...], format_params: dict[str, Any], dtype: torch.dtype, bias: bool) -> Self:
        """The layer with empty tensors of the right shapes, which a loader fills. Also works on the meta device.

        shape  (out_features, in_features); of a norm (width,) of its gain; () without a weight
        dtype  of dense values and of stored scales
        """
        raise NotImplementedError

    @classmethod
    def holds_bias(cls, format_params: dict[str, Any]) -> bool:
        """Whether this format stores the weight's bias too, so that the dense bias is dropped."""
        return False

    @classmethod
    def stock(cls, format_params: dict[str, Any]) -> Stock | str:
        """How stock transformers loads this format, or why it can't, as the end of a sentence about the weight."""
        return f"is stored as {cls.format_name}, which stock transformers doesn't know"

    def format_params(self) -> dict[str, Any]:
        """JSON parameters that rebuild this layer together with the tensors and the shape."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """Suffix -> tensor as in the checkpoint, without the bias; e.g. {"weight_packed": ...}."""
        raise NotImplementedError

    @classmethod
    def from_tensors(
        cls, format_params: dict[str, Any], tensors: dict[str, Tensor], bias: Tensor | None = None
    ) -> Self:
        """Rebuild the layer from the results of `format_params` and `tensors`."""
        raise NotImplementedError

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Set the stored tensors by suffix. raises ShapeError if one has another dtype or shape than this layer's"""
        for name, value in tensors.items():
            expected = getattr(self, name)
            if (expected.shape, expected.dtype) != (value.shape, value.dtype):
                raise ShapeError(
                    f"{name} is {value.dtype} {tuple(value.shape)}, {expected.dtype} {tuple(expected.shape)} expected",
                    hint=DAMAGED_HINT,
                    data={
                        "tensor": name,
                        "dtype": str(value.dtype),
                        "shape": list(value.shape),
                        "expected_dtype": str(expected.dtype),
                        "expected": list(expected.shape),
                    },
                )
            setattr(self, name, value.contiguous())

    @classmethod
    def planned(
        cls, shape: tuple[int, ...], format_params: dict[str, Any], dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Suffix -> (dtype, shape) of the stored tensors of a weight of this shape. Needs no data."""
        with torch.device("meta"):
            layer = cls.empty(shape, format_params, dtype, bias=False)
        return {name: (value.dtype, tuple(value.shape)) for name, value in layer.tensors().items()}

    def vector(self, dtype: torch.dtype) -> Tensor:
        """The bias (out_features,) of a format that stores it."""
        raise NotImplementedError

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight (out_features, in_features); of a norm its gain (width,)."""
        raise NotImplementedError

    def outside(self, x: Tensor) -> Tensor | None:
        """Number of values of an input outside of this layer's range, for the report; None: it has no range.

        The evaluation calls this method of every module that has it.
        """
        return None
