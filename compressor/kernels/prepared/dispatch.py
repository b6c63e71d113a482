"""Chooses the kernel for a weight or a lookup table, with the reasons against better ones. Decided once, in `prepare`.

In order: the CUDA kernels, the CPU library, a torch operation with the same results, the reference (dequantize and
multiply). A choice has the reason for each better one that was not used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.kernels.cpu import LEVELS, Library
from compressor.kernels.cuda import devices, ds1
from compressor.kernels.cuda import ops as cuda_ops
from compressor.kernels.ops import torch_products as torch_ops
from compressor.kernels.ops.linear import BITS, DTYPES, LAYOUT
from compressor.kernels.ops.table_lookup import MOST_ENTRIES
from compressor.kernels.prepared.selftest import tried_library

DYNAMIC_INT8 = "int8"
TORCH_OP, REFERENCE = FALLBACKS = "torch op", "reference"  # the implementations without kernels of this package
MOST_INT8_INPUTS = 65536  # 255 * 127 * 65536 < 2**31: int32 sums are exact


@dataclass(frozen=True)
class IntegerWeight:
    """A weight (out, in) as integers: (codes - zero_point) * scale, which covers every integer format.

    codes        (out, in) uint8 in [0, 2**bits - 1]
    scale        (out, groups) float32, bfloat16 or float16
    zero_point   (out, groups) uint8; None: 2**(bits - 1)
    group_size   columns of a group, -1 for whole rows
    group_index  (in,) the group of each column; None: the groups are consecutive
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    group_size: int
    group_index: Tensor | None = None

    def permutation(self) -> Tensor | None:
        """(in,) int64: the columns sorted by group, as kernels need them; None: they are sorted."""
        return None if self.group_index is None else torch.argsort(self.group_index, stable=True)


@dataclass(frozen=True)
class OutlierWeight:
    """A weight of LLM.int8(): rows of int8, and the inputs that are kept in floating point.

    codes      (out, in) int8 in [-127, 127]; absmax (out,) float32: codes * absmax / 127
    threshold  of a call's own outlier columns, 0 for none; without calibrated ones
    columns    (k,) int64 calibrated columns, with their weight (out, k); or None
    """

    codes: Tensor
    absmax: Tensor
    threshold: float
    columns: Tensor | None
    weight: Tensor | None


@dataclass(frozen=True)
class FactorWeight:
    """A weight of few atoms for each block of inputs; every output combines k of them (`layers/sparse_factor_linear`).

    atoms        (blocks, m, width), values (out, blocks, k): float32, bfloat16 or float16; or int8, times their scales
    index        (out, blocks, k) uint16, which atoms
    atom_scale   (blocks, m), value_scale (out,) float32; or None
    """

    atoms: Tensor
    values: Tensor
    index: Tensor
    atom_scale: Tensor | None = None
    value_scale: Tensor | None = None


Weight = IntegerWeight | OutlierWeight | FactorWeight
FACTORS = "factors"  # the layout of a FactorWeight, which is not packed


def shape_of(weight: Weight) -> tuple[int, int]:
    """(out, in)"""
    if isinstance(weight, FactorWeight):
        return weight.values.shape[0], weight.atoms.shape[0] * weight.atoms.shape[2]
    return weight.codes.shape[0], weight.codes.shape[1]


def device_of(weight: Weight) -> torch.device:
    return weight.atoms.device if isinstance(weight, FactorWeight) else weight.codes.device


@dataclass(frozen=True)
class Choice:
    """kernel   the kernel, such as "cpu library, avx512vnni"
    op       its name in torch.ops.compressor; None: the layer's own forward
    skipped  kernels that were not used, each with the reason
    layout   of the packed weight; None with op None, and of tables
    """

    kernel: str
    op: str | None
    skipped: tuple[str, ...]
    layout: str | None = None

    @property
    def is_fallback(self) -> bool:
        """Whether no kernel of this package is used, but torch or the reference."""
        return self.kernel in FALLBACKS


def choose(weight: Weight | str, activations: str | None, inputs: torch.dtype | None = None) -> Choice:
    """The best kernel on this machine.

    weight       a str is the reason why the format has no such numbers
    activations  "int8": dynamic activation quantization, row by row, which changes results; None: weight-only
    inputs       dtype of x, None if it is unknown: not every CUDA kernel accepts float32
    raises       KernelError if the CPU library or CUDA kernels fail their self-test
    """
    skipped: list[str] = []
    refused = _refusal_on_cuda(weight, activations, inputs)
    if refused is None:
        assert not isinstance(weight, str)
        kernels = devices.kernels_on(device_of(weight))
        if not isinstance(kernels, str):
            op = _op(weight, activations)
            return Choice(kernels.name, op, (), cuda_ops.LAYOUTS[op])
        skipped.append(f"{devices.NAME} ({kernels})")
    else:
        skipped.append(f"{devices.NAME} ({refused})")  # nothing is compiled for a refused weight
    found = tried_library()
    reason = weight if isinstance(weight, str) else _refusal(weight, activations)
    if isinstance(found, str):
        skipped.append(f"cpu library ({found})")
    elif reason is not None:
        skipped.append(f"cpu library ({reason})")
    else:
        assert not isinstance(weight, str)  # else it is the reason
        layout = FACTORS if isinstance(weight, FactorWeight) else LAYOUT
        return Choice(found.kernel, _op(weight, activations), tuple(skipped), layout)
    of_torch, why = _torch_layout(weight, activations, inputs)
    if of_torch is not None:
        assert not isinstance(weight, str)
        return Choice(TORCH_OP, _op(weight, activations), tuple(skipped), of_torch)
    skipped.append(f"{TORCH_OP} ({why})")
    return Choice(REFERENCE, None, tuple(skipped))


def _on_the_cpu(what: str) -> str:
    """The reason why no CUDA kernel is used on the CPU."""
    return f"{what} are on the CPU" if torch.cuda.is_available() else "no CUDA device"


def choose_lookup_table(table: Tensor, op: str) -> Choice:
    """The best kernel on this machine for a lookup table (entries,). op: its operation."""
    refused = f"{op} has no CUDA kernel in torch yet" if devices.is_cuda(table.device) else _on_the_cpu("tables")
    skipped = [f"{devices.NAME} ({refused})"]
    found = tried_library()
    if isinstance(found, str):
        skipped.append(f"cpu library ({found})")
    elif table.device.type != "cpu":
        skipped.append(f"cpu library (tables are on {table.device.type})")
    elif table.dtype != torch.float32 or not 2 <= len(table) <= MOST_ENTRIES:
        skipped.append(f"cpu library ({len(table)} entries of {table.dtype}, 2 to {MOST_ENTRIES} of float32 wanted)")
    else:
        return Choice(found.kernel, op, tuple(skipped))
    return Choice(REFERENCE, None, (*skipped, f"{TORCH_OP} (the reference is torch's operations already)"))


def fast_library() -> Library | None:
    """The compiled library, if it is there and faster than torch at what torch has operations for."""
    found = tried_library()
    return None if isinstance(found, str) or LEVELS[found.level] == "scalar" else found


def choose_dense(weight: Tensor) -> Choice | None:
    """The library's matmul with a dense weight (out, in); None if torch's is used."""
    found = fast_library()
    if found is None or weight.device.type != "cpu" or weight.dtype not in DTYPES:
        return None
    return Choice(found.kernel, "linear_dense", (f"{devices.NAME} ({_on_the_cpu('weights')})",))


def _torch_layout(weight: Weight | str, activations: str | None, inputs: torch.dtype | None) -> tuple[str | None, str]:
    """The layout of a torch matmul with the same results, or None, and the reason."""
    if isinstance(weight, str):
        return None, weight
    if device_of(weight).type != "cpu":
        return None, f"weights are on {device_of(weight).type}"
    if not isinstance(weight, IntegerWeight):
        return None, "the reference is torch's products already"
    if unequal := _unequal_groups(weight):
        return None, unequal
    centred = weight.zero_point is None or bool((weight.zero_point == 2 ** (weight.bits - 1)).all())
    op = _op(weight, activations)
    return torch_ops.layout_for(op, weight.bits, weight.group_size, shape_of(weight), centred, inputs)


def _op(weight: Weight, activations: str | None) -> str:
    if isinstance(weight, OutlierWeight):
        return "linear_int8_outlier"
    if isinstance(weight, FactorWeight):
        return "linear_dense_sparse"
    return "linear_dynamic_int8" if activations == DYNAMIC_INT8 else "linear_weight_only"


def _refusal_on_cuda(weight: Weight | str, activations: str | None, inputs: torch.dtype | None) -> str | None:
    """The reason why no CUDA kernel can be used for this weight; None if one can."""
    if not isinstance(weight, str) and devices.is_cuda(device_of(weight)):
        if isinstance(weight, FactorWeight):
            if weight.atom_scale is not None or weight.value_scale is not None:
                return "int8 factors have no CUDA kernel in torch yet"
            return ds1.refusal(weight.atoms, weight.values, inputs)
        bits, group_size = (weight.bits, weight.group_size) if isinstance(weight, IntegerWeight) else (8, -1)
        out, columns = shape_of(weight)
        reason = cuda_ops.refusal(_op(weight, activations), out, columns, bits, group_size, inputs)
        return reason or (_unequal_groups(weight) if isinstance(weight, IntegerWeight) else None)
    if not torch.cuda.is_available():
        return "no CUDA device"
    return weight if isinstance(weight, str) else "weights are on the CPU"


def _refusal(weight: Weight, activations: str | None) -> str | None:
    """The reason why no CPU kernel can be used for this weight; None if one can."""
    if device_of(weight).type != "cpu":
        return f"weights are on {device_of(weight).type}"
    if isinstance(weight, FactorWeight):
        for kept, scale in ((weight.atoms, weight.atom_scale), (weight.values, weight.value_scale)):
            if kept.dtype not in (DTYPES if scale is None else (torch.int8,)):
                return f"factors are {kept.dtype}, floats of 16 or 32 bits or scaled int8 are wanted"
        return None
    columns = shape_of(weight)[1]
    if isinstance(weight, OutlierWeight):
        return f"{columns} inputs, at most {MOST_INT8_INPUTS}" if columns > MOST_INT8_INPUTS else None
    op = _op(weight, activations)
    if weight.bits not in BITS[op]:
        return f"{op} takes {', '.join(map(str, BITS[op]))} bits, these are {weight.bits}"
    if weight.scale.dtype not in DTYPES:
        return f"scales are {weight.scale.dtype}"
    if weight.group_size != -1 and weight.group_size % 8:
        return f"groups of {weight.group_size} columns, a multiple of 8 is wanted"
    if (columns if weight.group_size == -1 else weight.group_size) * 128 * (2**weight.bits - 1) >= 2**31:
        return f"groups of {columns} columns of {weight.bits} bits: int32 can't hold their sums"
    return _unequal_groups(weight)


def _unequal_groups(weight: IntegerWeight) -> str | None:
    if weight.group_index is not None:
        if weight.group_index.numel() and int(weight.group_index.min()) < 0:
            return "group index with columns of no group: no kernel takes it"
        counts = torch.bincount(weight.group_index.long(), minlength=weight.scale.shape[1])
        if not bool((counts == weight.group_size).all()):
            return f"group index with {int(counts.min())} to {int(counts.max())} columns a group: no kernel takes it"
    return None
