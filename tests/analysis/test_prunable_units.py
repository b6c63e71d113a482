"""Heads and MLP units are found by running a model, whatever its family calls and how it lays out its matrices."""

from __future__ import annotations

from math import prod

import pytest
import tiny
from raising import raises

from compressor.analysis.prunable_units import find_prunable
from compressor.errors import ModelError
from compressor.model.facts import UnitsInConfig
from compressor.model.structure import read_structure

# family -> (heads, query heads of each, parameters of one, its projection), (parameters of an MLP unit, its projection)
FOUND = {
    "llama": ((2, 2, 32 * 8 * 6, "self_attn.o_proj"), (96, "mlp.down_proj")),
    "qwen3": ((2, 2, 32 * 8 * 6, "self_attn.o_proj"), (96, "mlp.down_proj")),
    "mistral": ((2, 2, 32 * 8 * 6, "self_attn.o_proj"), (96, "mlp.down_proj")),
    "phi3": ((2, 2, 32 * 8 * 6, "self_attn.o_proj"), (96, "mlp.down_proj")),
    "opt": ((4, 1, 32 * 8 * 4 + 24, "self_attn.out_proj"), (65, "fc2")),
    "gpt2": ((4, 1, 32 * 8 * 4 + 24, "attn.c_proj"), (65, "mlp.c_proj")),
    "phi": ((4, 1, 32 * 8 * 4 + 24, "self_attn.dense"), (65, "mlp.fc2")),
    "gpt_neox": ((4, 1, 32 * 8 * 4 + 24, "attention.dense"), (65, "mlp.dense_4h_to_h")),
    "bert": ((4, 1, 32 * 8 * 4 + 24, "attention.output.dense"), (65, "output.dense")),
    "vit": ((4, 1, 32 * 8 * 4 + 24, "attention.o_proj"), (65, "mlp.fc2")),
}


@pytest.fixture(scope="module")
def prunables(tmp_path_factory):
    found = {}

    def get(family, **config):
        key = (family, *config.items())
        if key not in found:
            structure = read_structure(tiny.save(family, tmp_path_factory.mktemp(family) / "m", **config))
            found[key] = structure, find_prunable(structure)
        return found[key]

    return get


@pytest.mark.parametrize("family", FOUND)
def test_the_units_of_every_family_are_found_with_what_they_cost(family, prunables):
    structure, found = prunables(family)
    (heads, per_unit, head_cost, head_reader), (ffn_cost, ffn_reader) = FOUND[family]
    assert [(prunable.block, prunable.kind) for prunable in found] == [
        (b, kind) for b in (0, 1) for kind in ("heads", "ffn")
    ]
    for prunable in found:
        path = f"{structure.pieces.blocks_path}.{prunable.block}."
        if prunable.kind == "heads":
            assert (prunable.units, prunable.layout.query_heads, prunable.layout.head_dim) == (heads, per_unit, 8)
            assert (prunable.cost, prunable.output_projection) == (head_cost, path + head_reader)
        else:
            assert (prunable.units, prunable.cost, prunable.output_projection) == (64, ffn_cost, path + ffn_reader)
        assert (
            prunable.columns == prunable.slices[0].rows
            and prunable.slices[0].parameter == f"{prunable.output_projection}.weight"
        )
        shapes = {cut.parameter: structure.model.get_parameter(cut.parameter).shape for cut in prunable.slices}
        for cut in prunable.slices:  # each row is of one unit, and all are of some
            assert sorted(sum(cut.rows, ())) == list(range(shapes[cut.parameter][cut.axis]))
        counted = [len(c.rows[1]) * prod(shapes[c.parameter]) // shapes[c.parameter][c.axis] for c in prunable.slices]
        assert prunable.cost == sum(counted)
        bias = f"{prunable.output_projection}.bias"
        assert prunable.bias == (bias if bias in dict(structure.model.named_parameters()) else None)


def rows(found, leaf, unit):
    return next(cut.rows[unit] for cut in found[0].slices if cut.parameter.endswith(leaf))


def test_a_unit_is_a_key_value_head_with_its_query_heads_wherever_they_lie(prunables):
    llama = prunables("llama")[1]
    assert rows(llama, "q_proj.weight", 1) == tuple(range(16, 32)) == rows(llama, "o_proj.weight", 1)
    assert rows(llama, "k_proj.weight", 1) == tuple(range(8, 16)) == rows(llama, "v_proj.weight", 1)
    third = (*range(8, 16), *range(40, 48), *range(72, 80))
    gpt2 = prunables("gpt2")[1]  # query, key and value in three ranges of columns
    assert rows(gpt2, "c_attn.weight", 1) == third == rows(gpt2, "c_attn.bias", 1)
    assert {cut.axis for cut in gpt2[0].slices if cut.parameter.endswith("c_attn.weight")} == {1}
    assert rows(prunables("gpt_neox")[1], "query_key_value.weight", 1) == tuple(range(24, 48))  # head by head
    assert rows(prunables("phi3")[1], "qkv_proj.weight", 1) == (*range(16, 32), *range(40, 48), *range(56, 64))
    assert prunables("phi3")[1][1].slices[1].rows[5] == (5, 69)  # gate and up in one matrix


def test_what_all_heads_share_is_not_cut(prunables):
    structure, found = prunables("qwen3")
    names = {cut.parameter for cut in found[0].slices}
    assert "model.layers.0.self_attn.q_norm.weight" in dict(structure.model.named_parameters())
    assert not any("norm" in name for name in names) and found[0].layout.has_norms


def test_what_a_config_can_say_of_its_units_is_proven_and_no_more(prunables):
    heads = {family: prunables(family)[1][0].layout.config for family in FOUND}
    both = UnitsInConfig({"num_attention_heads": 2, "num_key_value_heads": 1}, {"head_dim": 8})
    assert heads["llama"] == heads["qwen3"] == heads["mistral"] == heads["phi3"] == both
    assert heads["opt"] is heads["gpt2"] is heads["bert"] is heads["gpt_neox"] is None
    ffn = {family: next(iter(prunables(family)[1][1].layout.config.per_unit)) for family in FOUND}
    assert (ffn["opt"], ffn["gpt2"], ffn["llama"]) == ("ffn_dim", "n_inner", "intermediate_size")
    assert "can't run" in prunables("phi3")[1][0].layout.per_layer  # its code takes the split from the config
    assert [prunables(family)[1][0].layout.vanishes for family in ("llama", "qwen3", "gpt2", "bert")] == [
        True,
        True,
        False,  # biases stay
        False,
    ]


def test_attributes_that_count_heads_are_found_by_making_the_model_twice(prunables):
    def attributes(family):
        return next(iter(prunables(family)[1][0].layout.attributes.values()))

    assert attributes("gpt2") == {"embed_dim": 8, "num_heads": 1, "split_size": 8}
    assert attributes("bert") == {"num_attention_heads": 1, "all_head_size": 8}
    assert attributes("llama") == {}


def test_one_head_for_all_can_go_as_a_whole_only(prunables):
    _, found = prunables("llama", num_key_value_heads=1)
    assert found[0].units == 1 and found[0].layout.query_heads == 4
    assert {cut.parameter.split(".")[-2] for cut in found[0].slices} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_a_group_costs_384_times_a_unit_of_the_mlp_in_the_worked_example(prunables):
    """Of width 2048, that is; here it is 64, and costs go with the width."""
    sizes = {"hidden_size": 64, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 64}
    _, found = prunables("llama", **sizes, num_hidden_layers=1)
    assert [prunable.cost * 2048 // 64 for prunable in found] == [2_359_296, 6_144]


@pytest.mark.parametrize(
    ("family", "kind", "where", "names"),
    [
        (
            "olmo2",
            "heads",
            "model.layers.0.self_attn",
            ("self_attn.q_proj.weight", "self_attn.k_proj.weight"),
        ),
        ("mixtral", "ffn", "model.layers.0.mlp.experts", ()),
    ],
)
def test_what_cannot_be_shown_is_refused_with_module_and_reason(family, kind, where, names, tmp_path):
    """OLMo 2 has one norm over all heads."""
    structure = read_structure(tiny.save(family, tmp_path / "m"))
    with raises(ModelError, where=where, kind=kind) as caught:
        find_prunable(structure)
    assert set(caught.value.data["because"].get("shared", ())) >= set(names)
    other = "ffn" if kind == "heads" else "heads"
    assert {prunable.kind for prunable in find_prunable(structure, (other,))} == {other}
