"""Makes the probe model of the analyses: a small model of the same class with random weights in float64."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from compressor.model.block_runner import Pieces
from compressor.model.narrow_probe import Probe
from compressor.model.probe_model import (
    PROBE_SEED,
    PROBE_VOCABULARY,
    make_probe_model,
    shallow_config,
    shorten_vocabulary,
)
from compressor.model.reshaped_class import reshaping


def float64_probe_model(model: PreTrainedModel, pieces: Pieces, probe: Probe | None = None) -> PreTrainedModel:
    """A shallow probe model in float64, untied, with a small vocabulary.

    Its weights are random. No gain is 1 and no bias is 0, since such values would hide an error in a fold.

    probe  its config (`compressor.model.narrow_probe`); None: it has the widths of the model
    """
    config = copy.deepcopy(shallow_config(model.config, model, pieces) if probe is None else probe.config)
    vocabulary = getattr(config.get_text_config(), "vocab_size", 0)
    shorten_vocabulary(config)
    if vocabulary > PROBE_VOCABULARY:
        _shorten_embeddings(config, vocabulary, pieces.blocks_path)
    made = make_probe_model(type(model), config, torch.device("cpu"), torch.float64)
    fill(made)
    return made


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
