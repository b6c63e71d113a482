"""Runs the forward of a block up to a matmul, pauses, and resumes later. Each operation is computed once.

Calibrating a block needs the inputs of its weights stage by stage, and each stage sees the earlier ones changed.
Running the block from its start for each stage computes attention four times; a forward that pauses computes it once.
Python can't pause another library's forward without a thread for each batch. But it can run that forward again and
answer every torch call before the pause from memory: this is a recorded forward. At a pause it keeps the tensors that
the Python frames still refer to, as a paused thread would, and releases the others. Resuming runs the same Python code
again up to the pause, in microseconds per call, and computes from there.

Frames also refer to many tensors that they never read again. `needs` finds these on one small batch, and all batches
that make the same calls keep only what it needed. Code that reads a released tensor anyway gets `Forgotten`, which
raises `Diverged`.

Only calls that take or return tensors are answered; everything else (grad mode, autocast) runs again. A forward that
makes other calls the second time, or computes outside torch's functions, does not match its recorded forward. Then
`Diverged` is raised and the caller runs from the start. So results never depend on recorded forwards.
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
    """The forward did not make the recorded calls, or it reads a tensor that the recorded forward has not kept."""


class Forgotten(Tensor):
    """Replaces a tensor that was released. Its shape and dtype can be read; every computation raises Diverged."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Diverged(f"{func} reads a tensor that was not kept")


@dataclass
class Answer:
    """One call and its result, flattened. While the forward runs, its tensors are weak references. At a pause, a tensor
    is kept, or is None if nothing refers to it any more.
    """

    func: Any
    leaves: list[Any]
    tensors: tuple[int, ...]  # which leaves are tensors
    tree_spec: TreeSpec | None  # None: the one leaf is the result itself


@dataclass
class RecordedForward:
    """A forward up to its pause.

    answers   the calls before the pause
    passed    parameters whose matmuls were computed before the pause
    is_spent  the forward has written into a kept tensor, so it can't be resumed again
    """

    answers: list[Answer] = field(default_factory=list)
    passed: set[str] = field(default_factory=set)
    is_spent: bool = False

    def kept(self) -> list[Tensor]:
        return [leaf for a in self.answers for at in a.tensors if isinstance(leaf := a.leaves[at], Tensor)]

    def keep_only(self, leaves: frozenset[tuple[int, int]]) -> None:
        """Release every tensor except these, given as (answer, leaf)."""
        for number, answer in enumerate(self.answers):
            for at in answer.tensors:
                if (number, at) not in leaves:
                    answer.leaves[at] = None

    @property
    def calls(self) -> list[Any]:
        """The functions called before the pause. Batches of one kind call the same functions."""
        return [answer.func for answer in self.answers]

    @property
    def nbytes(self) -> int:
        """Bytes of the kept storages."""
        return sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in self.kept())}.values())


def advance(
    recorded: RecordedForward,
    watched: Mapping[str, Tensor],
    work: Callable[[], Any],
    pauses: Callable[[ObservedMatmul], bool],
) -> ObservedMatmul | None:
    """Run `work` up to the first matmul for which `pauses` is true, and pause before it is computed.

    returns that matmul; None if `work` ended without one, after which the recorded forward is spent
    raises  Diverged if the forward doesn't match the recorded forward, which is then useless
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
    """Run `work` from the pause to its end, or until `visit` raises Stop. The recorded forward keeps its pause.

    returns the result of `work`; None if it was stopped
    raises  Diverged if the forward doesn't match the recorded forward, which is then useless
    """
    result = _play_on(_Replayed(recorded, watched, visit), work)
    if isinstance(result, Forgotten):
        raise Diverged("it returns a tensor that was not kept")
    return result


def needs(recorded: RecordedForward, work: Callable[[], Any]) -> frozenset[tuple[int, int]]:
    """The (answer, leaf) numbers of kept tensors that the rest of the forward reads or returns. Runs it to its end.

    raises  Diverged if the forward doesn't match the recorded forward, which is then useless
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
    """Run from a pause that stays in place, and note whether anything wrote into a kept tensor."""
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
        if calls.is_answering:  # a real error is raised again by a run from the start
            raise Diverged from error
        raise


class _Replayed(ObservedMatmuls):
    """Answers calls from the recorded forward, then computes and reports matmuls."""

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
            raise Diverged(f"{answer.func} was expected, {func} was called")
        return func(*args, **(kwargs or {}))

    def result(self, answer: Answer) -> Any:
        leaves = list(answer.leaves)
        for at in answer.tensors:
            if leaves[at] is None:
                leaves[at] = torch.empty(0).as_subclass(Forgotten)
        return leaves[0] if answer.tree_spec is None else tree_unflatten(leaves, answer.tree_spec)


class _Recorded(_Replayed):
    """Continues the recording after the end of the recorded forward, up to the matmul of the pause (`reached`)."""

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
            if answer.leaves[at] is not None:  # the pause moves on: frames decide what is kept
                answer.leaves[at] = weakref.ref(answer.leaves[at])
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        flat, tree_spec = ([result], None) if isinstance(result, Tensor) else tree_flatten(result)
        tensors = tuple(at for at, leaf in enumerate(flat) if isinstance(leaf, Tensor))
        if tensors or _has_tensor(args) or _has_tensor(kwargs):
            leaves: list[Any] = [weakref.ref(leaf) if isinstance(leaf, Tensor) else leaf for leaf in flat]
            self.recorded.answers.append(Answer(func, leaves, tensors, tree_spec))

    def _hold(self) -> None:
        """Keep the tensors that the frames refer to now, and release the others."""
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
