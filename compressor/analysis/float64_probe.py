"""Makes the probe model of the analyses: a small model of the same class with random weights in float64."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from compressor.model.block_runner import Pieces
from compressor.model.probe_model import PROBE_SEED, make_probe_model, shallow_config
from compressor.model.reshaped_class import reshaping

PROBE_VOCABULARY = 256  # the probe model's; all rows of an embedding or output head work alike


def float64_probe_model(model: PreTrainedModel, pieces: Pieces) -> PreTrainedModel:
    """A shallow probe model in float64, untied, with a small vocabulary.

    Its weights are random. No gain is 1 and no bias is 0, since such values would hide an error in a fold.
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
    """Reduce the vocabulary of embeddings and output heads in the shapes of a reshaped model's config."""
    shapes = reshaping(config)[0]
    for name, shape in shapes.items():
        if shape and shape[0] == vocabulary and not name.startswith(path + "."):
            shapes[name] = [PROBE_VOCABULARY, *shape[1:]]


def fill(model: nn.Module) -> None:
    """Fill each parameter with its own seeded random values, so that a tied output head and embedding are separate."""
    generator = torch.Generator().manual_seed(PROBE_SEED)
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter.dim() < 2:
            value = parameter + 0.2 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        else:
            value = torch.randn(parameter.shape, dtype=torch.float64, generator=generator) / parameter.shape[-1] ** 0.5
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
