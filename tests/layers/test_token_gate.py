"""A gated block gives what the block itself gives for the kept tokens, whatever stands around a sample."""

from __future__ import annotations

import copy
from contextlib import ExitStack, contextmanager
from functools import cache

import pytest
import tiny
import torch
import transformers as hf
from raising import raises
from torch.utils.flop_counter import FlopCounterMode

from compressor.analysis.token_gates import find_token_gates
from compressor.errors import ModelError
from compressor.layers.structural.placing import reshape
from compressor.layers.structural.token_counts import kept_tokens
from compressor.layers.structural.token_gate import TokenGate, noting_choices
from compressor.model.structure import find_blocks, read_structure
from compressor.passes.zero_tprune import ZeroTPrune

TOLERANCE = 1e-5  # float32 of outputs about 1, summed over 32 to 64 values in another order
OTHERS = {
    "deit": (hf.DeiTForImageClassificationWithTeacher, hf.DeiTConfig),
    "dinov2": (hf.Dinov2ForImageClassification, hf.Dinov2Config),
    "siglip": (hf.SiglipVisionModel, hf.SiglipVisionConfig),
}
IMAGES = {
    "image_size": 16,
    "patch_size": 4,
    "num_channels": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.fixture(scope="module")
def facts_of(tmp_path_factory):
    @cache
    def made(family, **config):
        path = tmp_path_factory.mktemp("gate") / family
        return find_token_gates(read_structure(tiny.save(family, path, **config)))

    return made


def gated(model, facts, rates, **settings):
    """A copy of a model with gates, as loading makes it."""
    model = copy.deepcopy(model)
    found = ZeroTPrune(keep=rates, min_tokens=4, **settings).gates(facts, rates)
    modules = {
        f"{find_blocks(model)}.{block}": {"form": "token_gate", "spec": gate, "shape": []}
        for block, gate in found.items()
    }
    model.config.compressed_modules = modules
    reshape(model, {}, modules, {"token_gate": TokenGate})
    return model


def blocks_of(model):
    return list(model.get_submodule(find_blocks(model)))


def pixels(samples=2):
    return {"pixel_values": torch.randn(samples, 1, 16, 16, generator=torch.Generator().manual_seed(1))}


def sentences(lengths, left=0, longest=None):
    """Random token ids of these lengths, padded behind, or `left` before and the rest behind."""
    longest = longest or max(lengths) + left
    ids, mask = torch.full((len(lengths), longest), 7), torch.zeros(len(lengths), longest, dtype=torch.int64)
    for row, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(length)
        ids[row, left : left + length] = torch.randint(8, 96, (length,), generator=generator)
        mask[row, left : left + length] = 1
    places = {"position_ids": mask.cumsum(1).sub(1).clamp(min=0)} if left else {}
    return {"input_ids": ids, "attention_mask": mask, **places}


@contextmanager
def choices_of(model):
    with ExitStack() as stack:
        blocks = [block for block in blocks_of(model) if isinstance(block, TokenGate)]
        yield [stack.enter_context(noting_choices(block)) for block in blocks]


@pytest.mark.parametrize("family", ["vit", "bert", "bert_base"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keeping_everything_is_bit_identical(family, attention, facts_of):
    model = tiny.build(family)
    model.set_attn_implementation(attention)
    batch = pixels() if family == "vit" else sentences([9, 12])
    same = gated(model, facts_of(family), {0: 1.0, 1: 1.0})
    with torch.no_grad():
        assert torch.equal(same(**batch)[0], model(**batch)[0])


@pytest.mark.parametrize("family", ["vit", "bert"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_gate_gathers_after_attention_what_the_block_would_give(family, attention, facts_of):
    model = tiny.build(family)
    model.set_attn_implementation(attention)
    facts, batch = facts_of(family), pixels() if family == "vit" else sentences([14, 14])
    pruned = gated(model, facts, {0: 0.7, 1: 0.5})
    with torch.no_grad(), choices_of(pruned) as choices:
        output = pruned(**batch)[0]
        inputs = model(**batch, output_hidden_states=True).hidden_states[0]
        for block, (chosen,) in zip(blocks_of(model), choices, strict=True):
            assert bool((chosen.diff(dim=1) > 0).all()) and bool((chosen[:, 0] == 0).all())
            assert chosen.shape[1] == kept_tokens(
                inputs.shape[1], 0.7 if block is blocks_of(model)[0] else 0.5, sum(facts.protect), 4
            )
            whole = block(inputs, None)
            whole = whole[0] if isinstance(whole, tuple) else whole
            inputs = whole.gather(1, chosen[:, :, None].expand(-1, -1, whole.shape[2]))  # the MLP saw every token
        if family == "vit":
            wanted = model.classifier(model.vit.layernorm(inputs)[:, 0])
        else:
            wanted = model.classifier(model.bert.pooler(inputs))
    assert torch.allclose(output, wanted, atol=TOLERANCE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("partition", ["sequential", "random"])
def test_a_text_gives_the_same_alone_and_in_any_batch(attention, partition, facts_of):
    model = tiny.build("bert_base", num_hidden_layers=4)
    model.set_attn_implementation(attention)
    pruned = gated(model, facts_of("bert_base", num_hidden_layers=4), {0: 0.8, 2: 0.6}, partition=partition)
    lengths = [5, 17, 11, 3, 24]
    with torch.no_grad():
        alone = [pruned(**sentences([length])) for length in lengths]
        for batch in (sentences(lengths), sentences(lengths, longest=40), sentences(lengths[:2], left=6)):
            found = pruned(**batch)
            for row, (one, hidden) in enumerate(zip(alone, found.last_hidden_state)):
                kept = found.kept_mask[row].bool()
                assert torch.allclose(hidden[kept], one.last_hidden_state[0], atol=TOLERANCE)
    for length, one in zip(lengths, alone, strict=True):
        wanted = kept_tokens(kept_tokens(length, 0.8, 2, 4), 0.6, 2, 4)
        assert one.last_hidden_state.shape[1] == wanted == int(one.kept_mask.sum())


def test_the_class_token_and_the_head_follow_the_mask(facts_of):
    pruned = gated(tiny.build("bert"), facts_of("bert"), {0: 0.5})
    with torch.no_grad():
        together = pruned(**sentences([6, 20, 13])).logits
        alone = [pruned(**sentences([length])).logits for length in (6, 20, 13)]
    assert torch.allclose(together, torch.cat(alone), atol=TOLERANCE)


def test_mean_pooling_takes_its_mask_from_the_output(facts_of):
    pruned = gated(tiny.build("bert_base"), facts_of("bert_base"), {0: 0.5})
    found = []
    with torch.no_grad():
        for batch in (sentences([20]), sentences([20, 31])):
            output = pruned(**batch)
            mask = output.kept_mask.unsqueeze(-1)
            found.append(((output.last_hidden_state * mask).sum(1) / mask.sum(1))[0])
    assert torch.allclose(*found, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_reported_work_is_what_a_counter_finds(family, facts_of):
    facts = facts_of(family)
    settings = ZeroTPrune(keep={0: 0.7, 1: 0.5}, min_tokens=4, tolerance=0, iterations=(7, 5, 3))
    account = settings.account(facts, settings.keep, 17)
    model = tiny.build(family)
    model.set_attn_implementation("eager")
    pruned = gated(model, facts, settings.keep, tolerance=0, iterations=(7, 5, 3))
    batch = pixels(1) if family == "vit" else {"input_ids": sentences([17])["input_ids"]}
    for one, key in ((model, "macs_before"), (pruned, "macs_after")):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            one(**batch)
        assert counter.get_total_flops() == 2 * account[key]
    assert [row["left"] for row in account["blocks"]] == ([13, 7] if family == "vit" else [13, 8])


@pytest.mark.parametrize("name", OTHERS)
def test_other_image_models_have_a_place_for_gates(name, tmp_path):
    cls, config = OTHERS[name]
    values = {**IMAGES, "num_labels": 3} if name != "siglip" else IMAGES
    torch.manual_seed(0)
    cls(config(**values)).save_pretrained(tmp_path)
    facts = find_token_gates(read_structure(tmp_path))
    prefix = {"deit": 2, "dinov2": 1, "siglip": 0}[name]
    assert facts.protect == (prefix, 0) and facts.patches == (4, 4) and facts.tokens == 16 + prefix


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: tiny.build("llama"), {"where": "model.layers.0", "reason": "causal"}),
        (
            lambda: hf.BertForTokenClassification(hf.BertConfig(**tiny.COMMON)),
            {"where": "BertForTokenClassification", "reason": "answer-per-token", "tokens": 13},
        ),
        (
            lambda: hf.BertForMaskedLM(hf.BertConfig(**tiny.COMMON)),
            {"where": "BertForMaskedLM", "reason": "answer-per-token", "tokens": 13},
        ),
        (
            lambda: hf.ModernBertForSequenceClassification(_modern()),
            {"reason": "argument-of-tokens", "argument": "position_embeddings"},
        ),
        (
            lambda: hf.ConvNextV2ForImageClassification(_convolutions()),
            {"where": "ConvNextV2ForImageClassification", "reason": "no-tokens"},
        ),
        (
            lambda: tiny.build("bert", output_attentions=True, attn_implementation="eager"),
            {"reason": "asks-for-output", "key": "output_attentions"},
        ),
        (
            lambda: hf.ViTForMaskedImageModeling(hf.ViTConfig(**IMAGES, encoder_stride=4)),
            {"where": "ViTForMaskedImageModeling", "reason": "fails"},
        ),
    ],
    ids=["causal", "tokens", "masked", "rotary", "convolutions", "attentions", "pixels"],
)
def test_models_whose_tokens_cant_be_pruned_are_refused_by_name(build, told, tmp_path):
    build().save_pretrained(tmp_path)
    with raises(ModelError, **told):
        find_token_gates(read_structure(tmp_path))


def _modern():
    special = {"cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 1}
    return hf.ModernBertConfig(**{**tiny.COMMON, **special})


def _convolutions():
    return hf.ConvNextV2Config(image_size=16, num_channels=1, hidden_sizes=[8] * 4, depths=[2] * 4)


def test_attention_without_queries_and_keys_is_an_error_that_says_so(facts_of):
    pruned = gated(tiny.build("bert"), facts_of("bert"), {0: 0.5})
    attention = blocks_of(pruned)[0].attention.self
    attention.forward = lambda hidden_states, *args, **kwargs: (hidden_states, None)
    with raises(ModelError, reason="attention-not-seen"):
        pruned(**sentences([20]))
    empty = sentences([20, 20])
    empty["attention_mask"][1] = 0
    with raises(ModelError, reason="all-padding"):
        gated(tiny.build("bert"), facts_of("bert"), {0: 0.5})(**empty)
    with raises(ModelError, reason="already-gated"):
        TokenGate.wrap(blocks_of(pruned)[0], (), {})
