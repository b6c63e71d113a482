"""Finds what a parameter does to a stream by changing it a little and looking where the effect points.

All of it runs in float64 on random weights, so that "nothing else changes" can be told from rounding by ten digits.

- A parameter adds to the stream along an axis if pushing it along a direction e of that axis moves the stream along e
  and nowhere else.
- A parameter reads a norm along an axis if, with the norm's output held to two directions, pushing it at right angles
  to both changes nothing, while pushing it along one does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

TOLERANCE = 1e-9  # of the effect looked at; rounding in float64 stays below 1e-12
Answer = Callable[[Tensor], Tensor]


class InDouble(TorchFunctionMode):
    """Leaves float64 tensors float64 where a model's own code asks for float32, as most norms and routers do."""

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
    """Replace outputs of modules by what `answers` makes of their inputs; yields the calls in forward order."""
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
    """Add rest ⊗ direction to a parameter, the direction along `axis`, and take it back exactly.

    rest  the parameter's shape without `axis`
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
    """The one factor f with which the rows that change at all are f * direction, to 12 digits; None if they differ."""
    factors = (change @ direction).reshape(-1)
    moved = factors[factors.abs() > TOLERANCE * size(factors)]
    if moved.numel() == 0 or size(moved - moved[0]) > TOLERANCE * size(moved):
        return None
    return float(f"{float(moved[0]):.12g}")  # without the rounding of the difference it was taken from


def unit(width: int, generator: torch.Generator, apart_from: Sequence[Tensor] = ()) -> Tensor:
    """A random unit vector at right angles to the given orthonormal ones."""
    vector = torch.randn(width, dtype=torch.float64, generator=generator)
    for other in apart_from:
        vector = vector - (vector @ other) * other
    return vector / vector.norm()


class Plane:
    """Holds a norm's output to base + a_t * slope: the same two directions for every token t, in different shares.

    Tokens must differ, or attention would weigh all alike and its queries would do nothing.
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
        """The same, and `by` (D,) added at every token."""
        return lambda x: self(x) + by


def reads(run: Callable[[], Tensor], before: Tensor, parameter: Tensor, axis: int, plane: Plane, rest: Tensor) -> bool:
    """Whether a parameter multiplies, along `axis`, what is held to `plane` while `run` runs.

    before  what `run` gives with the parameter as it is
    rest    a push over the parameter's other axes
    """
    with perturbed(parameter, axis, plane.base + plane.slope, rest):
        within = size(run() - before)
    if within <= TOLERANCE * size(before):
        return False
    with perturbed(parameter, axis, plane.away, rest):
        return size(run() - before) <= TOLERANCE * within
