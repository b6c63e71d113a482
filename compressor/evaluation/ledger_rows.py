"""Rows of a ledger for readers: one for each account, or one for each kind of tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from compressor.model.ledger import Ledger
from compressor.model.name_kinds import kinds


class LedgerRow(NamedTuple):
    """what: names of the tensors, with `*` for numbers; tensors: how many; bytes: in the files of the source"""

    what: str
    becomes: str
    how: str
    tensors: int
    bytes: int


def rows_of_accounts(ledger: Ledger) -> Iterator[LedgerRow]:
    """One row for each account. It names one kind of its tensors, and the number of other kinds."""
    for account in ledger["accounts"]:
        (first, _), *others = _kinds(account["tensors"])
        what = f"{first} and {len(others)} other kinds" if others else first
        yield LedgerRow(what, account["becomes"], account["how"], len(account["tensors"]), account["bytes"])


def rows_of_kinds(ledger: Ledger) -> Iterator[LedgerRow]:
    """One row for each kind of tensor."""
    for account in ledger["accounts"]:
        for what, names in _kinds(account["tensors"]):
            size = sum(account["tensors"][name] for name in names)
            yield LedgerRow(what, account["becomes"], account["how"], len(names), size)


def tensor_count(ledger: Ledger) -> int:
    return sum(len(account["tensors"]) for account in ledger["accounts"])


def _kinds(tensors: dict[str, int]) -> list[tuple[str, list[str]]]:
    """(name of the kind, its tensors)"""
    names = list(tensors)
    return [(what, [names[position] for position in alike]) for what, alike in kinds(names, [None] * len(names))]
