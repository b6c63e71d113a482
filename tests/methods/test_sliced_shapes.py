"""Sizes of sliced models follow from a few numbers, and those from the residual-stream reads and writes."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import tiny
import torch
import transformers as hf

from compressor.analysis.residual_stream import read_residual, residual_of
from compressor.methods.rotation.sliced_shapes import (
    StreamShape,
    SublayerShape,
    global_parameters,
    kept_width,
    per_sublayer_parameters,
    stream_shape,
    uniform_widths,
    widest_that_shrinks,
)
from compressor.model.block_runner import Pieces
from compressor.model.empty_model import skeleton
from compressor.model.structure import find_blocks, read_structure


def llama_like(width, ffn, blocks, vocabulary, heads, kv_heads, head_dim):
    attention = SublayerShape((heads + 2 * kv_heads) * head_dim, heads * head_dim)
    sublayers = (attention, SublayerShape(2 * ffn, ffn)) * blocks
    return StreamShape(width, vocabulary, sublayers, vocabulary, kept=0, norms=2 * blocks + 1, end_norm=width)


LLAMA_2_7B = llama_like(4096, 11008, 32, 32000, 32, 32, 128)
DENSE_7B = 6_738_415_616


@pytest.mark.parametrize(
    ("sparsity", "width", "per_site", "head_sliced", "one"),
    [
        (0.0, 4096, 7_811_891_200, 7_811_891_200, 6_738_415_616),
        (0.1, 3680, 6_939_941_888, 6_920_519_680, 6_054_045_280),
        (0.2, 3272, 6_105_940_928, 6_067_806_208, 5_382_835_912),
        (0.25, 3072, 5_704_777_728, 5_657_591_808, 5_053_811_712),
        (0.3, 2864, 5_292_914_432, 5_236_400_128, 4_711_626_544),
        (0.5, 2048, 3_729_784_832, 3_637_510_144, 3_369_207_808),
    ],
)
def test_llama_2_7b_has_the_sizes_worked_out_by_hand(sparsity, width, per_site, head_sliced, one):
    """A table of V d + V h + sum of blocks, worked out apart from this code."""
    assert kept_width(4096, sparsity, 8) == width
    assert per_sublayer_parameters(LLAMA_2_7B, uniform_widths(LLAMA_2_7B, width)) == per_site
    assert per_sublayer_parameters(LLAMA_2_7B, uniform_widths(LLAMA_2_7B, width, head_sliced=True)) == head_sliced
    assert global_parameters(LLAMA_2_7B, width) == one


def test_llama_2_70b_at_thirty_percent():
    shape = llama_like(8192, 28672, 80, 32000, 64, 8, 128)
    width = kept_width(8192, 0.3, 8)
    assert width == 5728
    assert per_sublayer_parameters(shape, uniform_widths(shape, width)) == 53_642_050_560


def shapes_of(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}


def residual_at(width, family, blocks):
    """The residual-stream reads and writes of a large model: those of a small one with as many blocks, but wider."""
    small = tiny.build(family, num_hidden_layers=blocks).to("meta")
    return replace(residual_of(small, Pieces(small, find_blocks(small))), width=width)


# both published by the authors' regression tests (microsoft/TransformerCompression), at 20 %
def test_opt_125m_has_the_published_size():
    model = skeleton(hf.OPTForCausalLM, hf.OPTConfig(), torch.float32)  # its defaults are this model's
    shape = stream_shape(residual_at(768, "opt", 12), shapes_of(model))
    blocks = (SublayerShape(3 * 768, 768 + 1), SublayerShape(3072, 3072 + 1)) * 12
    kept = 12 * (3 * 768 + 3072) + 50272  # biases of readers, and the head's, made from the last norm's shift
    assert shape == StreamShape(768, 50272 + 2050, blocks, 50272, kept, norms=25, end_norm=2 * 768)
    assert per_sublayer_parameters(shape, uniform_widths(shape, kept_width(768, 0.2, 8))) == 147_250_880


def test_phi_2_has_the_published_size():
    model = skeleton(
        hf.PhiForCausalLM,
        hf.PhiConfig(
            vocab_size=51200,
            hidden_size=2560,
            intermediate_size=10240,
            num_hidden_layers=32,
            num_attention_heads=32,
            partial_rotary_factor=0.4,
        ),
        torch.float32,
    )
    shape = stream_shape(residual_at(2560, "phi", 32), shapes_of(model))
    assert per_sublayer_parameters(shape, uniform_widths(shape, kept_width(2560, 0.2, 8))) == 2_391_772_160


def test_projected_tables_help_a_small_tied_model_where_sliced_ones_hurt():
    """Numbers of Qwen2.5-0.5B, norms and biases left out on both sides."""
    shape, dense = llama_like(896, 4864, 24, 151_936, 14, 2, 64), 493_961_216
    widths = uniform_widths(shape, kept_width(896, 0.25, 8))
    change = {
        "slice": per_sublayer_parameters(shape, widths) / dense - 1,
        "project": per_sublayer_parameters(shape, widths, embedding="project", tied=True) / dense - 1,
        "global": global_parameters(shape, widths[0]) / dense - 1,
    }
    assert {name: round(100 * value, 1) for name, value in change.items()} == {
        "slice": 7.2,
        "project": -13.3,
        "global": -4.3,
    }
    untied = per_sublayer_parameters(shape, widths, embedding="project")
    assert untied - per_sublayer_parameters(shape, widths, embedding="project", tied=True) == 151_936 * 896


def test_widths_may_differ_by_sublayer():
    shape = StreamShape(4, 10, (SublayerShape(3, 5), SublayerShape(7, 2)), 11, kept=6, norms=3, end_norm=4)
    # tables 10*3; sublayer one 3*3 + 5*2 + 3*2; sublayer two 7*2 + 2*4 + 2*4; head 11*4; kept 6
    assert per_sublayer_parameters(shape, (3, 2, 4)) == 30 + 25 + 30 + 44 + 6
    # tables 10*4, their matrix 4*3, the last norm's 4 instead of the sliced tables
    assert per_sublayer_parameters(shape, (3, 2, 4), embedding="project") == 40 + 12 + 4 + 25 + 30 + 44 + 6


def test_widths_that_do_not_fit_are_errors():
    shape = StreamShape(4, 10, (SublayerShape(3, 5),), 11, kept=0, norms=2, end_norm=4)
    with pytest.raises(ValueError, match="1 widths"):
        per_sublayer_parameters(shape, (4,))
    with pytest.raises(ValueError, match="embedding"):
        per_sublayer_parameters(shape, (2, 2), embedding="project")


@pytest.mark.parametrize(
    ("width", "sparsity", "round_to", "kept"),
    [(10, 0.9, 1, 1), (4096, 0.3, 64, 2816), (768, 0.2, 8, 608), (32, 0, 8, 32)],
)
def test_kept_width_follows_the_decimal_number(width, sparsity, round_to, kept):
    assert kept_width(width, sparsity, round_to) == kept


def test_the_smallest_slicing_that_helps_is_found():
    def count(width):
        return per_sublayer_parameters(LLAMA_2_7B, uniform_widths(LLAMA_2_7B, width))

    widest = widest_that_shrinks(count, DENSE_7B, 4096)
    assert widest == 3582 and count(widest) < DENSE_7B <= count(widest + 1)
    assert widest_that_shrinks(count, DENSE_7B, 4096, round_to=64) == 3520
    assert widest_that_shrinks(count, count(1), 4096) is None
    assert widest_that_shrinks(lambda width: width, 100, 64) == 64


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt", "gpt2", "phi", "gpt_neox", "mixtral", "vit"])
def test_at_full_width_the_numbers_of_a_model_add_up_to_its_own(family, tmp_path):
    structure = read_structure(tiny.save(family, tmp_path / "m"))
    residual = read_residual(structure)
    shapes = shapes_of(structure.model)
    shape, own = stream_shape(residual, shapes), sum(prod(s) for s in shapes.values())
    norms = sum((norm.formula.has_weight + norm.formula.has_bias) * 32 for norm in residual.norms())
    made = {"gpt2": 96, "opt": 96, "gpt_neox": 96}.get(family, 0)  # a head bias, one for each word
    full = uniform_widths(shape, 32)
    assert per_sublayer_parameters(shape, full) == own - norms + made + len(shape.sublayers) * 32 * 32
    assert global_parameters(shape, 32) == own - norms + made + shape.norms * 32
    # one dimension less takes one number from every vector that touches the stream
    touching = (
        sum(sublayer.reads + sublayer.writes for sublayer in shape.sublayers)
        + shape.embeddings
        + shape.output_head
        + shape.norms
    )
    assert global_parameters(shape, 32) - global_parameters(shape, 31) == touching
