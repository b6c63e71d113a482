"""Finds by small changes of a parameter whether it writes to the residual stream or reads a norm.

All of it runs in float64 on random weights, so that "nothing else changes" differs from rounding by ten digits.

- A parameter writes to the stream along an axis if perturbing it along a direction e of that axis changes the stream
  along e only.
- A parameter reads a norm along an axis if, with the norm's output restricted to two directions, a perturbation
  orthogonal to both changes nothing, while a perturbation along one of them does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

TOLERANCE = 1e-9  # relative to the measured effect; rounding in float64 stays below 1e-12
Answer = Callable[[Tensor], Tensor]


class InDouble(TorchFunctionMode):
    """Keeps float64 tensors in float64 where a model's code converts to float32, as most norms and routers do."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()}
        return func(*args, **kwargs)


@contextmanager
def answering(modules: Mapping[str, nn.Module], answers: Mapping[str, Answer]) -> Iterator[list[tuple[str, Tensor]]]:
    """Replace the outputs of modules by functions of their inputs (`answers`). Yields the calls in forward order."""
    calls: list[tuple[str, Tensor]] = []

    def hook(name: str) -> Callable[..., Tensor | None]:
        def replace(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> Tensor | None:
            x = args[0] if args else next(iter(kwargs.values()))
            calls.append((name, x))
            return answers[name](x) if name in answers else None

        return replace

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(hook(name), with_kwargs=True).remove)
        yield calls


@contextmanager
def perturbed(parameter: Tensor, axis: int, direction: Tensor, rest: Tensor) -> Iterator[None]:
    """Add rest ⊗ direction to a parameter, the direction along `axis`, and restore it exactly at the end.

    rest  has the parameter's shape without `axis`
    """
    before = parameter.clone()
    try:
        parameter.add_((rest.unsqueeze(-1) * direction).movedim(-1, axis))
        yield
    finally:
        parameter.copy_(before)


def axes(parameter: Tensor, width: int) -> list[int]:
    return [axis for axis in range(parameter.dim()) if parameter.shape[axis] == width]


def size(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def points_along(change: Tensor, direction: Tensor) -> bool:
    """Whether every row of a change (..., D) is a multiple of the unit vector `direction`."""
    across = change - (change @ direction).unsqueeze(-1) * direction
    return size(across) <= TOLERANCE * size(change)


def factor_along(change: Tensor, direction: Tensor) -> float | None:
    """The factor f, to 12 digits, such that all rows that change are f * direction; None if the factors differ."""
    factors = (change @ direction).reshape(-1)
    moved = factors[factors.abs() > TOLERANCE * size(factors)]
    if moved.numel() == 0 or size(moved - moved[0]) > TOLERANCE * size(moved):
        return None
    return rounded(float(moved[0]))


def rounded(number: float) -> float:
    """A number to 12 digits, without the rounding error of a difference."""
    return float(f"{number:.12g}")


def unit(width: int, generator: torch.Generator, apart_from: Sequence[Tensor] = ()) -> Tensor:
    """A random unit vector orthogonal to the given orthonormal ones."""
    vector = torch.randn(width, dtype=torch.float64, generator=generator)
    for other in apart_from:
        vector = vector - (vector @ other) * other
    return vector / vector.norm()


class Plane:
    """Restricts a norm's output to base + a_t * slope: two directions, with another factor a_t for every token t.

    Tokens must differ, or attention would give all of them the same weight and its queries would have no effect.
    """

    def __init__(self, width: int, generator: torch.Generator) -> None:
        self.base = unit(width, generator)
        self.slope = unit(width, generator, [self.base])
        self.away = unit(width, generator, [self.base, self.slope])
        self._seed = int(torch.randint(2**31, (1,), generator=generator))

    def __call__(self, x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self._seed)
        shares = torch.randn(*x.shape[:-1], 1, dtype=torch.float64, generator=generator)
        return (self.base + shares * self.slope) * x.shape[-1] ** 0.5  # entries of about 1, as after a norm

    def moved(self, by: Tensor) -> Answer:
        """The same, with `by` (D,) added at every token."""
        return lambda x: self(x) + by


def reads(run: Callable[[], Tensor], before: Tensor, parameter: Tensor, axis: int, plane: Plane, rest: Tensor) -> bool:
    """Whether a parameter multiplies, along `axis`, the norm's output that is restricted to `plane` during `run`.

    before  the result of `run` with the unchanged parameter
    rest    the perturbation over the parameter's other axes
    """
    with perturbed(parameter, axis, plane.base + plane.slope, rest):
        within = size(run() - before)
    if within <= TOLERANCE * size(before):
        return False
    with perturbed(parameter, axis, plane.away, rest):
        return size(run() - before) <= TOLERANCE * within
