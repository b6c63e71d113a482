"""Loads a part of the model: the embeddings, one block, or the output head.

The tensors of a part come either from the source checkpoint or from a part file that an earlier sweep wrote. Both are
read by checkpoint name, so one function fills the model from either. A weight in a quantization format is dequantized
first. So the running model computes exactly what a user of the artifact will get.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from compressor.layers import find_layer
from compressor.layers.base import Layer
from compressor.model.mapped_tensors import MappedTensors, expert_parameters
from compressor.model.stored_weight import StoredWeight, joined_experts, replaced_tensors
from compressor.model.structure import Structure
from compressor.model.weight_names import fill, fill_experts, read_experts_parameter, read_parameter
from compressor.model.weights import Weight, part_of
from compressor.process.memory import return_freed_memory
from compressor.storage.safetensors_file import Entry, TensorInfo, read_header, read_pieces, read_slices


@dataclass
class PartSource:
    """Where a part's tensors are read from: a file of an earlier sweep, or (file None) the source checkpoint."""

    structure: Structure
    file: Path | None = None
    formats: dict[str, StoredWeight] = field(default_factory=dict)  # weight name -> its format, without dense weights

    def names(self, part: int) -> list[str]:
        """Checkpoint names of the tensors in this part, sorted."""
        if self.file is not None:
            return sorted(self._header)
        return sorted(tensor for tensor, at in self.structure.part_by_tensor.items() if at == part)

    def read(self, tensor: str) -> Tensor:
        """A dense tensor by checkpoint name, in transformers' dtype for it. A stored weight is dequantized.

        raises ModelError for a source tensor that holds NaN or Inf
        """
        dtype = self.structure.dtype
        if self.file is None:
            return self.structure.read(tensor)
        if self._slices(tensor):
            empty = torch.empty(self._parameter(tensor).shape, dtype=self._experts_dtype(tensor))
            return fill_experts(empty, self.read_experts(tensor))
        stored = self.formats.get(tensor.removesuffix(".weight"))
        if stored is not None:
            matrix = self.layer(stored).matrix(dtype)
            return matrix.t().contiguous() if stored.weight.transposed else matrix
        holder = next(
            (stored for stored in self.formats.values() if stored.weight.bias == tensor and stored.bias), None
        )
        if holder is not None:
            return self.layer(holder).vector(dtype)
        with safe_open(self.file, framework="pt") as opened:
            return opened.get_tensor(tensor)

    def read_experts(self, tensor: str) -> Iterator[Tensor]:
        """The matrices (rows, columns) in a tensor of all experts, as its parameter has them. Stored ones are
        dequantized. The file has the tensor unless all of them are stored.
        """
        dtype, raw = self._experts_dtype(tensor), None
        if self.file is None:
            raw = self.structure.read_slices(tensor)
        elif tensor in self._header:
            raw = read_slices(self._header[tensor])
        return joined_experts(
            raw,
            self._slices(tensor),
            self._parameter(tensor).shape,
            dtype,
            lambda format_name: self.layer(format_name).matrix(dtype),
        )

    def _experts_dtype(self, tensor: str) -> torch.dtype:
        is_dense = self.file is None or tensor in self._header
        return self.structure.bindings.dtype_of(tensor) if is_dense else self.structure.dtype

    def _slices(self, tensor: str) -> list[StoredWeight]:
        """The stored weights in a tensor of all experts."""
        return [stored for stored in self.formats.values() if stored.weight.tensor == tensor and stored.weight.is_slice]

    def _parameter(self, tensor: str) -> Tensor:
        return self.structure.model.get_parameter(self.structure.bindings.parameters_by_tensor[tensor])

    @cached_property
    def _header(self) -> dict[str, TensorInfo]:
        assert self.file is not None
        return read_header(self.file)

    def layer(self, stored: StoredWeight) -> Layer:
        """The layer of a stored weight, without its bias."""
        assert self.file is not None
        with safe_open(self.file, framework="pt") as opened:
            names = [name for name in opened.keys() if _belongs(name, stored.weight)]  # noqa: SIM118
            tensors = {name.removeprefix(stored.weight.name + "."): opened.get_tensor(name) for name in names}
        return find_layer(stored.format_name).from_tensors(stored.format_params, tensors)

    def entry(self, tensor: str) -> Entry:
        """A tensor as this source stores it, for writing."""
        if self.file is not None:
            info = self._header[tensor]
            return Entry(tensor, info.dtype, info.shape, partial(read_pieces, info))
        info, read = self.structure.checkpoint.tensors[tensor], self.structure.read
        whole = partial(self.structure.read_slices, tensor) if info.is_sliced else lambda: [read(tensor)]
        return Entry(tensor, self.structure.bindings.dtype_of(tensor), info.shape, whole)


@dataclass
class Installed:
    """Replaces modules of the running model by layers whose forward is more than a matmul with a weight.

    originals  path of a module -> the module that a layer replaced; None if there was none
    """

    structure: Structure
    originals: dict[str, nn.Module | None] = field(default_factory=dict)

    def install(self, weight: Weight, layer: Layer) -> None:
        """Replace the module that holds the weight, or that is the function, by the layer. The layer gets its bias."""
        if not layer.holds_bias(layer.format_params()):
            layer.bias = getattr(self._module(weight), "bias", None)  # type: ignore[assignment]
        self.place(weight, layer.eval())

    def place(self, weight: Weight, module: nn.Module) -> None:
        """Replace the module that holds the weight by another module."""
        path = weight.parameter.removesuffix(".weight")
        self.originals.setdefault(path, self._module(weight))
        self._set(path, module)

    def take_back(self, weight: Weight) -> None:
        """Restore the module that holds the weight, if a layer replaced it."""
        path = weight.parameter.removesuffix(".weight")
        if path in self.originals:
            self._set(path, self.originals.pop(path))

    def install_stored(self, source: PartSource, device: torch.device) -> None:
        """Install every layer of the source that must be installed: those that are not weight-only."""
        for stored in source.formats.values():
            if not find_layer(stored.format_name).weight_only:
                self.install(stored.weight, source.layer(stored).to(device))

    def remove(self) -> None:
        """Restore every replaced module. This must be done before the part is loaded or freed."""
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


def fill_part(
    structure: Structure,
    part: int,
    source: PartSource,
    device: torch.device,
    compared: Collection[str] = (),
    mapped: MappedTensors | None = None,
) -> bool:
    """Fill the model's parameters of one part. All other parameters stay as they are.

    compared  names of parameters that have values
    mapped    makes the parameters of experts; None: they are in memory
    returns   whether `compared` had the same values before
    """
    same = True
    for name, value in _values(structure, part, source, mapped):
        value = value.to(device)
        same = same and (name not in compared or _equal(structure.model.get_parameter(name), value))
        fill(name, value, structure.model)
    tie(structure)
    return same


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of the same shape are equal. Experts are compared one after the other."""
    return all(map(torch.equal, one, other)) if one.dim() == 3 else torch.equal(one, other)


def _values(
    structure: Structure, part: int, source: PartSource, mapped: MappedTensors | None
) -> Iterator[tuple[str, Tensor]]:
    """(name, value) of the parameters of a part, one after the other."""
    names, model, bindings = structure.parameters_of(part), structure.model, structure.bindings
    experts = expert_parameters(model, names) if mapped is not None else ()
    for name in names:
        if mapped is not None and name in experts:
            value = read_experts_parameter(name, bindings, source.read, source.read_experts, model, mapped.empty)
        else:
            value = read_parameter(name, bindings, source.read, model)
        yield name, value.to(bindings.dtypes[name])
    for stored in source.formats.values():
        if stored.weight.parameter in structure.bindings.tied:  # an untied output head has no tensor in the source
            yield stored.weight.parameter, source.read(stored.weight.tensor)


def free_part(structure: Structure, part: int) -> None:
    for name in structure.parameters_of(part):
        fill(name, None, structure.model)
    return_freed_memory()


def free_all(structure: Structure) -> None:
    for part in range(structure.block_count + 2):
        free_part(structure, part)
    for target in structure.bindings.tied:
        fill(target, None, structure.model)


def tie(structure: Structure) -> None:
    """Let each tied parameter share the storage of its source, except one that has an untied value."""
    model = structure.model
    for target, source in structure.bindings.tied.items():
        owner, _, leaf = target.rpartition(".")
        module = model.get_submodule(owner)
        if getattr(module, leaf).is_meta:
            module._parameters[leaf] = model.get_parameter(source)


def part_name(structure: Structure, part: int) -> str:
    return "embeddings" if part == 0 else "output head" if part > structure.block_count else f"block {part - 1}"


def view(structure: Structure, weight: Weight) -> Tensor:
    """The slice of a parameter that is this weight, as (out_features, in_features). Writes change the parameter."""
    return part_of(structure.model.get_parameter(weight.parameter).data, weight)


def part_entries(
    part: int, source: PartSource, put: dict[str, tuple[StoredWeight, Layer]], written: dict[str, Tensor]
) -> Iterator[Entry]:
    """The tensors of a part file: every tensor of the source except those of replaced weights, and the new layers.

    Tensors of the source are read when they are written.

    written  new values of dense tensors, by name
    """
    earlier = [stored for name, stored in source.formats.items() if stored.weight.is_slice and name not in put]
    replaced = replaced_tensors([*earlier, *(stored for stored, _ in put.values())], source.structure.checkpoint)
    for tensor in source.names(part):
        if tensor not in replaced and not any(_belongs(tensor, stored.weight) for stored, _ in put.values()):
            yield _entry(tensor, written[tensor]) if tensor in written else source.entry(tensor)
    for name, (stored, layer) in put.items():
        for suffix, value in layer.tensors().items():
            yield _entry(f"{name}.{suffix}", value, copied=stored.weight.expert is not None)


def _entry(name: str, value: Tensor, *, copied: bool = False) -> Entry:
    """A tensor that exists.

    copied  it may lie in a mapped file, whose pages can be given back if a copy is written
    """
    return Entry(name, value.dtype, tuple(value.shape), lambda: [value.clone() if copied else value])


def _belongs(tensor: str, weight: Weight) -> bool:
    """Whether a tensor of a part file belongs to the quantization format of this weight."""
    return tensor.startswith(weight.name + ".") and tensor != weight.bias
