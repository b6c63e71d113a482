"""A tiny random model of nearly any class of transformers, from its config class and a table of small sizes."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers as hf
from transformers.models.auto import modeling_auto

# size, layer and head counts under the names that configs give them
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("embedding_size", "lru_width", "kda_hidden_size"), 32),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "encoder_ffn_dim", "decoder_ffn_dim"), 64
    ),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "hidden_dim", "d_ff", "d_inner"), 64),
    **dict.fromkeys(
        ("intermediate_size_mlp", "expert_ffn_hidden_size", "mlp_hidden_size", "dense_intermediate_size"), 64
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_attention_groups"), 2),
    **dict.fromkeys(
        ("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "attention_head_dim", "d_kv"), 8
    ),
    **dict.fromkeys(("index_head_dim", "index_n_heads", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "rank"), 16),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "num_shared_experts"), 1),
    **dict.fromkeys(("moe_layer_start_index", "shared_expert_num", "num_nextn_predict_layers"), 1),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "mamba_n_heads", "mamba_num_heads"), 4),
    **{"linear_head_dim": 8, "linear_num_heads": 4},
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "n_vocab"), 96),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_sequence_length"), 128),
    **{"image_size": 32, "patch_size": 16, "num_channels": 3, "num_labels": 3, "sliding_window": 16, "state_size": 8},
    **{"hidden_size_per_layer_input": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "rotary_dim": 8},
    **{"num_codebooks": 2, "n_groups": 2, "mamba_d_state": 8, "mamba_d_head": 16, "attention_window": 8},
    **{
        "decoder_vocab_size": 96,
        "entity_vocab_size": 20,
        "type_vocab_size": 2,
        "layer_types": None,
        "mlp_layer_types": None,
    },
}


def classes_of(*tasks: str, part: int = 0, of: int = 1) -> list[str]:
    """Names of all classes that transformers has for some tasks, such as CAUSAL_LM, or of every `of`-th one of them.

    To know whether it has one, its module is imported, which takes time.
    """
    found: set[str] = set()
    for task in tasks:
        for names in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").values():
            found |= {names} if isinstance(names, str) else set(names)
    return [name for name in sorted(found)[part::of] if hasattr(hf, name)]


def tiny_config(cls: type[hf.PreTrainedModel], **more: Any) -> Any:
    """The class's config with whatever sizes it has made small."""
    default = cls.config_class()
    known = set(vars(default)) | set(getattr(default, "attribute_map", {}))
    sizes = {key: copy.copy(value) for key, value in SIZES.items() if key in known}
    for key in ("layer_types", "mlp_layer_types"):
        sizes.pop(key, None)
    if isinstance(own := getattr(default, "patch_size", None), int):  # larger patches can make features larger
        sizes["patch_size"] = min(own, SIZES["patch_size"])
    return cls.config_class(**{**sizes, **more})


def tiny_model(cls: type[hf.PreTrainedModel], dtype: torch.dtype, **more: Any) -> hf.PreTrainedModel:
    """A model with random values in all that a checkpoint holds, in float32 where the class keeps that."""
    torch.manual_seed(0)
    model = cls._from_config(tiny_config(cls, **more), dtype=dtype).eval()
    kept = [pattern.replace("*", "") for pattern in model._get_dtype_plan(dtype)]
    persistent = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, tensor in persistent.items():
            if not tensor.is_floating_point():
                continue
            if any(pattern in name for pattern in kept):
                tensor.data = tensor.data.float()
            tensor.copy_(torch.randn(tensor.shape) * 0.3 + 0.1)
    return model


def is_small(cls: type[hf.PreTrainedModel], parameters: int = 1 << 25) -> bool:
    """Whether the table of sizes makes a small model of this class; others need sizes of their own."""
    try:
        with torch.device("meta"):
            model = cls._from_config(tiny_config(cls))
    except Exception:  # any: rules of sizes are the class's own
        return False
    return sum(value.numel() for value in model.parameters()) <= parameters
