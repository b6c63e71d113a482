"""Loads a part of the model: the embeddings, one block, or the output head.

A part's tensors come either from the source checkpoint or from a part file that an earlier sweep wrote. Both are read
by checkpoint name, so one function fills the model from either; a weight in a stored form is rebuilt first, which is
what makes the running model compute exactly what a user of the artifact will get.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from compressor.layers import find_layer
from compressor.layers.base import Layer
from compressor.model.stored_weight import StoredWeight
from compressor.model.structure import Structure
from compressor.model.weight_names import fill, read_parameter
from compressor.model.weights import Weight, part_of

M_MMAP_THRESHOLD = -3  # malloc.h
LARGE_BLOCK_BYTES = 4 << 20


@dataclass
class PartSource:
    """Where a part's tensors are read from: a file of an earlier sweep, or (file None) the source checkpoint."""

    structure: Structure
    file: Path | None = None
    forms: dict[str, StoredWeight] = field(default_factory=dict)  # weight name -> form, only weights that are not dense

    def names(self, part: int) -> list[str]:
        """Checkpoint names of the tensors this part stores, sorted."""
        if self.file is not None:
            with safe_open(self.file, framework="pt") as opened:
                return sorted(opened.keys())
        return sorted(tensor for tensor, at in self.structure.part_by_tensor.items() if at == part)

    def read(self, tensor: str) -> Tensor:
        """A dense tensor by checkpoint name, in the dtype that transformers holds it in; stored weights are rebuilt.

        raises ModelError for a source tensor that holds NaN or Inf
        """
        dtype = self.structure.dtype
        if self.file is None:
            return self.structure.read(tensor)
        form = self.forms.get(tensor.removesuffix(".weight"))
        if form is not None:
            matrix = self.layer(form).matrix(dtype)
            return matrix.t().contiguous() if form.weight.transposed else matrix
        holder = next((form for form in self.forms.values() if form.weight.bias == tensor and form.bias), None)
        if holder is not None:
            return self.layer(holder).vector(dtype)
        with safe_open(self.file, framework="pt") as opened:
            return opened.get_tensor(tensor)

    def layer(self, form: StoredWeight) -> Layer:
        """A stored weight as its layer, without the bias."""
        assert self.file is not None
        with safe_open(self.file, framework="pt") as opened:
            names = [name for name in opened.keys() if _belongs(name, form.weight)]  # noqa: SIM118
            tensors = {name.removeprefix(form.weight.name + "."): opened.get_tensor(name) for name in names}
        return find_layer(form.form).from_tensors(form.spec, tensors)

    def raw(self, tensor: str) -> Tensor:
        """A tensor as this source stores it, by its name there."""
        if self.file is None:
            return self.read(tensor)
        with safe_open(self.file, framework="pt") as opened:
            return opened.get_tensor(tensor)


@dataclass
class Installed:
    """Layers that stand in the running model, because their forward is more than a multiply by their matrix.

    originals  path of a module -> the module whose place a layer took; None where there was none
    """

    structure: Structure
    originals: dict[str, nn.Module | None] = field(default_factory=dict)

    def install(self, weight: Weight, layer: Layer) -> None:
        """Put the layer, with the module's bias, in place of the module that holds the weight or is the function."""
        if not layer.holds_bias(layer.spec()):
            layer.bias = getattr(self._module(weight), "bias", None)  # type: ignore[assignment]
        self.place(weight, layer.eval())

    def place(self, weight: Weight, module: nn.Module) -> None:
        """Put a module in place of the one that holds the weight."""
        path = weight.parameter.removesuffix(".weight")
        self.originals.setdefault(path, self._module(weight))
        self._set(path, module)

    def take_back(self, weight: Weight) -> None:
        """Give the module that holds the weight its place back, if a layer has it."""
        path = weight.parameter.removesuffix(".weight")
        if path in self.originals:
            self._set(path, self.originals.pop(path))

    def install_stored(self, source: PartSource, device: torch.device) -> None:
        """The same for every such form that the source holds."""
        for form in source.forms.values():
            if not find_layer(form.form).weight_only:
                self.install(form.weight, source.layer(form).to(device))

    def remove(self) -> None:
        """Give every module its place back; do so before the part is loaded or freed."""
        for path, module in self.originals.items():
            self._set(path, module)
        self.originals.clear()

    def _module(self, weight: Weight) -> nn.Module | None:
        owner, _, leaf = weight.parameter.removesuffix(".weight").rpartition(".")
        return getattr(self.structure.model.get_submodule(owner), leaf, None)

    def _set(self, path: str, module: nn.Module | None) -> None:
        owner, _, leaf = path.rpartition(".")
        if module is None:
            delattr(self.structure.model.get_submodule(owner), leaf)
        else:
            setattr(self.structure.model.get_submodule(owner), leaf, module)


def fill_part(structure: Structure, part: int, source: PartSource, device: torch.device) -> None:
    """Fill the model's parameters of one part; everything else stays where it is."""
    for name in structure.parameters_of(part):
        value = read_parameter(name, structure.bindings, source.read, structure.model)
        fill(name, value.to(device, structure.bindings.dtypes[name]), structure.model)
    for form in source.forms.values():
        if form.weight.parameter in structure.bindings.tied:  # an untied head has no tensor in the source
            fill(form.weight.parameter, source.read(form.weight.tensor).to(device), structure.model)
    tie(structure)


def free_part(structure: Structure, part: int) -> None:
    for name in structure.parameters_of(part):
        fill(name, None, structure.model)
    _return_freed_memory()


def return_large_blocks() -> None:
    """Have the C library give every large block back as soon as it is freed, where it is glibc.

    By default glibc learns to keep freed blocks of up to 32 MB for itself, and what is kept from batch to batch settles
    between them. Measured on a Llama of width 512: peak of the sweep 0.96 GB by default, 0.81 GB with 4 MiB, in the
    same time; with 1 MiB the demo model's sweep took a third longer, since every fresh page costs a fault.
    """
    if (libc := _glibc()) is not None:
        libc.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


def _return_freed_memory() -> None:
    """Give freed pages back to the system; by our measurement small ones pile up to 13 MB a block of 13 MB blocks."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """glibc, where it is the C library; elsewhere there is nothing to call."""
    return ctypes.CDLL("libc.so.6") if sys.platform == "linux" and platform.libc_ver()[0] == "glibc" else None


def free_all(structure: Structure) -> None:
    for part in range(structure.block_count + 2):
        free_part(structure, part)
    for target in structure.bindings.tied:
        fill(target, None, structure.model)


def tie(structure: Structure) -> None:
    """Let tied parameters share their source's storage, unless an untied value was put there."""
    model = structure.model
    for target, source in structure.bindings.tied.items():
        owner, _, leaf = target.rpartition(".")
        module = model.get_submodule(owner)
        if getattr(module, leaf).is_meta:
            module._parameters[leaf] = model.get_parameter(source)


def part_name(structure: Structure, part: int) -> str:
    return "embeddings" if part == 0 else "output head" if part > structure.block_count else f"block {part - 1}"


def view(structure: Structure, weight: Weight) -> Tensor:
    """The part of the model's parameter that holds this weight, as (out_features, in_features); writes go through."""
    return part_of(structure.model.get_parameter(weight.parameter).data, weight)


def part_tensors(
    part: int, source: PartSource, put: dict[str, tuple[StoredWeight, Layer]], written: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """What a part's file will hold: every tensor of the source except those of replaced weights, and the new layers.

    written  dense tensors that have new values, by their names
    """
    replaced = {name for form, _ in put.values() for name in (form.weight.tensor, form.bias)}
    for tensor in source.names(part):
        if tensor not in replaced and not any(_belongs(tensor, form.weight) for form, _ in put.values()):
            yield tensor, written[tensor] if tensor in written else source.raw(tensor)
    for name, (_, layer) in put.items():
        for suffix, value in layer.tensors().items():
            yield f"{name}.{suffix}", value


def _belongs(tensor: str, weight: Weight) -> bool:
    """Whether a tensor of a part file is part of this weight's stored form."""
    return tensor.startswith(weight.name + ".") and tensor != weight.bias
