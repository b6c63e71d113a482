"""Implements a block with matrices on the residual path, for a stream with another basis and width at each sublayer.

    x <- x @ shortcut_k + sum of branches(norm(x))        at each sublayer k, in forward order

Ashkboos et al. 2024, arXiv 2401.15024, figure 4. Tensors

    shortcut_0, shortcut_1, ...  (d_k, d_k+1) in the dtype of the model, for row vectors; the weight of a nn.Linear
                                 would be its transpose

beside those of the block itself, whose names don't change. `compressor.analysis.branch_calls` finds the branches of a
block and their arguments by running it.
"""

from __future__ import annotations

import inspect
from typing import Any, Self

import torch
from torch import Tensor, nn

from compressor.errors import ModelError
from compressor.layers.base import DAMAGED_HINT, Layer, standing_for

INPUT, ARGUMENT, CONSTANT = "input", "argument", "constant"  # the kinds of arguments of a call


class RotatedBlock(Layer):
    """The model's own block with another forward. Its class is also a subclass of the block's.

    shape  (d_0, d_1, ..., d_n) for the spec's n sublayers: the stream's width before each, and after the last
    format_params
           sites    [{"norm": [name], "shortcut": bool, "branches": [{"norm": name, "steps": [step]}]}], the sublayers;
                    names are of modules inside the block, and a sublayer without branches only changes the basis
           returns  None: the block returns the stream; n: a tuple of n, the stream first and the others None

    A step calls one module:

        call    its name inside the block
        args    its arguments, each ["input"] (the output of the step before; first, of the norm), ["argument", name]
                (the block's own) or ["constant", value]
        kwargs  the same by name
        rest    whether it also gets all other arguments of the block
        take    None, or the index in the tuple that it returns
    """

    format_name = "rotated_block"
    stands_for = "block"
    weight_only = False

    sublayers: list[dict[str, Any]]
    returns: int | None
    widths: tuple[int, ...]
    _names: tuple[str, ...]  # of the block's own arguments after the stream, in order
    _defaults: dict[str, Any]

    @classmethod
    def empty(cls, shape: tuple[int, ...], format_params: dict[str, Any], dtype: torch.dtype, bias: bool) -> Self:
        """Only the shortcuts, without a block."""
        made = cls()
        made._set_up(shape, format_params, dtype, torch.get_default_device())
        return made

    @staticmethod
    def wrap(block: nn.Module, shape: tuple[int, ...], format_params: dict[str, Any]) -> None:
        """Turn a model's block into a rotated block, in place. Shortcuts start as (parts of) identity matrices.

        raises  ModelError if it already is one, or if shape and spec don't fit each other
        """
        if isinstance(block, RotatedBlock):
            raise ModelError(
                "is a rotated block already",
                where=type(block).__name__,
                hint="Leave the step out, or start from the original checkpoint.",
                data={"reason": "already-rotated"},
            )
        like = next(p for p in block.parameters() if p.is_floating_point())
        parameters = list(inspect.signature(block.forward).parameters.values())[1:]
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        block.__class__ = standing_for(RotatedBlock, type(block))  # type: ignore[arg-type]
        assert isinstance(block, RotatedBlock)
        block._set_up(shape, format_params, like.dtype, like.device)
        block._names = tuple(p.name for p in named)
        block._defaults = {p.name: p.default for p in named if p.default is not p.empty}

    def _set_up(
        self, shape: tuple[int, ...], format_params: dict[str, Any], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.sublayers, self.returns, self.widths = format_params["sites"], format_params["returns"], tuple(shape)
        if len(self.widths) != len(self.sublayers) + 1:
            raise ModelError(
                f"{len(self.widths)} widths for {len(self.sublayers)} sublayers; one more than sublayers is needed",
                where="rotated_block",
                hint=DAMAGED_HINT,
                data={"reason": "widths", "widths": len(self.widths), "sublayers": len(self.sublayers)},
            )
        for number, sublayer in enumerate(self.sublayers):
            before, after = self.widths[number : number + 2]
            if sublayer["shortcut"]:
                shortcut = nn.Parameter(torch.empty(before, after, dtype=dtype, device=device))
                nn.init.eye_(shortcut)
                self.register_parameter(f"shortcut_{number}", shortcut)
            elif before != after:
                raise ModelError(
                    f"sublayer {number} reads {before} values and writes {after} without a shortcut",
                    where="rotated_block",
                    hint=DAMAGED_HINT,
                    data={"reason": "no-shortcut", "sublayer": number, "before": before, "after": after},
                )

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module):
            self._parameters.pop(name, None)  # a quantized layer replaces the shortcut; torch would refuse
        super().__setattr__(name, value)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        known = {**self._defaults, **dict(zip(self._names, args))}
        known.update({name: value for name, value in kwargs.items() if name in self._names})
        rest = {name: value for name, value in kwargs.items() if name not in self._names}
        x = hidden_states
        for number, sublayer in enumerate(self.sublayers):
            normed = {name: self.get_submodule(name)(x) for name in sublayer["norm"]}
            added = [
                self._branch(branch["steps"], normed[branch["norm"]], known, rest) for branch in sublayer["branches"]
            ]
            if sublayer["shortcut"]:
                shortcut = getattr(self, f"shortcut_{number}")
                x = shortcut(x) if isinstance(shortcut, nn.Module) else x @ shortcut  # a module after quantization
            for branch in added:
                x = x + branch
        return x if self.returns is None else (x, *(None,) * (self.returns - 1))

    def _branch(self, steps: list[dict[str, Any]], x: Tensor, known: dict[str, Any], rest: dict[str, Any]) -> Tensor:
        def value(reference: list[Any]) -> Any:
            if reference[0] == INPUT:
                return x
            return known.get(reference[1]) if reference[0] == ARGUMENT else reference[1]

        for step in steps:
            given = {name: value(reference) for name, reference in step["kwargs"].items()}
            if step["rest"]:
                given.update({name: other for name, other in rest.items() if name not in given})
            out = self.get_submodule(step["call"])(*(value(reference) for reference in step["args"]), **given)
            x = out if step["take"] is None else out[step["take"]]
        return x

    def format_params(self) -> dict[str, Any]:
        return {"sites": self.sublayers, "returns": self.returns}

    def tensors(self) -> dict[str, Tensor]:
        names = (f"shortcut_{number}" for number, sublayer in enumerate(self.sublayers) if sublayer["shortcut"])
        return {name: getattr(self, name) for name in names}
