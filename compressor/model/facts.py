"""What a pass may know of a model before it runs, and what a pass that changes the model's definition answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from compressor.model.residual_records import Residual

KINDS = ("heads", "ffn")


@dataclass(frozen=True)
class Cut:
    """A parameter that loses slices along `axis`; unit u owns the indices rows[u]."""

    parameter: str
    axis: int
    rows: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class UnitsInConfig:
    """How config.json says how many units every block has.

    per_unit  key -> its value for each unit
    fixed     keys that have to be there beside them
    """

    per_unit: Mapping[str, int]
    fixed: Mapping[str, Any]

    def of(self, units: int) -> dict[str, Any]:
        """Keys of config.json for so many units."""
        return {key: number * units for key, number in self.per_unit.items()} | dict(self.fixed)


@dataclass(frozen=True)
class RemovedModule:
    """A module that a `removed` layer replaces where no unit stays.

    returns  length of the tuple that it gives; None: a tensor
    layer    number by which a cache knows it
    adds     it gives what the output projection gave
    """

    path: str
    returns: int | None
    layer: int | None
    adds: bool


@dataclass(frozen=True)
class PruningLayout:
    """What pruning has to know of a sub-block beside its parameters.

    head_dim, query_heads  of a unit, where the kind is heads; else 0
    attributes  module path -> attribute -> number for each unit
    shared      until it is proven: matrices whose rows act on more than one unit
    has_norms   the block has norms of another width than the stream's, which may have the same eps
    removal     modules that are replaced when no unit stays; None where the sub-block has to stay
    per_layer   None, or why blocks can't differ in their number of units
    config      None where config.json can't say how many units there are
    vanishes    without any unit, of the other kind neither, the block does nothing, and a model of its class can be
                without it
    """

    head_dim: int = 0
    query_heads: int = 0
    attributes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    shared: tuple[str, ...] = ()
    has_norms: bool = False
    removal: tuple[RemovedModule, ...] | None = None
    per_layer: str | None = None
    config: UnitsInConfig | None = None
    vanishes: bool = False


@dataclass(frozen=True)
class PrunableModule:
    """A sub-block of which units can go.

    name               module path of the sub-block; where it is none of its own, that of its output projection
    kind               heads: a unit is a key-value head and the query heads that read it; ffn: a neuron, a column of
                       the matrix after the activation
    output_projection  path of the module that reads what the units give; unit u is gone when this module's input is 0
                       at columns[u]
    cuts               what gets smaller; the first is the output projection along its input axis
    bias               of the output projection, which stays when all units are gone
    cost               parameters of one unit
    layout             what else pruning has to know
    """

    name: str
    block: int
    kind: Literal["heads", "ffn"]
    units: int
    output_projection: str
    columns: tuple[tuple[int, ...], ...]
    cuts: tuple[Cut, ...]
    bias: str | None
    cost: int
    layout: PruningLayout = field(default_factory=PruningLayout, hash=False)


Decision = dict[str, Any]  # small, sorted JSON


@dataclass(frozen=True)
class Redefinition:
    """What a step makes of a model's definition (`RewritePass.redefine`, `TokenPass.redefine`).

    config   keys of config.json that change
    shapes   parameter -> its new shape, of those that change or are new; None where it is gone
    widths   of the residual stream: before this step, and after it at each site where they differ
    notes    sentences for the plan and the report
    follows  whether a unit's signals are there while it is written: those of the model as cut so far, where the pass
             has `projections`, else of the model unchanged
    decision the choice these shapes follow from (`Pass.choose`), for the pass's own later calls and the report
    blocks   numbers of the blocks that stay, where some go altogether: the model then counts fewer
    tokens   of a token pruner, for the report: see `compressor.passes.zero_tprune`
    """

    config: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...] | None] = field(default_factory=dict)
    widths: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    follows: bool = False
    decision: Decision | None = None
    blocks: tuple[int, ...] | None = None
    tokens: dict[str, Any] | None = None


@dataclass(frozen=True)
class BlockTokens:
    """Where a token gate stands in a block, and what a token costs there.

    attention  name in the block of the module that attends
    after      {call, nth, spread} of each module after the attention residual (`token_gate`)
    mask       name of the block's argument that tells padding
    before     entries of the matrices that multiply a token before the gate; `behind`, after it
    width      of all heads together
    """

    attention: str
    after: tuple[dict[str, Any], ...]
    mask: str | None
    before: int
    behind: int
    width: int
    heads: int


@dataclass(frozen=True)
class TokenFacts:
    """What a token pruner has to know of a model.

    tokens   of each sample; None where it is as long as its text
    width    of the residual stream
    protect  how many at the beginning and the end are no patches, or special
    patches  rows and columns of an image's
    outside  multiply-accumulates of a sample in stem and head
    """

    tokens: int | None
    width: int
    protect: tuple[int, int]
    patches: tuple[int, int] | None
    blocks: tuple[BlockTokens, ...]
    outside: int

    def gate(self, block: int, before: Sequence[float], settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of a `token_gate` in a block, after gates that keep so much."""
        found = self.blocks[block]
        place = {"attention": found.attention, "after": [dict(entry) for entry in found.after], "mask": found.mask}
        return {**place, "protect": list(self.protect), "before": list(before), **settings}


@dataclass(frozen=True)
class ModelFacts:
    """A model as `Pass.redefinition` sees it: no weights, but everything that decides shapes.

    config    config.json, with the defaults of the model's class
    shapes    parameter -> shape, a tied head under its own name too
    tied      parameter -> the parameter whose storage it shares
    stream    tells what touches the residual stream; `residual` asks it. raises ModelError where it can't be told
    given     parameters of the model as it was given, before any step
    branches  widths (of each block: before its sites, and after the last) -> settings of a `rotated_block` for each
              block; raises ModelError where one can't be
    blocks    path of the block list
    fits      whether the model's own class holds what a Redefinition asks for: None, or why not
    prunable  kinds ("heads", "ffn") -> what of every block can be pruned; raises ModelError where a block has none
    tokens    what a token pruner has to know; raises ModelError for a model whose tokens can't be pruned
    accepts   whether the model's config class takes these values in place of its own: None, or why not
    """

    architecture: str
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str]
    stream: Callable[[], Residual]
    given: int
    branches: Callable[[Sequence[Sequence[int]]], tuple[dict[str, Any], ...]]
    blocks: str
    fits: Callable[[Redefinition], str | None]
    prunable: Callable[..., tuple[PrunableModule, ...]]
    tokens: Callable[[], TokenFacts]
    accepts: Callable[[dict[str, Any]], str | None]

    @property
    def residual(self) -> Residual:
        """What touches the residual stream. raises ModelError for a model whose stream can't be rotated"""
        return self.stream()
