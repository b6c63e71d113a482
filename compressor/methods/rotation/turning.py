"""What rotation and slicing do to one unit of a model: everything that touches the residual stream, by one matrix."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, Any

from compressor.errors import PassError
from compressor.lazy import torch
from compressor.methods.rotation.rotation import Covariance, rotate

if TYPE_CHECKING:
    from compressor.model.facts import ModelFacts
    from compressor.model.residual_records import Tap, Writer
    from compressor.protocol import StreamSite


def untied_head(
    model: ModelFacts,
) -> tuple[dict[str, Any], dict[str, tuple[int, ...] | None], tuple[str, ...]]:
    """(config, shapes, notes) of a Remodel in which the head has weights of its own, where it shared the table's."""
    shared = [reader.parameter for reader in model.residual.end.readers if reader.parameter in model.tied]
    if not shared:
        return {}, {}, ()
    count = sum(prod(model.shapes[name]) for name in shared)
    note = f"{shared[0]} shared the table's weights and gets its own: {count:,} parameters more"
    return {"tie_word_embeddings": False}, {name: model.shapes[name] for name in shared}, (note,)


def turn(site: StreamSite, q: torch.Tensor) -> None:
    """Rotate every parameter of the unit along the stream.

    q  (D, d) float64: the whole orthogonal matrix, or the columns that are kept
    """
    if site.index < 0:
        turn_writers(site, site.residual.stem, q)
    for stream in site.sites:
        for tap in stream.taps:
            turn_readers(site, tap, q)
        turn_writers(site, stream.writers, q)
    if site.index == len(site.residual.blocks):
        turn_readers(site, site.residual.end, q)


def turn_readers(site: StreamSite, tap: Tap, q: torch.Tensor) -> None:
    for reader in tap.readers:
        site.write(reader.parameter, rotate(site.read(reader.parameter), q, reader.axis))


def turn_writers(site: StreamSite, writers: tuple[Writer, ...], q: torch.Tensor) -> None:
    for writer in writers:
        site.write(writer.parameter, rotate(site.read(writer.parameter), q, writer.axis))


def pooled_covariance(sites: Iterator[StreamSite], normalised: bool = False) -> tuple[torch.Tensor, int]:
    """(sum over all sites of their second moments, each of trace 1; tokens): (D, D) float64.

    Without the scaling the last sites would decide alone, since the stream grows with depth.
    """
    total, tokens = None, 0
    for site in sites:
        for tap in taps_of(site):
            covariance = tap_covariance(site, tap, normalised)
            scaled = of_trace_one(covariance.matrix)
            total, tokens = scaled if total is None else total + scaled, covariance.tokens
    assert total is not None  # there is a head
    return total, tokens


def of_trace_one(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix of second moments over its trace; signals that are zeros alone leave zeros."""
    return matrix / (float(matrix.trace()) or 1.0)


def taps_of(site: StreamSite) -> list[Tap]:
    """A norm for each place of the unit where the stream is read; of the head the last norm."""
    is_head = site.index == len(site.residual.blocks)
    return [stream.taps[0] for stream in site.sites] + ([site.residual.end] if is_head else [])


def tap_covariance(site: StreamSite, tap: Tap, normalised: bool) -> Covariance:
    """Second moments of what a norm reads. raises PassError if no calibration token reached it, or one isn't finite"""
    covariance = Covariance.zeros(site.residual.width, site.device)
    for x in site.signals(tap):
        covariance.add(x, normalised=normalised, where=tap.module)
    if not covariance.tokens:
        raise PassError("no calibration token reached it", where=tap.module, hint="Give calibration data.")
    return covariance
