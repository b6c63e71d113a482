"""How many tokens a model takes is what the model itself takes, whatever its config says."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from compressor.model.token_limit import token_limit

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
GPT = {"vocab_size": 96, "n_positions": 66, "n_embd": 32, "n_layer": 1, "n_head": 4}
PADDED = {**SIZES, "max_position_embeddings": 66, "pad_token_id": 1}


@pytest.mark.parametrize(
    ("name", "sizes", "limit"),
    [
        ("Roberta", PADDED, 64),
        ("XLMRoberta", PADDED, 64),
        ("Camembert", PADDED, 64),
        ("MPNet", PADDED, 64),
        ("Data2VecText", PADDED, 64),
        ("RobertaPreLayerNorm", PADDED, 64),
        ("Esm", {**PADDED, "mask_token_id": 32, "position_embedding_type": "absolute"}, 64),
        ("Longformer", {**PADDED, "attention_window": 8}, 64),
        ("Bert", PADDED, 66),
        ("Electra", PADDED, 66),
        ("OPT", {**PADDED, "ffn_dim": 64, "word_embed_proj_dim": 32}, 66),
        ("BioGpt", PADDED, 66),
        ("GPT2", GPT, 66),
        ("GPTJ", {**GPT, "rotary_dim": 4}, 66),
        ("Mpt", {"vocab_size": 96, "d_model": 32, "n_heads": 4, "n_layers": 1, "max_seq_len": 66}, 66),
    ],
)  # fmt: skip
def test_the_limit_is_the_longest_sample_that_the_model_itself_takes(name, sizes, limit):
    config = getattr(hf, f"{name}Config")(**sizes)
    endings = ("ForMaskedLM", "ForCausalLM", "LMHeadModel")
    cls = next(getattr(hf, name + ending) for ending in endings if hasattr(hf, name + ending))
    model = cls(config).eval()

    def runs(length):
        try:
            with torch.no_grad():
                model(input_ids=torch.full((1, length), 5))
        except Exception:
            return False
        return True

    assert runs(limit) and not runs(limit + 1)
    assert token_limit(cls, config, 200) == token_limit(cls, config, limit + 1) == limit
    assert token_limit(cls, config, limit) is None


def test_a_model_without_a_table_has_the_limit_that_it_states():
    config = hf.LlamaConfig(**{**SIZES, "max_position_embeddings": 66})
    assert token_limit(hf.LlamaForCausalLM, config, 67) == 66 and token_limit(hf.LlamaForCausalLM, config, 66) is None
    bloom = hf.BloomConfig(vocab_size=96, hidden_size=32, n_layer=1, n_head=4)
    assert token_limit(hf.BloomForCausalLM, bloom, 300) is None
