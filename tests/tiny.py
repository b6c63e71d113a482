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
    model = FAMILIES[family](**config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.to(dtype).eval()


def save(family: str, directory: Path, *, shard: str = "5GB", **options: Any) -> Path:
    """A checkpoint directory of a tiny random model."""
    build(family, **options).save_pretrained(directory, max_shard_size=shard)
    return directory
