"""Residual-stream reads and writes are found on a probe model; a model whose stream can't be rotated is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import tiny
import torch
import transformers as hf
from raising import raises

from compressor.analysis.float64_probe import fill, float64_probe_model
from compressor.analysis.perturbation import answering
from compressor.analysis.residual_stream import find_residual, read_residual, residual_of
from compressor.analysis.rotation_proof import center_writes, fold_norm, gainless_norm, prove_invariance
from compressor.errors import ModelError
from compressor.methods.rotation.rotation import pca, random_orthogonal, rotate
from compressor.model.block_runner import Pieces, output_of
from compressor.model.norms import describe_norm
from compressor.model.probe_model import example_batch, make_probe_model
from compressor.model.residual_records import InputProjection, ResidualNorm, ResidualWrite
from compressor.model.structure import find_blocks, read_structure

QKV = ["q_proj 1", "k_proj 1", "v_proj 1"]
QKV_BIASED = ["q_proj 1 +", "k_proj 1 +", "v_proj 1 +"]
LLAMA = [([QKV], ["o_proj 0"]), ([["gate_proj 1", "up_proj 1"]], ["down_proj 0"])]
MOE = [([QKV], ["o_proj 0"]), ([["experts.gate_up_proj 2", "gate 1"]], ["experts.down_proj 1"])]
# per sublayer: consumers of norms as "module axis", "+" with a bias; then what writes, a bias as "module.bias axis"
SITES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "phi3": [([["qkv_proj 1"]], ["o_proj 0"]), ([["gate_up_proj 1"]], ["down_proj 0"])],
    "mixtral": MOE,
    "qwen3_moe": MOE,
    "opt": [([QKV_BIASED], ["out_proj 0", "out_proj.bias 0"]), ([["fc1 1 +"]], ["fc2 0", "fc2.bias 0"])],
    "gpt2": [([["c_attn 0 +"]], ["c_proj 1", "c_proj.bias 0"]), ([["c_fc 0 +"]], ["c_proj 1", "c_proj.bias 0"])],
    "vit": [([QKV_BIASED], ["o_proj 0", "o_proj.bias 0"]), ([["fc1 1 +"]], ["fc2 0", "fc2.bias 0"])],
    "phi": [([[*QKV_BIASED, "fc1 1 +"]], ["dense 0", "dense.bias 0", "fc2 0", "fc2.bias 0"])],
    "gpt_neox": [
        (
            [["query_key_value 1 +"], ["dense_h_to_4h 1 +"]],
            ["dense 0", "dense.bias 0", "dense_4h_to_h 0", "dense_4h_to_h.bias 0"],
        )
    ],
}
BRANCH = {"where": "model.layers.0.post_attention_layernorm", "reason": "norm-on-branch"}
REFUSED = {
    "gemma2": BRANCH,
    "gemma3": BRANCH,
    "olmo2": BRANCH,
    "bert": {"where": "bert.encoder.layer.0.output.LayerNorm", "reason": "post-norm"},
    "bert_base": {"where": "encoder.layer.0.output.LayerNorm", "reason": "post-norm"},
}


def short(name):
    name = name.removesuffix(".weight")
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1] == "bias" or parts[-2] == "experts" else parts[-1]


def described(sublayers):
    return [
        (
            [
                sorted(f"{short(r.parameter)} {r.axis}{' +' if r.bias else ''}" for r in norm.consumers)
                for norm in sublayer.norms
            ],
            sorted(f"{short(w.parameter)} {w.axis}" for w in sublayer.writes),
        )
        for sublayer in sublayers
    ]


def in_order(sublayers):
    return [([sorted(norm) for norm in norms], sorted(writes)) for norms, writes in sublayers]


def structure_of(family, tmp_path, **config):
    return read_structure(tiny.save(family, tmp_path / "m", **config))


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """The residual-stream reads and writes of a tiny family; read once."""

    @cache
    def read(family):
        return read_residual(structure_of(family, tmp_path_factory.mktemp(family)))

    return read


@pytest.fixture
def found(tmp_path):
    """A float64 probe model of a family, the path of its blocks, and the reads and writes of its stream."""

    def find(family, **config):
        structure = structure_of(family, tmp_path, **config)
        probe, path = float64_probe_model(structure.model, structure.pieces), structure.pieces.blocks_path
        return probe, path, find_residual(probe, path)

    return find


def test_every_family_is_rotated_or_refused():
    assert set(SITES) | set(REFUSED) == set(tiny.FAMILIES)


@pytest.mark.parametrize("family", sorted(SITES))
def test_readers_and_writers_of_every_block_are_found_and_proven(family, known):
    residual = known(family)
    expected = in_order(SITES[family])
    assert [described(sublayers) for sublayers in residual.blocks] == [expected] * 2
    assert residual.width == 32
    assert all(f".{index}." in t.module for index, block in enumerate(residual.blocks) for s in block for t in s.norms)


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_a_family_whose_stream_cannot_be_rotated_is_refused_by_module_and_reason(family, tmp_path):
    with raises(ModelError, **REFUSED[family]) as failure:
        read_residual(structure_of(family, tmp_path))
    assert failure.value.exit_code == 5


def test_post_norm_opt_and_models_that_return_the_stream_are_refused(tmp_path):
    with raises(ModelError, where="model.decoder.layers.0.final_layer_norm", reason="post-norm"):
        read_residual(structure_of("opt", tmp_path, do_layer_norm_before=False))
    tiny.build("llama").model.save_pretrained(tmp_path / "base")
    with raises(ModelError, where="norm", reason="norm-unread"):
        read_residual(read_structure(tmp_path / "base"))


def test_tables_convolutions_and_biases_of_the_stem_are_found_with_their_scale(known):
    embeddings = known("vit").embeddings
    assert embeddings == (
        ResidualWrite("vit.embeddings.cls_token", 2, 1.0),
        ResidualWrite("vit.embeddings.position_embeddings", 2, 1.0),
        ResidualWrite("vit.embeddings.patch_embeddings.projection.weight", 0, None),
        ResidualWrite("vit.embeddings.patch_embeddings.projection.bias", 0, 1.0),
    )


def test_the_scale_of_gemmas_table_is_the_root_of_its_width(known):
    (table,) = known("gemma").embeddings
    assert table.scale == pytest.approx(32**0.5, rel=1e-11)  # stated to 12 digits


def test_the_head_is_a_reader_of_its_own_even_if_the_checkpoint_ties_it(known):
    residual = known("gpt2")
    assert residual.end.consumers == (InputProjection("lm_head.weight", 1, None),)
    assert [write.parameter for write in residual.embeddings] == ["transformer.wte.weight", "transformer.wpe.weight"]


def test_norms_on_heads_are_not_on_the_stream(tmp_path):
    residual = read_residual(structure_of("qwen3", tmp_path, head_dim=32))  # as wide as the stream
    assert not any("q_norm" in norm.module or "k_norm" in norm.module for norm in residual.norms())


def test_two_norms_in_sequence_are_two_sublayers(tmp_path):
    residual = read_residual(structure_of("gpt_neox", tmp_path, use_parallel_residual=False))
    assert [len(sublayer.norms) for sublayer in residual.blocks[0]] == [1, 1]


def test_blocks_of_two_kinds_each_have_their_own_sublayers(tmp_path):
    structure = structure_of("qwen3_moe", tmp_path, num_hidden_layers=4, mlp_only_layers=[2])
    residual = read_residual(structure)
    expected = [in_order(sublayers) for sublayers in (MOE, MOE, LLAMA, MOE)]
    assert [described(sublayers) for sublayers in residual.blocks] == expected
    names = {name for name, _ in structure.model.named_parameters()}
    assert {r.parameter for norm in residual.norms() for r in norm.consumers} <= names
    assert {write.parameter for write in residual.writes()} <= names


def test_the_probe_has_few_tokens_and_the_answer_does_not_depend_on_it(tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    structure = structure_of("llama", large, vocab_size=1000, pad_token_id=999)
    assert float64_probe_model(structure.model, structure.pieces).get_input_embeddings().num_embeddings == 256
    assert read_residual(structure) == read_residual(structure_of("llama", small))


@pytest.mark.parametrize(
    ("family", "leaf"),
    [("mixtral", "mlp.gate.weight"), ("llama", "v_proj.weight"), ("opt", "fc2.bias"), ("phi", "fc1.weight")],
)
def test_one_missed_reader_or_writer_fails_the_proof_and_the_block_is_named(family, leaf, found):
    probe, path, residual = found(family)
    first = tuple(
        replace(
            sublayer,
            norms=tuple(
                replace(norm, consumers=tuple(r for r in norm.consumers if not r.parameter.endswith(leaf)))
                for norm in sublayer.norms
            ),
            writes=tuple(w for w in sublayer.writes if not w.parameter.endswith(leaf)),
        )
        for sublayer in residual.blocks[0]
    )
    assert first != residual.blocks[0]
    with raises(ModelError, where=f"{path}.0", reason="does-not-rotate"):
        prove_invariance(probe, path, replace(residual, blocks=(first, *residual.blocks[1:])))


def test_a_branch_that_is_no_matrix_fails_the_proof(found):
    """It reads a norm and adds to the stream beside the matrices that were found."""
    probe, path, _ = found("llama")
    block = probe.model.layers[1]
    own = block.forward
    block.forward = lambda x, *args, **kwargs: own(x, *args, **kwargs) + 0.1 * block.input_layernorm(x).tanh()
    residual = find_residual(probe, path)  # sees the first block of this kind only
    with raises(ModelError, where="model.layers.1", reason="does-not-rotate"):
        prove_invariance(probe, path, residual)


def test_a_norm_that_runs_twice_is_refused(found):
    probe, path, _ = found("llama")
    block = probe.model.layers[0]
    own = block.forward
    block.forward = lambda x, *args, **kwargs: own(x, *args, **kwargs) + 0.1 * block.input_layernorm(x).tanh()
    with raises(ModelError, where="model.layers.0.input_layernorm", reason="norm-twice"):
        find_residual(probe, path)


def test_something_that_reads_the_stream_past_its_norms_is_refused(found):
    probe, path, _ = found("llama")
    block = probe.model.layers[0]
    own = block.forward
    block.forward = lambda x, *args, **kwargs: own(x, *args, **kwargs) + 0.1 * x.tanh()
    with raises(ModelError, where="model.layers.0", reason="past-norms-or-scaled"):
        find_residual(probe, path)


def test_a_stream_that_is_scaled_between_blocks_is_refused(found):
    """Turning it would be sound, but what a sublayer adds wouldn't be what the next one sees."""
    probe, path, _ = found("llama")
    block = probe.model.layers[0]
    own = block.forward
    block.forward = lambda x, *args, **kwargs: own(2 * x, *args, **kwargs)
    with raises(ModelError, where="model.layers.0.input_layernorm", reason="past-norms-or-scaled"):
        find_residual(probe, path)


def test_a_branch_that_later_sites_do_not_see_is_refused(found):
    """The first branch reaches the second norm, but not the block's output."""
    probe, path, _ = found("llama")
    block = probe.model.layers[0]

    def forward(x, position_embeddings=None, attention_mask=None, **kwargs):
        read = block.input_layernorm(x)
        first = block.self_attn(read, position_embeddings=position_embeddings, attention_mask=attention_mask)[0]
        return x + block.mlp(block.post_attention_layernorm(x + first))

    block.forward = forward
    with raises(ModelError, where="model.layers.0.self_attn.o_proj.weight", reason="does-not-stay"):
        find_residual(probe, path)


def test_two_kinds_of_norm_on_one_stream_are_refused(found):
    probe, path, _ = found("llama")
    probe.model.norm = torch.nn.LayerNorm(32).double().requires_grad_(False)
    with raises(ModelError, where="model.layers.0.input_layernorm", reason="two-kinds-of-norm"):
        find_residual(probe, path)


def test_a_head_that_reads_the_stream_past_its_norm_is_refused(found):
    probe, path, _ = found("llama")
    probe.model.norm = Beside(probe.model.norm)
    with raises(ModelError, where="LlamaForCausalLM", reason="head-past-norm"):
        find_residual(probe, path)


class Beside(torch.nn.Module):
    """A norm, and a little of what it got."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x) + 0.1 * x


def test_a_second_norm_before_the_head_and_a_missing_one_are_refused(found):
    probe, path, _ = found("llama")
    norm = probe.model.norm
    probe.model.norm = torch.nn.Sequential(norm, torch.nn.LayerNorm(32).double().requires_grad_(False))
    with raises(ModelError, where="LlamaForCausalLM", reason="norms-at-end", count=2):
        find_residual(probe, path)
    probe.model.norm = torch.nn.Identity()
    with raises(ModelError, where="LlamaForCausalLM", reason="norms-at-end", count=0):
        find_residual(probe, path)


@pytest.mark.parametrize(
    ("model", "where", "reason"),
    [
        (
            lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4)),
            "transformer.word_embeddings_layernorm",
            "norm-before-blocks",
        ),
        (
            lambda: hf.Dinov2ForImageClassification(
                hf.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4)
            ),
            "dinov2.encoder.layer.0.norm1",
            "scaled-branches",  # by a vector
        ),
        (
            lambda: hf.OlmoForCausalLM(hf.OlmoConfig(**tiny.COMMON)),  # its norm doesn't say its eps
            "model.layers.0",
            "no-norm",
        ),
    ],
    ids=["embedding norm", "layer scale", "unknown norm"],
)
def test_other_ways_in_which_a_stream_cannot_be_rotated_are_named(model, where, reason):
    meta = model().to("meta")
    with raises(ModelError, where=where, reason=reason):
        residual_of(meta, Pieces(meta, find_blocks(meta)))


def test_centring_a_stream_of_rms_norms_changes_the_model(found):
    probe, path, residual = found("llama")
    with raises(ModelError, where="model.layers.0", reason="does-not-rotate"):
        prove_invariance(probe, path, replace(residual, kind="layer"))


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_large_eps_is_kept(family, found):
    key = "rms_norm_eps" if family == "llama" else "layer_norm_eps"
    probe, path, residual = found(family, **{key: 0.1})
    assert {norm.formula.eps for norm in residual.norms()} == {0.1}
    prove_invariance(probe, path, residual)


def fold(model, residual):
    for norm in residual.norms():
        fold_norm(model, norm)
    if residual.kind == "layer":
        center_writes(model, residual.writes())


def rotate_all(model, residual, q):
    consumers = (consumer for norm in residual.norms() for consumer in norm.consumers)
    for edge in (*residual.writes(), *consumers):
        parameter = model.get_parameter(edge.parameter).data
        parameter.copy_(rotate(parameter.double(), q, edge.axis))


def gainless_logits(model, residual, batch):
    answers = {norm.module: gainless_norm(norm) for norm in residual.norms()}
    with torch.no_grad(), answering({name: model.get_submodule(name) for name in answers}, answers):
        return output_of(model(**batch))


@pytest.mark.parametrize("family", sorted(SITES))
def test_float32_logits_stay_within_rounding_folded_and_rotated(family, known):
    """The proof is in float64; this is the model as a user runs it, its own norms and experts included."""
    residual, model = known(family), tiny.build(family)
    if model.get_output_embeddings() is not None:
        untied = model.get_output_embeddings().weight.detach().clone()
        model.get_output_embeddings().weight = torch.nn.Parameter(untied)
    batch = example_batch(model, torch.device("cpu"))
    with torch.no_grad():
        expected = output_of(model(**batch))
    fold(model, residual)
    folded = gainless_logits(model, residual, batch)
    rotate_all(model, residual, random_orthogonal(32, torch.Generator().manual_seed(3)))
    rotated = gainless_logits(model, residual, batch)
    # float32 has 6e-8; a few dozen roundings in two blocks, and a rotation rounds every weight once more
    assert (folded - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (rotated - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_layer_norm_stream_has_one_empty_direction_after_centring(found):
    """So that deleting one dimension of a LayerNorm model loses nothing."""
    probe, path, residual = found("gpt2")
    batch = example_batch(probe, torch.device("cpu"), samples=8)
    streams = []
    probe.get_submodule(path)[-1].register_forward_hook(lambda _m, _a, out: streams.append(out))
    fold(probe, residual)
    gainless_logits(probe, residual, batch)
    x = streams[0].reshape(-1, 32)
    values, q = pca(x.t() @ x)
    assert abs(values[-1]) < 1e-14 * values[0]
    torch.testing.assert_close(q[:, -1], torch.full((32,), 32**-0.5, dtype=torch.float64))


def test_a_shift_with_no_bias_to_take_it_is_refused_by_name():
    """A LayerNorm read by a bare parameter; a linear module would be given a bias."""
    holder = torch.nn.Module()
    holder.norm = torch.nn.LayerNorm(4)
    holder.table = torch.nn.Parameter(torch.zeros(3, 4))
    holder.head = torch.nn.Linear(4, 3, bias=False)
    torch.nn.init.ones_(holder.norm.bias)
    norm = describe_norm(holder.norm)
    with raises(ModelError, where="table", reason="no-bias"):
        fold_norm(holder, ResidualNorm("norm", norm, (InputProjection("table", 1, None),)))
    fold_norm(holder, ResidualNorm("norm", norm, (InputProjection("head.weight", 1, None),)))
    torch.testing.assert_close(holder.head.bias, holder.head.weight.sum(1))


def test_gpt_oss_expert_biases_are_found(tmp_path):
    """Fused experts with biases of their own: an input projection's bias has its shape without the width."""
    config = hf.GptOssConfig(
        **{**tiny.COMMON, "intermediate_size": 16},
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = make_probe_model(hf.GptOssForCausalLM, config, torch.device("cpu"), torch.float64)
    fill(model)
    residual = find_residual(model, "model.layers")
    mlp = residual.blocks[0][1]
    experts = "model.layers.0.mlp.experts."
    assert InputProjection(f"{experts}gate_up_proj", 1, f"{experts}gate_up_proj_bias") in mlp.norms[0].consumers
    assert {(w.parameter, w.axis) for w in mlp.writes} == {(f"{experts}down_proj", 2), (f"{experts}down_proj_bias", 1)}
