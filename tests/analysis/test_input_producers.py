"""What produces the inputs of weights: known producers of each family, and that folding into them changes nothing."""

from __future__ import annotations

import pytest
import tiny
import torch

from compressor.analysis.input_producers import find_producers, producers_of
from compressor.model.probe_model import example_batch, use_eager_experts
from compressor.model.structure import read_structure

# family -> producer -> (what reads it, distinct slices); of the first block
KNOWN = {
    "llama": {
        "input_layernorm": ("q_proj k_proj v_proj", 32),
        "post_attention_layernorm": ("gate_proj up_proj", 32),
        "self_attn.v_proj.weight": ("o_proj", 16),  # two query heads to a value head
        "mlp.up_proj.weight": ("down_proj", 64),
    },
    "gemma2": {  # its other norms stand on what the branches give, and q_norm and k_norm on heads
        "input_layernorm": ("q_proj k_proj v_proj", 32),
        "pre_feedforward_layernorm": ("gate_proj up_proj", 32),
        "self_attn.v_proj.weight": ("o_proj", 16),
        "mlp.up_proj.weight": ("down_proj", 64),
    },
    "olmo2": {"self_attn.v_proj.weight": ("o_proj", 16), "mlp.up_proj.weight": ("down_proj", 64)},  # post-norm
    "opt": {
        "self_attn_layer_norm": ("q_proj k_proj v_proj", 32),
        "final_layer_norm": ("fc1", 32),
        "self_attn.v_proj.weight": ("out_proj", 32),
        "fc1.weight": ("fc2", 64),  # a ReLU passes positive factors on
    },
    "gpt2": {  # GELU doesn't
        "ln_1": ("c_attn", 32),
        "ln_2": ("c_fc", 32),
        "attn.c_attn.weight": ("c_proj", 32),
    },
    "phi3": {  # two query heads to a value head in one matrix: its last quarter is no layout that is tried
        "input_layernorm": ("qkv_proj", 32),
        "post_attention_layernorm": ("gate_up_proj", 32),
        "mlp.gate_up_proj.weight": ("down_proj", 64),
    },
    "phi": {"input_layernorm": ("q_proj k_proj v_proj fc1", 32), "self_attn.v_proj.weight": ("dense", 32)},
    "mixtral": {
        "input_layernorm": ("q_proj k_proj v_proj", 32),
        "post_attention_layernorm": ("gate gate_up_proj", 32),  # the router too
        "self_attn.v_proj.weight": ("o_proj", 16),
        "mlp.experts.gate_up_proj": ("down_proj", 64),
    },
    "bert": {"attention.self.value.weight": ("dense", 32)},
}


def structure_of(family, folder):
    return read_structure(tiny.save(family, folder))


@pytest.mark.parametrize("family", KNOWN)
def test_producers_of_a_family_are_found(family, tmp_path):
    structure = structure_of(family, tmp_path / "model")
    prefix = f"{structure.pieces.blocks_path}.0."
    found = {}
    for producer in producers_of(find_producers(structure), structure, 1):
        projections = [consumer.parameter.removesuffix(".weight").rpartition(".")[2] for consumer in producer.consumers]
        found[producer.name.removeprefix(prefix)] = (" ".join(projections), len(set(producer.slices)))
    assert found == KNOWN[family]


@pytest.mark.parametrize("family", KNOWN)
def test_folding_any_factors_into_the_producers_keeps_the_outputs(family, tmp_path):
    """In float64, all producers of all blocks at once, by factors between 1/4 and 4."""
    structure = structure_of(family, tmp_path / "model")
    producers = find_producers(structure)
    model = tiny.build(family, dtype=torch.float64)
    use_eager_experts(model.config)
    batch = example_batch(model, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    parameters = dict(model.named_parameters())
    before = model(**batch)[0].detach()
    with torch.no_grad():
        for part in range(1, structure.block_count + 1):
            for producer in producers_of(producers, structure, part):
                slices = torch.tensor(producer.slices)
                maker = parameters[producer.makers[0].parameter].shape[producer.makers[0].axis]
                factors = torch.ones(maker, dtype=torch.float64)
                used = slices.unique()
                factors[used] = 4 ** (2 * torch.rand(len(used), generator=generator, dtype=torch.float64) - 1)
                for one in producer.makers:
                    value, by = parameters[one.parameter], along(factors, one.axis, parameters[one.parameter])
                    value.copy_((value + one.offset) / by - one.offset)
                for one in producer.consumers:
                    parameters[one.parameter].mul_(along(factors[slices], one.axis, parameters[one.parameter]))
        after = model(**batch)[0]
    # the model's own float32 parts, such as softmax, leave some 1e-7; a wrong fold moves outputs by their own size
    assert float((after - before).abs().max() / before.abs().max()) < 1e-5


def along(factors, axis, value):
    return factors.view([-1 if at == axis else 1 for at in range(value.dim())])
