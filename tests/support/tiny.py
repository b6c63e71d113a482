"""Tiny random models of every supported family, saved as real checkpoints in seconds on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf

COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _llama(**kw: Any) -> hf.PreTrainedModel:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**COMMON, "num_key_value_heads": 2, **kw}))


def _qwen3(**kw: Any) -> hf.PreTrainedModel:
    return hf.Qwen3ForCausalLM(
        hf.Qwen3Config(**{**COMMON, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True, **kw})
    )


def _mistral(**kw: Any) -> hf.PreTrainedModel:
    return hf.MistralForCausalLM(hf.MistralConfig(**{**COMMON, "num_key_value_heads": 2, "sliding_window": 16, **kw}))


def _opt(**kw: Any) -> hf.PreTrainedModel:
    sizes = {**COMMON, "ffn_dim": 64, "word_embed_proj_dim": 32, **kw}
    sizes.pop("intermediate_size")
    return hf.OPTForCausalLM(hf.OPTConfig(**sizes))


def _gpt2(**kw: Any) -> hf.PreTrainedModel:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(
            **{
                "vocab_size": 96,
                "n_embd": 32,
                "n_layer": 2,
                "n_head": 4,
                "n_positions": 128,
                "n_inner": 64,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": 0,
                **kw,
            }
        )
    )


def _phi(**kw: Any) -> hf.PreTrainedModel:
    return hf.PhiForCausalLM(hf.PhiConfig(**{**COMMON, "partial_rotary_factor": 0.5, **kw}))


def _phi3(**kw: Any) -> hf.PreTrainedModel:
    return hf.Phi3ForCausalLM(hf.Phi3Config(**{**COMMON, "num_key_value_heads": 2, **kw}))


def _gemma(**kw: Any) -> hf.PreTrainedModel:
    return hf.GemmaForCausalLM(hf.GemmaConfig(**{**COMMON, "num_key_value_heads": 2, "head_dim": 8, **kw}))


def _gemma2(**kw: Any) -> hf.PreTrainedModel:
    return hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**{**COMMON, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16, **kw})
    )


def _olmo2(**kw: Any) -> hf.PreTrainedModel:
    return hf.Olmo2ForCausalLM(hf.Olmo2Config(**{**COMMON, "num_key_value_heads": 2, **kw}))


def _gemma3(**kw: Any) -> hf.PreTrainedModel:
    return hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(
            **{
                **COMMON,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "num_hidden_layers": 3,
                "sliding_window": 16,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                **kw,
            }
        )
    )


def _gpt_neox(**kw: Any) -> hf.PreTrainedModel:
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**{**COMMON, "use_parallel_residual": True, **kw}))


def _mixtral(**kw: Any) -> hf.PreTrainedModel:
    return hf.MixtralForCausalLM(
        hf.MixtralConfig(**{**COMMON, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, **kw})
    )


def _qwen3_moe(**kw: Any) -> hf.PreTrainedModel:
    return hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(
            **{
                **COMMON,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                **kw,
            }
        )
    )


def _bert(**kw: Any) -> hf.PreTrainedModel:
    return hf.BertForSequenceClassification(hf.BertConfig(**{**COMMON, **kw}))


def _bert_base(**kw: Any) -> hf.PreTrainedModel:
    return hf.BertModel(hf.BertConfig(**{**COMMON, **kw}))


def _vit(**kw: Any) -> hf.PreTrainedModel:
    sizes = {k: v for k, v in COMMON.items() if k not in ("vocab_size", "max_position_embeddings")}
    sizes = {k: v for k, v in sizes.items() if not k.endswith("token_id")}
    return hf.ViTForImageClassification(
        hf.ViTConfig(**{**sizes, "image_size": 16, "patch_size": 4, "num_channels": 1, "num_labels": 3, **kw})
    )


SMALL: dict[str, Any] = {key: value for key, value in COMMON.items() if not key.endswith("token_id")}
TEXT: dict[str, Any] = {**COMMON, "num_key_value_heads": 2}
MOE: dict[str, Any] = {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
HEADS = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
# Families that are split, and whose weights are told apart, in one way of their own: blocks that give tuples, routers
# of every kind, experts in one tensor, modules that a text run doesn't use, keys and values that blocks share
FURTHER: dict[str, Callable[..., hf.PreTrainedModel]] = {
    "falcon": lambda **kw: hf.FalconForCausalLM(
        hf.FalconConfig(
            vocab_size=96,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_kv_heads=2,
            new_decoder_architecture=True,
            bias=False,
            **kw,
        )
    ),
    "bloom": lambda **kw: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4, **kw)),
    "mpt": lambda **kw: hf.MptForCausalLM(
        hf.MptConfig(vocab_size=96, d_model=32, n_layers=2, n_heads=4, max_seq_len=128, **kw)
    ),
    "gpt_neo": lambda **kw: hf.GPTNeoForCausalLM(
        hf.GPTNeoConfig(
            vocab_size=96,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=8,
            max_position_embeddings=128,
            intermediate_size=64,
            **kw,
        )
    ),
    "deberta_v2": lambda **kw: hf.DebertaV2ForSequenceClassification(
        hf.DebertaV2Config(**{**SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], **kw})
    ),
    "mpnet": lambda **kw: hf.MPNetForSequenceClassification(hf.MPNetConfig(**{**SMALL, **kw})),
    "roformer": lambda **kw: hf.RoFormerForSequenceClassification(hf.RoFormerConfig(**{**SMALL, **kw})),
    "data2vec_vision": lambda **kw: hf.Data2VecVisionForImageClassification(
        hf.Data2VecVisionConfig(**{**VISION, "num_labels": 3, **kw})
    ),
    "phimoe": lambda **kw: hf.PhimoeForCausalLM(hf.PhimoeConfig(**{**MOE, **kw})),
    "gpt_oss": lambda **kw: hf.GptOssForCausalLM(hf.GptOssConfig(**{**MOE, "head_dim": 8, **kw})),
    "granitemoe": lambda **kw: hf.GraniteMoeForCausalLM(hf.GraniteMoeConfig(**{**MOE, **kw})),
    "jetmoe": lambda **kw: hf.JetMoeForCausalLM(hf.JetMoeConfig(**{**MOE, "kv_channels": 8, **kw})),
    "gemma4_moe": lambda **kw: hf.Gemma4ForCausalLM(
        hf.Gemma4TextConfig(
            **{
                **TEXT,
                "head_dim": 8,
                "global_head_dim": 8,
                "hidden_size_per_layer_input": 0,
                "enable_moe_block": True,
                "num_experts": 4,
                "top_k_experts": 2,
                "moe_intermediate_size": 32,
                "sliding_window": 16,
                "layer_types": ["sliding_attention", "full_attention"],
                **kw,
            }
        )
    ),
    "qwen3_5_moe": lambda **kw: hf.Qwen3_5MoeForCausalLM(
        hf.Qwen3_5MoeTextConfig(
            **{
                **TEXT,
                **HEADS,
                "head_dim": 8,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "shared_expert_intermediate_size": 32,
                "layer_types": ["linear_attention", "full_attention"],
                **kw,
            }
        )
    ),
    "qwen3_vl_moe": lambda **kw: hf.Qwen3VLMoeForConditionalGeneration(
        hf.Qwen3VLMoeConfig(
            text_config={
                **TEXT,
                "head_dim": 8,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 64,
                "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0},
                **kw,
            },
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 64,
                "depth": 2,
                "num_heads": 4,
                "out_hidden_size": kw.get("hidden_size", 32),
                "deepstack_visual_indexes": [0],
            },
            image_token_id=90,
            video_token_id=91,
            vision_start_token_id=92,
            vision_end_token_id=93,
        )
    ),
    "bamba": lambda **kw: hf.BambaForCausalLM(  # its config.json has an infinite number
        hf.BambaConfig(
            **{
                **TEXT,
                "attn_layer_indices": [1],
                "mamba_n_heads": 8,
                "mamba_d_head": 8,
                "mamba_n_groups": 1,
                "mamba_d_state": 8,
                **kw,
            }
        )
    ),
    "jamba": lambda **kw: hf.JambaForCausalLM(
        hf.JambaConfig(
            **{
                **TEXT,
                "num_experts": 4,
                "attn_layer_period": 2,
                "attn_layer_offset": 1,
                "expert_layer_period": 2,
                "expert_layer_offset": 1,
                "mamba_d_state": 8,
                "mamba_dt_rank": 8,
                **kw,
            }
        )
    ),
    "llama4": lambda **kw: hf.Llama4ForCausalLM(
        hf.Llama4TextConfig(**{**MOE, "intermediate_size_mlp": 64, "head_dim": 8, **kw})
    ),
    "dbrx": lambda **kw: hf.DbrxForCausalLM(
        hf.DbrxConfig(
            vocab_size=96,
            d_model=32,
            n_heads=4,
            n_layers=2,
            max_seq_len=128,
            attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
            ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
            **kw,
        )
    ),
    "qwen3_next": lambda **kw: hf.Qwen3NextForCausalLM(
        hf.Qwen3NextConfig(
            **{
                **TEXT,
                **HEADS,
                "num_hidden_layers": 4,
                "head_dim": 8,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "shared_expert_intermediate_size": 32,
                **kw,
            }
        )
    ),
    "qwen3_5": lambda **kw: hf.Qwen3_5ForCausalLM(
        hf.Qwen3_5TextConfig(**{**TEXT, **HEADS, "num_hidden_layers": 4, "head_dim": 8, **kw})
    ),
    "idefics3": lambda **kw: hf.Idefics3ForConditionalGeneration(
        hf.Idefics3Config(text_config={"model_type": "llama", **COMMON}, vision_config=VISION, image_token_id=90, **kw)
    ),
    "llava": lambda **kw: hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            text_config={"model_type": "llama", **TEXT},
            vision_config={"model_type": "clip_vision_model", **VISION},
            image_token_index=90,
            **kw,
        )
    ),
    "gemma4_shared": lambda **kw: hf.Gemma4ForCausalLM(
        hf.Gemma4TextConfig(
            **{
                **TEXT,
                "num_hidden_layers": 4,
                "head_dim": 8,
                "global_head_dim": 8,
                "hidden_size_per_layer_input": 32,
                "vocab_size_per_layer_input": 96,
                "num_kv_shared_layers": 2,
                "sliding_window": 16,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
                **kw,
            }
        )
    ),
    "albert": lambda **kw: hf.AlbertForSequenceClassification(
        hf.AlbertConfig(**{**SMALL, "embedding_size": 32, "num_hidden_layers": 4, **kw})
    ),
}

FAMILIES: dict[str, Callable[..., hf.PreTrainedModel]] = {
    "llama": _llama,
    "qwen3": _qwen3,
    "mistral": _mistral,
    "opt": _opt,
    "gpt2": _gpt2,
    "phi": _phi,
    "phi3": _phi3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "olmo2": _olmo2,
    "gpt_neox": _gpt_neox,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "bert": _bert,
    "bert_base": _bert_base,
    "vit": _vit,
}


def build(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> hf.PreTrainedModel:
    """A random model in eval mode; norms and biases are perturbed too, so that nothing is trivially 0 or 1."""
    torch.manual_seed(seed)
    model = (FAMILIES | FURTHER)[family](**config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.to(dtype).eval()


def save(family: str, directory: Path, *, shard: str = "5GB", **options: Any) -> Path:
    """A checkpoint directory of a tiny random model."""
    build(family, **options).save_pretrained(directory, max_shard_size=shard)
    return directory
