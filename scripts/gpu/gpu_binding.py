"""Checks the CUDA kernels as torch operations on a GPU; part of check_gpu.py."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from compressor.errors import CompressError  # noqa: E402
from compressor.kernels.cuda import ops as cuda_ops  # noqa: E402
from compressor.kernels.ops import linear as ops  # noqa: E402
from compressor.kernels.ops.gptq_columns import Columns, round_columns  # noqa: E402
from compressor.kernels.ops.gptq_solve import round_compiled  # noqa: E402
from compressor.kernels.prepared.prepare import prepare  # noqa: E402
from compressor.layers.packed_linear import PackedLinear  # noqa: E402
from compressor.layers.sparse_factor_linear import SparseFactorLinear  # noqa: E402
from cuda_ext.cases import hadamard  # noqa: E402

OUT, COLUMNS, GROUP = 70, 1088, 64  # a tail, two slices of K
ROWS = (0, 1, 16, 20, 70)
HADAMARD_SIZES = (8, 256, 4096, 32768, 96, 5120, 14336, 36864)
# twice 2^-24: tensor cores may truncate (see check_gpu.py); one rounding of y
UNIT, OUTPUT_UNIT = 2.0**-23, {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def layer(dtype: torch.dtype, symmetric: bool, act_order: bool, bias: bool, bits: int = 4) -> PackedLinear:
    """A random weight."""
    made = torch.Generator().manual_seed(0)
    groups, half = COLUMNS // GROUP, 2 ** (bits - 1)
    index = torch.randperm(COLUMNS, generator=made) // GROUP if act_order else None
    return PackedLinear.pack(
        torch.randint(-half, half, (OUT, COLUMNS), generator=made, dtype=torch.int8),
        (torch.rand(OUT, groups, generator=made) * 0.02 + 0.01).to(dtype),
        None if symmetric else torch.randint(-half, half, (OUT, groups), generator=made, dtype=torch.int8),
        bits=bits, group_size=GROUP, symmetric=symmetric, index=index,
        bias=torch.randn(OUT, generator=made).to(dtype) if bias else None,
    )  # fmt: skip


def judge(y: Tensor, exact: Tensor, size: Tensor) -> str:
    """The error in y, or "": COLUMNS additions, two more for each group and slice, and the bias."""
    inside = (COLUMNS + 2 * (COLUMNS // GROUP) + 5) * UNIT * size
    off = (y.cpu().double() - exact).abs()
    right = off <= inside + OUTPUT_UNIT[y.dtype] * (exact.abs() + inside) + 2.0**-25
    return "" if bool(right.all()) else f"{int((~right).sum())} of {right.numel()} outputs are wrong"


def product(model: nn.Module, x: Tensor, device: torch.device, exact: Tensor, size: Tensor) -> str:
    return judge(model(x.to(device)), exact, size)


def products(device: torch.device) -> Iterator[tuple[str, Callable[[], str]]]:
    """Prepared layers, strict, against float64."""
    cases = [
        *itertools.product(OUTPUT_UNIT, (4,), (True, False), (True, False)),
        *itertools.product(OUTPUT_UNIT, (2, 3, 8), (False,), (True,)),
    ]
    for dtype, bits, symmetric, act_order in cases:
        made = torch.Generator().manual_seed(1)
        # rows of the identity give the weight, exact in float32; on the CPU by torch alone
        plain = layer(dtype, symmetric, act_order, bias=False, bits=bits).float()
        weight = plain(torch.eye(COLUMNS)).t().double()
        stored = layer(dtype, symmetric, act_order, bias=True, bits=bits)
        added = stored.bias.detach().double()
        model = nn.Sequential(stored).to(device)
        prepared = prepare(model, strict=True)
        for rows in ROWS:
            x = torch.randn(rows, COLUMNS, generator=made).to(dtype)
            exact, size = x.double() @ weight.t() + added, x.double().abs() @ weight.abs().t() + added.abs()
            kind = ("symmetric" if symmetric else "zero points") + (", act-order" if act_order else "")
            yield (
                f"{prepared['0'].kernel}, {bits} bits, {dtype}, {kind}, {rows} rows",
                partial(product, model, x, device, exact, size),
            )


def rounded_products(device: torch.device) -> Iterator[tuple[str, Callable[[], str]]]:
    """Prepared layers with dynamic activation quantization, strict, against float64 of rows rounded by IEEE."""
    for dtype in OUTPUT_UNIT:
        made = torch.Generator().manual_seed(2)
        weight = layer(dtype, False, True, bias=False).float()(torch.eye(COLUMNS)).t().double()
        stored = layer(dtype, False, True, bias=True)
        added = stored.bias.detach().double()
        model = nn.Sequential(stored).to(device)
        prepared = prepare(model, activations="int8", strict=True)
        for rows in ROWS:
            x = torch.randn(rows, COLUMNS, generator=made).to(dtype)
            largest = x.float().abs().amax(1, keepdim=True)
            rounded = (x.float() * (1 / largest * 127)).round().double() * (largest / 127).double()
            exact, size = rounded @ weight.t() + added, rounded.abs() @ weight.abs().t() + added.abs()
            name = f"{prepared['0'].kernel}, {dtype}, inputs rounded to int8, {rows} rows"
            yield name, partial(product, model, x, device, exact, size)


def factors(device: torch.device) -> Iterator[tuple[str, Callable[[], str]]]:
    """Prepared layers of sparse combinations of atoms, strict, against float64."""
    blocks, atoms, width, k = COLUMNS // 136, 70, 136, 6
    for dtype in OUTPUT_UNIT:
        made = torch.Generator().manual_seed(3)
        index = torch.rand(OUT, blocks, atoms, generator=made).argsort(2)[..., :k].sort(2).values
        dense, values = torch.randn(blocks, atoms, width, generator=made), torch.randn(OUT, blocks, k, generator=made)
        layer = SparseFactorLinear.pack(dense, values, index, str(dtype).removeprefix("torch."))
        layer.dtype, layer.bias = dtype, nn.Parameter(torch.randn(OUT, generator=made).to(dtype), requires_grad=False)
        added = layer.bias.detach().double()
        dense, values = layer.weight_atoms.double(), layer.weight_values.double()
        spread = torch.zeros(OUT, blocks, atoms, dtype=torch.float64).scatter_(2, index, values)
        weight, largest = (
            torch.einsum("oba,baw->obw", *pair).flatten(1) for pair in ((spread, dense), (spread.abs(), dense.abs()))
        )
        model = nn.Sequential(layer).to(device)
        prepared = prepare(model, strict=True)
        for rows in ROWS:
            x = torch.randn(rows, COLUMNS, generator=made).to(dtype)
            exact, size = x.double() @ weight.t() + added, x.double().abs() @ largest.t() + added.abs()
            name = f"{prepared['0'].kernel}, {dtype}, sparse factors, {rows} rows"
            # fewer additions than COLUMNS: 192 inside the mma, one for each of 48 values and 8 parts
            yield name, partial(product, model, x, device, exact, size)


def columns(device: torch.device) -> Iterator[tuple[str, Callable[[], str]]]:
    """Columns of a sub-block of GPTQ: the codes, errors and updates of torch on the CPU."""

    def case(symmetric: bool) -> str:
        made = torch.Generator().manual_seed(4)
        upper = torch.randn(32, 32, generator=made).triu() * 0.3
        upper.diagonal().copy_(torch.rand(32, generator=made) + 0.2)
        scale = torch.rand(2, OUT, generator=made) * 0.3 + 0.01
        zero = None if symmetric else torch.randint(-8, 8, (2, OUT), generator=made).float()
        work = torch.randn(32, OUT, generator=made)
        index = torch.arange(32) // 16
        part = Columns(work.clone(), work.clone(), work.clone(), upper, index, scale, zero, -8, 7)
        there = {role: tensor.to(device) for role, tensor in vars(part).items() if isinstance(tensor, Tensor)}
        ours = replace(part, **{role: tensor.clone() for role, tensor in there.items()})
        round_columns(part, 0, 24)
        round_compiled(ours, 0, 24)
        pairs = {"updates": (ours.work[24:], part.work[24:]), "errors": (ours.errors, part.errors)}
        pairs["codes"] = ours.codes, part.codes
        wrong = [what for what, (got, want) in pairs.items() if not torch.equal(got.cpu()[:24], want[:24])]
        return f"{', '.join(wrong)} are not those of torch on the CPU" if wrong else ""

    for symmetric in (True, False):
        yield f"gptq_solve, {'symmetric' if symmetric else 'zero points'}", partial(case, symmetric)


def of_torch(device: torch.device) -> Iterator[tuple[str, Callable[[], str]]]:
    """Checks that need a real device: torch's own checks, another stream, a CUDA graph."""
    model = nn.Sequential(layer(torch.float16, False, True, bias=True)).to(device)
    prepare(model, strict=True)
    x = torch.randn(4, COLUMNS, device=device).half()
    want = model(x)

    def same(y: Tensor) -> str:
        return "" if torch.equal(y, want) else "other bits than the plain call"

    def opcheck() -> str:
        inner: Any = model[0]
        rest = (inner.permutation, OUT, 4, GROUP, inner.choice.layout)
        torch.library.opcheck(
            torch.ops.compressor.linear_weight_only.default, (x, inner.packed, inner.bias.detach(), *rest)
        )
        return ""

    def stream() -> str:
        other = torch.cuda.Stream(device)
        other.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(other):
            y = model(x)
        other.synchronize()
        return same(y)

    def graph() -> str:
        captured, inputs = torch.cuda.CUDAGraph(), torch.zeros_like(x)
        with torch.cuda.graph(captured):
            y = model(inputs)
        inputs.copy_(x)
        captured.replay()
        torch.cuda.synchronize(device)
        return same(y)

    def unpack() -> str:
        codes, _, _ = ops.unpack_weight(model[0].packed, OUT, COLUMNS, 4, GROUP, "mma1")
        return "" if codes.is_cuda and bool((codes < 16).all()) else "codes of the packed weight are wrong"

    yield from {"opcheck": opcheck, "another stream": stream, "a CUDA graph": graph, "unpacking": unpack}.items()


def transforms(device: torch.device) -> Iterator[tuple[str, Callable[[], str]]]:
    """Hadamard transforms of float32 against float64."""

    def case(n: int) -> str:
        x = torch.randn(3, n, generator=torch.Generator().manual_seed(n))
        y = cuda_ops.hadamard(x.to(device), 2.0**-6).cpu().double()
        exact = torch.from_numpy(hadamard.hadamard_product(x.double().numpy())) * 2.0**-6
        m = hadamard.factor(n)
        # m + log2(n / m) additions, the rounding of y; the scale is exact
        allowed = (m + (n // m).bit_length() + 1) * 2.0**-24 * x.double().abs().sum(1, keepdim=True) * 2.0**-6
        wrong = int((~((y - exact).abs() <= allowed)).sum())  # NaN is never right
        return f"{wrong} of {y.numel()} outputs are wrong" if wrong else ""

    for n in HADAMARD_SIZES:
        yield f"hadamard, {n}", partial(case, n)


def checks(device: torch.device) -> list[dict[str, str]]:
    """Each case and its problem, "" for none. An error of CUDA, torch or this package is a problem of its case."""
    found = []
    parts = [
        products(device),
        transforms(device),
        rounded_products(device),
        factors(device),
        columns(device),
        *([of_torch(device)] if device.type == "cuda" else []),
    ]
    for name, case in itertools.chain(*parts):
        try:
            problem = case()
        except (CompressError, RuntimeError) as error:
            problem = f"{type(error).__name__}: {error}"
        found.append({"case": name, "problem": problem})
    return found
