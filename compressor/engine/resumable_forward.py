"""A pass through a block that pauses before a product and goes on later, each operation computed once.

Calibrating a block needs the inputs of its weights one stage after the other, each stage with the earlier ones already
changed. Replaying the block from its start for each stage computes attention four times; a pass that waits where it
was computes it once. Python can't wait inside somebody's forward without a thread for each batch, but it can run that
forward again with every torch call before the pause answered from memory: that is a recorded forward. At a pause it
keeps the tensors that the paused frames still refer to, as a suspended thread would, and forgets the rest.
Resuming runs the same Python again, at microseconds a call, up to the pause, and computes from there.

Frames also refer to much that they never read again; `needs` finds that out on one batch, and the others of its kind
keep only what it needed. Whoever touches a forgotten tensor after all is told so by `Forgotten`.

Answered are calls that take or give tensors; everything else (grad mode, autocast) runs again. A forward that takes
another way the second time, or computes outside torch's functions, does not match its recorded forward: `Diverged` is
raised and the caller starts from the beginning, so results never depend on whether a recorded forward was used.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from compressor.model.block_runner import Stop
from compressor.model.observed_matmul import ObservedMatmul, ObservedMatmuls


class Diverged(Exception):
    """The forward did not make the recorded calls, or reads what the recorded forward has not kept."""


class Forgotten(Tensor):
    """Stands for a tensor that was released. Its shape and dtype can be asked for; nothing can compute with it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Diverged(f"{func} reads a tensor that was not kept")


@dataclass
class Answer:
    """One call and what it gave, flattened. A tensor among the leaves is weakly referred to while the pass runs; at a
    pause it is kept, or is None if nothing refers to it any more.
    """

    func: Any
    leaves: list[Any]
    tensors: tuple[int, ...]  # which leaves are tensors
    spec: TreeSpec | None  # None: the one leaf is the result itself


@dataclass
class RecordedForward:
    """answers  the calls before the pause
    passed   parameters whose products were computed before it
    is_spent the forward has written into a tensor that was kept, so it can't go on from here again
    """

    answers: list[Answer] = field(default_factory=list)
    passed: set[str] = field(default_factory=set)
    is_spent: bool = False

    def kept(self) -> list[Tensor]:
        return [leaf for a in self.answers for at in a.tensors if isinstance(leaf := a.leaves[at], Tensor)]

    def keep_only(self, leaves: frozenset[tuple[int, int]]) -> None:
        """Let go of every tensor but these, given as (answer, leaf)."""
        for number, answer in enumerate(self.answers):
            for at in answer.tensors:
                if (number, at) not in leaves:
                    answer.leaves[at] = None

    @property
    def calls(self) -> list[Any]:
        """The functions called before the pause; batches of one kind call the same."""
        return [answer.func for answer in self.answers]

    @property
    def nbytes(self) -> int:
        """Bytes of the storages that are kept."""
        return sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in self.kept())}.values())


def advance(
    recorded: RecordedForward,
    watched: Mapping[str, Tensor],
    work: Callable[[], Any],
    pauses: Callable[[ObservedMatmul], bool],
) -> ObservedMatmul | None:
    """Run `work` on to the first product that `pauses` asks for, and pause before it is computed.

    returns that product; None if `work` ended without one, after which the recorded forward is spent
    raises  Diverged if the forward doesn't match the recorded forward, which is useless then
    """
    calls = _Recorded(recorded, watched, pauses)
    _play(calls, work)
    recorded.is_spent = calls.reached is None
    return calls.reached


def run_on(
    recorded: RecordedForward,
    watched: Mapping[str, Tensor],
    work: Callable[[], Any],
    visit: Callable[[ObservedMatmul], None],
) -> Any:
    """Run `work` from the pause to its end, or until `visit` raises Stop; the recorded forward stays where it is.

    returns what `work` returned, None if it was stopped
    raises  Diverged if the forward doesn't match the recorded forward, which is useless then
    """
    result = _play_on(_Replayed(recorded, watched, visit), work)
    if isinstance(result, Forgotten):
        raise Diverged("it returns a tensor that was not kept")
    return result


def needs(recorded: RecordedForward, work: Callable[[], Any]) -> frozenset[tuple[int, int]]:
    """The (answer, leaf) numbers of kept tensors that the rest of the pass reads or returns; runs it to its end.

    raises  Diverged if the forward doesn't match the recorded forward, which is useless then
    """
    numbers = {
        id(leaf): (number, at)
        for number, answer in enumerate(recorded.answers)
        for at in answer.tensors
        if isinstance(leaf := answer.leaves[at], Tensor)
    }
    found: set[tuple[int, int]] = set()

    class Watched(_Replayed):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not self.is_answering:
                found.update(numbers[id(leaf)] for leaf in tree_leaves((args, kwargs)) if id(leaf) in numbers)
            return super().__torch_function__(func, types, args, kwargs)

    result = _play_on(Watched(recorded, {}, lambda call: None), work)
    found.update(numbers[id(leaf)] for leaf in tree_leaves(result) if id(leaf) in numbers)
    return frozenset(found)


def _play_on(calls: _Replayed, work: Callable[[], Any]) -> Any:
    """Play from a pause that is to stay, and note whether anything wrote into what it keeps."""
    versions = [(tensor, tensor._version) for tensor in calls.recorded.kept()]
    result = _play(calls, work)
    calls.recorded.is_spent = any(tensor._version != version for tensor, version in versions)
    return result


def _play(calls: _Replayed, work: Callable[[], Any]) -> Any:
    try:
        with calls:
            return work()
    except Stop:
        return None
    except Exception as error:
        if calls.is_answering:  # a real fault comes again when the pass is run from its start
            raise Diverged from error
        raise


class _Replayed(ObservedMatmuls):
    """Answers calls from the recorded forward, then computes and reports products."""

    def __init__(
        self, recorded: RecordedForward, watched: Mapping[str, Tensor], on_call: Callable[[ObservedMatmul], Any]
    ) -> None:
        super().__init__(watched, on_call)
        self.recorded = recorded
        self._at, self._end = 0, len(recorded.answers)

    @property
    def is_answering(self) -> bool:
        return self._at < self._end

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.is_answering:
            return super().__torch_function__(func, types, args, kwargs)
        answer = self.recorded.answers[self._at]
        if answer.func == func:
            self._at += 1
            return self.result(answer)
        if _has_tensor(args) or _has_tensor(kwargs):
            raise Diverged(f"{answer.func} was expected, {func} came")
        return func(*args, **(kwargs or {}))

    def result(self, answer: Answer) -> Any:
        leaves = list(answer.leaves)
        for at in answer.tensors:
            if leaves[at] is None:
                leaves[at] = torch.empty(0).as_subclass(Forgotten)
        return leaves[0] if answer.spec is None else tree_unflatten(leaves, answer.spec)


class _Recorded(_Replayed):
    """Goes on recording where the recorded forward ends, up to the product that `pauses` asks for (`reached`)."""

    reached: ObservedMatmul | None = None

    def visit(self, call: ObservedMatmul) -> None:
        if self._on_call(call):
            self._hold()
            self.reached = call
            raise Stop
        self.recorded.passed.add(call.parameter)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        was_answering = self.is_answering
        result = super().__torch_function__(func, types, args, kwargs)
        if not was_answering:
            self._note(func, args, kwargs, result)
        return result

    def result(self, answer: Answer) -> Any:
        result = super().result(answer)
        for at in answer.tensors:
            if answer.leaves[at] is not None:  # the recorded forward moves on: what stays is for the frames to say
                answer.leaves[at] = weakref.ref(answer.leaves[at])
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        flat, spec = ([result], None) if isinstance(result, Tensor) else tree_flatten(result)
        tensors = tuple(at for at, leaf in enumerate(flat) if isinstance(leaf, Tensor))
        if tensors or _has_tensor(args) or _has_tensor(kwargs):
            leaves: list[Any] = [weakref.ref(leaf) if isinstance(leaf, Tensor) else leaf for leaf in flat]
            self.recorded.answers.append(Answer(func, leaves, tensors, spec))

    def _hold(self) -> None:
        """Keep what the frames refer to now, forget the rest."""
        for answer in self.recorded.answers:
            for at in answer.tensors:
                reference = answer.leaves[at]
                answer.leaves[at] = None if reference is None else reference()


def _has_tensor(tree: Any) -> bool:
    if isinstance(tree, (tuple, list)):
        return any(_has_tensor(item) for item in tree)
    if isinstance(tree, dict):
        return any(_has_tensor(item) for item in tree.values())
    return isinstance(tree, Tensor)
