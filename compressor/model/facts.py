"""Defines the facts of a model that a pass may use, and the answer of a pass that changes the model's definition."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, TypedDict

from compressor.model.residual_records import Residual

KINDS = ("heads", "ffn")


@dataclass(frozen=True)
class PrunedSlice:
    """A parameter that is pruned along `axis`. Unit u has the indices rows[u]."""

    parameter: str
    axis: int
    rows: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class UnitsInConfig:
    """The keys of config.json that give the number of units of every block.

    per_unit  key -> its value per unit
    fixed     further keys that must be set
    """

    per_unit: Mapping[str, int]
    fixed: Mapping[str, Any]

    def of(self, units: int) -> dict[str, Any]:
        """The keys of config.json for this number of units."""
        return {key: number * units for key, number in self.per_unit.items()} | dict(self.fixed)


@dataclass(frozen=True)
class RemovedModule:
    """A module that a `removed` layer replaces if no unit is kept.

    returns  length of the tuple that it returns; None: a tensor
    layer    its layer number in a cache
    adds     its output is that of the output projection
    """

    path: str
    returns: int | None
    layer: int | None
    adds: bool


@dataclass(frozen=True)
class PruningLayout:
    """The facts of a sub-block that pruning needs, except its parameters.

    head_dim, query_heads  of a unit, if the kind is heads; else 0
    attributes  module path -> attribute -> number per unit
    shared      matrices whose rows act on more than one unit, until the proof has passed
    has_norms   the block has norms of another width than the stream's, which may have the same eps
    removal     modules that are replaced if no unit is kept; None if the sub-block must stay
    per_layer   None, or the reason why blocks can't differ in their number of units
    config      None if config.json can't give the number of units
    vanishes    without units of either kind the block does nothing, and the model's class can be made without it
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
    """A sub-block whose units can be removed.

    name               module path of the sub-block; if it is not a module, that of its output projection
    kind               heads: a unit is a key-value head with the query heads that read it; ffn: a neuron, a column of
                       the matrix after the activation
    output_projection  path of the module that reads the outputs of the units; unit u is removed if this module's input
                       is 0 at columns[u]
    slices               the parameters that get smaller; the first is the output projection along its input axis
    bias               of the output projection; it stays when all units are removed
    cost               number of parameters of one unit
    layout             further facts that pruning needs
    """

    name: str
    block: int
    kind: Literal["heads", "ffn"]
    units: int
    output_projection: str
    columns: tuple[tuple[int, ...], ...]
    slices: tuple[PrunedSlice, ...]
    bias: str | None
    cost: int
    layout: PruningLayout = field(default_factory=PruningLayout, hash=False)


Decision = Mapping[str, Any]  # small, sorted JSON; a pass may describe the keys of its own by a TypedDict


class PruningDecision(TypedDict):
    """What pruning keeps.

    sites    name of a prunable module -> ascending indices of the units that stay; a module without entry stays whole
    hidden   indices of the residual stream that stay, or null: all of them
    removed  names of prunable modules that are removed as a whole; the same as an empty list under `sites`
    """

    sites: Mapping[str, Sequence[int]]
    hidden: NotRequired[Sequence[int] | None]
    removed: NotRequired[Sequence[str]]


class BlockTokenAccount(TypedDict):
    """Of one block of a model with token gates. `tokens` enter it, `left` leave it, `similar` are dropped for others
    that are like them.
    """

    block: int
    keep: float
    tokens: int
    left: int
    similar: int
    macs_before: int
    macs_after: int
    macs_of_gate: int


class TokenAccount(TypedDict):
    """Tokens and multiply-accumulates of a sample with `tokens` tokens, before and after tokens are pruned.

    macs_after  including those of the gates
    outside     multiply-accumulates in the embeddings and the output head
    patches     rows and columns of an image's patches
    """

    tokens: int
    macs_before: int
    macs_after: int
    macs_of_gates: int
    outside: int
    patches: list[int] | None
    blocks: list[BlockTokenAccount]


@dataclass(frozen=True)
class Redefinition:
    """The new definition of a model after a step (`RewritePass.redefine`).

    config   keys of config.json that change; those of the modeling file are `ClassChanges`
    shapes   parameter -> its new shape, for those that change or are new; None if it is removed
    widths   of the residual stream: before this step, and after it at each sublayer where they differ
    notes    sentences for the plan and the report
    follows  whether the signals of a part are available while it is written: those of the model as changed so far if
             the pass has `projections`, else those of the unchanged model
    decision the choice that gave these shapes (`Pass.choose`), for later calls of the pass and for the report
    blocks   numbers of the blocks that stay, if some are removed; the model then has fewer blocks
    tokens   counts of a pass that drops tokens, for the report
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...] | None] = field(default_factory=dict)
    widths: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    follows: bool = False
    decision: Decision | None = None
    blocks: tuple[int, ...] | None = None
    tokens: TokenAccount | None = None


class LaterCall(TypedDict):
    """A module that runs on the kept tokens: its `nth` call in the block.

    spread  whether the block's code adds its output to a tensor of all tokens
    """

    call: str
    nth: int
    spread: bool


class GateSettings(TypedDict):
    """What a pass chooses of a `token_gate`."""

    keep: float
    similar: float
    partition: str
    order: str
    iterations: int
    tolerance: float
    filter: list[float] | None
    heads: str
    seed: int
    minimum: int


class GateParams(GateSettings):
    """All parameters of a `token_gate`: see `compressor.layers.structural.token_gate`."""

    attention: str
    after: list[LaterCall]
    mask: str | None
    protect: list[int]
    before: list[float]


@dataclass(frozen=True)
class BlockTokens:
    """The place of a token gate in a block, and the work of a token there.

    attention  name of the attention module in the block
    after      the modules after the attention residual, in order
    mask       name of the block's argument that marks padding
    before     number of entries of the matrices that multiply a token before the gate; `behind`: after it
    width      of all heads together
    """

    attention: str
    after: tuple[LaterCall, ...]
    mask: str | None
    before: int
    behind: int
    width: int
    heads: int


@dataclass(frozen=True)
class TokenFacts:
    """The facts of a model that pruning tokens needs.

    tokens   of each sample; None if it is as long as its text
    width    of the residual stream
    protect  number of protected tokens at the beginning and the end: special tokens, and those that are no patches
    patches  rows and columns of an image's patches
    outside  multiply-accumulates of a sample in the embeddings and the output head
    """

    tokens: int | None
    width: int
    protect: tuple[int, int]
    patches: tuple[int, int] | None
    blocks: tuple[BlockTokens, ...]
    outside: int

    def gate(self, block: int, before: Sequence[float], settings: GateSettings) -> GateParams:
        """Settings of a `token_gate` in a block, after gates that keep these shares (`before`)."""
        found = self.blocks[block]
        return {
            "attention": found.attention,
            "after": [entry.copy() for entry in found.after],
            "mask": found.mask,
            "protect": list(self.protect),
            "before": list(before),
            **settings,
        }


@dataclass(frozen=True)
class ModelFacts:
    """The facts of a model for `RewritePass.redefine`: no weights, but everything that decides shapes.

    config    config.json, with the defaults of the model's class
    shapes    parameter -> shape, also of a tied output head under its own name
    tied      parameter -> the parameter whose storage it shares
    stream    finds the reads and writes of the residual stream for `residual`. raises ModelError if it can't
    given     number of parameters before any step
    branches  widths (of each block: before its sublayers, and after the last) -> settings of a `rotated_block` for
              each block; raises ModelError if a block can't be one
    blocks    path of the block list
    fits      whether the model's class can have the shapes of a Redefinition: None, or why not
    prunable  kinds ("heads", "ffn") -> the prunable modules of every block; raises ModelError if a block has none
    tokens    the facts for pruning tokens; raises ModelError for a model whose tokens can't be pruned
    accepts   whether the model's config class accepts these values in place of its own: None, or why not
    builds    the same for the config class and the model's class, which makes a model of few blocks without weights
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
    builds: Callable[[dict[str, Any]], str | None]

    @property
    def residual(self) -> Residual:
        """The reads and writes of the residual stream. raises ModelError for a model whose stream can't be rotated"""
        return self.stream()
