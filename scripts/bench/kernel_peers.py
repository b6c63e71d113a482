"""Defines the candidates of cpu_kernels.py: our operations, torch's, bitsandbytes' and llama.cpp's, for one shape.

A `Candidate` has enough copies of its weight that no cache has it when it is called, and multiplies by one of them.
Its result is compared with float64 once, when it is made.
"""

from __future__ import annotations

import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.evaluation.environment import cpu_features
from compressor.kernels.ops import linear as ops
from compressor.kernels.ops.int8_split import round_rows
from compressor.kernels.prepared.dispatch import DYNAMIC_INT8, IntegerWeight, choose
from compressor.kernels.prepared.prepared_linear import PreparedInteger
from compressor.kernels.prepared.stock import StoredWeight

HERE = Path(__file__).parent
CHECKED = 128  # rows of the weight that are compared with float64
# Relative error of the result, on these weights: bfloat16 results have 8 bits,
# int8 activations of normal inputs about 1 %, LLM.int8()'s int8 weights as much again.
TOLERANCE = {"float32": 1e-4, "bf16": 0.01, "int8": 0.03}


@dataclass
class Candidate:
    """name    ours start with "ours"
    seconds of one product with the copy of that number, by `run`; `copies` of them, `bytes` each
    error      relative, to float64
    slow       too slow to be called as often as others
    """

    name: str
    run: Callable[[int], float]
    copies: int
    bytes: int
    error: float
    slow: bool = False
    note: str = ""


@dataclass(frozen=True)
class Shape:
    out: int
    columns: int

    def __str__(self) -> str:
        return f"{self.out}x{self.columns}"


def copies_of(size: int, rotation: int) -> int:
    return max(1, -(-rotation // size))


def relative_error(found: Tensor, x: Tensor, weight: Tensor) -> float:
    wanted = x.double() @ weight.double().T
    return float((found[:, : len(weight)].double() - wanted).norm() / wanted.norm())


def timed(
    name: str,
    multiply: Callable[[Any], Tensor],
    packed: Any,
    size: int,
    *,
    x: Tensor,
    weight: Tensor,
    kind: str,
    rotation: int,
    clone: Callable[[Any], Any] = Tensor.clone,
    slow: bool = False,
) -> Candidate:
    """A candidate of this process; `weight` has the first rows of the dequantized `packed`.

    raises  ArithmeticError if its result is wrong
    """
    error = relative_error(multiply(packed), x, weight)
    if not error <= TOLERANCE[kind]:
        raise ArithmeticError(f"{name}: relative error {error:.3g} to float64, at most {TOLERANCE[kind]} expected")
    weights = [packed, *(clone(packed) for _ in range(copies_of(size, rotation) - 1))]

    def run(number: int) -> float:
        chosen = weights[number]
        start = time.perf_counter()
        multiply(chosen)
        return time.perf_counter() - start

    return Candidate(name, run, len(weights), size, error, slow)


def integer_weight(
    shape: Shape, bits: int, group: int, index: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """codes, scale (bfloat16), zero point, and the first rows as float64; index: the group of each column"""
    groups = ops.groups_of(shape.columns, group)
    codes = torch.randint(0, 2**bits, (shape.out, shape.columns), dtype=torch.uint8)
    scale = (torch.rand(shape.out, groups) * 0.02 + 0.01).bfloat16()
    zero = torch.randint(2 ** (bits - 1) - 2, 2 ** (bits - 1) + 3, (shape.out, groups), dtype=torch.uint8)
    if index is None:
        index = torch.arange(shape.columns) // (shape.columns if group == -1 else group)
    spread = [part[:CHECKED].double()[:, index] for part in (scale, zero)]
    return codes, scale, zero, (codes[:CHECKED].double() - spread[1]) * spread[0]


def prepared_layer(
    weight: IntegerWeight, activations: str | None, dtype: torch.dtype, bias: torch.nn.Parameter | None = None
) -> PreparedInteger:
    """A layer of a prepared model, without the stored tensors, which its matmul doesn't read."""
    stored = StoredWeight("packed_linear", {}, bias, lambda tensors: weight)
    return PreparedInteger(stored, weight, choose(weight, activations, dtype))


def ours(
    name: str,
    activations: str | None,
    shape: Shape,
    bits: int,
    group: int,
    x: Tensor,
    rotation: int,
    whole: bool = False,
) -> Candidate:
    """whole: columns are in any groups, as after act-order, there is a bias, and the layer itself is called"""
    index = torch.randperm(shape.columns) // group if whole else None
    bias = torch.nn.Parameter(torch.zeros(shape.out), requires_grad=False) if whole else None
    codes, scale, zero, weight = integer_weight(shape, bits, group, index)

    def pack(_: Any = None) -> PreparedInteger:  # a clone would have other memory pages
        return prepared_layer(IntegerWeight(codes, scale, zero, bits, group, index), activations, x.dtype, bias)

    layer = pack()
    return timed(
        name,
        lambda layer: layer(x) if whole else layer.call(x)[0],
        layer,
        layer.packed.numel(),
        x=x,
        weight=weight,
        kind="int8" if activations else "float32" if x.dtype == torch.float32 else "bf16",
        rotation=rotation,
        clone=pack,
    )


def torch_dense(name: str, shape: Shape, x: Tensor, dtype: torch.dtype, rotation: int) -> Candidate:
    weight, x = torch.randn(shape.out, shape.columns).to(dtype), x.to(dtype)
    kind = "float32" if dtype == torch.float32 else "bf16"
    return timed(
        name,
        lambda w: F.linear(x, w),
        weight,
        weight.numel() * weight.element_size(),
        x=x,
        weight=weight[:CHECKED],
        kind=kind,
        rotation=rotation,
    )


def torch_int4(name: str, shape: Shape, x: Tensor, rotation: int, group: int = 64) -> Candidate:
    """torch._weight_int4pack_mm_for_cpu; its zero is a float that is added, after code 8 is taken off"""
    codes = torch.randint(0, 16, (shape.out, shape.columns), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scale = torch.rand(shape.columns // group, shape.out, 2).bfloat16() * 0.02
    x = x.bfloat16()
    wide = scale[:, :CHECKED].double().repeat_interleave(group, 0)
    weight = (codes[:CHECKED].double() - 8) * wide[..., 0].T + wide[..., 1].T
    return timed(
        name,
        lambda w: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w, group, scale),
        packed,
        packed.numel() * packed.element_size(),
        x=x,
        weight=weight,
        kind="bf16",
        rotation=rotation,
    )


def torch_int8(name: str, shape: Shape, x: Tensor, rotation: int) -> Candidate:
    weight = torch.randint(-127, 128, (shape.out, shape.columns), dtype=torch.int8)
    scale, x = torch.rand(shape.out).bfloat16() * 0.02, x.bfloat16()
    return timed(
        name,
        lambda w: torch._weight_int8pack_mm(x, w, scale),
        weight,
        weight.numel(),
        x=x,
        weight=weight[:CHECKED].double() * scale[:CHECKED, None].double(),
        kind="bf16",
        rotation=rotation,
    )


def onednn_int8(name: str, shape: Shape, x: Tensor, rotation: int) -> Candidate:
    """oneDNN's W8A8 by torch's own operation; activations are uint8 already, one scale for all, which favours it

    Where the processor has no VNNI it adds pairs of products in 16 bits, which saturate; weights of 7 bits don't, and
    take as long.
    """
    most = 127 if {"avx512_vnni", "avx_vnni"} & set(cpu_features()) else 63
    weight = torch.randint(-most, most + 1, (shape.out, shape.columns), dtype=torch.int8)
    step = float(x.abs().max()) / 127
    codes = (x / step + 128).round().clamp(0, 255).to(torch.uint8)
    scale, zero = torch.rand(shape.out) * 0.02 + 0.01, torch.zeros(shape.out, dtype=torch.int64)
    multiply = torch.ops.onednn.qlinear_pointwise.default
    return timed(
        name,
        lambda w: multiply(codes, step, 128, w, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""),
        torch.ops.onednn.qlinear_prepack(weight, None),
        weight.numel(),
        x=x,
        weight=weight[:CHECKED].double() * scale[:CHECKED, None].double(),
        kind="int8",
        rotation=rotation,
        clone=lambda _: torch.ops.onednn.qlinear_prepack(weight, None),
    )


def with_outliers(x: Tensor) -> Tensor:
    """six columns of x beyond LLM.int8()'s threshold of 6"""
    x = x.clamp(-5, 5)
    x[:, :: max(1, x.shape[1] // 6)] *= 4
    x[0, :: max(1, x.shape[1] // 6)] = 20
    return x


def ours_int8_outlier(name: str, shape: Shape, x: Tensor, rotation: int) -> Candidate:
    """LLM.int8() with threshold 6, on bfloat16 as the peer"""
    matrix, x = torch.randn(shape.out, shape.columns), with_outliers(x).bfloat16()
    codes, absmax = round_rows(matrix)
    return timed(
        name,
        lambda w: ops.linear_int8_outlier(x, w, absmax, None, None, None, 6.0),
        ops.pack_int8_rows(codes, absmax),
        codes.numel(),
        x=x.float(),
        weight=matrix[:CHECKED],
        kind="int8",
        rotation=rotation,
        clone=lambda _: ops.pack_int8_rows(codes, absmax),
    )


def bitsandbytes_int8(name: str, shape: Shape, x: Tensor, rotation: int) -> Candidate:
    """Linear8bitLt with threshold 6"""
    import bitsandbytes

    weight, x = torch.randn(shape.out, shape.columns), with_outliers(x).bfloat16()

    def layer(_: Any = None) -> torch.nn.Module:
        made = bitsandbytes.nn.Linear8bitLt(shape.columns, shape.out, bias=False, has_fp16_weights=False, threshold=6.0)
        made.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        return made.to("cpu")

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="MatMul8bitLt")  # it says that x is cast
        made = layer()
        if made.weight.dtype != torch.int8:
            raise RuntimeError(f"{name}: weight is {made.weight.dtype} after quantization, torch.int8 expected")
        return timed(
            name,
            lambda w: w(x),
            made,
            weight.numel(),
            x=x,
            weight=weight[:CHECKED],
            kind="int8",
            rotation=rotation,
            clone=layer,
            slow=True,
        )


@contextmanager
def llama_cpp(driver: Path, kind: str, shape: Shape, rows: int, rotation: int, threads: int) -> Iterator[Candidate]:
    """llama.cpp in a process of its own, which times itself; `driver` is made by `build_llama_cpp`"""
    size = shape.out * shape.columns * {"q4_0": 18, "q8_0": 34}[kind] // 32
    copies = copies_of(size, rotation)
    command = [str(driver), kind, *map(str, (shape.out, shape.columns, rows, copies, threads))]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None and child.stdout is not None
    sending, receiving = child.stdin, child.stdout

    def answer() -> str:
        line = receiving.readline()
        if not line:
            raise RuntimeError(f"llama.cpp driver ended with exit code {child.wait()}: {' '.join(command)}")
        return line

    def run(number: int) -> float:
        sending.write(f"{number}\n")
        sending.flush()
        return int(answer()) * 1e-9

    try:
        word, buffer, error, rounding, weight_bytes = answer().split()
        if word != "ready" or not float(rounding) <= TOLERANCE["int8"]:
            raise ArithmeticError(
                f"llama.cpp {kind}: relative error {rounding} to float64 of its own rounded weight, "
                f"at most {TOLERANCE['int8']} expected"
            )
        yield Candidate(
            f"llama.cpp {kind}", run, copies, int(weight_bytes), float(error), note=f"buffer {buffer}, one copy checked"
        )
    finally:
        sending.close()
        child.wait()
        receiving.close()


def build_llama_cpp(root: Path, folder: Path) -> Path:
    """The driver, compiled against the ggml that llama-cpp-python installed under `root` (an environment).

    raises FileNotFoundError
    """
    headers, libraries = sorted(root.rglob("ggml-cpu.h")), sorted(root.rglob("libggml-cpu*.so"))
    if not headers or not libraries:
        raise FileNotFoundError(
            f"no ggml-cpu.h and libggml-cpu*.so under {root}: name an environment with llama-cpp-python built from "
            "source (scripts/bench/peers/requirements-llama-cpp.txt)"
        )
    at, driver = libraries[0].parent, folder / "llama_cpp"
    command = ["g++", "-O2", "-std=c++17", str(HERE / "peers" / "llama_cpp.cpp"), f"-I{headers[0].parent}", f"-L{at}"]
    subprocess.run([*command, "-lggml", "-lggml-cpu", "-lggml-base", f"-Wl,-rpath,{at}", "-o", str(driver)], check=True)
    return driver


def product_rates(quick: bool) -> dict[str, float]:
    """Operations per second of torch's products of many rows, the best of some calls: bfloat16, and oneDNN's int8."""
    shape, rows = (Shape(256, 256), 64) if quick else (Shape(4096, 4096), 512)
    x = torch.randn(rows, shape.columns)
    made = {
        "bf16 product": torch_dense("torch bf16", shape, x, torch.bfloat16, 0),
        "int8 product": onednn_int8("oneDNN W8A8", shape, x, 0),
    }
    operations = 2 * rows * shape.out * shape.columns
    return {name: operations / min(found.run(0) for _ in range(2 if quick else 8)) for name, found in made.items()}


def candidates(
    shape: Shape, rows: int, rotation: int, threads: int, llama: Path | None, stack: ExitStack
) -> list[Candidate]:
    x = torch.randn(rows, shape.columns)
    found = [
        ours("ours W4A8 g64", DYNAMIC_INT8, shape, 4, 64, x, rotation),
        ours("ours W4A8 g64 again", DYNAMIC_INT8, shape, 4, 64, x, rotation),
        ours("ours W4A8 g64, order, bias", DYNAMIC_INT8, shape, 4, 64, x, rotation, whole=True),
        ours("ours W4A8 g128", DYNAMIC_INT8, shape, 4, 128, x, rotation),
        ours("ours W8A8", DYNAMIC_INT8, shape, 8, -1, x, rotation),
        ours("ours W4A16 g64", None, shape, 4, 64, x, rotation),
        ours("ours W4A16 g64, bf16 x", None, shape, 4, 64, x.bfloat16(), rotation),
        torch_dense("torch float32", shape, x, torch.float32, rotation),
        torch_dense("torch bf16", shape, x, torch.bfloat16, rotation),
        torch_int4("torch int4pack", shape, x, rotation),
        torch_int8("torch int8pack", shape, x, rotation),
        onednn_int8("oneDNN W8A8", shape, x, rotation),
        ours_int8_outlier("ours LLM.int8", shape, x, rotation),
        bitsandbytes_int8("bitsandbytes int8", shape, x, rotation),
    ]
    if llama is not None:
        found += [stack.enter_context(llama_cpp(llama, k, shape, rows, rotation, threads)) for k in ("q4_0", "q8_0")]
    return found
