"""Reads weights in the layouts of GPTQ and AWQ: integer codes packed into int32 words, with zero points and scales.

Both compute weight[o, i] = scale[g, o] * (code[i, o] - zero_point[g, o]), where g is the group of the input i. No
library does this on a CPU without kernels of its own, so it is done here.

GPTQ packs codes along the inputs, as one stream of bits with the first code in the lowest bits of the first word. A
code of 3 bits may lie in two words. Version 1 of its format (`gptq`) stores each zero point minus 1. AWQ packs eight
codes of neighbouring outputs into a word, in an order of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compressor.model.quantized_weight import Dequantize, QuantizedWeight, Tensors, require, unsound

WORD_BITS = 32
GPTQ_BITS = (2, 3, 4, 8)
GPTQ_OFFSETS = {"gptq": 1, "gptq_v2": 0}  # checkpoint_format -> what is added to a stored zero point
AWQ_BITS = 4
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # field of a word -> its place among eight outputs
CHUNK_INPUTS = 1024  # inputs that are dequantized at once, which bounds the memory for float32 products


def find_gptq(tensors: Tensors, stated: Mapping[str, Any]) -> list[QuantizedWeight]:
    """The quantized weights; none for a variant that isn't read (marlin). raises ModelError for shapes that don't fit

    A module has qweight (in * bits / 32, out) int32, qzeros (groups, out * bits / 32) int32, scales (groups, out), and
    mostly g_idx (in,), the group of each input.
    """
    variant = stated.get("checkpoint_format") or "gptq"
    if variant not in GPTQ_OFFSETS or stated.get("is_marlin_format"):
        return []
    found = []
    for module in _modules(tensors):
        words, zeros, scales = (tensors[f"{module}.{name}"].shape for name in ("qweight", "qzeros", "scales"))
        if not len(words) == len(zeros) == len(scales) == 2 or not all((*words, *zeros, *scales)):
            raise unsound(module, f"qweight {words}, qzeros {zeros} and scales {scales} need two dimensions")
        (groups, out), bits = scales, zeros[1] * WORD_BITS // scales[1]
        inputs = words[0] * WORD_BITS // bits if bits in GPTQ_BITS else 0
        names = ("qweight", "qzeros", "scales", *(("g_idx",) if f"{module}.g_idx" in tensors else ()))
        fits = words == (inputs * bits // WORD_BITS, out) and zeros == (groups, out * bits // WORD_BITS)
        has_groups = tensors[f"{module}.g_idx"].shape == (inputs,) if "g_idx" in names else inputs % groups == 0
        if bits not in GPTQ_BITS or not fits or not has_groups:
            raise unsound(module, f"qweight {words}, qzeros {zeros}, scales {scales} and g_idx don't fit together")
        dequantize = partial(_dequantize_gptq, bits=bits, offset=GPTQ_OFFSETS[variant])
        found.append(_weight(module, names, (out, inputs), groups, bits, stated, dequantize))
    return found


def find_awq(tensors: Tensors, stated: Mapping[str, Any]) -> list[QuantizedWeight]:
    """The quantized weights; none for another layout than `gemm`. raises ModelError for shapes that don't fit

    A module has qweight (in, out / 8) int32, qzeros (groups, out / 8) int32 and scales (groups, out).
    """
    layout = stated.get("version") or stated.get("format") or "gemm"
    if str(layout).lower() != "gemm" or stated.get("bits", AWQ_BITS) != AWQ_BITS:
        return []
    found = []
    for module in _modules(tensors):
        words, zeros, scales = (tensors[f"{module}.{name}"].shape for name in ("qweight", "qzeros", "scales"))
        per_word = len(AWQ_ORDER)
        if (
            not len(words) == len(zeros) == len(scales) == 2
            or scales != (zeros[0], zeros[1] * per_word)
            or words[1] != zeros[1]
            or not scales[0]
            or words[0] % scales[0]
        ):
            raise unsound(module, f"qweight {words}, qzeros {zeros} and scales {scales} don't fit together")
        shape = (scales[1], words[0])
        names = ("qweight", "qzeros", "scales")
        found.append(_weight(module, names, shape, scales[0], AWQ_BITS, stated, _dequantize_awq))
    return found


def unpack_stream(words: Tensor, bits: int) -> Tensor:
    """The codes of a stream of bits along the first dimension.

    words   (n * bits / 32, columns) int32
    returns (n, columns) uint8
    """
    period = math.lcm(bits, WORD_BITS)
    count, stride = period // bits, period // WORD_BITS  # codes and words after which codes begin at bit 0 again
    out = torch.empty(len(words) * WORD_BITS // bits, words.shape[1], dtype=torch.uint8)
    for place in range(count):
        word, shift = divmod(place * bits, WORD_BITS)
        codes = words[word::stride] >> shift
        if (low := WORD_BITS - shift) < bits:  # the rest of the code is in the next word
            codes = (codes & ((1 << low) - 1)) | (words[word + 1 :: stride] << low)
        out[place::count] = (codes & ((1 << bits) - 1)).to(torch.uint8)
    return out


def unpack_awq(words: Tensor) -> Tensor:
    """The codes of words with eight outputs each: (rows, out / 8) int32 -> (rows, out) uint8."""
    out = torch.empty(*words.shape, len(AWQ_ORDER), dtype=torch.uint8)
    for field, place in enumerate(AWQ_ORDER):
        out[..., place] = ((words >> (AWQ_BITS * field)) & 15).to(torch.uint8)
    return out.flatten(-2)


def _dequantize_gptq(values: Mapping[str, Tensor], dtype: torch.dtype, bits: int, offset: int) -> Tensor:
    codes = unpack_stream(values["qweight"], bits)
    stored = unpack_stream(values["qzeros"].T, bits).T
    # A zero point of 0 minus 1 is stored as the largest code, and becomes 0 again here.
    zeros = (stored.short() + offset) & ((1 << bits) - 1)
    group = values["g_idx"].long() if "g_idx" in values else _groups(len(codes), len(zeros))
    return _product(codes, zeros, values["scales"], group, dtype)


def _dequantize_awq(values: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    codes, zeros = unpack_awq(values["qweight"]), unpack_awq(values["qzeros"]).short()
    return _product(codes, zeros, values["scales"], _groups(len(codes), len(zeros)), dtype)


def _product(codes: Tensor, zeros: Tensor, scales: Tensor, group: Tensor, dtype: torch.dtype) -> Tensor:
    """The dense matrix (out, in), computed in float32, in which the products are exact.

    codes (in, out) uint8, zeros (groups, out) int16, scales (groups, out), group (in,) int64
    """
    out = torch.empty(codes.shape[1], codes.shape[0], dtype=dtype)
    for start in range(0, len(codes), CHUNK_INPUTS):
        part = slice(start, start + CHUNK_INPUTS)
        of = group[part]
        out[:, part] = ((codes[part].short() - zeros[of]).float() * scales[of].float()).T
    return out


def _groups(inputs: int, groups: int) -> Tensor:
    return torch.arange(inputs) // (inputs // groups)


def _modules(tensors: Tensors) -> list[str]:
    """The modules with packed codes. raises ModelError for words of another size than 32 bits"""
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    for module in modules:
        require(tensors, module, ("qzeros", "scales"))
        for name in (f"{module}.qweight", f"{module}.qzeros"):
            if tensors[name].stored_as != "I32":
                raise unsound(name, f"has words of {tensors[name].stored_as}, I32 is needed")
    return modules


def _weight(
    module: str,
    names: Sequence[str],
    shape: tuple[int, int],
    groups: int,
    bits: int,
    stated: Mapping[str, Any],
    dequantize: Dequantize,
) -> QuantizedWeight:
    size = shape[1] // groups
    is_whole_row = groups == 1 and stated.get("group_size") != size
    layout = "one scale per row" if is_whole_row else f"groups of {size}"
    members = {name: f"{module}.{name}" for name in names}
    return QuantizedWeight(f"{module}.weight", members, shape, bits, layout, dequantize)
