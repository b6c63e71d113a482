"""A block that goes on with fewer tokens after its attention: what Zero-TPrune stores.

Wang, Dedhia, Jha 2023/24, arXiv 2305.17328. A gate has no tensors; the block keeps its own forward and weights. When
the first module after the attention residual is called, the gate ranks the tokens by the queries and keys that the
attention got (`token_ranking`), and this module and those after it get the kept ones alone. What comes back
is spread over all tokens only where the block's own code adds it to something, and the block gives the kept tokens.

How many of a sample's tokens stay is a function of how many it has, so samples of one length stay a rectangle. With
padding, the kept ones move to the front and the batch is padded to its longest; what a later block's attention mask has
to say then follows from the mask as the model made it, so every block after a gate is one of this form too (`keep` 1
where it drops nothing). The output of a model carries the mask of what is left as `kept_mask`.

Attention goes on as it was (sdpa, eager, ...); a gate computes scores of its own. Which modules stand where,
`compressor.analysis.token_gates` found by running the block.
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
    """The model's own block with a gate; its class is also a subclass of the block's.

    shape  ()
    spec   attention   name inside the block of the module that calls transformers' attention interface
           after       [{"call": name, "nth": its nth call in this block, "spread": whether the block's code adds what
                       it gives to a tensor of all tokens}] of the modules after the attention residual, in order
           mask        name of the block's argument that is the attention mask, or null
           protect     [first, last]: how many tokens at both ends are never dropped
           minimum     tokens that a gate leaves at least
           before      `keep` of the gates before this block, in order
           keep        share of the unprotected tokens that this gate leaves
           similar, partition, order, iterations, tolerance, filter, heads, seed: see `choose_tokens`
    """

    form = "token_gate"
    stands_for = "block"
    weight_only = False
    helpers = (
        "compressor.layers.structural.observed_attention",
        "compressor.layers.structural.token_counts",
        "compressor.layers.structural.token_ranking",
    )

    token_gate: dict[str, Any]
    _names: tuple[str, ...]  # of the block's own arguments after the stream, in order
    choices: list[Tensor] | None = None  # where `noting_choices` asks for it

    @classmethod
    def prepare(cls, model: nn.Module) -> None:
        register_watching()
        base = getattr(model, "base_model", model)
        for module in {id(model): model, id(base): base}.values():
            module.register_forward_hook(_add_mask, with_kwargs=True)

    @classmethod
    def empty(cls, shape: tuple[int, ...], spec: dict[str, Any], dtype: torch.dtype, bias: bool) -> Self:
        made = cls()
        made.token_gate = spec
        return made

    @staticmethod
    def wrap(block: nn.Module, shape: tuple[int, ...], spec: dict[str, Any]) -> None:
        """Make a gated block of a model's block, in place.

        raises  ModelError if it is one already
        """
        if isinstance(block, TokenGate):
            raise ModelError("has a token gate already", where=type(block).__name__, data={"reason": "already-gated"})
        parameters = list(inspect.signature(block.forward).parameters.values())[1:]
        block.__class__ = standing_for(TokenGate, type(block))  # type: ignore[arg-type]
        assert isinstance(block, TokenGate)
        block.token_gate = spec
        block._names = tuple(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))

    @staticmethod
    @contextmanager
    def wrapped(block: nn.Module, spec: dict[str, Any]) -> Iterator[None]:
        """The same for a while."""
        plain = type(block)
        TokenGate.wrap(block, (), spec)
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
        """The block's arguments with a mask for the tokens that are left, how many each sample has, and (b, n) which
        they are; None if all are.
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
        if counts != lengths:  # some have moved to the front
            valid = front(counts, n, hidden.device)
            shown = shortened(mask, valid, n)
            if place < len(args):
                args = (*args[:place], shown, *args[place + 1 :])
            else:
                kwargs = {**kwargs, name: shown}
        if valid.shape[1] != n:
            raise ModelError(f"{n} tokens come with a mask of {valid.shape[1]}", where=name)
        return args, kwargs, counts, valid

    def _chosen(self, seen: list[tuple[Tensor, Tensor, float]], valid: Tensor | None, left: list[int]) -> Tensor:
        """Indices (b, longest) of the kept tokens, in order; the tail of shorter samples is padding."""
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

    def spec(self) -> dict[str, Any]:
        return self.token_gate

    def tensors(self) -> dict[str, Tensor]:
        return {}


@contextmanager
def noting_choices(block: nn.Module) -> Iterator[list[Tensor]]:
    """(b, left) indices of the tokens that a gate kept, of those that came in; one for each call that dropped any."""
    assert isinstance(block, TokenGate)
    block.choices = []
    try:
        yield block.choices
    finally:
        block.choices = None


class _Passage:
    """Narrows tensors (b, n, ...) to the kept tokens, and spreads them again."""

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
    """Which tokens are attended to, (b, n) bool, by a mask as transformers hands it to blocks.

    mask    (b, 1, queries, n) bool or whole numbers, which are true where not 0, or added to scores; or (b, n)
    raises  ModelError for another kind
    """
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise ModelError(
            f"a token gate can't read an attention mask of type {type(mask).__name__}",
            where="attention_mask",
            hint="Load the model with attn_implementation='sdpa' or 'eager'.",
        )
    found = mask if mask.dim() == 2 else mask[:, 0, 0, :]
    if found.dtype != torch.bool:
        is_added = mask.dim() == 4 and found.is_floating_point()
        found = found > torch.finfo(found.dtype).min / 2 if is_added else found > 0
    return found.expand(samples, -1)


def shortened(mask: Tensor, valid: Tensor, tokens: int) -> Tensor:
    """A mask of the same kind for (b, tokens) of which some are `valid`."""
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
    """(b, tokens) bool: the first so many of each sample."""
    return torch.arange(tokens, device=device) < torch.tensor(counts, device=device)[:, None]


def unprotected(valid: Tensor, protect: list[int]) -> Tensor:
    """The valid tokens but so many at their beginning and end."""
    first, last = protect
    if first:
        valid = valid & (valid.cumsum(1) > first)
    return valid & (valid.flip(1).cumsum(1).flip(1) > last) if last else valid


def last_gate(config: Any) -> dict[str, Any] | None:
    """The gate of the last gated block of a model, of whose tokens its output is made."""
    modules = getattr(config, "compressed_modules", None) or {}
    gates = [entry["spec"] for entry in modules.values() if entry["form"] == TokenGate.form]
    return max(gates, key=lambda gate: len(gate["before"]) + (gate["keep"] < 1), default=None)


def _add_mask(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Let the output say which of its tokens are no padding; a tuple stays as it is."""
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
