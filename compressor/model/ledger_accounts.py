"""Makes the ledger of an artifact (`compressor.model.ledger`).

The accounts are made from what a run does: tensors fill parameters, or nothing; weights get a quantization format;
steps rewrite the model. The names and bytes of the source are those in the headers of its files. `problems_of` compares
the two, so a tensor that nothing takes is found, and one that is counted twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_args

from compressor.model.ledger import Account, Becomes, Ledger, source_bytes
from compressor.model.stored_weight import StoredWeight, replaced_tensors
from compressor.model.structure import Structure
from compressor.model.unused_tensors import WHY_UNUSED, Unused

ACTIVATIONS = "only quantized activations need it"
SHADOWED = "the last shard that has a tensor of this name is read"


@dataclass(frozen=True)
class Rewriting:
    """A step that gives dense tensors new values.

    step     name of the pass
    written  tensors after the step that have new values; None: it isn't known yet, and all may have
    tensors  tensor before the step -> the tensors after it that fill the same parameters; None: each is itself
    """

    step: str
    written: Collection[str] | None
    tensors: Mapping[str, tuple[str, ...]] | None = None


class Fate(NamedTuple):
    """What becomes of one tensor."""

    becomes: Becomes
    how: str
    into: tuple[str, ...] = ()


def make_ledger(
    source: Structure, result: Structure, formats: Iterable[StoredWeight], rewritings: Sequence[Rewriting] = ()
) -> Ledger:
    """The ledger of an artifact with the tensors of `result`, in which these weights are stored.

    result      `source`, or the model after steps that change the model itself
    rewritings  in the order of the steps
    """
    checkpoint = source.checkpoint
    held = checkpoint.in_files
    accounts: dict[tuple[str, str], Account] = {}
    for name, fate in _fates(source, _Result(source, result, list(formats), rewritings)):
        new: Account = {"becomes": fate.becomes, "how": fate.how, "bytes": 0, "tensors": {}}
        account = accounts.setdefault((fate.becomes, fate.how), new)
        nbytes = held[name].nbytes if name in held else 0  # `problems_of` tells of a name that isn't in the files
        account["tensors"][name] = nbytes
        account["bytes"] += nbytes
        if fate.into not in ((), (name,), (name.removesuffix(".weight"),)):
            account.setdefault("into", {})[name] = list(fate.into)
    return {
        "source_bytes": source_bytes(checkpoint),
        "accounts": [accounts[key] for key in sorted(accounts, key=_order)],
    }


def _order(key: tuple[str, str]) -> tuple[int, str]:
    return get_args(Becomes).index(key[0]), key[1]


def _fates(source: Structure, result: _Result) -> Iterator[tuple[str, Fate]]:
    """(name in the files of the source, what becomes of it), from everything that takes tensors of the source."""
    checkpoint, quantized = source.checkpoint, source.checkpoint.quantized
    for name in checkpoint.shadowed:
        yield name, Fate("left out", SHADOWED)
    members = {} if quantized is None else quantized.members
    for name in () if quantized is None else quantized.unread:
        yield name, Fate("left out", ACTIVATIONS)
    fates = {unused.tensor: result.of_unused(unused) for unused in source.bindings.unused}
    fates |= {tensor: result.of_used(tensor) for tensor in source.bindings.parameters_by_tensor}
    before = {new: name for name, new in checkpoint.renamed.items()}
    for tensor, fate in fates.items():
        dense = before.get(tensor, tensor)
        if dense not in members:
            yield dense, fate
            continue
        codes, *others = members[dense]
        yield codes, fate
        assert quantized is not None
        merged = fate if fate.becomes == "left out" else Fate("merged", f"with {quantized.method} codes", fate.into)
        yield from ((name, merged) for name in others)


class _Result:
    """What the artifact has of each tensor that the source's structure reads."""

    def __init__(
        self, source: Structure, result: Structure, formats: list[StoredWeight], rewritings: Sequence[Rewriting]
    ) -> None:
        self.source, self.result, self.rewritings = source, result, rewritings
        self.replaced = replaced_tensors(formats, result.checkpoint)
        self.formats: dict[str, list[StoredWeight]] = {}  # tensor -> the formats that hold it, or slices of it
        for stored in formats:
            for name in {stored.weight.tensor, stored.bias} - {None, ""}:
                self.formats.setdefault(str(name), []).append(stored)
        used = result.bindings.parameters_by_tensor
        self.unused = {unused.tensor: unused for unused in result.bindings.unused if unused.tensor not in used}
        self.changing = next((rewriting.step for rewriting in rewritings if rewriting.tensors is not None), None)
        self.followed = {tensor: self._follow(tensor) for tensor in source.bindings.parameters_by_tensor}
        self.fillers = Counter(name for names, _ in self.followed.values() for name in names)

    def _follow(self, tensor: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The tensors after all steps that fill the same parameters, and the steps that gave them new values.

        If there are none: the step that removed them, and the steps before it that gave them new values.
        """
        names: tuple[str, ...] = (tensor,)
        steps: list[str] = []
        for rewriting in self.rewritings:
            before, following = names, rewriting.tensors
            if following is not None:
                names = tuple(dict.fromkeys(new for name in before for new in following.get(name, (name,))))
                if not names:
                    return (), (rewriting.step, *dict.fromkeys(steps))
            if rewriting.written is None or any(name in rewriting.written for name in names):
                steps.append(rewriting.step)
        return names, tuple(dict.fromkeys(steps))

    def of_unused(self, unused: Unused) -> Fate:
        """Of a tensor that fills no parameter."""
        if not unused.is_carried:
            return Fate("left out", WHY_UNUSED[unused.reason])
        if self.changing is not None:
            return Fate("left out", f"{WHY_UNUSED[unused.reason]}, and {self.changing} changes the model")
        how, origin, into = WHY_UNUSED[unused.reason], self._origin(unused.tensor), (unused.tensor,)
        dtype = _name(self.source, unused.tensor)
        return Fate("copied", how, into) if origin == dtype else Fate("converted", f"{origin} to {dtype}, {how}", into)

    def of_used(self, tensor: str) -> Fate:
        """Of a tensor that fills a parameter."""
        names, steps = self.followed[tensor]
        if not names:
            after = f", after {' and '.join(steps[1:])}" if steps[1:] else ""
            return Fate("left out", f"{steps[0]} removes what it fills{after}")
        if names[0] in self.unused:
            return Fate("left out", WHY_UNUSED[self.unused[names[0]].reason])
        formats = [stored_weight for name in names for stored_weight in self.formats.get(name, ())]
        origin, after = self._origin(tensor), str(self.result.bindings.dtype_of(names[0])).removeprefix("torch.")
        stored = [stored_weight for stored_weight in formats if not stored_weight.weight.is_function]
        if stored:
            weights = tuple(dict.fromkeys(stored_weight.weight.name for stored_weight in stored))
            whole = () if all(name in self.replaced for name in names) else names  # the rest of a divided tensor
            how = [" and ".join(sorted({stored_weight.described for stored_weight in stored}))]
            how += [f"from {self._method}"] if self._is_dequantized(tensor) else []
            how += [f"after {' and '.join(steps)}"] if steps else []
            is_split = stored[0].weight.is_slice or len(names) > 1
            return Fate("split" if is_split else "quantized", ", ".join(how), (*weights, *whole))
        by = f"by {' and '.join(steps)}"
        if len(names) > 1:
            return Fate("split", by, names)
        if self.fillers[names[0]] > 1:
            return Fate("merged", by, names)
        if steps:
            return Fate("rewritten", by, names)
        if origin != after:
            return Fate("converted", f"{origin} to {after}", names)
        return Fate("copied", f"in {formats[0].format_name}" if formats else "stays dense", names)

    @property
    def _method(self) -> str:
        quantized = self.source.checkpoint.quantized
        assert quantized is not None
        return quantized.method

    def _is_dequantized(self, tensor: str) -> bool:
        return self.source.checkpoint.tensors[tensor].decode is not None

    def _origin(self, tensor: str) -> str:
        """How the source has a tensor: its dtype, or the method by which it is quantized."""
        return self._method if self._is_dequantized(tensor) else _name(self.source, tensor)


def _name(structure: Structure, tensor: str) -> str:
    info = structure.checkpoint.tensors[tensor]
    return info.small or str(info.dtype).removeprefix("torch.")
