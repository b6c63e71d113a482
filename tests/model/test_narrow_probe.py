"""What is found on narrow probe models and carried over is what a probe model of the model's own widths shows."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import tiny
import yaml
from tiers import every_day

from compressor.analysis.branch_calls import find_branches
from compressor.analysis.input_producers import find_producers
from compressor.analysis.lifting import factor, found_on_narrow, run_of
from compressor.analysis.prunable_units import look
from compressor.analysis.residual_stream import read_residual
from compressor.analysis.token_gates import find_token_gates
from compressor.engine.plan import make_plan
from compressor.errors import ModelError
from compressor.model import narrow_probe
from compressor.model.functions import find_functions
from compressor.model.narrow_probe import Probes
from compressor.model.replay_proof import prove_by_replay
from compressor.model.structure import read_structure
from compressor.recipe.recipe import parse_recipe

# wide enough to be divided by 4 and by 2
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
HEADED = {**WIDE, "head_dim": 16}
FAMILIES = {
    "llama": WIDE,
    "qwen3": {**HEADED, "hidden_size": 48},  # heads are wider than the stream
    "phi3": WIDE,  # queries, keys and values in one matrix; gate and up in another
    "gpt2": {"n_embd": 64, "n_inner": 96},  # transposed
    "gpt_neox": WIDE,  # queries, keys and values head by head
    "gemma": HEADED,  # its embedding is scaled by the root of the width
    "mixtral": WIDE,
    "qwen3_moe": {**HEADED, "moe_intermediate_size": 24},
    "gpt_oss": {**HEADED, "intermediate_size": 48},  # gate and up alternate
    "bert": WIDE,
    "vit": WIDE,
}
EVERY_DAY = ("phi3", "gpt2", "qwen3_moe")


@pytest.fixture(scope="module")
def structures(tmp_path_factory):
    @cache
    def read(family):
        return read_structure(tiny.save(family, tmp_path_factory.mktemp(family) / "m", **FAMILIES[family]))

    return read


def outcome(find, structure):
    """What an analysis finds, or where it refuses the model."""
    try:
        return find(structure)
    except ModelError as refusal:
        return refusal.where, {key: refusal.data[key] for key in ("reason", "kind") if key in refusal.data}


def prunable(structure):
    """Without the reasons, which name widths of the probe model."""
    seen = look(structure)
    prunables = [
        replace(prunable, layout=replace(prunable.layout, per_layer=bool(prunable.layout.per_layer)))
        for prunable in seen.prunables
    ]
    return prunables, {key: where for key, (where, _) in seen.refused.items()}


def functions(structure):
    found = find_functions(structure)
    return found.by_part, found.refused.keys()


ANALYSES = {
    "residual": read_residual,
    "branches": lambda structure: find_branches(structure, read_residual(structure)),
    "prunable": prunable,
    "producers": find_producers,
    "tokens": find_token_gates,
    "functions": functions,
}


def make_narrow(monkeypatch):
    monkeypatch.setattr(narrow_probe, "SMALL", 0)
    monkeypatch.setattr(narrow_probe, "LEAST_WIDTH", 12)


@pytest.mark.parametrize("family", every_day(sorted(FAMILIES), *EVERY_DAY))
def test_what_is_found_on_narrow_models_is_what_the_whole_one_shows(family, structures, monkeypatch):
    structure = structures(family)
    expected = {name: outcome(find, structure) for name, find in ANALYSES.items()}
    make_narrow(monkeypatch)
    structure = replace(structure, probes=Probes(structure.model, structure.pieces, structure.dtype))
    widths = [probe.width for probe in structure.probes.narrow()]
    assert widths == [structure.probes.whole.width // 4, structure.probes.whole.width // 2]
    prove_by_replay(structure)
    for name, find in ANALYSES.items():
        assert outcome(find, structure) == expected[name], name


@pytest.mark.parametrize(
    ("sizes", "kept"),
    [
        ({"num_local_experts": 4}, {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}),
        ({"num_local_experts": 16}, {"num_local_experts": 16}),  # as many as a head is wide
    ],
)
def test_a_narrow_model_has_the_heads_and_experts_of_the_model(sizes, kept, tmp_path, monkeypatch):
    make_narrow(monkeypatch)
    structure = read_structure(tiny.save("mixtral", tmp_path / "m", **WIDE, **sizes))
    narrow = structure.probes.narrowest
    assert {key: getattr(narrow.config, key) for key in kept} == kept
    assert (narrow.width, narrow.config.intermediate_size) == (16, 24)
    assert narrow.kinds == structure.probes.whole.kinds


@pytest.mark.parametrize(
    ("rows_of", "keeps"),
    [
        (lambda features: tuple(range(features)), False),
        (lambda features: tuple(2 * n + 1 for n in range(features)), True),  # rows of gate and up alternate
    ],
)
def test_indices_are_carried_over_only_where_a_second_narrow_model_agrees(rows_of, keeps, structures, monkeypatch):
    make_narrow(monkeypatch)
    structure = structures("phi3")
    probes = Probes(structure.model, structure.pieces, structure.dtype)
    name, features = "model.layers.0.mlp.down_proj.weight", []

    def find(probe):
        features.append(probe.shapes[name][1])
        return rows_of(features[-1])

    def lift(found, narrow, wider):
        return run_of(found, factor(narrow, wider, name, 1))

    assert found_on_narrow("rows", probes, find, lift) == rows_of(96)
    assert features == ([24, 48, 96, 96] if keeps else [24, 48])


def test_the_widths_of_a_reshaped_model_are_divided_too(tmp_path, monkeypatch):
    """Its LayerNorms are replaced by norms that state their width, and its config has shapes."""
    tree = {"version": 1, "name": "t", "steps": [{"pass": "fuse_norms"}]}
    directory = tiny.save("gpt2", tmp_path / "m", **FAMILIES["gpt2"])
    after = make_plan(parse_recipe(yaml.safe_dump(tree).encode(), "t.yaml"), str(directory), prove=False).structure
    expected = read_residual(after)
    make_narrow(monkeypatch)
    after = replace(after, probes=Probes(after.model, after.pieces, after.dtype))
    assert after.probes.narrowest.width == 16
    assert read_residual(after) == expected
    assert {norm.formula.width for norm in expected.norms()} == {64}
