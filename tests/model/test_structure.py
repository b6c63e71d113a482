"""A model's structure is found by running it, and proven by replay."""

from __future__ import annotations

import json
from typing import ClassVar

import pytest
import tiny
import torch
import transformers as hf
from raising import raises

from compressor.engine.block_io import PartSource, fill_part
from compressor.errors import ModelError, PreflightError
from compressor.model import tracing
from compressor.model.block_runner import Pieces
from compressor.model.checkpoint import open_checkpoint
from compressor.model.model_class import class_of
from compressor.model.narrow_probe import Probes
from compressor.model.probe_model import example_batch, make_probe_model
from compressor.model.replay_proof import prove_by_replay, prove_equal
from compressor.model.structure import find_blocks, read_structure, structure_of
from compressor.model.weight_names import read_parameter

GROUPS = {
    "llama": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "qwen3": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "mistral": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "opt": [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]],
    "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
    "phi3": [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]],
    "gemma3": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "gpt_neox": [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]],
    "bert": [["query", "key", "value"], ["dense"], ["dense"], ["dense"]],
    "bert_base": [["query", "key", "value"], ["dense"], ["dense"], ["dense"]],
    "vit": [["query", "key", "value"], ["dense"], ["dense"], ["dense"]],
}


@pytest.mark.parametrize("family", sorted(GROUPS))
def test_weights_that_read_the_same_input_are_grouped(family, tmp_path):
    structure = read_structure(tiny.save(family, tmp_path / "m"))
    for unit in range(1, structure.block_count + 1):
        found = [[w.name.rpartition(".")[2] for w in group] for stage in structure.stages(unit) for group in stage]
        assert found == GROUPS[family]


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3", "phi3", "jamba"])
def test_what_a_mask_lets_run_without_weights_is_what_weights_show(family, tmp_path, monkeypatch):
    structure = read_structure(tiny.save(family, tmp_path / "m"))
    probes = Probes(structure.model, structure.pieces, structure.dtype)
    if family != "jamba":  # its experts choose by values
        with monkeypatch.context() as patch:
            patch.setattr(tracing, "make_probe_model", lambda *_: pytest.fail("weights were made"))
            tracing.trace(probes)
    monkeypatch.setattr(tracing, "_with_mask", lambda _batch: [])
    assert tracing.trace(probes) == structure.traced


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "vit", "gemma4_shared"])
def test_a_model_of_other_widths_is_read_like_the_one_that_it_stands_for(family, tmp_path, monkeypatch):
    structure = read_structure(tiny.save(family, tmp_path / "m"))
    saved = read_structure(tiny.save(family, tmp_path / "same"))
    monkeypatch.setattr("compressor.model.structure.trace", lambda _probes: pytest.fail("a probe model ran"))
    like = structure_of(saved.checkpoint, type(saved.model), saved.model.config, like=structure)
    assert like.traced == saved.traced and like.pieces.answers == saved.pieces.answers


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_groups_of_one_stage_and_carry_checkpoint_names(family, tmp_path):
    structure = read_structure(tiny.save(family, tmp_path / "m"))
    stages = structure.stages(1)
    sizes = [len(stage) for stage in stages]
    assert sizes == [1, 1, 1, 4, 4]
    assert [w.role for w in stages[2][0]] == ["router"]
    first, second = stages[3][2].weights
    assert first.expert == second.expert == 2
    assert first.rows == (0, first.out_features)
    assert second.rows == (first.out_features, 2 * first.out_features)
    assert f"{first.name}.weight" in structure.checkpoint.tensors


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_stem_blocks_and_head_reproduce_the_model_bit_for_bit(family, tmp_path):
    path = tiny.save(family, tmp_path / "m")
    structure = read_structure(path)
    prove_by_replay(structure)
    model = type(structure.model).from_pretrained(path, experts_implementation="eager").eval()
    for unit in range(structure.block_count + 2):
        fill_part(structure, unit, PartSource(structure), torch.device("cpu"))
    batch = example_batch(model, torch.device("cpu"))
    with torch.no_grad():
        output = model(**batch)
    expected = output.logits if "logits" in output else output.last_hidden_state
    assert torch.equal(structure.pieces.whole(batch), expected)


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_every_tensor_belongs_to_exactly_one_part(family, tmp_path):
    structure = read_structure(tiny.save(family, tmp_path / "m"))
    assert set(structure.part_by_tensor) == set(structure.checkpoint.tensors)
    for unit in range(1, structure.block_count + 1):
        inside = [tensor for tensor, at in structure.part_by_tensor.items() if at == unit]
        assert inside and all(f".{unit - 1}." in tensor for tensor in inside)


def test_parameters_read_block_by_block_equal_from_pretrained(tmp_path):
    path = tiny.save("mixtral", tmp_path / "m", shard="20KB")
    structure = read_structure(path)
    model = hf.AutoModelForCausalLM.from_pretrained(path)
    source = PartSource(structure)
    for name, parameter in model.named_parameters():
        assert torch.equal(read_parameter(name, structure.bindings, source.read, structure.model), parameter), name


def test_a_checkpoint_saved_without_its_prefix_binds(tmp_path):
    """As the original GPT-2 checkpoints: no `transformer.` in front, and the config asks for the head model."""
    import json

    path = tmp_path / "m"
    tiny.build("gpt2").transformer.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))
    structure = read_structure(path)
    assert structure.bindings.tied == {"lm_head.weight": "transformer.wte.weight"}
    assert [weight.name for _, weight in structure.weights()][:3] == ["wte", "wpe", "h.0.attn.c_attn"]


def test_a_model_whose_blocks_talk_beside_the_hidden_states_is_refused_by_block():
    class Leaky(hf.models.llama.modeling_llama.LlamaDecoderLayer):
        shared: ClassVar[list] = []

        def forward(self, hidden_states, **kwargs):
            out = super().forward(hidden_states, **kwargs)
            self.shared.append(float(out.sum()))
            return out + len(self.shared) * 0.1

    model = tiny.build("llama")
    for index, layer in enumerate(model.model.layers):
        leaky = Leaky(model.config, index).eval()
        leaky.load_state_dict(layer.state_dict())
        model.model.layers[index] = leaky
    with raises(ModelError, where="model.layers.0", reason="output-differs") as failure:
        prove_equal(model, "model.layers", example_batch(model, torch.device("cpu")))
    assert failure.value.exit_code == 5


def test_encoder_decoders_are_refused():
    config = hf.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=50)
    with raises(ModelError, where="T5ForConditionalGeneration", reason="two-stacks"):
        find_blocks(hf.T5ForConditionalGeneration(config))


def test_an_encoder_decoder_is_refused_before_it_is_measured(tmp_path):
    sizes = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    hf.T5ForConditionalGeneration(hf.T5Config(**sizes)).save_pretrained(tmp_path)
    with raises(ModelError, where="T5ForConditionalGeneration", reason="two-stacks"):
        class_of(open_checkpoint(tmp_path))


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("keys", [["compressed_weights"], ["quantization_config"]])
def test_an_artifact_of_this_tool_is_no_source_with_the_flag_or_without(keys, trust, tmp_path):
    directory = tiny.save("llama", tmp_path / "m")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **{key: {"quant_method": "x"} for key in keys}}))
    (directory / "compress_manifest.json").write_text("{}")
    with raises(ModelError, where="m", reason="is-artifact"):
        read_structure(directory, trust_remote_code=trust)


def test_a_block_that_writes_into_its_input_is_refused_by_name():
    model = tiny.build("llama").requires_grad_(False)
    block = model.model.layers[1]
    own = block.forward
    block.forward = lambda hidden, *args, **kwargs: own(hidden.mul_(2), *args, **kwargs)
    with raises(ModelError, where="model.layers.1", reason="writes-into-input"):
        prove_equal(model, "model.layers", example_batch(model, torch.device("cpu")))


def test_a_port_answers_for_its_block():
    model = tiny.build("gemma3")
    pieces = Pieces(model, "model.layers")
    hidden, calls = pieces.embeddings(example_batch(model, torch.device("cpu")))
    assert hidden.shape[-1] == 32 and len(calls) == 3
    assert list(model.model.layers.children()) == pieces.blocks, "the blocks are back in place"


def test_tracing_twice_gives_the_same_structure(tmp_path):
    path = tiny.save("qwen3_moe", tmp_path / "m")
    assert read_structure(path).overview() == read_structure(path).overview()


def test_plain_tables_that_the_stem_looks_up_are_weights_of_the_stem(tmp_path):
    structure = read_structure(tiny.save("bert", tmp_path / "m"))
    found = [
        (weight.name, weight.role, weight.shape) for stage in structure.stages(0) for group in stage for weight in group
    ]
    tables = "bert.embeddings."
    assert sorted(found) == [
        (tables + "position_embeddings", "embedding", (128, 32)),
        (tables + "token_type_embeddings", "embedding", (2, 32)),
        (tables + "word_embeddings", "embedding", (96, 32)),
    ]


def test_a_table_that_is_scaled_or_shifted_when_looked_up_is_no_weight(tmp_path):
    assert read_structure(tiny.save("gemma3", tmp_path / "scaled")).stages(0) == []
    names = [g.name for stage in read_structure(tiny.save("opt", tmp_path / "shifted")).stages(0) for g in stage]
    assert names == ["model.decoder.embed_tokens"]


def test_a_probe_that_memory_cannot_hold_is_refused_before_it_is_made(tmp_path):
    """As of two blocks of 256 experts each, which the system would end the process for."""
    config = hf.LlamaConfig(**{**tiny.COMMON, "intermediate_size": 1 << 40})
    with raises(PreflightError, where="LlamaForCausalLM") as failure:
        make_probe_model(hf.LlamaForCausalLM, config, torch.device("cpu"), torch.float32)
    assert failure.value.data["needed"] > failure.value.data["available"] > 0
