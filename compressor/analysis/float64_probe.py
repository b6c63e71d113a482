"""A small model of the same class with random weights in float64, on which the analyses look for what they need."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from compressor.model.block_runner import Pieces
from compressor.model.probe_model import PROBE_SEED, make_probe_model, shallow_config
from compressor.model.reshaped_class import reshaping

PROBE_VOCABULARY = 256  # the probe model's; rows of embeddings and heads are all alike


def float64_probe_model(model: PreTrainedModel, pieces: Pieces) -> PreTrainedModel:
    """A shallow probe model in float64, untied, with a small vocabulary.

    Its weights are random, its gains not one and its biases not zero, which would hide what is wrong with a fold.
    """
    config = shallow_config(model.config, model, pieces)
    text = config.get_text_config()
    if (vocabulary := getattr(text, "vocab_size", 0)) > PROBE_VOCABULARY:
        text.vocab_size = PROBE_VOCABULARY
        if (getattr(text, "pad_token_id", None) or 0) >= PROBE_VOCABULARY:
            text.pad_token_id = None
        _shorten_embeddings(config, vocabulary, pieces.blocks_path)
    probe = make_probe_model(type(model), config, torch.device("cpu"), torch.float64)
    fill(probe)
    return probe


def _shorten_embeddings(config: PretrainedConfig, vocabulary: int, path: str) -> None:
    """Embeddings and heads that a reshaped model's config gives the vocabulary's rows get the probe model's."""
    shapes = reshaping(config)[0]
    for name, shape in shapes.items():
        if shape and shape[0] == vocabulary and not name.startswith(path + "."):
            shapes[name] = [PROBE_VOCABULARY, *shape[1:]]


def fill(model: nn.Module) -> None:
    """Give a float64 model seeded random parameters of its own under each name, so that head and embedding are two."""
    generator = torch.Generator().manual_seed(PROBE_SEED)
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter.dim() < 2:
            value = parameter + 0.2 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        else:
            value = torch.randn(parameter.shape, dtype=torch.float64, generator=generator) / parameter.shape[-1] ** 0.5
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
