"""Implements a block that drops tokens after its attention (Zero-TPrune).

Wang, Dedhia, Jha 2023/24, arXiv 2305.17328. A gate has no tensors, and the block keeps its own forward and weights.
When the first module after the attention residual is called, the gate ranks the tokens by the queries and keys of the
attention (`token_ranking`). This module and those after it get only the kept tokens. Their outputs are spread over all
tokens only where the block's own code adds them to a tensor of all tokens. The block returns the kept tokens.

The number of kept tokens is a function of the number of tokens, so samples of one length stay a rectangle. With
padding, the kept tokens move to the front and the batch is padded to its longest sample. The attention mask of a later
block then follows from the model's own mask, so every block after a gate has this layer too (`keep` 1 if it drops
nothing). The model's output has the mask of the kept tokens as `kept_mask`.

Attention is unchanged (sdpa, eager, ...); a gate computes its own scores. `compressor.analysis.token_gates` finds the
modules by running the block.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from compressor.errors import ModelError
from compressor.layers.base import Layer, standing_for
from compressor.layers.structural.observed_attention import last_seen, register_watching, watching
from compressor.layers.structural.token_counts import tokens_after
from compressor.layers.structural.token_ranking import attention_graph, choose_tokens

KEPT_MASK = "kept_mask"


class TokenGate(Layer):
    """The model's own block with a gate. Its class is also a subclass of the block's.

    shape  ()
    format_params  attention   name inside the block of the module that calls transformers' attention interface
           after       [{"call": name, "nth": its nth call in this block, "spread": whether the block's code adds its
                       output to a tensor of all tokens}] of the modules after the attention residual, in order
           mask        name of the block's argument that is the attention mask, or null
           protect     [first, last]: numbers of tokens at both ends that are never dropped
           minimum     smallest number of tokens that a gate keeps
           before      `keep` of the gates before this block, in order
           keep        share of the unprotected tokens that this gate keeps
           similar, partition, order, iterations, tolerance, filter, heads, seed: see `choose_tokens`
    """

    format_name = "token_gate"
    stands_for = "block"
    weight_only = False
    helpers = (
        "compressor.layers.structural.observed_attention",
        "compressor.layers.structural.token_counts",
        "compressor.layers.structural.token_ranking",
    )

    token_gate: dict[str, Any]
    _names: tuple[str, ...]  # of the block's own arguments after the stream, in order
    choices: list[Tensor] | None = None  # a list inside `noting_choices`

    @classmethod
    def prepare(cls, model: nn.Module) -> None:
        register_watching()
        base = getattr(model, "base_model", model)
        for module in {id(model): model, id(base): base}.values():
            module.register_forward_hook(_add_mask, with_kwargs=True)

    @classmethod
    def empty(cls, shape: tuple[int, ...], format_params: dict[str, Any], dtype: torch.dtype, bias: bool) -> Self:
        made = cls()
        made.token_gate = format_params
        return made

    @staticmethod
    def wrap(block: nn.Module, shape: tuple[int, ...], format_params: dict[str, Any]) -> None:
        """Turn a model's block into a gated block, in place.

        raises  ModelError if it already is one
        """
        if isinstance(block, TokenGate):
            raise ModelError(
                "has a token gate already",
                where=type(block).__name__,
                hint="Leave the step out, or start from the original checkpoint.",
                data={"reason": "already-gated"},
            )
        parameters = list(inspect.signature(block.forward).parameters.values())[1:]
        block.__class__ = standing_for(TokenGate, type(block))  # type: ignore[arg-type]
        assert isinstance(block, TokenGate)
        block.token_gate = format_params
        block._names = tuple(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))

    @staticmethod
    @contextmanager
    def wrapped(block: nn.Module, format_params: dict[str, Any]) -> Iterator[None]:
        """The same inside this context only."""
        plain = type(block)
        TokenGate.wrap(block, (), format_params)
        try:
            yield
        finally:
            block.__class__ = plain  # type: ignore[assignment]
            del block.__dict__["token_gate"], block.__dict__["_names"]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        args, kwargs, counts, valid = self._masked(hidden_states, args, kwargs)
        gate = self.token_gate
        protected = sum(gate["protect"])
        left = [tokens_after(count, [gate["keep"]], protected, gate["minimum"]) for count in counts]
        if left == counts:
            return super().forward(hidden_states, *args, **kwargs)
        seen: list[tuple[Tensor, Tensor, float]] = []
        passage = _Passage(hidden_states.shape[:2], lambda: self._chosen(seen, valid, left))
        calls: dict[str, int] = {}
        waiting = list(gate["after"])

        def enter(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
            calls[name] = calls.get(name, -1) + 1
            if not waiting or (waiting[0]["call"], waiting[0]["nth"]) != (name, calls[name]):
                return None
            return (
                tuple(passage.narrow(value) for value in args),
                {key: passage.narrow(value) for key, value in kwargs.items()},
            )

        def leave(name: str, output: Any) -> Any:
            if not waiting or (waiting[0]["call"], waiting[0]["nth"]) != (name, calls[name]):
                return None
            return passage.spread(output) if waiting.pop(0)["spread"] else None

        with ExitStack() as stack:
            stack.enter_context(watching(self.get_submodule(gate["attention"]), seen))
            for name in sorted({entry["call"] for entry in waiting}):
                module = self.get_submodule(name)
                before, behind = _named(enter, name), _named(leave, name, with_output=True)
                stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(behind).remove)
            output = super().forward(hidden_states, *args, **kwargs)
        if isinstance(output, tuple):
            return (passage.narrow(output[0]), *output[1:])
        return passage.narrow(output)

    def _masked(
        self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], list[int], Tensor | None]:
        """The block's arguments with a mask for the remaining tokens, their number in each sample, and (b, n) which
        ones they are; None if all remain.
        """
        b, n, _ = hidden.shape
        gate, name = self.token_gate, self.token_gate["mask"]
        place = self._names.index(name) if name in self._names else len(args)
        mask = args[place] if place < len(args) else kwargs.get(name)
        if mask is None:
            return args, kwargs, [n] * b, None
        valid = attended(mask, b)
        lengths = valid.sum(1).tolist()
        if min(lengths) == 0:
            raise ModelError(
                "a sample consists of padding only",
                where=name,
                hint="Remove this sample from the batch, or correct its attention_mask.",
                data={"reason": "all-padding"},
            )
        counts = [tokens_after(length, gate["before"], sum(gate["protect"]), gate["minimum"]) for length in lengths]
        if counts != lengths:  # some moved to the front
            valid = front(counts, n, hidden.device)
            shown = shortened(mask, valid, n)
            if place < len(args):
                args = (*args[:place], shown, *args[place + 1 :])
            else:
                kwargs = {**kwargs, name: shown}
        if valid.shape[1] != n:
            raise ModelError(
                f"{n} tokens come with a mask of {valid.shape[1]}",
                where=name,
                hint="Pass an attention_mask with one value for each token.",
                data={"reason": "mask-length", "tokens": n, "mask": valid.shape[1]},
            )
        return args, kwargs, counts, valid

    def _chosen(self, seen: list[tuple[Tensor, Tensor, float]], valid: Tensor | None, left: list[int]) -> Tensor:
        """Indices (b, longest) of the kept tokens, in order. The end of shorter samples is padding."""
        query, key, scaling = last_seen(seen, self.token_gate["attention"])
        b, _, n, _ = query.shape
        whole = torch.ones(b, n, dtype=torch.bool, device=query.device) if valid is None else valid
        candidates = unprotected(whole, self.token_gate["protect"])
        graph = attention_graph(query, key, scaling, valid)
        counts = [count - sum(self.token_gate["protect"]) for count in left]
        kept = choose_tokens(graph, key, whole, candidates, [max(0, count) for count in counts], self.token_gate)
        chosen = (~kept).to(torch.uint8).sort(dim=1, stable=True).indices[:, : max(left)]
        if self.choices is not None:
            self.choices.append(chosen)
        return chosen

    def format_params(self) -> dict[str, Any]:
        return self.token_gate

    def tensors(self) -> dict[str, Tensor]:
        return {}


@contextmanager
def noting_choices(block: nn.Module) -> Iterator[list[Tensor]]:
    """Record the (b, left) indices of the tokens that a gate kept, for each call that dropped any."""
    assert isinstance(block, TokenGate)
    block.choices = []
    try:
        yield block.choices
    finally:
        block.choices = None


class _Passage:
    """Reduces tensors (b, n, ...) to the kept tokens, and spreads them again."""

    def __init__(self, shape: torch.Size, choose: Callable[[], Tensor]) -> None:
        self.shape, self.choose = tuple(shape), choose
        self.rows: Tensor | None = None  # into (b * n, ...)
        self.left = 0

    def narrow(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() < 3 or tuple(value.shape[:2]) != self.shape:
            return value
        if self.rows is None:
            chosen = self.choose()
            self.left = chosen.shape[1]
            offsets = torch.arange(self.shape[0], device=chosen.device)[:, None] * self.shape[1]
            self.rows = (chosen + offsets).flatten()
        return value.flatten(0, 1).index_select(0, self.rows).unflatten(0, (self.shape[0], self.left))

    def spread(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return (self.spread(value[0]), *value[1:])
        assert self.rows is not None
        whole = value.new_zeros(self.shape[0] * self.shape[1], *value.shape[2:])
        return whole.index_copy(0, self.rows, value.flatten(0, 1)).unflatten(0, self.shape)


def attended(mask: Any, samples: int) -> Tensor:
    """The tokens, (b, n) bool, that a mask of transformers' blocks allows.

    mask    (b, 1, queries, n) bool or integers (not 0 is true), or floats that are added to scores; or (b, n)
    raises  ModelError for another kind of mask
    """
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise ModelError(
            f"a token gate can't read an attention mask of type {type(mask).__name__}",
            where="attention_mask",
            hint="Load the model with attn_implementation='sdpa' or 'eager'.",
            data={"reason": "mask-type", "type": type(mask).__name__},
        )
    found = mask if mask.dim() == 2 else mask[:, 0, 0, :]
    if found.dtype != torch.bool:
        is_added = mask.dim() == 4 and found.is_floating_point()
        found = found > torch.finfo(found.dtype).min / 2 if is_added else found > 0
    return found.expand(samples, -1)


def shortened(mask: Tensor, valid: Tensor, tokens: int) -> Tensor:
    """A mask of the same kind for (b, tokens) with the tokens `valid`."""
    if mask.dim() == 2:
        return valid.to(mask.dtype)
    rows = 1 if mask.shape[2] == 1 else tokens
    shown = valid[:, None, None, :].expand(-1, 1, rows, -1)
    if not mask.is_floating_point():
        return shown.to(mask.dtype)
    return torch.zeros(shown.shape, dtype=mask.dtype, device=mask.device).masked_fill(
        ~shown, torch.finfo(mask.dtype).min
    )


def front(counts: list[int], tokens: int, device: torch.device) -> Tensor:
    """(b, tokens) bool: the first `counts` tokens of each sample."""
    return torch.arange(tokens, device=device) < torch.tensor(counts, device=device)[:, None]


def unprotected(valid: Tensor, protect: list[int]) -> Tensor:
    """The valid tokens except the protected ones at their beginning and end."""
    first, last = protect
    if first:
        valid = valid & (valid.cumsum(1) > first)
    return valid & (valid.flip(1).cumsum(1).flip(1) > last) if last else valid


def last_gate(config: Any) -> dict[str, Any] | None:
    """The gate of the last gated block of a model, whose kept tokens are in the output."""
    modules = getattr(config, "compressed_modules", None) or {}
    gates = [entry["spec"] for entry in modules.values() if entry["form"] == TokenGate.format_name]
    return max(gates, key=lambda gate: len(gate["before"]) + (gate["keep"] < 1), default=None)


def _add_mask(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Add to the output the mask of its tokens that are not padding. A tuple is not changed."""
    gate = last_gate(model.config)
    mask = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments.get("attention_mask")
    states = getattr(output, "last_hidden_state", None)
    if gate is None or isinstance(output, tuple) or states is None:
        return output
    if mask is None or mask.dim() != 2:
        output[KEPT_MASK] = torch.ones(states.shape[:2], dtype=torch.int64, device=states.device)
        return output
    keeps = [*gate["before"], gate["keep"]]
    lengths = mask.sum(1).tolist()
    counts = [tokens_after(length, keeps, sum(gate["protect"]), gate["minimum"]) for length in lengths]
    packed = mask if counts == lengths else front(counts, states.shape[1], states.device)
    output[KEPT_MASK] = packed.to(torch.int64)
    return output


def _named(hook: Callable[..., Any], name: str, with_output: bool = False) -> Callable[..., Any]:
    if with_output:
        return lambda _module, _args, output: hook(name, output)
    return lambda _module, args, kwargs: hook(name, args, kwargs)
