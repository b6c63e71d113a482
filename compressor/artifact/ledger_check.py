"""Checks the ledger of an artifact: against the files of the artifact, and against those of its source."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from compressor.artifact.manifest import Manifest
from compressor.errors import Because
from compressor.model.checkpoint import Checkpoint, open_checkpoint
from compressor.model.ledger import Account, problems_of
from compressor.storage.safetensors_file import same_bytes


def ledger_problems(manifest: Manifest, artifact: Checkpoint, source: Path | None) -> list[str]:
    """Sentences on what the ledger says and the files don't show; none for an artifact without a ledger.

    source  directory of the source: the ledger must have every tensor of its files, and tensors that were copied must
            have the same bytes. None: only the artifact is looked at
    """
    ledger = manifest.get("ledger")
    if ledger is None:
        return []
    checkpoint = None if source is None else open_checkpoint(source)
    problems = [] if checkpoint is None else problems_of(ledger, checkpoint)
    absent, changed = [], []
    for account in ledger["accounts"]:
        for tensor, name in _held(account):
            is_copied = account["becomes"] == "copied"
            is_weight = any(key in manifest["weights"] for key in (name, name.removesuffix(".weight")))
            if name not in artifact.tensors and (is_copied or not is_weight):
                absent.append(f"{tensor} ({account['becomes']})")
            elif (
                is_copied
                and checkpoint is not None
                and tensor in checkpoint.stored
                and not same_bytes(checkpoint.stored[tensor], artifact.tensors[name])
            ):
                changed.append(tensor)
    if absent:
        message = f"{len(absent)} tensors of the source are not in the artifact, such as {absent[0]}"
        problems.append(Because(message, reason="absent-tensors", tensors=absent))
    if changed:
        message = f"{len(changed)} copied tensors have other bytes than in the source, such as {changed[0]}"
        problems.append(Because(message, reason="changed-tensors", tensors=changed))
    return problems


def _held(account: Account) -> Iterator[tuple[str, str]]:
    """(tensor of the source, each name that it has in the artifact)"""
    into = account.get("into", {})
    for tensor in () if account["becomes"] == "left out" else account["tensors"]:
        yield from ((tensor, name) for name in into.get(tensor, (tensor,)))
