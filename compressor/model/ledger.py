"""The ledger of an artifact: what becomes of every tensor of its source, by name and bytes. `ledger_accounts` makes it.

A ledger is JSON values, the same in a plan, a report, a manifest and `inspect`.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal, NotRequired, TypedDict

from compressor.errors import Because
from compressor.model.checkpoint import Checkpoint

Becomes = Literal["quantized", "split", "merged", "rewritten", "converted", "copied", "left out"]


class Account(TypedDict):
    """Tensors of the source of which the same becomes.

    becomes  quantized: a weight in a quantization format; split: several weights or tensors; merged: a part of another
             tensor; rewritten: new values by a step; converted: the same values in another dtype; copied: the same
             bytes; left out
    how      the format, the step or the reason
    bytes    of all of them, in the files of the source
    tensors  name in the source -> bytes there
    into     name in the source -> names of the weights or tensors in the artifact, if these are others
    """

    becomes: Becomes
    how: str
    bytes: int
    tensors: dict[str, int]
    into: NotRequired[dict[str, list[str]]]


class Ledger(TypedDict):
    """What becomes of every tensor of a source. source_bytes: of all tensors in its files"""

    source_bytes: int
    accounts: list[Account]


def source_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of all tensors in the files of a checkpoint."""
    return sum(info.nbytes for info in checkpoint.in_files.values())


def problems_of(ledger: Ledger, checkpoint: Checkpoint) -> list[str]:
    """Differences between a ledger and the files of its source, each as a sentence; none if it balances."""
    held = {name: info.nbytes for name, info in checkpoint.in_files.items()}
    counts: Counter[str] = Counter()
    reported: dict[str, int] = {}
    for account in ledger["accounts"]:
        counts.update(account["tensors"].keys())
        reported |= account["tensors"]
    lost = [name for name in held if name not in reported]
    twice = [name for name, count in counts.items() if count > 1]
    other = [name for name, size in reported.items() if held.get(name) != size]
    accounted = sum(account["bytes"] for account in ledger["accounts"])
    reasons = (
        ("not-accounted-for", lost, "are not accounted for"),
        ("accounted-for-twice", twice, "are accounted for more than once"),
        ("not-in-source", other, "are not in the source, or have other sizes there"),
    )
    problems: list[str] = [
        Because(f"{len(names)} tensors {what}, such as {min(names)}", reason=reason, tensors=names)
        for reason, names, what in reasons
        if names
    ]
    if not accounted == ledger["source_bytes"] == sum(held.values()):
        whole, source = ledger["source_bytes"], sum(held.values())
        message = (
            f"{accounted:,} bytes are accounted for, the ledger has {whole:,} bytes in all, and the tensors of the "
            f"source have {source:,}"
        )
        problems.append(Because(message, reason="other-sum", accounted=accounted, ledger=whole, source=source))
    return problems
