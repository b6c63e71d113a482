"""Branches are found by running a block, and proven by running it as they were found."""

from __future__ import annotations

from functools import cache

import pytest
import tiny
from raising import raises
from torch import nn

from compressor.analysis.branch_calls import branches_of, check_widths, find_branches
from compressor.analysis.float64_probe import float64_probe_model
from compressor.analysis.residual_stream import find_residual, read_residual
from compressor.errors import ModelError
from compressor.model.block_runner import Pieces
from compressor.model.structure import find_blocks, read_structure

# family -> of each sublayer, the rows of modules that its branches are
ROWS = {
    "llama": [["self_attn"], ["mlp"]],
    "mistral": [["self_attn"], ["mlp"]],
    "qwen3": [["self_attn"], ["mlp"]],
    "gemma": [["self_attn"], ["mlp"]],
    "mixtral": [["self_attn"], ["mlp"]],
    "qwen3_moe": [["self_attn"], ["mlp"]],
    "phi3": [["self_attn resid_attn_dropout"], ["mlp resid_mlp_dropout"]],
    "opt": [["self_attn"], ["fc1 activation_fn fc2"]],
    "gpt2": [["attn"], ["mlp"]],
    "vit": [["attention dropout"], ["mlp dropout"]],
    "phi": [["self_attn resid_dropout", "mlp resid_dropout"]],
    "gpt_neox": [["attention post_attention_dropout", "mlp post_mlp_dropout"]],
}


def probe_of(family, **config):
    model = tiny.build(family, **config).to("meta")
    path = find_blocks(model)
    return float64_probe_model(model, Pieces(model, path)), path


@cache
def found_in(family, **config):
    probe, path = probe_of(family, **config)
    return list(branches_of(probe, path, find_residual(probe, path)).values())


@pytest.mark.parametrize("family", sorted(ROWS))
def test_the_modules_of_each_branch_are_found_in_their_order(family):
    (format_params,) = found_in(family)
    rows = [
        [" ".join(s["call"] for s in way["steps"]) for way in sublayer["branches"]]
        for sublayer in format_params["sites"]
    ]
    assert rows == ROWS[family] and format_params["returns"] is None
    assert all(sublayer["shortcut"] for sublayer in format_params["sites"])


def test_blocks_in_a_row_and_beside_each_other_are_told_apart():
    (beside,), (in_a_row,) = (found_in("gpt_neox", use_parallel_residual=parallel) for parallel in (True, False))
    assert [len(sublayer["norm"]) for sublayer in beside["sites"]] == [2]
    assert [way["norm"] for way in beside["sites"][0]["branches"]] == ["input_layernorm", "post_attention_layernorm"]
    assert [sublayer["norm"] for sublayer in in_a_row["sites"]] == [["input_layernorm"], ["post_attention_layernorm"]]


def test_arguments_are_those_of_the_block_also_where_nothing_was_given():
    for family, name in (("llama", "attention_mask"), ("gpt2", "cache"), ("gpt_neox", "layer_past")):
        step = found_in(family)[0]["sites"][0]["branches"][0]["steps"][0]
        assert step["kwargs"][name] == ["argument", name] and step["rest"] and step["take"] == 0
    step = found_in("vit")[0]["sites"][0]["branches"][0]["steps"][0]
    assert step["args"] == [["input"], ["argument", "attention_mask"]]


def test_each_kind_of_block_has_its_own_settings(tmp_path):
    structure = read_structure(tiny.save("qwen3_moe", tmp_path / "m", num_hidden_layers=4, mlp_only_layers=[2]))
    assert len(find_branches(structure, read_residual(structure))) == 2


class Changed(nn.Module):
    """A block around that of a model."""

    def __init__(self, block):
        super().__init__()
        for name, child in block.named_children():
            setattr(self, name, child)


class Scaled(Changed):
    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        normed = self.input_layernorm(hidden_states)
        kwargs = {"position_embeddings": position_embeddings, "attention_mask": attention_mask}
        x = hidden_states + 2 * self.self_attn(normed, **kwargs)[0]
        return x + self.mlp(self.post_attention_layernorm(x))


class Inlined(Changed):
    def forward(self, hidden_states, **kwargs):
        normed = self.input_layernorm(hidden_states)
        mlp = self.mlp
        return hidden_states + mlp.down_proj(mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed))


class Sliced(Changed):
    def forward(self, hidden_states, position_embeddings=None, **kwargs):
        normed = self.input_layernorm(hidden_states)
        halves = tuple(part[:, :] * 1 for part in position_embeddings)
        x = hidden_states + self.self_attn(normed, position_embeddings=halves, attention_mask=None)[0]
        return x + self.mlp(self.post_attention_layernorm(x))


def _first(given):
    return given[0] if isinstance(given, tuple) else given


class Talkative(Changed):
    def forward(self, hidden_states, **kwargs):
        hidden_states = _first(hidden_states)
        x = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return x, x


class Strict(Changed):
    def forward(self, hidden_states, position_embeddings=None, **kwargs):
        for name in kwargs:
            if name not in ("attention_mask", "position_ids", "past_key_values", "cache", "use_cache"):
                raise TypeError(f"unexpected {name}")
        x = hidden_states + self.self_attn(self.input_layernorm(hidden_states), position_embeddings, None)[0]
        return x + self.mlp(self.post_attention_layernorm(x))


@pytest.mark.parametrize(
    ("kind", "where", "data"),
    [
        (Scaled, "model.layers.0", {"reason": "other-values"}),
        (Inlined, "model.layers.0", {"reason": "no-branches"}),
        (
            Sliced,
            "model.layers.0.self_attn",
            {"reason": "foreign-argument", "argument": "position_embeddings"},
        ),
        (Strict, "Strict", {"reason": "not-on-its-own", "cause": "unexpected compressor_probe"}),
        (Talkative, "model.layers.0", {"reason": "returns-more"}),
    ],
)
def test_a_block_that_cannot_be_run_by_its_branches_is_refused_by_name(kind, where, data):
    probe, path = probe_of("llama")
    blocks = probe.model.layers
    for index, block in enumerate(blocks):
        blocks[index] = kind(block)
    probe.model.norm.register_forward_pre_hook(lambda _m, args: (_first(args[0]),))  # as a model of such blocks does
    residual = find_residual(probe, path)
    with raises(ModelError, where=where, **data):
        branches_of(probe, path, residual)


def widths_checked(family, tmp_path, *widths, embeddings=None):
    structure = read_structure(tiny.save(family, tmp_path / family))
    residual = read_residual(structure)
    all_params = find_branches(structure, residual)
    for each in widths:
        check_widths(structure, residual, all_params, each, embeddings)


@pytest.mark.parametrize("family", ["llama", "vit", "opt"])
def test_widths_may_differ_at_every_sublayer(family, tmp_path):
    widths_checked(family, tmp_path, [(24, 20, 18), (18, 16, 32)])


def test_experts_that_give_what_they_take_are_refused_other_widths(tmp_path):
    with raises(ModelError, where="model.layers.1", takes=[20, 24], gives=[24, 32]):
        widths_checked("mixtral", tmp_path, [(24, 20, 20), (20, 24, 24)], [(24, 20, 20), (20, 24, 32)])


def test_a_model_that_ends_with_the_width_it_began_with_is_refused_another(tmp_path):
    with raises(ModelError, first=24, last=32):
        widths_checked("gpt2", tmp_path, [(24, 20, 16), (16, 20, 24)], [(24, 20, 16), (16, 20, 32)])


def test_embeddings_that_are_projected_may_be_as_wide_as_the_head(tmp_path):
    widths_checked("gpt2", tmp_path, [(24, 20, 16), (16, 20, 32)], embeddings=32)
