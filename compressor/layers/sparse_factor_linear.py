"""Stores a weight as few dense atoms for each block of inputs; every output combines a fixed number of them.

With the inputs in blocks of B, W = [W_1, ..., W_n], each W_b (out, B) is S_b D_b: D_b (m, B) dense, S_b (out, m) with k
stored entries per row. Tensors (docs/format.md):
    weight_atoms        (n, m, B), D: float16, bfloat16 or int8
    weight_atom_scale   float32 (n, m), int8 only
    weight_values       (out, n, k), the stored entries of S, of the same dtype
    weight_value_scale  float32 (out,), int8 only
    weight_index        uint8 (ceil(out * n * bits / 8),), the positions of the entries (`sparse_factors`)

    bytes = v · m · in + v · out · n · k + ceil(out · n · min(k · ceil(log2 m), m) / 8), and 4 · (n · m + out) with int8

v is 2, or 1 with int8. The forward pass costs m · in + out · n · k multiply-adds per token, in float32 or wider.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from compressor.errors import ShapeError
from compressor.kernels.ops.sparse_factors import pack_index, row_bits, sparse_product, unpack_index
from compressor.layers.base import DAMAGED_HINT, Layer


class SparseFactorLinear(Layer):
    """Replaces nn.Linear. Multiplies by the atoms once, then gathers the products of each output."""

    format_name = "sparse_factor_linear"
    weight_only = False
    helpers: ClassVar[tuple[str, ...]] = ("compressor.kernels.ops.sparse_factors",)
    weight_atoms: Tensor
    weight_atom_scale: Tensor
    weight_values: Tensor
    weight_value_scale: Tensor
    weight_index: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        block: int,
        atoms: int,
        k: int,
        values: str,
        dtype: torch.dtype,
        bias: bool = False,
    ) -> None:
        """values: the stored dtype, float16 | bfloat16 | int8

        raises  ShapeError if block doesn't divide the inputs, or k > atoms
        """
        super().__init__()
        if in_features % block or not 1 <= k <= atoms:
            raise ShapeError(
                f"blocks of {block} values with {k} of {atoms} atoms each can't make up {in_features} inputs",
                hint=DAMAGED_HINT,
                data={"block": block, "k": k, "atoms": atoms, "inputs": in_features},
            )
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.block, self.atoms, self.k, self.values = block, atoms, k, values
        blocks, kind = in_features // block, getattr(torch, values)
        self.register_buffer("weight_atoms", torch.zeros(blocks, atoms, block, dtype=kind))
        self.register_buffer("weight_values", torch.zeros(out_features, blocks, k, dtype=kind))
        if values == "int8":
            self.register_buffer("weight_atom_scale", torch.zeros(blocks, atoms, dtype=torch.float32))
            self.register_buffer("weight_value_scale", torch.zeros(out_features, dtype=torch.float32))
        packed = -(-out_features * blocks * row_bits(atoms, k) // 8)
        self.register_buffer("weight_index", torch.zeros(packed, dtype=torch.uint8))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype), requires_grad=False) if bias else None

    @classmethod
    def empty(cls, shape: tuple[int, ...], format_params: dict[str, Any], dtype: torch.dtype, bias: bool) -> Self:
        return cls(
            shape[1],
            shape[0],
            format_params["block"],
            format_params["atoms"],
            format_params["k"],
            format_params["values"],
            dtype,
            bias,
        )

    @classmethod
    def pack(cls, atoms: Tensor, values: Tensor, index: Tensor, kind: str) -> Self:
        """Store factors.

        atoms   (blocks, m, B), values (out, blocks, k), floating
        index   (out, blocks, k) int64, ascending in each row, < m
        raises  ShapeError if the index doesn't ascend within m
        """
        if bool((index[..., 1:] <= index[..., :-1]).any()):
            raise ShapeError("the indices of a row must ascend", hint=DAMAGED_HINT, data={"reason": "descends"})
        count, block, k = atoms.shape[1], atoms.shape[2], values.shape[2]
        stored = getattr(torch, kind)
        tensors = {"weight_index": pack_index(index.reshape(-1, k), count)}
        if kind == "int8":
            atom_step = atoms.abs().amax(2).clamp(min=1e-30) / 127
            value_step = values.abs().amax((1, 2)).clamp(min=1e-30) / 127
            tensors |= {"weight_atom_scale": atom_step.float(), "weight_value_scale": value_step.float()}
            atoms, values = torch.round(atoms / atom_step[..., None]), torch.round(values / value_step[:, None, None])
        tensors |= {"weight_atoms": atoms.to(stored), "weight_values": values.to(stored)}
        return cls.from_tensors({"block": block, "atoms": count, "k": k, "values": kind}, tensors)

    def index(self) -> Tensor:
        """(out, blocks, k) int64"""
        blocks = self.in_features // self.block
        packed = unpack_index(self.weight_index, self.out_features * blocks, self.atoms, self.k)
        return packed.view(self.out_features, blocks, self.k)

    def _check_index(self) -> None:
        """raises ShapeError for stored bits that don't name k atoms per row"""
        rows = self.out_features * self.in_features // self.block
        index = unpack_index(self.weight_index, rows, self.atoms, self.k)
        if index.shape != (rows, self.k):
            raise ShapeError(
                f"weight_index doesn't name {self.k} atoms for each of {rows} rows",
                hint=DAMAGED_HINT,
                data={"tensor": "weight_index", "k": self.k, "rows": rows},
            )
        if bool((index[..., 1:] <= index[..., :-1]).any()) or int(index.max()) >= self.atoms:
            raise ShapeError(
                f"weight_index must ascend within {self.atoms} atoms in each row",
                hint=DAMAGED_HINT,
                data={"tensor": "weight_index", "atoms": self.atoms},
            )

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """atoms (blocks, m, B) and values (out, blocks, k)"""
        if self.values != "int8":
            return self.weight_atoms.to(dtype), self.weight_values.to(dtype)
        atoms = self.weight_atoms * self.weight_atom_scale[..., None]
        values = self.weight_values * self.weight_value_scale[:, None, None]
        return atoms.to(dtype), values.to(dtype)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The product of the factors (out, in)."""
        atoms, values = self.factors(torch.float32)
        blocks, index = len(atoms), self.index()
        spread = values.new_zeros(self.out_features, blocks, self.atoms).scatter_(2, index, values)
        return torch.cat([spread[:, b] @ atoms[b] for b in range(blocks)], 1).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        work = torch.promote_types(x.dtype, torch.float32)
        atoms, values = self.factors(work)
        result = sparse_product(x.reshape(-1, self.in_features).to(work), atoms, values, self.index())
        if self.bias is not None:
            result = result + self.bias.to(work)
        return result.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def format_params(self) -> dict[str, Any]:
        return {"block": self.block, "atoms": self.atoms, "k": self.k, "values": self.values}

    def tensors(self) -> dict[str, Tensor]:
        scales = ("weight_atom_scale", "weight_value_scale") if self.values == "int8" else ()
        return {name: getattr(self, name) for name in ("weight_atoms", "weight_values", "weight_index", *scales)}

    @classmethod
    def from_tensors(
        cls, format_params: dict[str, Any], tensors: dict[str, Tensor], bias: Tensor | None = None
    ) -> Self:
        blocks, _, block = tensors["weight_atoms"].shape
        with torch.device("meta"):
            layer = cls.empty((len(tensors["weight_values"]), blocks * block), format_params, torch.float32, bias=False)
        layer.fill(tensors)
        layer._check_index()
        layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return layer
