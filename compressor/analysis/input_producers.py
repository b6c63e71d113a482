"""What produces the inputs of a block's weights, feature by feature: a norm's gain, or the rows of a matrix.

Where a feature has such a producer, dividing the producer's slice by a factor and multiplying the feature's column of
every consumer by it changes nothing that the block computes (Lin et al. 2023, arXiv 2306.00978, section 3.2). Producers
are found by running a float64 probe model with random weights, and no family is named:

- Scaling by two is exact in binary floating point. So a claim such as "row 7 makes column 7" is tested bit for bit, not
  up to a tolerance.
- Norms: the output of each norm is scaled by ones and twos. Every product whose input follows exactly is a consumer.
- Matrices: the rows of an earlier matrix are scaled by ones and twos, once for each binary digit of the row's number.
  The digits of the row that makes a column can then be read off the column. The up projection of a gated MLP is found
  so, and the value projection whose heads several query heads share; a gate or a query isn't, since its input scales
  by another factor for each token.
- The whole claim is then tested: with the producer scaled down and all consumers scaled up, the block gives the same
  bits. A consumer that was missed would show.

Only matrices whose rows, all of them, or a half, or the last rows (values behind queries and keys), or every second
one make the features are tried. Other layouts have no producer, which a pass reports.

The probe model is a narrow one (`lifting`). Time: some tens of forward passes of each kind of block on a few tokens.
Memory: the probe model in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compressor.analysis.float64_probe import float64_probe_model
from compressor.analysis.lifting import Unliftable, factor, found_on_narrow, run_of
from compressor.analysis.perturbation import InDouble
from compressor.model.block_runner import Call, Pieces, hidden_of
from compressor.model.module_names import with_prefix
from compressor.model.narrow_probe import Probe
from compressor.model.norms import Norm, describe_norm
from compressor.model.observed_matmul import ObservedMatmul, ObservedMatmuls
from compressor.model.probe_model import PROBE_SEED, Kind, example_batch
from compressor.model.redefined_structure import is_splittable
from compressor.model.structure import Structure
from compressor.model.tracing import Product
from compressor.model.weights import Producer, ScaledParameter

Producers = Mapping[Kind, tuple[Producer, ...]]  # kind of block -> its producers, names relative to the block


def find_producers(structure: Structure) -> Producers:
    """The producers of each kind of block, in forward order."""
    model, pieces = structure.model, structure.pieces
    splittable = {kind: _splittable(structure, kind) for kind in structure.traced.groups}

    def find(probe: Probe) -> Producers:
        made = float64_probe_model(model, pieces, probe)
        return _find_in_probe(made, pieces.blocks_path, probe.kinds, splittable)

    question = ("producers", frozenset(splittable.items()))
    return found_on_narrow(question, structure.probes, find, partial(_lifted, pieces.blocks_path))


def _splittable(structure: Structure, kind: Kind) -> tuple[Product, ...]:
    """The matmuls of a kind of block whose parameters can be written as tensors of the checkpoint."""
    prefix = f"{structure.pieces.blocks_path}.{structure.kinds.index(kind)}."
    products = (product for group in structure.traced.groups[kind] for product in group)
    return tuple(product for product in products if is_splittable(structure, prefix + product.parameter))


def _find_in_probe(
    probe: PreTrainedModel, path: str, kinds: Sequence[Kind], splittable: Mapping[Kind, Sequence[Product]]
) -> Producers:
    """kinds: of the blocks of the probe model"""
    found: dict[Kind, tuple[Producer, ...]] = {}
    with InDouble(), torch.no_grad():
        pieces = Pieces(probe, path)
        hidden, calls = pieces.embeddings(example_batch(probe, torch.device("cpu")))
        for block, call, kind in zip(pieces.blocks, calls, kinds):
            if kind in found or kind not in splittable:
                continue
            runner = _Runner(block, call, hidden.shape, list(splittable[kind]))
            found[kind] = (*_norm_producers(runner), *_matrix_producers(runner))
    return found


def _lifted(path: str, producers: Producers, narrow: Probe, wider: Probe) -> Producers:
    """What was found on a narrow probe model for one of other widths. raises Unliftable"""

    def of(producer: Producer, prefix: str) -> Producer:
        edges = (*producer.makers, *producer.consumers)
        divisors = {factor(narrow, wider, prefix + one.parameter, one.axis) for one in edges}
        if len(divisors) != 1:
            raise Unliftable(f"{producer.name} and its consumers were divided by several numbers")
        return replace(producer, slices=run_of(producer.slices, divisors.pop()))

    return {
        kind: tuple(of(producer, f"{path}.{narrow.first_of(kind)}.") for producer in found)
        for kind, found in producers.items()
    }


def producers_of(producers: Producers, structure: Structure, part: int) -> tuple[Producer, ...]:
    """Those of one part of the model, under the full names of its parameters."""
    if not producers or not 1 <= part <= structure.block_count:
        return ()
    prefix = f"{structure.pieces.blocks_path}.{part - 1}."
    return tuple(_renamed(producer, prefix) for producer in producers.get(structure.kinds[part - 1], ()))


def _renamed(producer: Producer, prefix: str) -> Producer:
    def full(scaled: Sequence[ScaledParameter]) -> tuple[ScaledParameter, ...]:
        return tuple(replace(one, parameter=with_prefix(one.parameter, "", prefix)) for one in scaled)

    return replace(
        producer, name=prefix + producer.name, makers=full(producer.makers), consumers=full(producer.consumers)
    )


@dataclass
class _Run:
    """output  of the block
    inputs  parameter -> its inputs in the order of its products, (tokens, in_features) each
    """

    output: Tensor
    inputs: dict[str, list[Tensor]]

    def follows(self, before: _Run, name: str, factors: Tensor) -> bool:
        """Whether what a parameter reads is exactly what it was, times `factors` (features,)."""
        now, then = self.inputs.get(name, []), before.inputs[name]
        return len(now) == len(then) and all(
            a.shape == b.shape and a.shape[-1] == len(factors) and torch.equal(a, b * factors)
            for a, b in zip(now, then)
        )


class _ScaledProducts(ObservedMatmuls):
    """Reports products, and multiplies the outputs of those by one parameter."""

    def __init__(
        self,
        watched: Mapping[str, Tensor],
        on_call: Callable[[ObservedMatmul], None],
        maker: str | None,
        factors: Tensor | None,
    ) -> None:
        super().__init__(watched, on_call)
        self.maker, self.factors, self.is_made = maker, factors, False

    def visit(self, call: ObservedMatmul) -> None:
        self.is_made = call.parameter == self.maker
        super().visit(call)

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        self.is_made = False
        result = super().__torch_function__(func, types, args, kwargs)
        return result * self.factors if self.is_made else result


class _Runner:
    """A block of the probe model on one random input; parameters can be scaled for the time of a run."""

    def __init__(self, block: nn.Module, call: Call, shape: torch.Size, products: Sequence[Product]) -> None:
        self.block, self.call = block, call
        self.generator = torch.Generator().manual_seed(PROBE_SEED)
        self.x = torch.randn(shape, dtype=torch.float64, generator=self.generator)
        self.parameters = dict(block.named_parameters())
        self.products = {product.parameter: product for product in products}
        self.before = self.run()
        self.multiplied = [name for name in self.before.inputs if name in self.products]  # in forward order

    def run(self, maker: str | None = None, factors: Tensor | None = None) -> _Run:
        """factors: what the outputs of the products by `maker` are multiplied by, as if its rows and bias were"""
        inputs: dict[str, list[Tensor]] = {}

        def note(call: ObservedMatmul) -> None:
            inputs.setdefault(call.parameter, []).append(call.input.reshape(-1, call.input.shape[-1]).clone())

        with _ScaledProducts(self.parameters, note, maker, factors):
            output = hidden_of(self.block(self.x, *self.call.args, **self.call.kwargs))
        return _Run(output, inputs)

    def ones_and_twos(self, count: int) -> Tensor:
        return 1.0 + torch.randint(0, 2, (count,), generator=self.generator).double()

    def in_axis(self, name: str) -> int:
        return self.parameters[name].dim() - (2 if self.products[name].transposed else 1)

    def out_axis(self, name: str) -> int:
        return self.parameters[name].dim() - (1 if self.products[name].transposed else 2)

    def bias_of(self, name: str) -> str | None:
        """The bias that is added to a product: `bias` beside a `weight`, or `..._bias` beside fused experts."""
        other = f"{name.removesuffix('weight')}bias" if name.endswith("weight") else f"{name}_bias"
        return other if other in self.parameters else None

    @contextmanager
    def scaled(self, factors: Mapping[str, tuple[int, Tensor]]) -> Iterator[None]:
        """Parameters multiplied along an axis: name -> (axis, factors)."""
        kept = {name: self.parameters[name].clone() for name in factors}
        try:
            for name, (axis, by) in factors.items():
                value = self.parameters[name].data
                value.mul_(by.reshape([-1 if at == axis else 1 for at in range(value.dim())]))
            yield
        finally:
            for name, before in kept.items():
                self.parameters[name].copy_(before)

    def gives_the_same(self) -> bool:
        return torch.equal(self.run().output, self.before.output)


def _norm_producers(runner: _Runner) -> Iterator[Producer]:
    """Norms whose output is read by products alone."""
    for path, module in runner.block.named_modules():
        formula = describe_norm(module)
        if formula is None or not (formula.has_weight or formula.has_bias):
            continue
        factors = runner.ones_and_twos(formula.width)
        with _output_scaled(module, factors):
            names = _consumer_names(runner, factors)
            with runner.scaled({name: (runner.in_axis(name), 1 / factors) for name in names}):
                holds = bool(names) and runner.gives_the_same()
        if holds:
            makers = _norm_makers(path, formula)
            consumers = tuple(ScaledParameter(name, runner.in_axis(name)) for name in names)
            yield Producer(path, "norm", makers, consumers, tuple(range(formula.width)))


def _consumer_names(runner: _Runner, factors: Tensor) -> list[str]:
    """Parameters that multiply the scaled output of a norm.

    Experts get the tokens that they got only once the router is scaled back, so the search is repeated.
    """
    names: list[str] = []
    while True:
        with runner.scaled({name: (runner.in_axis(name), 1 / factors) for name in names}):
            run = runner.run()
        found = [name for name in runner.multiplied if run.follows(runner.before, name, factors)]
        if set(found) <= set(names):
            return names
        names = found


def _norm_makers(path: str, formula: Norm) -> tuple[ScaledParameter, ...]:
    weight = [ScaledParameter(f"{path}.weight", 0, formula.offset)] if formula.has_weight else []
    return (*weight, *([ScaledParameter(f"{path}.bias", 0)] if formula.has_bias else []))


@contextmanager
def _output_scaled(module: nn.Module, factors: Tensor) -> Iterator[None]:
    handle = module.register_forward_hook(
        lambda _m, _a, output: output * factors if output.shape[-1] == len(factors) else output
    )
    try:
        yield
    finally:
        handle.remove()


def _matrix_producers(runner: _Runner) -> Iterator[Producer]:
    """Matrices that make the input of another one row by row."""
    names = runner.multiplied
    for at, target in enumerate(names):
        for maker in names[:at]:
            is_like = runner.parameters[maker].dim() == runner.parameters[target].dim()
            if is_like and (found := _made_by(runner, maker, target)) is not None:
                yield found
                break


def _made_by(runner: _Runner, maker: str, target: str) -> Producer | None:
    """The producer of what `target` reads, if rows of `maker` are it."""
    features = runner.before.inputs[target][0].shape[-1]
    rows = runner.parameters[maker].shape[runner.out_axis(maker)]
    for chosen in _row_sets(rows, features):
        slices = _decoded(runner, maker, target, chosen)
        if slices is None:
            continue
        factors = runner.ones_and_twos(rows)
        with runner.scaled(_of_rows(runner, maker, _only(factors, chosen))):
            run = runner.run()
            names = [name for name in runner.multiplied if run.follows(runner.before, name, factors[slices])]
            with runner.scaled({name: (runner.in_axis(name), 1 / factors[slices]) for name in names}):
                holds = target in names and runner.gives_the_same()
        if holds:
            makers = tuple(ScaledParameter(name, axis) for name, (axis, _) in _of_rows(runner, maker, factors).items())
            consumers = tuple(ScaledParameter(name, runner.in_axis(name)) for name in names)
            return Producer(maker, "matrix", makers, consumers, tuple(slices.tolist()))
    return None


def _row_sets(rows: int, features: int) -> Iterator[Tensor]:
    """Rows of a matrix that may make the features, the likeliest first."""
    numbers = torch.arange(rows)
    yield numbers
    if rows == 2 * features:  # gate and up projection in one matrix
        yield from (numbers[features:], numbers[:features], numbers[1::2], numbers[::2])
    elif rows > features and (rows - features) % 2 == 0:  # queries, keys and values, as wide as the queries are
        yield numbers[-(rows - features) // 2 :]


def _decoded(runner: _Runner, maker: str, target: str, chosen: Tensor) -> Tensor | None:
    """For each feature of the target's input, the row of `chosen` that makes it; None if it isn't so."""
    rows = runner.parameters[maker].shape[runner.out_axis(maker)]
    doubled = _doubled(runner, maker, target, _only(torch.full((rows,), 2.0, dtype=torch.float64), chosen))
    if doubled is None or not bool(doubled.all()):
        return None
    found = torch.zeros(len(doubled), dtype=torch.long)
    for digit in range(max(1, (len(chosen) - 1).bit_length())):
        factors = torch.ones(rows, dtype=torch.float64)
        factors[chosen] += (torch.arange(len(chosen)) >> digit) & 1
        doubled = _doubled(runner, maker, target, factors)
        if doubled is None:
            return None
        found += doubled.long() << digit
    return chosen[found] if int(found.max()) < len(chosen) else None


def _doubled(runner: _Runner, maker: str, target: str, factors: Tensor) -> Tensor | None:
    """Which features of the target's input are exactly doubled; None if one is neither that nor as it was."""
    now = runner.run(maker, factors).inputs.get(target, [])
    then = runner.before.inputs[target]
    if [x.shape for x in now] != [x.shape for x in then]:
        return None
    after, before = torch.cat(now), torch.cat(then)
    same, twice = (after == before).all(0), (after == 2 * before).all(0)
    return twice if bool((same ^ twice).all()) else None


def _of_rows(runner: _Runner, name: str, factors: Tensor) -> dict[str, tuple[int, Tensor]]:
    """A matrix and its bias along their output axis."""
    found = {name: (runner.out_axis(name), factors)}
    if (bias := runner.bias_of(name)) is not None:
        found[bias] = (runner.parameters[bias].dim() - 1, factors)
    return found


def _only(factors: Tensor, chosen: Tensor) -> Tensor:
    """The factors on the chosen rows, 1 on the others."""
    result = torch.ones_like(factors)
    result[chosen] = factors[chosen]
    return result
