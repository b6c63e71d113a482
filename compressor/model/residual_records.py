"""Records of what touches a model's residual stream; `residual_stream` fills them in by running the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from compressor.model.module_names import renumbered
from compressor.model.norms import Norm


@dataclass(frozen=True)
class Writer:
    """A parameter that adds to the stream along `axis`: a matrix, a bias, an embedding, a convolution.

    scale  what the stream gets is scale times the parameter (1 for most embeddings and biases, sqrt(hidden) for Gemma's
           embedding); None where the factor varies, as in a product
    """

    parameter: str
    axis: int
    scale: float | None


@dataclass(frozen=True)
class Reader:
    """A parameter that multiplies a norm's output along `axis`.

    bias  the parameter added to its product, of its shape without `axis`; None if there is none
    """

    parameter: str
    axis: int
    bias: str | None


@dataclass(frozen=True)
class Tap:
    """A norm on the residual stream and what reads its output."""

    module: str
    norm: Norm
    readers: tuple[Reader, ...]


@dataclass(frozen=True)
class ResidualSublayer:
    """One place where branches leave the stream and come back to it.

    taps     one norm, or several that all see the same stream (GPT-NeoX's parallel blocks)
    writers  what they add before the next site
    """

    taps: tuple[Tap, ...]
    writers: tuple[Writer, ...]


@dataclass(frozen=True)
class Residual:
    """Everything that touches the residual stream, under the model's own parameter names.

    width   of the stream
    kind    of all its norms; a `layer` stream can be centred, an `rms` stream must not be
    stem    what the stream is made of before block 0
    blocks  the sites of each block, in forward order
    end     the last norm and its readers
    """

    width: int
    kind: Literal["layer", "rms"]
    stem: tuple[Writer, ...]
    blocks: tuple[tuple[ResidualSublayer, ...], ...]
    end: Tap

    def taps(self) -> Iterator[Tap]:
        for sites in self.blocks:
            for site in sites:
                yield from site.taps
        yield self.end

    def writers(self) -> Iterator[Writer]:
        yield from self.stem
        for sites in self.blocks:
            for site in sites:
                yield from site.writers


def renamed(site: ResidualSublayer, old: str, new: str) -> ResidualSublayer:
    """The same site of another block: `old` in front of every name becomes `new`."""

    def name(full: str) -> str:
        return renumbered(full, old, new)

    taps = tuple(
        replace(
            tap,
            module=name(tap.module),
            readers=tuple(
                replace(reader, parameter=name(reader.parameter), bias=name(reader.bias) if reader.bias else None)
                for reader in tap.readers
            ),
        )
        for tap in site.taps
    )
    return ResidualSublayer(taps, tuple(replace(writer, parameter=name(writer.parameter)) for writer in site.writers))
