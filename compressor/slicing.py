"""How many parameters a model has once its residual stream is narrower, exactly and before anything is computed.

Every parameter that touches the stream keeps its other axes, so its size is a number of vectors times a width: `reads`
and `writes` below count those vectors. What doesn't touch the stream stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from math import prod
from typing import Literal

from compressor.stream import Residual


@dataclass(frozen=True)
class SiteShape:
    """reads   vectors that read this site's stream: output rows of all its readers
    writes  vectors that its branches add from: input columns of all its writers, and one for each bias
    """

    reads: int
    writes: int


@dataclass(frozen=True)
class StreamShape:
    """The numbers of a model that decide its size when sliced.

    width        of the stream, D
    tables       vectors that make up the stream before block 0: rows of all tables, columns of convolutions, biases
    sites        of all blocks, in order
    head         rows of the head, which counts as a matrix of its own
    kept         parameters that don't touch the stream: biases of readers (those that a LayerNorm's shift makes
                 included), norms on heads, matrices inside a branch
    norms        norms on the stream, the last one included
    end_norm     parameters of the last norm
    """

    width: int
    tables: int
    sites: tuple[SiteShape, ...]
    head: int
    kept: int
    norms: int
    end_norm: int


def stream_shape(residual: Residual, shapes: Mapping[str, Sequence[int]]) -> StreamShape:
    """The numbers of a model.

    shapes  parameter name -> shape, of every parameter, a tied head under its own name too
    """
    touching: set[str] = set()

    def vectors(name: str) -> int:
        touching.add(name)
        return prod(shapes[name]) // residual.width

    tables = sum(vectors(writer.parameter) for writer in residual.stem)
    sites = []
    for block in residual.blocks:
        for site in block:
            reads = sum(vectors(reader.parameter) for tap in site.taps for reader in tap.readers)
            sites.append(SiteShape(reads, sum(vectors(writer.parameter) for writer in site.writers)))
    head = sum(vectors(reader.parameter) for reader in residual.end.readers)
    made = 0  # biases that a shift brings into being
    taps = tuple(residual.taps())
    for tap in taps:
        touching |= {f"{tap.module}.{leaf}" for leaf in ("weight", "bias")}
        if tap.norm.has_bias:
            made += sum(prod(shapes[r.parameter]) // residual.width for r in tap.readers if r.bias is None)
    kept = made + sum(prod(shape) for name, shape in shapes.items() if name not in touching)
    end_norm = (residual.end.norm.has_weight + residual.end.norm.has_bias) * residual.width
    return StreamShape(residual.width, tables, tuple(sites), head, kept, len(taps), end_norm)


def kept_width(width: int, sparsity: float, round_to: int = 1) -> int:
    """floor((1 - sparsity) * width), then down to a multiple of round_to; 0.9 of 10 leaves 1, as decimals say."""
    exact = int((1 - Decimal(repr(sparsity))) * width)
    return exact - exact % round_to


def uniform_widths(shape: StreamShape, width: int, *, head_sliced: bool = False) -> tuple[int, ...]:
    """`width` at every site, and at the end either that or all of it."""
    return (width,) * len(shape.sites) + (width if head_sliced else shape.width,)


def per_site_parameters(
    shape: StreamShape,
    widths: Sequence[int],
    *,
    embedding: Literal["slice", "project"] = "slice",
    tied: bool = False,
) -> int:
    """Parameters of a model with a rotation of its own at each site, and a matrix (w_k, w_k+1) beside its branches.

    widths     at each site and, last, before the head: len(sites) + 1 numbers
    embedding  slice: narrower tables, and a head of its own; project: whole tables and a matrix (D, w_0) after their
               sum, the head in the original basis behind the last norm with its own gain
    tied       with project: head and table stay one
    """
    if len(widths) != len(shape.sites) + 1:
        raise ValueError(f"{len(widths)} widths for {len(shape.sites)} sites and the head")
    if embedding == "project" and widths[-1] != shape.width:
        raise ValueError("a projected embedding leaves the head in the original basis, at its full width")
    total = shape.kept
    for site, width, following in zip(shape.sites, widths, widths[1:]):
        total += site.reads * width + site.writes * following + width * following
    if embedding == "slice":
        return total + shape.tables * widths[0] + shape.head * widths[-1]
    head = 0 if tied else shape.head * shape.width
    return total + shape.tables * shape.width + shape.width * widths[0] + head + shape.end_norm


def global_parameters(shape: StreamShape, width: int) -> int:
    """Parameters of a model with one rotation: nothing beside the branches, and a constant gain in every norm."""
    vectors = shape.tables + shape.head + sum(site.reads + site.writes for site in shape.sites)
    return shape.kept + (vectors + shape.norms) * width


def widest_that_shrinks(count: Callable[[int], int], dense: int, width: int, round_to: int = 1) -> int | None:
    """The largest multiple of round_to, at most `width`, at which a model has fewer parameters than `dense`.

    None if not even round_to does. `count` must not fall as the width grows.
    """
    low, high = 0, width // round_to  # `low` shrinks or is 0; the answer lies in [low, high]
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count(middle * round_to) < dense else (low, middle - 1)
    return low * round_to or None
