"""Artifacts made of a plan alone, without a run, and the check that plain transformers reads them."""

from __future__ import annotations

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

from compressor.artifact.artifact_config import artifact_config
from compressor.artifact.stock_formats import module_of
from compressor.methods.quantization.packed_codes import store
from compressor.methods.quantization.uniform_grid import find_grid, quantize
from compressor.model.probe_model import example_batch


class Shelf:
    """The part of a site that storing codes needs; keeps the layers."""

    dtype = torch.bfloat16

    def __init__(self):
        self.layers = {}

    def put(self, weight, layer, **record):
        self.layers[weight.name] = layer


def nearest(stored, matrix):
    """The layer that rtn makes of a weight."""
    shelf, size = Shelf(), stored.format_params["group_size"]
    grouped = matrix.view(len(matrix), -1, matrix.shape[1] if size == -1 else size)
    grid = find_grid(grouped, stored.format_params["bits"], stored.format_params["symmetric"], "minmax", shelf.dtype)
    store(shelf, stored.weight, quantize(grouped, grid), grid, size, {})
    return shelf.layers[stored.weight.name]


def store_as_planned(plan, artifact, make=nearest):
    """What a run leaves for a loader, weights and config.json, without the run; returns the layers by module."""
    structure, formats, layers = plan.structure, list(plan.formats.values()), {}
    shutil.copytree(structure.checkpoint.directory, artifact)
    tensors = load_file(artifact / "model.safetensors")
    for stored in formats:
        layer = layers[module_of(stored)] = make(stored, tensors.pop(stored.weight.tensor).float())
        assert (layer.format_name, layer.format_params()) == (stored.format_name, stored.format_params)
        tensors |= {f"{stored.weight.name}.{suffix}": value for suffix, value in layer.tensors().items()}
    save_file(tensors, artifact / "model.safetensors", {"format": "pt"})
    source = structure.checkpoint.config
    config = artifact_config(source, plan.export_format, formats, structure.model, "bfloat16", plan.untied)
    (artifact / "config.json").write_text(json.dumps(config))
    return layers


def assert_plain_transformers_computes_what_the_codes_stand_for(plan, artifact, make=nearest):
    """Same bits as the dense model with each weight set to its codes' meaning; nothing missing, nothing unexpected."""
    layers = store_as_planned(plan, artifact, make)
    cls = type(plan.structure.model)
    stock, info = cls.from_pretrained(artifact, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    probe = cls.from_pretrained(plan.structure.checkpoint.directory)
    for module, layer in layers.items():
        probe.get_submodule(module).weight.data = layer.matrix(torch.bfloat16)
    inputs = example_batch(probe, torch.device("cpu"))
    with torch.no_grad():
        first, second, expected = stock(**inputs)[0], stock(**inputs)[0], probe(**inputs)[0]
    assert torch.equal(first, expected) and torch.equal(second, expected)
