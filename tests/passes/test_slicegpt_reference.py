"""The plain SliceGPT keeps the paper's promises, so that a fast one can be held against it."""

from __future__ import annotations

import copy
from functools import cache, partial

import pytest
import slicegpt_reference as reference
import tiny
import torch

from compressor.analysis.float64_probe import float64_probe_model
from compressor.analysis.residual_stream import find_residual
from compressor.methods.rotation.rotation import orthogonality_error, random_orthogonal, randomized_hadamard, rotate
from compressor.methods.rotation.sliced_shapes import per_sublayer_parameters, stream_shape
from compressor.model.block_runner import Pieces, output_of
from compressor.model.probe_model import example_batch
from compressor.model.structure import find_blocks

FAMILIES = ["llama", "qwen3", "gemma", "mixtral", "opt", "phi"]
EPS = {"opt": {}, "phi": {"layer_norm_eps": 0.1}}  # so large that a wrong one would show; OPT's is fixed


@cache
def read(family):
    config = EPS.get(family, {"rms_norm_eps": 0.1})
    model = tiny.build(family, num_hidden_layers=3, **config).to("meta")
    pieces = Pieces(model, find_blocks(model))
    probe = float64_probe_model(model, pieces)
    return probe, pieces.blocks_path, find_residual(probe, pieces.blocks_path)


@pytest.fixture
def probe():
    """A float64 model with random gains, shifts and biases, its residual, inputs and logits; then it is folded."""

    def build(family, change=None):
        found, path, residual = read(family)
        model = copy.deepcopy(found)
        if change is not None:
            change(model, residual)
        batch = example_batch(model, torch.device("cpu"), samples=4)
        with reference.InDouble(), torch.no_grad():
            logits = output_of(model(**batch))
        reference.fold(model, residual)
        return Pieces(model, path), residual, batch, logits

    return build


def widths_of(residual, width):
    return [width] * sum(map(len, residual.blocks)) + [residual.width]


def uneven_widths(residual):
    return [*[31, 24, 17, 8, 29, 20][: sum(map(len, residual.blocks))], residual.width]


def error(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("basis", ["principal", "random", "hadamard"])
def test_slicing_nothing_leaves_the_logits(family, basis, probe):
    pieces, residual, batch, logits = probe(family)
    generator = torch.Generator().manual_seed(1)
    make = {
        "principal": reference.principal,
        "random": lambda x: random_orthogonal(x.shape[-1], generator),
        "hadamard": lambda x: randomized_hadamard(x.shape[-1], generator),
    }[basis]
    sliced = reference.slice_model(pieces, residual, batch, widths_of(residual, 32), make)
    assert error(reference.run(sliced, batch)[1], logits) < 1e-9
    assert max(orthogonality_error(shortcut) for shortcut in sliced.shortcuts) < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("width", [24, 8])
def test_the_signal_carried_is_that_of_the_sliced_model(family, width, probe):
    pieces, residual, batch, _ = probe(family)
    sliced = reference.slice_model(pieces, residual, batch, widths_of(residual, width))
    assert error(reference.run(sliced, batch)[0], sliced.carried) < 1e-9
    assert pieces.model.get_parameter(residual.embeddings[0].parameter).shape[residual.embeddings[0].axis] == width


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sliced_model_is_the_whole_one_with_its_stream_projected_at_each_sublayer(family, probe):
    pieces, residual, batch, _ = probe(family)
    whole = Pieces(copy.deepcopy(pieces.model), pieces.blocks_path)
    widths = uneven_widths(residual)
    bases = []

    def basis(x):
        q = reference.principal(x)
        bases.append(q[:, : widths[len(bases)]])
        return q

    sliced = reference.slice_model(pieces, residual, batch, widths, basis)
    projected = reference.run_projected(whole, residual, batch, bases)
    assert error(reference.run(sliced, batch)[1], projected) < 1e-9


@pytest.mark.parametrize("family", ["opt", "phi"])
def test_one_dimension_less_loses_nothing_in_a_layer_norm_model(family, probe):
    pieces, residual, batch, logits = probe(family)
    sliced = reference.slice_model(pieces, residual, batch, widths_of(residual, 31))
    assert error(reference.run(sliced, batch)[1], logits) < 1e-9


def test_one_dimension_less_loses_something_in_an_rms_norm_model(probe):
    pieces, residual, batch, logits = probe("llama")
    sliced = reference.slice_model(pieces, residual, batch, widths_of(residual, 31))
    assert error(reference.run(sliced, batch)[1], logits) > 1e-4


def shaped(scales, model, residual):
    """Let everything that makes up the stream lie along fixed random directions, in the given strengths."""
    q = random_orthogonal(32, torch.Generator().manual_seed(2))
    for write in residual.writes():
        parameter = model.get_parameter(write.parameter)
        parameter.copy_(rotate(parameter, (q * scales) @ q.t(), write.axis))


def test_a_stream_of_twenty_dimensions_needs_twenty(probe):
    scales = (torch.arange(32) < 20).double()
    errors = []
    for width in (20, 19):
        pieces, residual, batch, logits = probe("llama", partial(shaped, scales))
        sliced = reference.slice_model(pieces, residual, batch, widths_of(residual, width))
        errors.append(error(reference.run(sliced, batch)[1], logits))
    assert errors[0] < 1e-9 < 1e-3 < errors[1]


def test_the_error_falls_with_the_width_and_principal_directions_beat_random_ones(probe):
    """On a stream whose directions differ in strength, as those of trained models do."""
    scales = torch.logspace(0, -2, 32, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    lost = {"principal": [], "random": []}
    for width in (28, 24, 16, 8):
        for name, basis in (("principal", reference.principal), ("random", lambda _: random_orthogonal(32, generator))):
            pieces, residual, batch, logits = probe("llama", partial(shaped, scales))
            sliced = reference.slice_model(pieces, residual, batch, widths_of(residual, width), basis)
            difference = reference.run(sliced, batch)[1] - logits
            lost[name].append(float(difference.square().mean() / logits.square().mean()))
    assert lost["principal"] == sorted(lost["principal"])
    factors = [random / principal for random, principal in zip(lost["random"], lost["principal"])]
    # 5000, 2300, 180 and 9 here: the more is cut, the less the choice of directions can save
    assert min(factors) > 3, factors


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sliced_model_has_as_many_parameters_as_predicted(family, probe):
    pieces, residual, batch, _ = probe(family)
    before = read(family)[0]  # with its norms, and without the biases that folding makes
    shapes = {name: tuple(p.shape) for name, p in before.named_parameters()}
    widths = uneven_widths(residual)
    predicted = per_sublayer_parameters(stream_shape(residual, shapes), widths)
    sliced = reference.slice_model(pieces, residual, batch, widths)
    norms = {norm.module for norm in residual.norms()}
    stored = sum(p.numel() for n, p in pieces.model.named_parameters() if n.rpartition(".")[0] not in norms)
    assert stored + sum(shortcut.numel() for shortcut in sliced.shortcuts) == predicted
