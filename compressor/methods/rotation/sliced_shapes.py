"""Computes the shapes and the number of parameters of a model with a narrower residual stream.

A parameter that reads or writes the stream keeps its other axes, so its size is a number of vectors times a width.
`reads` and `writes` below count these vectors. Other parameters don't change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from math import prod
from typing import Literal

from compressor.lazy import torch
from compressor.model.class_changes import ClassChanges, changed_modules, changed_shapes, rms_norm_entry
from compressor.model.facts import ModelFacts, Redefinition
from compressor.model.families import NORM_EPS_KEYS
from compressor.model.residual_records import Residual, ResidualNorm


@dataclass(frozen=True)
class SublayerShape:
    """reads   vectors that read this sublayer's stream: output rows of all its input projections
    writes  vectors that write to it: input columns of all its output projections, and one for each bias
    """

    reads: int
    writes: int


@dataclass(frozen=True)
class StreamShape:
    """The numbers of a model that decide its size after slicing.

    width        of the stream, D
    embeddings   vectors that write to the stream before block 0: rows of embeddings, columns of convolutions, biases
    sublayers        sublayers of all blocks, in order
    output_head  rows of the output head, which counts as a separate matrix
    kept         parameters that neither read nor write the stream: biases of input projections (with those for a
                 LayerNorm's shift), norms on heads, matrices inside a branch
    norms        norms on the stream, the last one included
    end_norm     parameters of the last norm
    """

    width: int
    embeddings: int
    sublayers: tuple[SublayerShape, ...]
    output_head: int
    kept: int
    norms: int
    end_norm: int


def stream_shape(residual: Residual, shapes: Mapping[str, Sequence[int]]) -> StreamShape:
    """The numbers of a model.

    shapes  parameter name -> shape of every parameter, also of a tied output head under its own name
    """
    touching: set[str] = set()

    def vectors(name: str) -> int:
        touching.add(name)
        return prod(shapes[name]) // residual.width

    embeddings = sum(vectors(write.parameter) for write in residual.embeddings)
    sublayers = []
    for block in residual.blocks:
        for sublayer in block:
            reads = sum(vectors(consumer.parameter) for norm in sublayer.norms for consumer in norm.consumers)
            sublayers.append(SublayerShape(reads, sum(vectors(write.parameter) for write in sublayer.writes)))
    output_head = sum(vectors(consumer.parameter) for consumer in residual.end.consumers)
    made = 0  # new biases for a norm's shift
    norms = tuple(residual.norms())
    for norm in norms:
        touching |= {f"{norm.module}.{leaf}" for leaf in ("weight", "bias")}
        if norm.formula.has_bias:
            made += sum(prod(shapes[r.parameter]) // residual.width for r in norm.consumers if r.bias is None)
    kept = made + sum(prod(shape) for name, shape in shapes.items() if name not in touching)
    end_norm = (residual.end.formula.has_weight + residual.end.formula.has_bias) * residual.width
    return StreamShape(residual.width, embeddings, tuple(sublayers), output_head, kept, len(norms), end_norm)


def kept_width(width: int, sparsity: float, round_to: int = 1) -> int:
    """floor((1 - sparsity) * width) in decimals, rounded down to a multiple of round_to: sparsity 0.9 of 10 gives 1."""
    exact = int((1 - Decimal(repr(sparsity))) * width)
    return exact - exact % round_to


def uniform_widths(shape: StreamShape, width: int, *, head_sliced: bool = False) -> tuple[int, ...]:
    """`width` at every sublayer, and at the end either `width` or the whole width."""
    return (width,) * len(shape.sublayers) + (width if head_sliced else shape.width,)


def staggered_widths(shape: StreamShape, width: int, step: int) -> tuple[int, ...]:
    """Widths of which any three sublayers in a row have three, as a schedule may choose them; the whole one at the end.

    They are `width`, and one and two steps less, as far as at least one direction stays.
    """
    return (*(max(width - at % 3 * step, 1) for at in range(len(shape.sublayers))), shape.width)


def per_sublayer_parameters(
    shape: StreamShape,
    widths: Sequence[int],
    *,
    embedding: Literal["slice", "project"] = "slice",
    tied: bool = False,
) -> int:
    """Parameters of a model with a rotation for each sublayer, and a matrix (w_k, w_k+1) on its residual path.

    widths     at each sublayer and, last, before the output head: len(sublayers) + 1 numbers
    embedding  slice: narrower embeddings and a separate output head; project: whole embeddings, then a matrix (D, w_0),
               and an output head in the original basis after the last norm with its gain
    tied       with project: output head and embedding stay tied
    """
    if len(widths) != len(shape.sublayers) + 1:
        raise ValueError(f"{len(widths)} widths for {len(shape.sublayers)} sublayers and the output head")
    if embedding == "project" and widths[-1] != shape.width:
        raise ValueError("a projected embedding keeps the output head in the original basis, at its full width")
    total = shape.kept
    for sublayer, width, following in zip(shape.sublayers, widths, widths[1:]):
        total += sublayer.reads * width + sublayer.writes * following + width * following
    if embedding == "slice":
        return total + shape.embeddings * widths[0] + shape.output_head * widths[-1]
    output_head = 0 if tied else shape.output_head * shape.width
    return total + shape.embeddings * shape.width + shape.width * widths[0] + output_head + shape.end_norm


def global_parameters(shape: StreamShape, width: int) -> int:
    """Parameters of a model with one rotation: no matrices on the residual path, and a constant gain in every norm."""
    vectors = (
        shape.embeddings + shape.output_head + sum(sublayer.reads + sublayer.writes for sublayer in shape.sublayers)
    )
    return shape.kept + (vectors + shape.norms) * width


def scheduled_widths(
    shape: StreamShape, spectra: Sequence[Sequence[float]], budget: int, round_to: int, least: int
) -> tuple[int, ...]:
    """Widths at each sublayer, and the whole width at the end, that lose the least variance for a number of parameters.

    Greedy from the full widths: the next `round_to` directions are removed at the sublayer where their share of the
    variance per removed parameter is smallest. Shares fall along a sublayer's axes, so later removals always cost
    more. This is the exchange argument of the fractional knapsack, except for the last step and the shortcut matrices,
    whose size depends on two widths.

    spectra  eigenvalues of each sublayer's second moments, largest first
    budget   largest number of parameters
    least    smallest width of a sublayer
    raises   ValueError if even the smallest widths have more parameters
    """
    full = shape.width - shape.width % round_to
    widths = [*([full] * len(shape.sublayers)), shape.width]
    tails = []
    for values in spectra:
        share = torch.as_tensor(values, dtype=torch.float64).clamp_min(0)
        share = share / share.sum()
        tails.append(
            [*share.flip(0).cumsum(0).flip(0).tolist(), 0.0]
        )  # [w]: the variance that is lost if w directions stay
    count = per_sublayer_parameters(shape, widths)

    def saved(at: int) -> int:
        """Parameters that are saved by round_to fewer directions at one sublayer."""
        sublayer, before = (
            shape.sublayers[at],
            shape.sublayers[at - 1].writes + widths[at - 1] if at else shape.embeddings,
        )
        return round_to * (sublayer.reads + before + widths[at + 1])

    while count > budget:
        able = [at for at in range(len(shape.sublayers)) if widths[at] - round_to >= least]
        if not able:
            raise ValueError(f"{count:,} parameters are left at the least widths, {budget:,} are allowed")
        lost = {at: tails[at][widths[at] - round_to] - tails[at][widths[at]] for at in able}
        cheapest = min(able, key=lambda at: (lost[at] / saved(at), at))
        count -= saved(cheapest)
        widths[cheapest] -= round_to
    return tuple(widths)


def per_sublayer_redefinition(model: ModelFacts, widths: Sequence[int]) -> Redefinition:
    """Blocks with matrices on the residual path, norms that divide by the old width, and an output head of full width.

    widths  at each sublayer and, last, before the output head
    """
    residual = model.residual
    sublayers = [sublayer for block in residual.blocks for sublayer in block]
    shapes: dict[str, tuple[int, ...] | None] = {}
    modules = changed_modules(model.config)

    def narrow(name: str, axis: int, width: int) -> None:
        shapes[name] = _resized(model.shapes[name], axis, width)

    def strip(norm: ResidualNorm, width: int) -> None:
        modules[norm.module] = rms_norm_entry(residual.width, norm.formula.eps, width)
        shapes.update({f"{norm.module}.weight": None} if norm.formula.has_weight else {})

    for write in residual.embeddings:
        narrow(write.parameter, write.axis, widths[0])
    for sublayer, width, following in zip(sublayers, widths, widths[1:]):
        for norm in sublayer.norms:
            strip(norm, width)
            for consumer in norm.consumers:
                narrow(consumer.parameter, consumer.axis, width)
        for write in sublayer.writes:
            narrow(write.parameter, write.axis, following)
    strip(residual.end, residual.width)
    per_block, at = [], 0
    for block in residual.blocks:
        per_block.append(list(widths[at : at + len(block) + 1]))
        at += len(block)
    held = {name: list(shape) for name, shape in shapes.items() if shape is not None}
    for number, (format_params, shape) in enumerate(zip(model.branches(per_block), per_block)):
        path = f"{model.blocks}.{number}"
        modules[path] = {"form": "rotated_block", "spec": format_params, "shape": shape}
        shapes |= {f"{path}.shortcut_{n}": (shape[n], shape[n + 1]) for n in range(len(shape) - 1)}
    config: ClassChanges = {
        "compressed_shapes": {**changed_shapes(model.config), **held},
        "compressed_modules": modules,
    }
    return Redefinition(config, shapes, (residual.width, *widths), follows=True)


def global_redefinition(model: ModelFacts, kept: int) -> Redefinition:
    """A stock model of that hidden size: the shape of every parameter along the stream, and the keys of config.json."""
    width = model.residual.width
    shapes: dict[str, tuple[int, ...] | None] = {}
    edges = [(consumer.parameter, consumer.axis) for norm in model.residual.norms() for consumer in norm.consumers]
    edges += [(write.parameter, write.axis) for write in model.residual.writes()]
    shapes |= {name: _resized(model.shapes[name], axis, kept) for name, axis in edges}
    shapes |= {f"{norm.module}.weight": (kept,) for norm in model.residual.norms() if norm.formula.has_weight}
    eps = model.residual.end.formula.eps * width / kept
    config = {"hidden_size": kept, **{key: eps for key in NORM_EPS_KEYS if key in model.config}}
    heads = model.config.get("num_attention_heads")
    if heads:
        config["head_dim"] = model.config.get("head_dim") or width // heads
    return Redefinition(config, shapes, (width, kept))


def _resized(shape: tuple[int, ...], axis: int, length: int) -> tuple[int, ...]:
    return (*shape[:axis], length, *shape[axis + 1 :])


def widest_that_shrinks(count: Callable[[int], int], dense: int, width: int, round_to: int = 1) -> int | None:
    """The largest multiple of round_to, at most `width`, at which a model has fewer parameters than `dense`.

    None if even round_to has more. `count` must not decrease with the width.
    """
    low, high = 0, width // round_to  # `low` has fewer parameters or is 0; the answer is in [low, high]
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count(middle * round_to) < dense else (low, middle - 1)
    return low * round_to or None
