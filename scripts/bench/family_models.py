"""The model families that families.py tries: the class of each, and what its tiny config needs beside small sizes.

A family is named after its type in transformers, with a suffix where one type has several kinds of models. `SIZES` of
tests/support/many_models.py makes the sizes small, also in the configs inside a config; the changes here are made after
it. Widths are multiples of 32, so that groups of 32 divide them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from many_models import SIZES, tiny_model
from safetensors.torch import load_file, save_file

Kind = Literal["decoder", "encoder", "vision", "wrapper", "encoder-decoder", "classifier"]
TITLES: dict[Kind, str] = {
    "decoder": "Decoders",
    "classifier": "Decoders with another head",
    "encoder": "Text encoders",
    "vision": "Vision models",
    "wrapper": "Models of images and text",
    "encoder-decoder": "Encoder-decoders",
}
MOST_PARAMETERS = 1 << 24  # a tiny model has fewer; more means that a size has a name that is not in the table


@dataclass(frozen=True)
class Family:
    """cls      name of a model class of transformers
    changes  keys of its config; a dict changes the config of that name inside it
    beside   tensors that its published checkpoints have and the class doesn't use, as (name, shape)
    """

    name: str
    kind: Kind
    cls: str
    changes: dict[str, Any] = field(default_factory=dict)
    beside: tuple[tuple[str, tuple[int, ...]], ...] = ()


def save(family: Family, model: transformers.PreTrainedModel, directory: Path) -> None:
    """Write a checkpoint, with the tensors beside those of the model."""
    model.save_pretrained(directory)
    if family.beside:
        file = directory / "model.safetensors"
        more = {name: torch.randn(shape).to(torch.bfloat16) for name, shape in family.beside}
        save_file(load_file(file) | more, file, {"format": "pt"})


def build(family: Family) -> transformers.PreTrainedModel:
    """A random model in bfloat16, except what its class keeps in float32.

    raises  whatever the class raises for the config; ValueError if it lacks the class or the model isn't small
    """
    cls = getattr(transformers, family.cls, None)
    if cls is None:
        raise ValueError(f"transformers {transformers.__version__} has no {family.cls}")
    config = _config(cls.config_class, family.changes)
    with torch.device("meta"):
        size = sum(value.numel() for value in cls._from_config(cls.config_class(**config)).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"the table of sizes makes a model of {size:,} parameters")
    return tiny_model(cls, torch.bfloat16, **config)


def _config(cls: type[transformers.PretrainedConfig], changes: dict[str, Any]) -> dict[str, Any]:
    """Keys of a small config, with the small configs inside it as dicts."""
    default = cls()
    known = set(vars(default)) | set(default.attribute_map)
    found = {key: value for key, value in SIZES.items() if key in known and value is not None}
    for key in cls.sub_configs:
        inner = getattr(default, key, None)
        if inner is not None:
            asked = dict(changes.get(key, {}))
            kind = type(inner)
            if "model_type" in asked:
                kind = transformers.CONFIG_MAPPING[asked["model_type"]]
            found[key] = _config(kind, asked) | {"model_type": kind.model_type}
    inside = {key for key in cls.sub_configs if key in found}
    return {**found, **{key: value for key, value in changes.items() if key not in inside}}


HEADS_OF_LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16}
LINEAR = {**HEADS_OF_LINEAR, "linear_value_head_dim": 16, "num_hidden_layers": 4}
PATCHES = {"image_size": 32, "patch_size": 8}
WINDOWS = {
    "image_size": 64,
    "patch_size": 4,
    "window_size": 8,
    "depths": [1, 1],
    "num_heads": [2, 4],
    "num_attention_heads": [2, 4],
}
WINDOWED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "num_hidden_layers": 3}
MIXED = {**WINDOWED, "global_head_dim": 8}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_expand": 2}
SHARED_KEYS = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "global_head_dim": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 32,
}
ZAMBA = {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4}
LATENT = {
    "num_key_value_heads": 4,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
}

Row = tuple[str, dict[str, Any]]
DECODERS: dict[str, Row] = {
    "llama": ("LlamaForCausalLM", {}),
    "mistral": ("MistralForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {}),
    "qwen3_next": ("Qwen3NextForCausalLM", LINEAR),
    "qwen3_5": ("Qwen3_5ForCausalLM", LINEAR),
    "qwen3_5_moe": ("Qwen3_5MoeForCausalLM", LINEAR),
    "gemma": ("GemmaForCausalLM", {}),
    "gemma2": ("Gemma2ForCausalLM", {}),
    "gemma3": ("Gemma3ForCausalLM", WINDOWED),
    "gemma3n": ("Gemma3nForCausalLM", {"num_hidden_layers": 4, "num_kv_shared_layers": 2}),
    "gemma4": ("Gemma4ForCausalLM", {**MIXED, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}),
    "gemma4-e": ("Gemma4ForCausalLM", SHARED_KEYS),
    "gemma4-moe": ("Gemma4ForCausalLM", {**MIXED, "num_kv_shared_layers": 0, "enable_moe_block": True}),
    "phi": ("PhiForCausalLM", {}),
    "phi3": ("Phi3ForCausalLM", {}),
    "phimoe": ("PhimoeForCausalLM", {}),
    "falcon-new": ("FalconForCausalLM", {"new_decoder_architecture": True, "bias": False}),
    "falcon-old": ("FalconForCausalLM", {"new_decoder_architecture": False, "multi_query": True}),
    "falcon_h1": ("FalconH1ForCausalLM", {**MAMBA, "mamba_d_ssm": 64}),
    "bamba": ("BambaForCausalLM", {**MAMBA, "attn_layer_indices": [1]}),
    "bloom": ("BloomForCausalLM", {}),
    "mpt": ("MptForCausalLM", {}),
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt_neo": ("GPTNeoForCausalLM", {"attention_types": [[["global", "local"], 1]], "window_size": 8}),
    "gpt_neox": ("GPTNeoXForCausalLM", {}),
    "gptj": ("GPTJForCausalLM", {}),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", {}),
    "codegen": ("CodeGenForCausalLM", {}),
    "opt": ("OPTForCausalLM", {}),
    "granite": ("GraniteForCausalLM", {}),
    "granitemoe": ("GraniteMoeForCausalLM", {}),
    "granitemoeshared": ("GraniteMoeSharedForCausalLM", {"shared_intermediate_size": 64}),
    "granitemoehybrid": (
        "GraniteMoeHybridForCausalLM",
        {**MAMBA, "shared_intermediate_size": 64, "layer_types": ["mamba", "attention"]},
    ),
    "granitemoehybrid-dense": (
        "GraniteMoeHybridForCausalLM",
        {**MAMBA, "shared_intermediate_size": 64, "layer_types": ["mamba", "attention"], "num_local_experts": 0},
    ),
    "gpt_oss": ("GptOssForCausalLM", {}),
    "mixtral": ("MixtralForCausalLM", {}),
    "deepseek_v2": ("DeepseekV2ForCausalLM", {**LATENT, "topk_group": 1, "n_group": 1}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", LATENT),
    "deepseek_v32": ("DeepseekV32ForCausalLM", {**LATENT, "index_topk": 8}),
    "deepseek_v4": ("DeepseekV4ForCausalLM", {}),
    "glm4": ("Glm4ForCausalLM", {}),
    "glm4_moe": ("Glm4MoeForCausalLM", {}),
    "glm_moe_dsa": ("GlmMoeDsaForCausalLM", {**LATENT, "index_topk": 8}),
    "hunyuan_v1_dense": ("HunYuanDenseV1ForCausalLM", {}),
    "hunyuan_v1_moe": ("HunYuanMoEV1ForCausalLM", {}),
    "olmo": ("OlmoForCausalLM", {}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "olmo3": ("Olmo3ForCausalLM", {}),
    "olmo_hybrid": ("OlmoHybridForCausalLM", LINEAR),
    "olmoe": ("OlmoeForCausalLM", {}),
    "cohere": ("CohereForCausalLM", {}),
    "cohere2": ("Cohere2ForCausalLM", {}),
    "starcoder2": ("Starcoder2ForCausalLM", {}),
    "stablelm": ("StableLmForCausalLM", {}),
    "nemotron": ("NemotronForCausalLM", {}),
    "nemotron_h": ("NemotronHForCausalLM", {}),
    "jamba": (
        "JambaForCausalLM",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_dt_rank": 8,
        },
    ),
    "zamba": ("ZambaForCausalLM", {**ZAMBA, "mamba_dt_rank": 8, "n_mamba_heads": 2}),
    "zamba2": ("Zamba2ForCausalLM", {**ZAMBA, "n_mamba_heads": 4, "mamba_headdim": 16, "mamba_ngroups": 1}),
    "mamba": ("MambaForCausalLM", {"time_step_rank": 8}),
    "mamba2": ("Mamba2ForCausalLM", {"num_heads": 4, "head_dim": 16, "n_groups": 1}),
    "falcon_mamba": ("FalconMambaForCausalLM", {"time_step_rank": 8}),
    "rwkv": ("RwkvForCausalLM", {"attention_hidden_size": 32, "context_length": 128}),
    "xlstm": ("xLSTMForCausalLM", {"hidden_size": 128, "embedding_dim": 128}),
    "recurrent_gemma": ("RecurrentGemmaForCausalLM", {"num_hidden_layers": 3, "attention_window_size": 16}),
    "lfm2": ("Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"]}),
    "lfm2_moe": ("Lfm2MoeForCausalLM", {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "kimi_linear": ("KimiLinearForCausalLM", {**LATENT, "layer_types": ["linear_attention", "full_attention"]}),
    "mistral4": ("Mistral4ForCausalLM", {**LATENT, "head_dim": 16}),
    "hy_v3": ("HYV3ForCausalLM", {}),
    "hy_v4": ("HYV4ForCausalLM", {}),
    "ernie4_5": ("Ernie4_5ForCausalLM", {}),
    "ernie4_5_moe": ("Ernie4_5_MoeForCausalLM", {}),
    "exaone4": ("Exaone4ForCausalLM", {}),
    "exaone_moe": ("ExaoneMoeForCausalLM", {}),
    "dots1": ("Dots1ForCausalLM", {}),
    "minimax": ("MiniMaxForCausalLM", {}),
    "minimax_m2": ("MiniMaxM2ForCausalLM", {}),
    "smollm3": ("SmolLM3ForCausalLM", {}),
    "seed_oss": ("SeedOssForCausalLM", {}),
    "jetmoe": ("JetMoeForCausalLM", {}),
    "dbrx": (
        "DbrxForCausalLM",
        {
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        },
    ),
    "llama4-text": ("Llama4ForCausalLM", {}),
    "arcee": ("ArceeForCausalLM", {}),
    "apertus": ("ApertusForCausalLM", {}),
    "helium": ("HeliumForCausalLM", {}),
    "nanochat": ("NanoChatForCausalLM", {}),
    "solar_open": ("SolarOpenForCausalLM", {}),
    "mimo_v2_flash": ("MiMoV2FlashForCausalLM", {}),
    "diffllama": ("DiffLlamaForCausalLM", {}),
    "persimmon": ("PersimmonForCausalLM", {}),
    "glm": ("GlmForCausalLM", {}),
    "ministral3": ("Ministral3ForCausalLM", {}),
}
CLASSIFIERS: dict[str, Row] = {
    "llama-classifier": ("LlamaForSequenceClassification", {}),
    "qwen3-classifier": ("Qwen3ForSequenceClassification", {}),
    "gemma2-classifier": ("Gemma2ForSequenceClassification", {}),
    "gpt2-classifier": ("GPT2ForSequenceClassification", {}),
    "llama-base": ("LlamaModel", {}),
    "qwen3-base": ("Qwen3Model", {}),
    "mistral-tokens": ("MistralForTokenClassification", {}),
}
ENCODERS: dict[str, Row] = {
    "bert": ("BertForSequenceClassification", {}),
    "bert-base": ("BertModel", {}),
    "bert-mlm": ("BertForMaskedLM", {}),
    "roberta": ("RobertaForSequenceClassification", {}),
    "xlm-roberta": ("XLMRobertaForSequenceClassification", {}),
    "xlm-roberta-base": ("XLMRobertaModel", {}),
    "distilbert": ("DistilBertForSequenceClassification", {}),
    "albert": ("AlbertForSequenceClassification", {"num_hidden_layers": 4}),
    "electra": ("ElectraForSequenceClassification", {}),
    "mpnet": ("MPNetForSequenceClassification", {}),
    "mpnet-base": ("MPNetModel", {}),
    "roformer": ("RoFormerForSequenceClassification", {}),
    "deberta-v2": (
        "DebertaV2ForSequenceClassification",
        {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "share_att_key": True},
    ),
    "modernbert": ("ModernBertForSequenceClassification", {"num_hidden_layers": 3}),
    "modernbert-base": ("ModernBertModel", {"num_hidden_layers": 3}),
    "nomic_bert": ("NomicBertModel", {}),
    "jina_embeddings_v3": ("JinaEmbeddingsV3Model", {}),
    "esm": ("EsmForSequenceClassification", {"position_embedding_type": "rotary"}),
    "camembert": ("CamembertForSequenceClassification", {}),
    "longformer": ("LongformerForSequenceClassification", {}),
}
VISION: dict[str, Row] = {
    "vit": ("ViTForImageClassification", PATCHES),
    "deit": ("DeiTForImageClassification", PATCHES),
    "dinov2": ("Dinov2ForImageClassification", PATCHES),
    "dinov2-base": ("Dinov2Model", PATCHES),
    "dinov2-giant": ("Dinov2ForImageClassification", {**PATCHES, "use_swiglu_ffn": True}),
    "dinov2-registers": ("Dinov2WithRegistersForImageClassification", PATCHES),
    "dinov3_vit": ("DINOv3ViTModel", PATCHES),
    "beit": ("BeitForImageClassification", PATCHES),
    "data2vec-vision": ("Data2VecVisionForImageClassification", PATCHES),
    "swin": ("SwinForImageClassification", WINDOWS),
    "swinv2": ("Swinv2ForImageClassification", WINDOWS),
    "convnext": (
        "ConvNextForImageClassification",
        {"image_size": 64, "hidden_sizes": [32, 64], "depths": [1, 1], "num_stages": 2},
    ),
    "clip": ("CLIPModel", {"vision_config": PATCHES}),
    "clip-vision": ("CLIPVisionModel", PATCHES),
    "clip-text": ("CLIPTextModel", {}),
    "clip-classifier": ("CLIPForImageClassification", {"vision_config": PATCHES}),
    "siglip": ("SiglipModel", {"vision_config": PATCHES}),
    "siglip-vision": ("SiglipVisionModel", PATCHES),
    "siglip-text": ("SiglipTextModel", {}),
    "siglip-classifier": ("SiglipForImageClassification", {"vision_config": PATCHES}),
    "siglip2": ("Siglip2Model", {}),
    "siglip2-vision": ("Siglip2VisionModel", {"num_patches": 16, "patch_size": 8}),
    "siglip2-text": ("Siglip2TextModel", {}),
    "siglip2-classifier": ("Siglip2ForImageClassification", {}),
    "ijepa": ("IJepaForImageClassification", PATCHES),
}
DEEP = {"num_hidden_layers": 6}  # the language model has most of the parameters
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}, **DEEP}
TOWER = {"depth": 2, "out_hidden_size": 32, "deepstack_visual_indexes": [0]}
IMAGES_OF_CLIP = {"model_type": "clip_vision_model", **PATCHES}
WRAPPERS: dict[str, Row] = {
    "llava": ("LlavaForConditionalGeneration", {"vision_config": IMAGES_OF_CLIP, "image_token_index": 90}),
    "paligemma": ("PaliGemmaForConditionalGeneration", {"vision_config": PATCHES, "image_token_index": 90}),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", {"text_config": SECTIONS, "vision_config": {"depth": 2}}),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", {"text_config": SECTIONS, "vision_config": TOWER}),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", {"text_config": DEEP, "vision_config": TOWER}),
    "qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration", {"text_config": DEEP, "vision_config": TOWER}),
    "qwen3_5-conditional": ("Qwen3_5ForConditionalGeneration", {"text_config": LINEAR}),
    "qwen3_5_moe-conditional": ("Qwen3_5MoeForConditionalGeneration", {"text_config": LINEAR}),
    "gemma3-conditional": (
        "Gemma3ForConditionalGeneration",
        {"text_config": WINDOWED, "vision_config": PATCHES, "mm_tokens_per_image": 4},
    ),
    "gemma3n-conditional": (
        "Gemma3nForConditionalGeneration",
        {"text_config": {"num_hidden_layers": 4, "num_kv_shared_layers": 2}},
    ),
    "gemma4-conditional": (
        "Gemma4ForConditionalGeneration",
        {"text_config": {**MIXED, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}},
    ),
    "gemma4-e-conditional": ("Gemma4ForConditionalGeneration", {"text_config": SHARED_KEYS}),
    "gemma4-moe-conditional": (
        "Gemma4ForConditionalGeneration",
        {"text_config": {**MIXED, "num_kv_shared_layers": 0, "enable_moe_block": True}},
    ),
    "mistral3": ("Mistral3ForConditionalGeneration", {"text_config": DEEP}),
    "internvl": ("InternVLForConditionalGeneration", {"vision_config": {"image_size": [32, 32], "patch_size": [8, 8]}}),
    "glm4v": ("Glm4vForConditionalGeneration", {"text_config": SECTIONS, "vision_config": TOWER}),
    "idefics3": ("Idefics3ForConditionalGeneration", {"vision_config": PATCHES, "image_token_id": 90}),
    "smolvlm": ("SmolVLMForConditionalGeneration", {"vision_config": PATCHES, "image_token_id": 90}),
    "aria": ("AriaForConditionalGeneration", {"image_token_index": 90}),
    "llama4": (
        "Llama4ForConditionalGeneration",
        {"vision_config": {**PATCHES, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}},
    ),
    "kimi_k25": ("Kimi_K25ForConditionalGeneration", {"text_config": LATENT}),
    "mistral_large4": ("MistralLarge4ForConditionalGeneration", {"text_config": LATENT}),
}
ENCODER_DECODERS: dict[str, Row] = {
    "t5": ("T5ForConditionalGeneration", {}),
    "t5-encoder": ("T5EncoderModel", {}),
    "bart": ("BartForConditionalGeneration", {}),
    "whisper": ("WhisperForConditionalGeneration", {}),
}


# layers that predict further tokens, rotary frequencies that older releases saved, heads of the pretraining
FURTHER = (("model.layers.2.eh_proj.weight", (32, 64)), ("model.layers.2.self_attn.o_proj.weight", (32, 32)))
BESIDE = {
    **dict.fromkeys(("deepseek_v3", "deepseek_v32", "glm4_moe", "glm_moe_dsa"), FURTHER),
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_5-conditional"), (("mtp.fc.weight", (32, 64)),)),
    "mimo_v2_flash": (("model.mtp.layers.0.eh_proj.weight", (32, 64)),),
    "llama": (("model.layers.0.self_attn.rotary_emb.inv_freq", (4,)),),
    "bert": (("cls.seq_relationship.weight", (2, 32)), ("cls.predictions.bias", (96,))),
}


def _families() -> dict[str, Family]:
    tables: dict[Kind, dict[str, Row]] = {
        "decoder": DECODERS,
        "classifier": CLASSIFIERS,
        "encoder": ENCODERS,
        "vision": VISION,
        "wrapper": WRAPPERS,
        "encoder-decoder": ENCODER_DECODERS,
    }
    rows = [(kind, name, row) for kind, table in tables.items() for name, row in table.items()]
    return {name: Family(name, kind, *row, BESIDE.get(name, ())) for kind, name, row in rows}


FAMILIES = _families()
