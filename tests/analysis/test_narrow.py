"""What is found on narrow probe models and carried over is what a probe model of the model's own widths shows."""

from __future__ import annotations

from functools import cache

import pytest
import tiny
from raising import raises

from compressor.analysis import lifting
from compressor.analysis.branch_calls import find_branches
from compressor.analysis.input_producers import find_producers
from compressor.analysis.prunable_units import look
from compressor.analysis.residual_stream import read_residual
from compressor.analysis.token_gates import find_token_sites
from compressor.errors import CompressError, ModelError
from compressor.model import narrow_probe
from compressor.model.functions import find_functions
from compressor.model.narrow_probe import narrow_probes, whole_probe
from compressor.model.replay_proof import prove_by_replay
from compressor.model.structure import read_structure

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


@pytest.fixture(scope="module")
def structures(tmp_path_factory):
    @cache
    def read(family):
        return read_structure(tiny.save(family, tmp_path_factory.mktemp(family) / "m", **FAMILIES[family]))

    return read


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setattr(narrow_probe, "SMALL", 0)
    monkeypatch.setattr(narrow_probe, "LEAST_WIDTH", 12)


def outcome(find, structure):
    """What an analysis finds, or where it refuses the model."""
    try:
        return find(structure)
    except ModelError as refusal:
        return refusal.where, {key: refusal.data[key] for key in ("reason", "kind") if key in refusal.data}


def prunable(structure):
    """Without the reasons, which have the widths of the probe model."""
    seen = look(structure)
    return [(site, site.layout.attributes) for site in seen.sites], {key: where for key, (where, _) in seen.refused.items()}


ANALYSES = {
    "residual": read_residual,
    "branches": lambda structure: find_branches(structure, read_residual(structure)),
    "prunable": prunable,
    "producers": find_producers,
    "tokens": find_token_sites,
    "functions": find_functions,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_found_on_narrow_models_is_what_the_whole_one_shows(family, structures, monkeypatch):
    structure = structures(family)
    expected = {name: outcome(find, structure) for name, find in ANALYSES.items()}
    monkeypatch.setattr(narrow_probe, "SMALL", 0)
    monkeypatch.setattr(narrow_probe, "LEAST_WIDTH", 12)
    whole = whole_probe(structure.model, structure.pieces)
    widths = [probe.width for probe in narrow_probes(whole, structure.pieces.blocks_path)]
    assert widths == [whole.width // 4, whole.width // 2]
    for name, find in ANALYSES.items():
        assert outcome(find, structure) == expected[name], name
