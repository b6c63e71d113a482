"""Loads the model of an artifact block by block, for models that are larger than memory.

Weights are dequantized in one of two ways: by this package's layers, as `compressor.load` does, or by the library that
owns the stock format (compressed-tensors), as its loader does. bitsandbytes has layers of its own instead, which can't
be loaded in parts; what such layers compute is then computed by ours.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor
from transformers import CompressedTensorsConfig

from compressor.artifact.loader import Unfilled, is_replaced, naming, stored_tensors
from compressor.artifact.manifest import Manifest
from compressor.artifact.stock_formats import module_of
from compressor.errors import ArtifactError
from compressor.layers import find_layer
from compressor.model.checkpoint import Checkpoint
from compressor.model.mapped_tensors import MappedTensors
from compressor.model.stored_weight import StoredWeight
from compressor.model.streamed import StreamedModel
from compressor.model.structure import find_blocks
from compressor.model.weight_names import fill

Decompress = Callable[[StoredWeight], Tensor]


def load_streamed(checkpoint: Checkpoint, manifest: Manifest, decompress: Decompress | None = None) -> StreamedModel:
    """The model of an artifact, on the CPU, whose blocks are in memory only while they run.

    decompress  None: every stored weight is a layer, as in `compressor.load`. Otherwise it gives the dense matrix of a
                stored weight
    raises      ArtifactError for anything that differs from the manifest; ModelError for a model without blocks
    """
    with naming(checkpoint.directory.name):
        unfilled = Unfilled(checkpoint, manifest)
        unfilled.matrix_of = decompress or unfilled.matrix_of
        layers = [
            module
            for module, name in unfilled.modules.items()
            if decompress is None or not find_layer(unfilled.formats[name].format_name).weight_only
        ]
        path = find_blocks(unfilled.model)
        return StreamedModel(ArtifactFiller(unfilled, layers, path), path, unfilled.bindings.unused)


class ArtifactFiller:
    """Fills the model of an artifact block by block, and puts the layers of each block in place.

    Layers outside of blocks stay in memory. They are compressed, and a module can't be replaced while it runs.
    """

    def __init__(self, unfilled: Unfilled, layers: Collection[str], blocks_path: str) -> None:
        self.unfilled, self.model = unfilled, unfilled.model
        self.in_blocks = {module for module in layers if module.startswith(blocks_path + ".")}
        self.replaced: dict[str, Any] = {}  # module -> what its layer has replaced
        outside = set(layers) - self.in_blocks
        for module in sorted(outside):
            if (bias := f"{module}.bias") in unfilled.bindings.sources:  # the layer takes it from the module
                fill(bias, unfilled.value(bias), self.model)
            unfilled.place(module)
        outer = tuple(f"{module}." for module in outside)
        names = [*unfilled.bindings.sources, *unfilled.bindings.tied]
        self._names = [name for name in names if not name.startswith(outer) and not is_replaced(name, self.in_blocks)]

    @property
    def mapped(self) -> MappedTensors | None:
        return self.unfilled.mapped

    @mapped.setter
    def mapped(self, value: MappedTensors | None) -> None:
        self.unfilled.mapped = value

    def names(self) -> list[str]:
        return self._names

    def fill(self, part: str, names: Sequence[str]) -> None:
        for name in names:
            fill(name, self.unfilled.value(name), self.model)
        for module in self._layers_of(part):
            self.replaced[module] = self.unfilled.place(module)

    def free(self, part: str, names: Sequence[str]) -> None:
        for module in self._layers_of(part):
            owner, _, leaf = module.rpartition(".")
            before = self.replaced.pop(module)
            if before is None:
                delattr(self.model.get_submodule(owner), leaf)
            else:
                setattr(self.model.get_submodule(owner), leaf, before)
        for name in names:
            fill(name, None, self.model)

    def _layers_of(self, part: str) -> list[str]:
        return [module for module in sorted(self.in_blocks) if module.startswith(part + ".")]


@dataclass(frozen=True)
class StockDecompressor:
    """Dequantizes the stored weights of a compressed-tensors artifact with the code of that library.

    schemes  the library's own reading of `quantization_config`
    dtype    dtype of the model
    """

    checkpoint: Checkpoint
    config: Any
    dtype: torch.dtype

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> StockDecompressor:
        """raises ArtifactError if the library can't read `quantization_config`"""
        values = {key: value for key, value in (checkpoint.quantization_config or {}).items() if key != "quant_method"}
        with naming("config.json", holds_values=False):
            config = CompressedTensorsConfig(**values).quantization_config
        return cls(checkpoint, config, getattr(torch, checkpoint.config["dtype"]))

    def __call__(self, stored: StoredWeight) -> Tensor:
        """The dense matrix (out_features, in_features). raises ArtifactError if the stored tensors don't fit"""
        scheme = self._scheme(stored)
        compressor = BaseCompressor.get_value_from_registry(scheme.format or self.config.format)
        tensors = stored_tensors(self.checkpoint, stored)
        if lacking := sorted(set(compressor.compression_param_names(scheme)) - tensors.keys()):
            raise ArtifactError(
                f"compressed-tensors needs {', '.join(lacking)}, which it doesn't have",
                where=stored.weight.name,
                hint="Copy the artifact again from where it was written, or build it again.",
                data={"reason": "lacks-tensors", "tensors": lacking},
            )
        with naming(stored.weight.name):
            return compressor.decompress(tensors, scheme)["weight"].to(self.dtype)

    def _scheme(self, stored: StoredWeight) -> QuantizationScheme:
        """The config group of a weight: the one that names its module, or of an expert the one for experts."""
        groups = list(self.config.config_groups.values())
        for group in groups:
            named = any(target.startswith("re:") and "experts" in target for target in group.targets)
            if named if stored.weight.expert is not None else module_of(stored) in group.targets:
                return group
        raise ArtifactError(
            "no config group of quantization_config names it",
            where=stored.weight.name,
            hint="Copy the artifact again from where it was written, or build it again.",
        )
