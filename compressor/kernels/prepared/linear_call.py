"""Multiplies one input by several layers of the same format in one call of the CPU library.

Everything that does not depend on the input is looked up once. Between two layers a model reads more data than the
caches can keep. Then each lookup of a name or attribute costs microseconds, while a small matmul takes some tens of
them.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

from torch import Tensor

from compressor.errors import KernelError, ShapeError
from compressor.kernels.ops import linear as ops
from compressor.kernels.prepared.fused_layer import FusedLayer

FIELDS = 6  # of a weight in ops.h: packed, its bytes, bias, its dtype, outputs, y
BIAS, BIAS_DTYPE, Y = 2, 3, 5


class Bound(NamedTuple):
    """The values that don't depend on the input.

    size     bytes of all packed weights
    given    (weights, FIELDS) as in ops.h; a call sets biases and outputs
    parts    for each weight its layer, its number of outputs and the beginning of its row in `given`
    weights  the packed weights, whose addresses are in `given`
    """

    run: Callable[..., int]
    level: int
    size: int
    columns: int
    bits: int
    group: int
    given: array[int]
    parts: tuple[tuple[FusedLayer, int, int], ...]
    weights: tuple[Tensor, ...]


class LinearCall:
    """layers  whose packed weights have layout cpu2, one width and one group"""

    def __init__(self, layers: Sequence[FusedLayer]) -> None:
        self.layers = layers
        self.name = layers[0].choice.op
        self.bound: Bound | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"bound": None}  # a copy has its weights at other addresses

    def forget(self) -> None:
        """Look everything up again, since the layers have other packed weights."""
        self.bound = None

    def _bind(self) -> Bound:
        first, library = self.layers[0], ops.cpu_library()
        weights, given = tuple(layer.packed for layer in self.layers), array("q")
        for packed, layer in zip(weights, self.layers, strict=True):
            if not packed.is_cpu:
                raise KernelError(
                    f"{self.name}: the weight is on {packed.device}, and this operation runs on the CPU",
                    hint=ops.ON_CPU,
                    data={"op": self.name, "device": str(packed.device)},
                )
            given.extend((packed.data_ptr(), packed.numel(), 0, 0, layer.out_features, 0))
        self.bound = Bound(
            run=getattr(library.functions, f"{self.name}_parts"),
            level=library.level,
            size=sum(packed.numel() for packed in weights),
            columns=first.in_features,
            bits=first.bits,
            group=ops.group_columns(first.in_features, first.group_size),
            given=given,
            parts=tuple((layer, layer.out_features, at * FIELDS) for at, layer in enumerate(self.layers)),
            weights=weights,
        )
        return self.bound

    def __call__(self, x: Tensor) -> list[Tensor]:
        """x (..., in) -> (..., out) for each layer, in the dtype of x, without gradients

        raises  ShapeError; KernelError if x is not on the CPU
        """
        run, level, size, columns, bits, group, given, parts, _ = self.bound or self._bind()
        kind, (*lead, width) = ops.DTYPES.get(x.dtype), x.shape or (0,)
        if kind is None or width != columns:
            raise ShapeError(
                f"{self.name}: x {x.dtype} {tuple(x.shape)}, a float (..., {columns}) expected",
                data={"op": self.name, "dtype": str(x.dtype), "shape": list(x.shape), "columns": columns},
            )
        if not x.is_cpu:
            raise KernelError(
                f"{self.name}: x is on {x.device}, and this operation runs on the CPU",
                hint=ops.ON_CPU,
                data={"op": self.name, "device": str(x.device)},
            )
        x = x.contiguous()
        given = given[:]
        outputs: list[Tensor] = []
        kept: list[Tensor] = []
        for layer, out, at in parts:
            y = x.new_empty(*lead, out)  # single sizes are parsed in two thirds of the time of a tuple
            given[at + Y] = y.data_ptr()
            outputs.append(y)
            if (bias := layer.bias) is not None:
                ops.check_bias(str(self.name), bias, out)
                kept.append(bias.contiguous())
                given[at + BIAS] = kept[-1].data_ptr()
                given[at + BIAS_DTYPE] = ops.DTYPES[bias.dtype]
        error = run(
            level, ops.threads_for(size), x.data_ptr(), kind, given.buffer_info()[0], len(outputs), prod(lead), columns,
            bits, group,
        )  # fmt: skip
        if error:
            outs = [out for _, out, _ in parts]
            raise ShapeError(
                f"{self.name}: a packed weight isn't of {outs} x {columns}, {bits} bits",
                data={"op": self.name, "outs": list(outs), "columns": columns, "bits": bits},
            )
        return outputs
