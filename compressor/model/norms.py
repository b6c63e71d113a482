"""Finds by running a normalization module what it computes: LayerNorm or RMSNorm, its gain, and its eps.

Families name their norms and eps differently, and may store the gain as 1 + weight. The formula of the output decides,
so a copy of the module is run and compared with it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

from compressor.lazy import torch

EPS_NAMES = ("eps", "variance_epsilon", "epsilon")
SEED = 0


@dataclass(frozen=True)
class Norm:
    """The formula of one norm over its last dimension.

    kind        layer: the mean is subtracted first; rms: it is not
    offset      the gain is offset + weight: 1 for Gemma, else 0
    eps         added to the mean square before the square root
    width       size of the last dimension
    has_weight  it has a gain; without one the gain is 1
    has_bias    a shift is added at the end
    divisor     of the sum of squares, if it is not the width: a narrower stream keeps the divisor of the original one
    """

    kind: Literal["layer", "rms"]
    offset: float
    eps: float
    width: int
    has_weight: bool
    has_bias: bool
    divisor: int | None = None


def apply_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, norm: Norm) -> torch.Tensor:
    """(x - mean) / sqrt(mean((x - mean)²) + eps) * (offset + weight) + bias; for rms the mean is taken as 0.

    With a divisor D the mean of squares is sum(...) / D.

    x             (..., width)
    weight, bias  (width,), or None where the norm has none
    returns       x's shape and dtype; computed in float64 if x is float64, else in float32
    """
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(work)
    if norm.kind == "layer":
        y = y - y.mean(-1, keepdim=True)
    squares = y.square()
    mean = squares.mean(-1, keepdim=True) if norm.divisor is None else squares.sum(-1, keepdim=True) / norm.divisor
    y = y * torch.rsqrt(mean + norm.eps)
    if weight is not None:
        y = y * (norm.offset + weight.to(work))
    if bias is not None:
        y = y + bias.to(work)
    return y.to(x.dtype)


def describe_norm(module: torch.nn.Module) -> Norm | None:
    """The norm that `module` computes, or None if it computes neither kind.

    Candidates are modules without children whose only parameters are a weight (width,) and perhaps a bias, and those
    without parameters that have a `normalized_shape` and perhaps a `divisor`. A float32 copy with random parameters
    runs on random inputs of ordinary size, and on inputs so small that a wrong eps shows. Both results must agree with
    `apply_norm`. The module itself is not run, and its parameters may be on the meta device.
    """
    width, eps = _width(module), _eps(module)
    divisor = getattr(module, "divisor", None)
    if width is None or eps is None or not (divisor is None or isinstance(divisor, int)):
        return None
    generator = torch.Generator().manual_seed(SEED)
    filled = {
        name: torch.rand(width, generator=generator, dtype=torch.float32) + 0.5
        for name, _ in module.named_parameters(recurse=False)
    }
    x = torch.randn(2, 3, width, generator=generator, dtype=torch.float32) + 1.0
    # the mean square is about eps; if eps is 0, any other value would show for such a small input
    inputs = (x, x * (eps**0.5 or 1e-10))
    outputs = _run_copy(module, filled, inputs)
    if outputs is None:
        return None
    weight, bias = filled.get("weight"), filled.get("bias")
    kinds: tuple[Literal["layer", "rms"], ...] = ("layer", "rms")
    for kind in kinds:
        for offset in (0.0, 1.0) if weight is not None else (0.0,):
            norm = Norm(
                kind, offset, eps, width, weight is not None, bias is not None, None if divisor == width else divisor
            )
            wanted = (apply_norm(x, weight, bias, norm) for x in inputs)
            # float32 has 7 digits and a norm rounds a few times; another formula differs by 0.1 or more
            if all(torch.allclose(y, z, rtol=1e-4, atol=1e-5) for y, z in zip(outputs, wanted)):
                return norm
    return None


def _width(module: torch.nn.Module) -> int | None:
    """Size of the last dimension if the module could be a norm."""
    if any(True for _ in module.children()):
        return None
    parameters = dict(module.named_parameters(recurse=False))
    if parameters:
        shapes = {tuple(parameter.shape) for parameter in parameters.values()}
        if "weight" not in parameters or not parameters.keys() <= {"weight", "bias"} or len(shapes) != 1:
            return None
        shape = next(iter(shapes))
    else:
        shape = getattr(module, "normalized_shape", ())
    return int(shape[0]) if isinstance(shape, tuple) and len(shape) == 1 else None


def _eps(module: torch.nn.Module) -> float | None:
    """The module's attribute for eps; None also if the dtype decides it (nn.RMSNorm)."""
    for name in EPS_NAMES:
        value = getattr(module, name, None)
        if isinstance(value, (int, float)):
            return float(value)
    return None


def _run_copy(
    module: torch.nn.Module, filled: dict[str, torch.Tensor], inputs: tuple[torch.Tensor, ...]
) -> list[torch.Tensor] | None:
    """Outputs of a float32 copy with the parameters `filled`; None if it can't run on such inputs."""
    probe = copy.deepcopy(module).eval()
    for name, value in filled.items():
        setattr(probe, name, torch.nn.Parameter(value, requires_grad=False))
    try:
        with torch.no_grad():
            # forward itself, so that hooks of the module don't run
            outputs = [probe.float().forward(x) for x in inputs]
    except (TypeError, ValueError, RuntimeError):  # it needs other arguments or another shape, so it is not such a norm
        return None
    same = all(isinstance(y, torch.Tensor) and y.shape == x.shape for x, y in zip(inputs, outputs))
    return outputs if same else None
