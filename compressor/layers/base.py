"""What every stored form offers to the engine, the artifact writer and the loader."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from compressor.errors import ShapeError


@dataclass(frozen=True)
class Stock:
    """What config.json has to say so that stock transformers reads a form's tensors as they are.

    family    the quant_method of config.json: compressed-tensors | bitsandbytes (see `stock_formats`)
    settings  how that family describes one weight; weights of equal settings are described once
    """

    family: str
    settings: dict[str, Any] = field(default_factory=dict)


def integer_scheme(bits: int, group_size: int, symmetric: bool) -> dict[str, Any]:
    """The `weights` of a compressed-tensors config group; group_size -1 is one scale per row."""
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
    """The class of a block that a layer turns into itself, in place: a subclass of both.

    It has the block's name, so that whatever looks for the block's class or its name still finds it.
    """
    return type(block.__name__, (layer, block), {"__module__": block.__module__})


class Layer(nn.Module):
    """One weight (out_features, in_features), or one function of the model, in its stored form.

    form         its name in the manifest and in config.json
    stands_for   what it is a drop-in for: linear (nn.Linear), embedding (nn.Embedding, of which rows are looked up),
                 activation, norm, or attention (see `compressor.layers.block_attention`). Structural layers stand for a
                 block, a module, or a module's settings (see `compressor.layers.structural.placing`)
    weight_only  True: forward is a dense multiply by matrix(), so the engine may write matrix() back. False: forward
                 does more, such as rounding its input, and the layer itself has to stand in the running model
    helpers      modules, beside its own, whose functions it uses when it runs; the modeling file of a custom artifact
                 gets their source
    """

    form: ClassVar[str]
    stands_for: ClassVar[str] = "linear"
    weight_only: ClassVar[bool] = True
    helpers: ClassVar[tuple[str, ...]] = ()

    in_features: int
    out_features: int
    dtype: torch.dtype = torch.float32  # of what stays dense; a loader sets it for layers whose input doesn't tell

    @classmethod
    def prepare(cls, model: nn.Module) -> None:
        """What a model needs before layers of this form stand in it; most need nothing."""

    @classmethod
    def empty(cls, shape: tuple[int, ...], spec: dict[str, Any], dtype: torch.dtype, bias: bool) -> Self:
        """The layer with tensors of the right shapes for a loader to fill; runs under the meta device too.

        shape  (out_features, in_features); of a norm (width,) of its gain, of what has no weight ()
        dtype  of what stays dense, and of stored scales
        """
        raise NotImplementedError

    @classmethod
    def holds_bias(cls, spec: dict[str, Any]) -> bool:
        """Whether this form stores the weight's bias itself, so that the dense one is dropped."""
        return False

    @classmethod
    def stock(cls, spec: dict[str, Any]) -> Stock | str:
        """How stock transformers loads this form, or why it can't: what follows the weight's name in a sentence."""
        return f"is stored as {cls.form}, which stock transformers doesn't know"

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

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Take stored tensors by suffix. raises ShapeError if one has another dtype or shape than this layer's"""
        for name, value in tensors.items():
            expected = getattr(self, name)
            if (expected.shape, expected.dtype) != (value.shape, value.dtype):
                raise ShapeError(
                    f"{name} is {value.dtype} {tuple(value.shape)}, {expected.dtype} {tuple(expected.shape)} expected",
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
        cls, shape: tuple[int, ...], spec: dict[str, Any], dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Suffix -> (dtype, shape) of the tensors a weight of this shape would store; no data needed."""
        with torch.device("meta"):
            layer = cls.empty(shape, spec, dtype, bias=False)
        return {name: (value.dtype, tuple(value.shape)) for name, value in layer.tensors().items()}

    def vector(self, dtype: torch.dtype) -> Tensor:
        """The bias (out_features,) of a form that holds it."""
        raise NotImplementedError

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The weight (out_features, in_features) that the stored tensors stand for; of a norm its gain (width,)."""
        raise NotImplementedError

    def outside(self, x: Tensor) -> Tensor | None:
        """How many values of an input lie outside the range that this layer holds, for the report; None: it has none.

        The evaluation asks every module of the model that has this method, stored form or not.
        """
        return None
