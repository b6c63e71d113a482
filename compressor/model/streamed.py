"""Runs a model whose parameters are in memory only while they are used.

The model is on the meta device. A block is filled when its forward begins, and emptied when it ends. Every other module
is filled in the same way with the parameters that it holds itself. So a whole forward needs the memory of one block,
and code that runs models needs no change. `keeping` lets many forwards share what was filled, and `holding` gives code
that reads parameters the values of one block or module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compressor.model.checkpoint import Checkpoint
from compressor.model.mapped_tensors import MappedTensors, expert_parameters
from compressor.model.module_names import tensor_named
from compressor.model.stored_weight import as_in_parameter
from compressor.model.unused_tensors import Unused
from compressor.model.weight_names import Bindings, fill, read_experts_parameter, read_parameter
from compressor.process.memory import return_freed_memory
from compressor.storage.safetensors_file import read_slices

HOLDER = "_streamed_by"  # attribute of a streamed model


class Filler(Protocol):
    """Where the values of a model on the meta device come from.

    names   of all parameters and buffers that `fill` can give a value
    mapped  makes the parameters of experts; None: they are in memory
    """

    model: PreTrainedModel
    mapped: MappedTensors | None

    def names(self) -> Iterable[str]: ...

    def fill(self, part: str, names: Sequence[str]) -> None:
        """Give these parameters of a module, or of a block, their values."""

    def free(self, part: str, names: Sequence[str]) -> None:
        """Take the values away again."""


class DenseFiller:
    """Fills a model from a checkpoint without stored layers, as transformers would."""

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel, bindings: Bindings) -> None:
        self.checkpoint, self.model, self.bindings = checkpoint, model, bindings
        self.mapped: MappedTensors | None = None

    def names(self) -> Iterable[str]:
        return [*self.bindings.sources, *self.bindings.tied]

    def fill(self, part: str, names: Sequence[str]) -> None:
        for name in names:
            value = tied_value(name, self.bindings, self._read, self._read_experts, self.model, self.mapped)
            fill(name, value, self.model)

    def free(self, part: str, names: Sequence[str]) -> None:
        for name in names:
            fill(name, None, self.model)

    def _read(self, tensor: str) -> Tensor:
        return self.checkpoint.read(tensor).to(self.bindings.dtype_of(tensor))

    def _read_experts(self, tensor: str) -> Iterator[Tensor]:
        shape = self.model.get_parameter(self.bindings.parameters_by_tensor[tensor]).shape
        return as_in_parameter(read_slices(self.checkpoint.tensors[tensor]), shape)


def tied_value(
    name: str,
    bindings: Bindings,
    read: Callable[[str], Tensor],
    read_experts: Callable[[str], Iterator[Tensor]],
    model: PreTrainedModel,
    mapped: MappedTensors | None,
) -> Tensor:
    """The value of a parameter or buffer; of a tied parameter that of the one whose tensor fills it.

    read_experts  as in `read_experts_parameter`
    mapped        makes the parameters of experts; None: they are in memory
    """
    origin = bindings.tied.get(name, name)
    if mapped is not None and expert_parameters(model, (origin,)):
        return read_experts_parameter(origin, bindings, read, read_experts, model, mapped.empty)
    return read_parameter(origin, bindings, read, model).to(bindings.dtypes[origin])


class StreamedModel:
    """A model on the meta device that fills its modules while they run.

    blocks_path  path of the list of blocks
    unused       checkpoint tensors that fill nothing
    placed       functions that are called with the path of each block after it was filled
    """

    def __init__(self, filler: Filler, blocks_path: str, unused: Sequence[Unused] = ()) -> None:
        self.unused = unused
        self.filler, self.model, self.blocks_path = filler, filler.model, blocks_path
        self.placed: list[Callable[[str], None]] = []
        self.begun: Counter[str] = Counter()  # part -> how many of its forwards have begun; the caller clears it
        self._held: dict[str, int] = {}  # filled part -> how many forwards and contexts use it now
        self._keeps = False
        self._blank: Mapping[str, int] = {}
        self._blanked: set[str] = set()
        blocks = self.model.get_submodule(blocks_path)
        self.parts: dict[str, list[str]] = {f"{blocks_path}.{name}": [] for name, _ in blocks.named_children()}
        for name in filler.names():
            self.parts.setdefault(self.part_of_name(name), []).append(name)
        for part in self.parts:
            module = self.model.get_submodule(part)
            module.register_forward_pre_hook(partial(self._begin, part), prepend=True)
            module.register_forward_hook(partial(self._end, part), always_call=True)
        self.model.__dict__[HOLDER] = self

    def nbytes_of(self, name: str) -> int:
        """Bytes of a parameter or buffer when it is filled."""
        return tensor_named(self.model, name).nbytes

    def leave_out(self, names: Collection[str], modules: Collection[str]) -> None:
        """From now on don't fill these parameters, and all parameters of these modules. Nothing must be filled now."""
        assert not self._held, "filled values would stay"
        prefixes = tuple(f"{module}." for module in modules)
        for part, members in self.parts.items():
            self.parts[part] = [name for name in members if name not in names and not name.startswith(prefixes)]

    def part_of_name(self, name: str) -> str:
        """The block in which a parameter or module lies, or the module that holds a parameter outside of blocks."""
        prefix = self.blocks_path + "."
        if name.startswith(prefix):
            return prefix + name.removeprefix(prefix).partition(".")[0]
        return name.rpartition(".")[0]

    @contextmanager
    def holding(self, part: str) -> Iterator[None]:
        """Keep a block, or a module outside of blocks, filled inside this context."""
        self._take(part)
        try:
            yield
        finally:
            self._give(part)

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Keep everything that is filled inside this context until its end."""
        assert not self._keeps, "a context that keeps is open"
        self._keeps = True
        try:
            yield
        finally:
            self._keeps = False
            for part in [part for part, count in self._held.items() if count == 0]:
                self._empty(part)

    @contextmanager
    def blanking(self, calls: Mapping[str, int]) -> Iterator[None]:
        """Inside this context the first forwards of these modules read zeros, which need no memory.

        calls  module outside of blocks -> how many of its forwards, from the first, have outputs that nobody needs
        """
        self._blank = calls
        self.begun.clear()
        try:
            yield
        finally:
            self._blank = {}

    def _begin(self, part: str, module: nn.Module, args: Any) -> None:
        self.begun[part] += 1
        if self.begun[part] <= self._blank.get(part, 0) and part not in self._held:
            self._blanked.add(part)
            for name in self.parts[part]:
                empty = tensor_named(self.model, name)
                fill(name, torch.zeros((), dtype=empty.dtype).expand(empty.shape), self.model)
        else:
            self._take(part)

    def _end(self, part: str, module: nn.Module, args: Any, output: Any) -> None:
        if part in self._blanked:
            self._blanked.discard(part)
            self.filler.free(part, self.parts[part])
        elif self._held.get(part):  # a forward that failed before it was filled ends, too
            self._give(part)

    def _take(self, part: str) -> None:
        if part not in self._held:
            self.filler.fill(part, self.parts.get(part, []))
            for call in self.placed:
                call(part)
            self._held[part] = 0
        self._held[part] += 1

    def _give(self, part: str) -> None:
        self._held[part] -= 1
        if self._held[part] == 0 and not self._keeps:
            self._empty(part)

    def _empty(self, part: str) -> None:
        del self._held[part]
        self.filler.free(part, self.parts.get(part, []))
        return_freed_memory()


def streamed_of(model: Any) -> StreamedModel | None:
    """What streams this model; None for a model whose parameters are in memory."""
    return getattr(model, "__dict__", {}).get(HOLDER)
