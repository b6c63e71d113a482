"""Implements a decoder block that drops tokens of the prompt that the next token hardly attends to.

Fu, Cho, Merth, Mehta, Rastegari, Najibi 2024, "LazyLLM: Dynamic Token Pruning for Efficient Long Context LLM
Inference", arXiv 2407.14057. A gate is placed after a block. It keeps the tokens that the last token attends to most in
this block (mean over heads). A dropped token has no keys and values in later blocks. Its hidden state waits in a store
beside the cache. If a later token attends to a waiting token, the waiting one enters the next block together with it,
and later blocks compute the missing keys and values.

No token is dropped without a cache (training, scoring of texts), in prompts shorter than `min_prompt`, and in blocks
before the first gate. Tokens keep their own positions. The model's output has a row for every input token: the row of a
dropped token is its hidden state when it was dropped.

No tensors. `compressor.passes.prefill_pruning` chooses gates.
"""

from __future__ import annotations

import inspect
import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from compressor.errors import ModelError
from compressor.layers.base import Layer, standing_for
from compressor.layers.structural.observed_attention import last_seen, register_watching, watching

NOT_LAZY_HINT = "Leave prefill_pruning out for this model; llm_int8 makes it faster without dropping tokens."
MASKED = -1e30  # lower than any other score


@dataclass
class LazyTokens:
    """The state of a cache beside keys and values, for each row of the batch. A slot is the number of a token.

    slots    (batch, q) of the tokens that enter the next block, in their order there
    columns  block -> (batch, keys) slots of its keys, in their order in the cache
    waiting  block -> slots (batch, w) and states (batch, w, width) of tokens that have not entered it
    valid    (batch, tokens) which tokens are not padding
    tables   position arguments of the blocks: ids and embeddings, (batch or 1, tokens, width) each
    new      number of tokens of the current call
    """

    slots: Tensor
    valid: Tensor
    new: int
    tables: list[Tensor] = field(default_factory=list)
    columns: dict[int, Tensor] = field(default_factory=dict)
    waiting: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, as a beam search does with the cache."""

        def taken(value: Tensor) -> Tensor:
            return value if value.shape[0] == 1 else value.index_select(0, rows.to(value.device))

        self.slots, self.valid = taken(self.slots), taken(self.valid)
        self.tables = [taken(table) for table in self.tables]
        self.columns = {block: taken(slots) for block, slots in self.columns.items()}
        self.waiting = {block: (taken(slots), taken(states)) for block, (slots, states) in self.waiting.items()}


class LazyBlock(Layer):
    """The model's own block with a gate. Its class is also a subclass of the block's.

    format_params  number       of the block
          begin        number of the block with the first gate; earlier blocks are unchanged
          last         whether it is the model's last block
          keep         share of the tokens that are kept after it; null if it has no gate
          sink         number of tokens at the start that are always kept
          min_prompt   shorter prompts are not pruned
          revive       whether dropped tokens can be brought back
    """

    format_name = "lazy_block"
    stands_for = "block"
    weight_only = False
    helpers = ("compressor.layers.structural.observed_attention",)

    number: int
    keep: float | None
    begin: int
    is_last: bool
    sink: int
    min_prompt: int
    revive: bool
    _names: tuple[str, ...]
    _attention: str  # name of the module inside the block

    @classmethod
    def prepare(cls, model: nn.Module) -> None:
        register_watching()

    @classmethod
    def empty(cls, shape: tuple[int, ...], format_params: dict[str, Any], dtype: torch.dtype, bias: bool) -> Self:
        made = cls()
        made._set_up(format_params)
        return made

    @staticmethod
    def wrap(block: nn.Module, shape: tuple[int, ...], format_params: dict[str, Any]) -> None:
        """Turn a model's block into a lazy block, in place.

        raises  ModelError for a block that already is one, is not a decoder's, or whose attention can't be identified
        """
        where = f"block {format_params['number']} ({type(block).__name__})"
        if isinstance(block, Layer):
            raise ModelError(
                f"is a {block.format_name} already",
                where=where,
                hint="Leave prefill_pruning out, or start from the original checkpoint.",
                data={"reason": "already-replaced", "format_name": block.format_name},
            )
        names = tuple(inspect.signature(block.forward).parameters)
        found = {n: m for n, m in block.named_modules() if n and hasattr(m, "layer_idx") and hasattr(m, "config")}
        if len(found) != 1:
            raise ModelError(
                f"has {len(found)} attention modules with a layer number; exactly one is needed",
                where=where,
                hint=NOT_LAZY_HINT,
                data={"reason": "attentions", "count": len(found)},
            )
        ((name, attention),) = found.items()
        if not getattr(attention, "is_causal", False):
            raise ModelError(
                "attends to later tokens too, so it isn't a decoder block",
                where=where,
                hint=NOT_LAZY_HINT,
                data={"reason": "not-causal"},
            )
        if getattr(attention, "sliding_window", None) is not None:
            raise ModelError(
                "attends within a sliding window, whose cache drops tokens by itself",
                where=where,
                hint=NOT_LAZY_HINT,
                data={"reason": "sliding-window"},
            )
        block.__class__ = standing_for(LazyBlock, type(block))  # type: ignore[arg-type]
        assert isinstance(block, LazyBlock)
        block._names, block._attention = names, name
        block._set_up(format_params)

    def _set_up(self, format_params: dict[str, Any]) -> None:
        self.number, self.keep, self.sink = format_params["number"], format_params["keep"], format_params["sink"]
        self.begin, self.is_last = format_params["begin"], format_params["last"]
        self.min_prompt, self.revive = format_params["min_prompt"], format_params["revive"]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self._names[1:], args)), **kwargs}
        kept = next((value for value in given.values() if isinstance(value, Cache)), None)
        is_plain = kept is None or self.number < self.begin
        state = None if is_plain else self._state(kept, hidden_states, given)
        if state is None:
            return super().forward(hidden_states, **given)  # type: ignore[misc]
        before = state.columns.get(self.number)
        columns = state.slots if before is None else torch.cat([before, state.slots], 1)
        seen: list[tuple[Tensor, Tensor, float]] = []
        with watching(self.get_submodule(self._attention), seen) if self.keep is not None else nullcontext():
            output = super().forward(hidden_states, **self._narrowed(given, state, columns))  # type: ignore[misc]
        hidden = output[0] if isinstance(output, tuple) else output
        state.columns[self.number] = columns
        if self.keep is not None:
            scores = self._scores(state, columns, *last_seen(seen, self._attention))
            hidden = self._gate(state, hidden, scores, is_prompt=before is None)
        if self.is_last:
            hidden = _every_place(state, hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _state(self, kept: Any, hidden: Tensor, given: dict[str, Any]) -> LazyTokens | None:
        """The tokens of this call. The block of the first gate creates it; None if no token is dropped."""
        state: LazyTokens | None = getattr(kept, "lazy_tokens", None)
        if self.number > self.begin:
            return state
        batch, new = hidden.shape[:2]
        if state is None:
            if kept.get_seq_length(self.number) or new < self.min_prompt:
                return None
            nothing = torch.zeros(batch, 0, dtype=torch.bool, device=hidden.device)
            state = LazyTokens(torch.zeros(batch, 0, dtype=torch.int64, device=hidden.device), nothing, 0)
            kind: Any = type(kept)
            kept.__class__ = kind if hasattr(kind, "lazy_tokens") else _lazy_cache(kind)
            kept.lazy_tokens = state
        seen = state.valid.shape[1]
        state.new = new
        state.slots = torch.arange(seen, seen + new, device=hidden.device).expand(batch, new)
        state.valid = _valid(given.get("attention_mask"), state.valid, batch, new)
        tables = _tables(given)
        state.tables = [torch.cat(pair, 1) for pair in zip(state.tables, tables)] if state.tables else tables
        return state

    def _narrowed(self, given: dict[str, Any], state: LazyTokens, columns: Tensor) -> dict[str, Any]:
        """The block's other arguments for the tokens that entered it."""
        narrowed = {**given, "attention_mask": _mask(given.get("attention_mask"), state, columns)}
        tables = [_rows(table, state.slots) for table in state.tables]
        if torch.is_tensor(given.get("position_ids")):
            narrowed["position_ids"] = tables.pop(0)[:, :, 0]
        if tables:
            narrowed["position_embeddings"] = tables[0] if torch.is_tensor(given["position_embeddings"]) else (*tables,)
        if torch.is_tensor(given.get("cache_position")):
            narrowed["cache_position"] = state.slots[0]
        return narrowed

    def _gate(self, state: LazyTokens, hidden: Tensor, scores: Tensor, is_prompt: bool) -> Tensor:
        """Choose the tokens to keep, and the waiting tokens to bring back."""
        assert self.keep is not None
        columns, following = state.columns[self.number], self.number + 1
        count = math.ceil(self.keep * columns.shape[1] - 1e-9)
        if is_prompt:
            order = scores.masked_fill(columns == state.slots[:, -1:], torch.inf)
            starts = (state.valid.cumsum(1) <= self.sink) & state.valid
            order = order.masked_fill(starts.gather(1, columns), torch.inf)
            chosen = _best(order, min(max(count, self.sink + 1), columns.shape[1]))
            left = _others(chosen, columns.shape[1])
            state.waiting[following] = (columns.gather(1, left), _rows(hidden, left))
            state.slots = columns.gather(1, chosen)
            return _rows(hidden, chosen)
        if not self.revive or following not in state.waiting:
            return hidden
        slots, states = state.waiting[following]
        place = (columns[:, None, :] == slots[:, :, None]).int().argmax(2)  # each waiting token has its key here
        wanted = torch.zeros_like(scores, dtype=torch.bool).scatter(1, _best(scores, count), True).gather(1, place)
        back = int(wanted.sum(1).max())
        if not back:
            return hidden
        chosen = _best(scores.gather(1, place), back)
        left = _others(chosen, slots.shape[1])
        state.waiting[following] = (slots.gather(1, left), _rows(states, left))
        state.slots = torch.cat([slots.gather(1, chosen), state.slots], 1)
        return torch.cat([_rows(states, chosen), hidden], 1)

    def _scores(self, state: LazyTokens, columns: Tensor, query: Tensor, key: Tensor, scaling: float) -> Tensor:
        """Attention of the last token to each key of this block, mean over heads: (batch, keys) float32."""
        if key.shape[2] != columns.shape[1]:
            raise ModelError(
                f"the cache returned {key.shape[2]} keys, but {columns.shape[1]} were stored",
                where=f"block {self.number}",
                hint="Pass past_key_values=DynamicCache(), or no cache, to generate.",
                data={"returned": key.shape[2], "stored": columns.shape[1]},
            )
        groups = query.shape[1] // key.shape[1]
        last, keys = query[:, :, -1:].float(), key.float().repeat_interleave(groups, 1)
        logits = torch.matmul(last, keys.transpose(2, 3))[:, :, 0] * scaling
        hidden = ~state.valid.gather(1, columns)
        weights = torch.softmax(logits.masked_fill(hidden[:, None], MASKED), -1).mean(1)
        return weights.masked_fill(hidden, -1.0)

    def format_params(self) -> dict[str, Any]:
        settings = {"number": self.number, "begin": self.begin, "last": self.is_last, "keep": self.keep}
        return {**settings, "sink": self.sink, "min_prompt": self.min_prompt, "revive": self.revive}

    def tensors(self) -> dict[str, Tensor]:
        return {}


def _best(scores: Tensor, count: int) -> Tensor:
    """Positions of the `count` largest scores, in ascending order. Of equal scores the first wins."""
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    return order[:, :count].sort(1).values


def _others(chosen: Tensor, length: int) -> Tensor:
    """The positions that are not chosen, ascending. Each row has the same number of chosen ones."""
    free = torch.ones(chosen.shape[0], length, dtype=torch.bool, device=chosen.device).scatter(1, chosen, False)
    return free.nonzero()[:, 1].view(chosen.shape[0], -1)


def _rows(values: Tensor, places: Tensor) -> Tensor:
    """values (batch or 1, n, width) at places (batch, m)."""
    values = values.expand(places.shape[0], *values.shape[1:])
    return values.gather(1, places[:, :, None].expand(-1, -1, values.shape[2]))


def _tables(given: dict[str, Any]) -> list[Tensor]:
    """The position ids and the position embeddings in a block's arguments, as far as it has them."""
    ids, embeddings = given.get("position_ids"), given.get("position_embeddings")
    found = [] if embeddings is None else [embeddings] if torch.is_tensor(embeddings) else list(embeddings)
    return found if ids is None else [ids[:, :, None], *found]


def _valid(mask: Tensor | None, before: Tensor, batch: int, new: int) -> Tensor:
    """(batch, tokens) which tokens the last token of this call may attend to."""
    if mask is None:
        return torch.cat([before, before.new_ones(batch, new)], 1)
    last = mask[:, 0, -1, : before.shape[1] + new]
    allowed = last if last.dtype == torch.bool else last == 0
    return allowed.expand(batch, -1)


def _mask(given: Tensor | None, state: LazyTokens, columns: Tensor) -> Tensor | None:
    """The keys that each token may attend to: valid keys that are not later, and itself."""
    q, keys = state.slots.shape[1], columns.shape[1]
    if given is None and (q in (1, keys)):
        return None  # attention is causal itself: tokens are in their order, or there is one
    earlier = columns[:, None, :] <= state.slots[:, :, None]
    same = columns[:, None, :] == state.slots[:, :, None]
    allowed = ((earlier & state.valid.gather(1, columns)[:, None, :]) | same)[:, None]
    if given is None or given.dtype == torch.bool:
        return allowed
    return torch.zeros_like(allowed, dtype=given.dtype).masked_fill(~allowed, torch.finfo(given.dtype).min)


def _every_place(state: LazyTokens, hidden: Tensor) -> Tensor:
    """The tokens of this call, each in its row. Tokens that were brought back have no row."""
    began = state.valid.shape[1] - state.new
    if state.slots.shape[1] == state.new and began:
        return hidden
    if began:
        return hidden[:, -state.new :]
    full = hidden.new_zeros(hidden.shape[0], state.new, hidden.shape[2])
    for slots, states in [*state.waiting.values(), (state.slots, hidden)]:
        full.scatter_(1, slots[:, :, None].expand(-1, -1, hidden.shape[2]), states)
    return full


@cache
def _lazy_cache(kind: type) -> type:
    """A subclass of the cache's class that selects rows of the lazy tokens too."""

    class Lazy(kind):  # type: ignore[misc]
        lazy_tokens: Any = None  # a LazyTokens after the prompt

        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            self.lazy_tokens.select(beam_idx)

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self.lazy_tokens.select(indices)

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            rows = torch.arange(self.lazy_tokens.valid.shape[0]).repeat_interleave(repeats)
            self.lazy_tokens.select(rows)

        def crop(self, *args: Any, **kwargs: Any) -> None:
            raise ModelError(
                "a cache of which tokens were dropped can't be shortened",
                where=kind.__name__,
                hint="Generate without assisted decoding or prompt lookup, or begin with a new cache.",
                data={"reason": "no-crop"},
            )

        def reset(self) -> None:
            super().reset()
            self.lazy_tokens = None

    Lazy.__name__ = kind.__name__
    return Lazy


__all__ = ["LazyBlock", "LazyTokens"]
