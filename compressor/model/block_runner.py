"""A model taken apart into embeddings, blocks and output head, and put through its paces piece by piece.

The embeddings are whatever runs before the first block and the output head whatever runs after the last one; both are
found by running the model with a `Port` in place of each block. A port notes the arguments that its block would get and
either lets the hidden states through or ends the run. Nothing of the model's source is rewritten or traced
symbolically.
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
    """What one block is called with, beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """How a block gives the hidden states: bare, or as the first tensor of a tuple, list or mapping.

    leaves  what else it gives, with None in place of every tensor: a model that needs one of those is no plain stack
            of blocks, which the proof by replay finds out
    hidden  number of the leaf that is the hidden states
    """

    spec: TreeSpec
    leaves: tuple[Any, ...]
    hidden: int

    @classmethod
    def of(cls, output: Any) -> Answer:
        """raises TypeError for an output that holds no tensor"""
        leaves, spec = tree_flatten(output)
        at = next((number for number, leaf in enumerate(leaves) if isinstance(leaf, Tensor)), None)
        if at is None:
            raise TypeError(f"a block gives {type(output).__name__} without a tensor")
        return cls(spec, tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves), at)

    def around(self, hidden: Tensor) -> Any:
        """What the block would have given, with these hidden states."""
        return tree_unflatten([*self.leaves[: self.hidden], hidden, *self.leaves[self.hidden + 1 :]], self.spec)


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block gives: the first tensor of it.

    raises TypeError for an output that holds no tensor
    """
    if isinstance(output, Tensor):
        return output
    found = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
    if found is None:
        raise TypeError(f"a block gives {type(output).__name__} without a tensor")
    return found


class Stop(Exception):
    """Ends a forward pass early; raised by what watches it, and never left to a caller."""


class Port(nn.Module):
    """Stands in for a block; anything else asked of it is answered by the block itself."""

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
    """A model and the path of its block list; runs the embeddings, one block, or the output head.

    The blocks' weights may be on the meta device while embeddings or output head run, and the other way round, once
    `answers` says what each block gives. Where it isn't known, the first run of the embeddings finds it out beforehand.
    """

    def __init__(self, model: PreTrainedModel, blocks_path: str, answers: Sequence[Answer] = ()) -> None:
        self.model = model
        self.blocks_path = blocks_path
        self.blocks: list[nn.Module] = list(model.get_submodule(blocks_path).children())
        self.answers: list[Answer] = list(answers)

    def __len__(self) -> int:
        return len(self.blocks)

    def embeddings(self, batch: Batch) -> tuple[Tensor, list[Call]]:
        """Hidden states before block 0, and the arguments of every block.

        raises ValueError if the model ends before it has called as many blocks as it has
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
        """How each block gives the hidden states. A run of its own, since blocks may put into a cache what they see."""
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
        """Hidden states after one block."""
        with torch.set_grad_enabled(gradients):
            return hidden_of(self.blocks[index](hidden, *call.args, **call.kwargs))

    def output_head(self, batch: Batch, hidden: Tensor, *, gradients: bool = False) -> Tensor:
        """The model's output, given the hidden states after the last block; needs known answers."""
        assert len(self.answers) == len(self.blocks), "what the blocks give isn't known before a run of the embeddings"
        seen = 0

        def visit(passing: Tensor, call: Call) -> Any:
            nonlocal seen
            seen += 1
            answer = self.answers[(seen - 1) % len(self.blocks)]
            return answer.around(hidden if seen == len(self.blocks) else passing)

        with self._ports(visit), torch.set_grad_enabled(gradients):
            return output_of(self.model(**batch))

    def whole(self, batch: Batch) -> Tensor:
        """embeddings -> blocks -> output head."""
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
    """What is noted of a call; its output is added when it is there."""

    output: Any


Note = TypeVar("Note", bound=Noted)


@contextmanager
def own_calls(
    block: nn.Module, note: Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any]], Note]
) -> Iterator[list[Note]]:
    """Note the calls of modules that a block makes itself while it runs, not those that its modules make.

    note  (name inside the block, module, args, kwargs) -> what goes into the list, in the order of their beginnings
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
    """Texts are scored as a whole: nothing that acts on a cache of keys and values, as dropping tokens does, acts."""
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
    """Logits if the model has them, else the last hidden states."""
    return output.logits if "logits" in output else output.last_hidden_state
