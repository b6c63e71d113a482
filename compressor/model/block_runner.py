"""Runs a model part by part: its embeddings, its blocks one by one, and its output head.

The embeddings are everything before the first block, and the output head is everything after the last one. Both are
found by running the model with a `Port` in place of each block. A port records the arguments of its block, and either
passes the hidden states on or ends the run. The model's source is neither rewritten nor traced symbolically.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten
from transformers import PreTrainedModel

Batch = dict[str, Tensor]  # the model's own inputs: input_ids or pixel_values


@dataclass(frozen=True)
class Call:
    """The arguments of one block, except the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """How a block returns the hidden states: alone, or as the first tensor of a tuple, list or mapping.

    leaves  its other outputs, with None in place of every tensor: a model that needs one of these tensors is not a
            plain stack of blocks, which `replay_proof` finds
    hidden  number of the leaf that is the hidden states
    """

    tree_spec: TreeSpec
    leaves: tuple[Any, ...]
    hidden: int

    @classmethod
    def of(cls, output: Any) -> Answer:
        """raises TypeError for an output without a tensor"""
        leaves, tree_spec = tree_flatten(output)
        at = next((number for number, leaf in enumerate(leaves) if isinstance(leaf, Tensor)), None)
        if at is None:
            raise TypeError(f"a block gives {type(output).__name__} without a tensor")
        return cls(tree_spec, tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves), at)

    def around(self, hidden: Tensor) -> Any:
        """The output of the block with these hidden states."""
        return tree_unflatten([*self.leaves[: self.hidden], hidden, *self.leaves[self.hidden + 1 :]], self.tree_spec)


def hidden_of(output: Any) -> Tensor:
    """The hidden states in the output of a block: its first tensor.

    raises  TypeError for an output without a tensor
    """
    if isinstance(output, Tensor):
        return output
    found = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
    if found is None:
        raise TypeError(f"a block gives {type(output).__name__} without a tensor")
    return found


class Stop(Exception):
    """Ends a forward pass early. The code that observes the pass raises and catches it."""


class Port(nn.Module):
    """Takes the place of a block. All its other attributes are those of the block."""

    def __init__(self, block: nn.Module, visit: Callable[[Tensor, Call], Any]) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)
        object.__setattr__(self, "_visit", visit)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._visit(hidden_states, Call(args, kwargs))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_block"), name)


class Pieces:
    """A model and the path of its block list. Runs the embeddings, one block, or the output head.

    The blocks' weights may be on the meta device while the embeddings or the output head run, and the other way round,
    once `answers` describes the output of each block. The first run of the embeddings runs the blocks to find it.
    """

    def __init__(self, model: PreTrainedModel, blocks_path: str, answers: Sequence[Answer] = ()) -> None:
        self.model = model
        self.blocks_path = blocks_path
        self.blocks: list[nn.Module] = list(model.get_submodule(blocks_path).children())
        self.answers: list[Answer] = list(answers)

    def __len__(self) -> int:
        return len(self.blocks)

    def embeddings(self, batch: Batch) -> tuple[Tensor, list[Call]]:
        """The hidden states before block 0, and the arguments of every block.

        raises  ValueError if the model ends before it has called all its blocks
        """
        if len(self.answers) != len(self.blocks):
            self.answers = self._answers_in(batch)
        calls: list[Call] = []
        first: list[Tensor] = []

        def visit(hidden: Tensor, call: Call) -> Any:
            if not calls:
                first.append(hidden)
            calls.append(call)
            if len(calls) == len(self.blocks):
                raise Stop
            return self.answers[len(calls) - 1].around(hidden)

        self._run_ports(visit, batch)
        if len(calls) != len(self.blocks):
            raise ValueError(f"{len(calls)} of {len(self.blocks)} blocks were reached")
        return first[0], calls

    def _answers_in(self, batch: Batch) -> list[Answer]:
        """How each block returns the hidden states. It takes a run of its own, since blocks may write to a cache."""
        answers: list[Answer] = []

        def visit(hidden: Tensor, call: Call) -> Any:
            output = self.blocks[len(answers)](hidden, *call.args, **call.kwargs)
            answers.append(Answer.of(output))
            if len(answers) == len(self.blocks):
                raise Stop
            return output

        self._run_ports(visit, batch)
        if len(answers) != len(self.blocks):
            raise ValueError(f"{len(answers)} of {len(self.blocks)} blocks were reached")
        return answers

    def _run_ports(self, visit: Callable[[Tensor, Call], Any], batch: Batch) -> None:
        """Run the model with ports until one of them stops it."""
        with self._ports(visit), torch.no_grad():
            try:
                self.model(**batch)
            except Stop:
                pass

    def block(self, index: int, hidden: Tensor, call: Call, *, gradients: bool = False) -> Tensor:
        """The hidden states after one block."""
        with torch.set_grad_enabled(gradients):
            return hidden_of(self.blocks[index](hidden, *call.args, **call.kwargs))

    def output_head(self, batch: Batch, hidden: Tensor, *, gradients: bool = False) -> Tensor:
        """The model's output for the hidden states after the last block. Needs `answers`."""
        assert len(self.answers) == len(self.blocks), "the outputs of the blocks are unknown until `embeddings` has run"
        seen = 0

        def visit(passing: Tensor, call: Call) -> Any:
            nonlocal seen
            seen += 1
            answer = self.answers[(seen - 1) % len(self.blocks)]
            return answer.around(hidden if seen == len(self.blocks) else passing)

        with self._ports(visit), torch.set_grad_enabled(gradients):
            return output_of(self.model(**batch))

    def whole(self, batch: Batch) -> Tensor:
        """Embeddings -> blocks -> output head."""
        hidden, calls = self.embeddings(batch)
        for index, call in enumerate(calls):
            hidden = self.block(index, hidden, call)
        return self.output_head(batch, hidden)

    @contextmanager
    def _ports(self, visit: Callable[[Tensor, Call], Tensor]) -> Iterator[None]:
        parent_path, _, name = self.blocks_path.rpartition(".")
        parent = self.model.get_submodule(parent_path)
        original = parent._modules[name]
        parent._modules[name] = nn.ModuleList(Port(block, visit) for block in self.blocks)
        try:
            yield
        finally:
            parent._modules[name] = original


class Noted(Protocol):
    """The record of a call. Its output is added after the call."""

    output: Any


Note = TypeVar("Note", bound=Noted)


@contextmanager
def own_calls(
    block: nn.Module, note: Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any]], Note]
) -> Iterator[list[Note]]:
    """Record the module calls that a block makes itself while it runs, not those of its modules.

    note  (name inside the block, module, args, kwargs) -> the record; records are listed in the order in which the
          calls begin
    """
    calls: list[Note] = []
    running: list[Note] = []

    def begin(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            noted = note(name, module, args, kwargs)
            if not running:
                calls.append(noted)
            running.append(noted)

        return hook

    def end(_module: nn.Module, _args: Any, output: Any) -> None:
        running.pop().output = output

    with ExitStack() as stack:
        for name, module in block.named_modules():
            if name:
                stack.callback(module.register_forward_pre_hook(begin(name), with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(end).remove)
        yield calls


@contextmanager
def without_cache(*models: PreTrainedModel) -> Iterator[None]:
    """Run models without a key-value cache, on whole texts: code that needs a cache, such as token dropping, is off."""
    configs = [config for config in (m.config.get_text_config() for m in models) if hasattr(config, "use_cache")]
    before = [config.use_cache for config in configs]
    for config in configs:
        config.use_cache = False
    try:
        yield
    finally:
        for config, value in zip(configs, before):
            config.use_cache = value


def output_of(output: Any) -> Tensor:
    """The logits if the model has them, else the last hidden states."""
    return output.logits if "logits" in output else output.last_hidden_state
