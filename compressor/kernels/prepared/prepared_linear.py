"""Implements quantized linear layers that call a kernel, with one class for each kind of weight.

    PreparedInteger   IntegerWeight: in the CPU library one fused call with the layers of the same input
    PreparedOutlier   OutlierWeight, LLM.int8()
    PreparedFactors   FactorWeight, a dense times a sparse factor

A prepared layer keeps the stored tensors under their names, so that the state_dict doesn't change, and one packed copy
for the kernel, which is not in the state_dict.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from compressor.kernels.cuda import ds1
from compressor.kernels.cuda import ops as cuda_ops
from compressor.kernels.ops import linear as ops
from compressor.kernels.ops import torch_products as torch_ops
from compressor.kernels.ops.dense_sparse import linear_dense_sparse
from compressor.kernels.ops.visible_calls import must_be_visible, without_gradient
from compressor.kernels.prepared.dispatch import (
    FACTORS,
    Choice,
    FactorWeight,
    IntegerWeight,
    OutlierWeight,
    Weight,
    shape_of,
)
from compressor.kernels.prepared.linear_call import LinearCall
from compressor.kernels.prepared.shared_input import SharedInput
from compressor.kernels.prepared.stock import StoredWeight

# by layout (which decides the device) and by name
RUN: dict[str | None, dict[str, Callable[..., Tensor]]] = {
    ops.LAYOUT: {"linear_int8_outlier": ops.linear_int8_outlier},  # the others have a LinearCall
    FACTORS: {"linear_dense_sparse": linear_dense_sparse},
    **dict.fromkeys(cuda_ops.LAYOUTS.values(), cuda_ops.RUN),
    **dict.fromkeys(torch_ops.LAYOUTS, torch_ops.RUN),
}


class PreparedLinear(nn.Module):
    """The base class of the three. Not for training: a backward pass through a layer is an error.

    packed  the packed weight for the kernel: codes in its layout, or the index of factors (on CUDA with the values)
    words   the format as text
    scales  names of the tensors that kernels read as float32, for any dtype of the model
    """

    scales: ClassVar[tuple[str, ...]] = ()
    packed: Tensor
    words: str

    def __init__(self, stored: StoredWeight, weight: Weight, choice: Choice) -> None:
        """weight: the numbers of `stored`"""
        super().__init__()
        assert choice.op is not None
        self.choice, self.read, self.names = choice, stored.read, tuple(stored.tensors)
        self.format_name, self.name = stored.format_name, choice.op
        for name, tensor in stored.tensors.items():
            self.register_buffer(name, tensor)
        self.bias = stored.bias
        self._take(weight)
        self.register_load_state_dict_post_hook(_take_again)

    def _take(self, weight: Weight) -> None:
        """Make the kernel's tensors and other arguments from the stored tensors."""
        self.out_features, self.in_features = shape_of(weight)
        for name, tensor in self._packed(weight).items():
            self.register_buffer(name, tensor, persistent=False)

    def _packed(self, weight: Any) -> dict[str, Tensor | None]:
        """`packed` and the other tensors of the kernel. Sets `words` and the kernel's numbers."""
        raise NotImplementedError

    def arguments(self) -> tuple[Any, ...]:
        """The arguments of the operation after x."""
        raise NotImplementedError

    def read_tensors(self) -> list[Tensor | None]:
        """The tensors of the weight that a matmul reads."""
        return [self.packed]

    def stored(self) -> StoredWeight:
        """The stored weight from which it was made."""
        tensors = {name: getattr(self, name) for name in self.names}
        return StoredWeight(self.format_name, tensors, self.bias, self.read)

    def _apply(self, *arguments: Any, **named: Any) -> Self:
        """Handle `to` and similar calls, which may move the packed weight."""
        kept = {name: getattr(self, name) for name in self.scales}
        super()._apply(*arguments, **named)
        for name, scale in kept.items():
            if scale is not None and (now := getattr(self, name)).dtype != torch.float32:
                setattr(self, name, scale.to(now.device))
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in the dtype of x"""
        name, layout = self.name, self.choice.layout
        if must_be_visible(x) and layout not in torch_ops.LAYOUTS:
            return getattr(torch.ops.compressor, name)(x, *self.arguments())
        with torch.no_grad():  # the registry costs as much as a small matmul, so only watched calls use it
            y = RUN[layout][name](x.detach(), *self.arguments())
        return without_gradient(x, y, name)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.words}, {self.choice.kernel}"


class PreparedInteger(PreparedLinear):
    """A weight of codes, scales and zero points.

    call    of this layer only, with its values looked up; None if it doesn't use the CPU library
    shared  the layers with which it shares a call, and its number among them
    """

    permutation: Tensor
    call: LinearCall | None = None
    shared: tuple[SharedInput, int] | None = None

    def __init__(self, stored: StoredWeight, weight: IntegerWeight, choice: Choice) -> None:
        super().__init__(stored, weight, choice)
        if choice.layout == ops.LAYOUT:
            self.call = LinearCall([self])

    def _take(self, weight: Weight) -> None:
        super()._take(weight)
        self._forget()

    def _packed(self, weight: IntegerWeight) -> dict[str, Tensor | None]:
        order, layout = weight.permutation(), self.choice.layout
        assert layout is not None
        if layout in torch_ops.LAYOUTS:
            codes = weight.codes if order is None else weight.codes.index_select(1, order)
            packed = torch_ops.pack(codes, weight.scale, weight.zero_point, layout)
        else:
            packed = ops.pack_weight(
                weight.codes, weight.scale, weight.zero_point, order, weight.bits, weight.group_size, layout
            )
        self.ordered = order is not None
        self.bits, self.group_size = weight.bits, weight.group_size
        self.words = f"W{weight.bits} " + ("rows" if weight.group_size == -1 else f"g{weight.group_size}")
        return {"packed": packed, "permutation": order}

    def arguments(self) -> tuple[Any, ...]:
        return (
            self.packed, self.bias, self.permutation, self.out_features, self.bits, self.group_size, self.choice.layout,
        )  # fmt: skip

    def _forget(self) -> None:
        for call in (self.call, self.shared and self.shared[0].call):
            if call is not None:
                call.forget()

    def _apply(self, *arguments: Any, **named: Any) -> Self:
        super()._apply(*arguments, **named)
        self._forget()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in the dtype of x"""
        if self.call is None or must_be_visible(x):
            return super().forward(x)
        y = None if self.shared is None else self.shared[0].product(self.shared[1], x)
        if y is None:
            y = self.call(x.index_select(-1, self.permutation) if self.ordered else x)[0]
        return without_gradient(x, y, self.name)

    def fused_format(self) -> tuple[Any, ...]:
        """The format; layers of the same format can share a call."""
        if self.call is None or self.ordered:
            return (id(self),)
        return self.choice, self.in_features, self.bits, self.group_size


class PreparedOutlier(PreparedLinear):
    """A weight of int8 rows, with columns of large magnitude in floating point."""

    scales = ("absmax",)
    absmax: Tensor
    columns: Tensor | None
    columns_weight: Tensor | None

    def _packed(self, weight: OutlierWeight) -> dict[str, Tensor | None]:
        packed, columns = weight.codes, weight.columns
        if self.choice.layout == ops.LAYOUT:
            packed = ops.pack_int8_rows(weight.codes, weight.absmax)
        elif columns is not None:
            columns = columns.int()
        self.threshold, self.words = weight.threshold, "W8 rows"
        return {"packed": packed, "absmax": weight.absmax, "columns": columns, "columns_weight": weight.weight}

    def arguments(self) -> tuple[Any, ...]:
        return self.packed, self.absmax, self.columns, self.columns_weight, self.bias, self.threshold


class PreparedFactors(PreparedLinear):
    """A weight of few atoms for each block of inputs, and the atoms of every output."""

    scales = ("atom_scale", "value_scale")
    atoms: Tensor
    values: Tensor
    atom_scale: Tensor | None
    value_scale: Tensor | None

    def _packed(self, weight: FactorWeight) -> dict[str, Tensor | None]:
        packed = weight.index
        if self.choice.layout == ds1.LAYOUT:
            packed = ds1.pack(weight.index, weight.values, weight.atoms.shape[1])
        self.words = f"{weight.values.shape[2]} of {weight.atoms.shape[1]} atoms"
        return {
            "packed": packed,
            "atoms": weight.atoms,
            "values": weight.values,
            "atom_scale": weight.atom_scale,
            "value_scale": weight.value_scale,
        }

    def arguments(self) -> tuple[Any, ...]:
        scales = () if self.value_scale is None else (self.atom_scale, self.value_scale)
        return (self.atoms, self.packed, self.values, self.bias, *scales)

    def read_tensors(self) -> list[Tensor | None]:
        read = [self.packed, self.atoms, self.atom_scale, self.value_scale]
        return [*read, self.values] if self.choice.layout == FACTORS else read


def prepared_linear(stored: StoredWeight, weight: Weight, choice: Choice) -> PreparedLinear:
    """A layer that multiplies by `weight`, the numbers of `stored`."""
    if isinstance(weight, IntegerWeight):
        return PreparedInteger(stored, weight, choice)
    if isinstance(weight, OutlierWeight):
        return PreparedOutlier(stored, weight, choice)
    return PreparedFactors(stored, weight, choice)


def _take_again(layer: PreparedLinear, keys: Any) -> None:
    """Make the kernel's copy again from the loaded tensors after load_state_dict."""
    stored = layer.stored()
    weight = stored.read(stored.tensors)
    assert not isinstance(weight, str)  # the same format as before
    layer._take(weight)
