"""Defines the records of the reads and writes of a model's residual stream. `residual_stream` fills them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from compressor.model.module_names import with_prefix
from compressor.model.norms import Norm


@dataclass(frozen=True)
class ResidualWrite:
    """A parameter that adds to the stream along `axis`: an output projection, a bias, an embedding or a convolution.

    scale  the stream gets scale times the parameter (1 for most embeddings and biases, sqrt(hidden) for Gemma's
           embedding); None if the factor varies, as in a matmul
    """

    parameter: str
    axis: int
    scale: float | None


@dataclass(frozen=True)
class InputProjection:
    """A parameter that multiplies a norm's output along `axis`.

    bias  the parameter that is added to the product, of its shape without `axis`; None if there is none
    """

    parameter: str
    axis: int
    bias: str | None


@dataclass(frozen=True)
class ResidualNorm:
    """A norm on the residual stream, its formula, and its consumers: the parameters that read its output."""

    module: str
    formula: Norm
    consumers: tuple[InputProjection, ...]


@dataclass(frozen=True)
class ResidualSublayer:
    """A sublayer: branches that read the stream and write to it.

    norms   one norm, or several that read the same stream (GPT-NeoX's parallel blocks)
    writes  the writes of the branches before the next sublayer
    """

    norms: tuple[ResidualNorm, ...]
    writes: tuple[ResidualWrite, ...]


@dataclass(frozen=True)
class Residual:
    """All reads and writes of the residual stream, under the model's own parameter names.

    width       of the stream
    kind        of all its norms; a `layer` stream can be centred, an `rms` stream must not be
    embeddings  what the stream is made of before block 0
    blocks      the sublayers of each block, in forward order
    end         the last norm and its consumers
    """

    width: int
    kind: Literal["layer", "rms"]
    embeddings: tuple[ResidualWrite, ...]
    blocks: tuple[tuple[ResidualSublayer, ...], ...]
    end: ResidualNorm

    def norms(self) -> Iterator[ResidualNorm]:
        for sublayers in self.blocks:
            for sublayer in sublayers:
                yield from sublayer.norms
        yield self.end

    def writes(self) -> Iterator[ResidualWrite]:
        yield from self.embeddings
        for sublayers in self.blocks:
            for sublayer in sublayers:
                yield from sublayer.writes


def renamed(sublayer: ResidualSublayer, old: str, new: str) -> ResidualSublayer:
    """The same sublayer of another block: the prefix `old` of every name becomes `new`."""

    def name(full: str) -> str:
        return with_prefix(full, old, new)

    norms = tuple(
        replace(
            norm,
            module=name(norm.module),
            consumers=tuple(
                replace(
                    consumer, parameter=name(consumer.parameter), bias=name(consumer.bias) if consumer.bias else None
                )
                for consumer in norm.consumers
            ),
        )
        for norm in sublayer.norms
    )
    return ResidualSublayer(norms, tuple(replace(write, parameter=name(write.parameter)) for write in sublayer.writes))
