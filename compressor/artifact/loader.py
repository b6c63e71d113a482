"""Loads an artifact as a model. It knows layers, but not passes. Format: docs/format.md."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from compressor.artifact.files import check_files
from compressor.artifact.manifest import BAD_HINT, Loadable, Manifest, model_class, read_manifest
from compressor.errors import ArtifactError, CompressError, UsageError, data_of
from compressor.kernels.prepared.prepare import prepare
from compressor.layers import find_layer
from compressor.model.attention import choose_plain
from compressor.model.checkpoint import Checkpoint, open_checkpoint
from compressor.model.empty_model import skeleton
from compressor.model.mapped_tensors import MappedTensors
from compressor.model.reshaped_class import class_for
from compressor.model.stored_weight import StoredWeight, joined_experts
from compressor.model.streamed import tied_value
from compressor.model.trusted_code import check_kernels
from compressor.model.weight_names import Bindings, bind, fill, fill_experts
from compressor.model.weights import Weight
from compressor.process.resources import ran_out
from compressor.storage.file_names import MANIFEST
from compressor.storage.safetensors_file import read_slices

KERNELS = ("auto", "strict", "reference")


def load(
    directory: str | Path,
    *,
    device: str = "cpu",
    check_hashes: bool = True,
    kernels: str = "auto",
    activations: str | None = None,
) -> transformers.PreTrainedModel:
    """The model of an artifact, as its stock class or a reshaped class, with stored layers in place of weights.

    Never runs code from the directory. Experts are dequantized to dense weights.

    kernels      auto: the fastest kernels of this machine (`compressor.kernels.explain` lists them); strict: the same,
                 but an error if a layer has none; reference: dequantize and multiply
    activations  int8: inputs are quantized to int8, see `compressor.kernels.prepare`
    raises       ArtifactError for anything that differs from the manifest; KernelError with strict
    """
    if kernels not in KERNELS:
        raise UsageError(
            f"kernels={kernels!r} is unknown",
            hint="Use one of: " + ", ".join(KERNELS),
            data={"kernels": str(kernels)},
        )
    directory = Path(directory)
    manifest = read_manifest(directory)
    if check_hashes:
        _check_hashes(directory, manifest)
    checkpoint = open_checkpoint(directory)
    with naming(directory.name):
        model = _filled_model(checkpoint, manifest)
    model = model.to(torch.device(device))  # type: ignore[arg-type]
    if kernels != "reference":
        prepare(model, activations=activations, strict=kernels == "strict")
    return model


def _check_hashes(directory: Path, manifest: Manifest) -> None:
    if problems := check_files(directory, manifest):
        raise ArtifactError(
            "; ".join(problems[:4]),
            where=directory.name,
            hint="Copy the artifact again from where it was written, or build it again.",
            data={"reason": "not-as-written", **data_of(problems)},
        )


class Unfilled:
    """The empty model of an artifact, and the values of its parameters and layers. They are read when asked for.

    model      on the meta device
    formats    weight name -> how it is stored
    dtype      dtype of dequantized weights
    modules    module that a layer replaces -> name of its weight. Experts are not modules
    matrix_of  gives the dequantized matrix (out_features, in_features) of a stored weight
    mapped     makes the parameters of experts; None: they are in memory
    """

    def __init__(self, checkpoint: Checkpoint, manifest: Manifest) -> None:
        beside = manifest.get("carried", {})  # tensors that this model doesn't use
        own = {name: info for name, info in checkpoint.tensors.items() if name not in beside}
        self.checkpoint = replace(checkpoint, tensors=own)
        self.formats = {name: StoredWeight.from_dict(entry) for name, entry in manifest["weights"].items()}
        self.dtype = _dtype(checkpoint)
        self.model = empty_model(self.checkpoint, manifest)
        self.bindings = bind(self.model, dense_view(self.checkpoint, self.formats, self.model, self.dtype), self.dtype)
        _check_places(self.formats, self.bindings)
        _check_slices(self.formats, self.model)
        for format_name in sorted({stored.format_name for stored in self.formats.values()}):
            find_layer(format_name).prepare(self.model)
        self.matrix_of: Callable[[StoredWeight], Tensor] = self._own_matrix
        self.mapped: MappedTensors | None = None
        self.modules = {
            stored_weight.weight.parameter.removesuffix(".weight"): name
            for name, stored_weight in self.formats.items()
            if stored_weight.weight.expert is None
        }
        self._slices: dict[str, list[StoredWeight]] = {}  # tensor of all experts -> the stored experts in it
        for stored in self.formats.values():
            if stored.weight.is_slice:
                self._slices.setdefault(stored.weight.tensor, []).append(stored)
        self._bias_holders = {
            stored_weight.bias: stored_weight
            for stored_weight in self.formats.values()
            if stored_weight.bias is not None
        }

    def layer(self, name: str) -> Any:
        """The layer of a stored weight, without its bias."""
        return _read_layer(self.checkpoint, self.formats[name])

    def value(self, name: str) -> Tensor:
        """The value of a parameter or buffer, dequantized if layers store it; of a tied one that of its origin."""
        return tied_value(name, self.bindings, self._read, self._read_experts, self.model, self.mapped)

    def place(self, module: str) -> Any:
        """Replace a module by its layer. Returns what was there before, or None."""
        name = self.modules[module]
        return _place_layer(self.model, module, self.formats[name], self.layer(name), self.dtype)

    def _own_matrix(self, stored: StoredWeight) -> Tensor:
        return self.layer(stored.weight.name).matrix(self.dtype)

    def _read(self, tensor: str) -> Tensor:
        """A tensor under its dense name, dequantized if a layer stores it."""
        holder = self._bias_holders.get(tensor)
        if holder is not None:
            return self.layer(holder.weight.name).vector(self.dtype)
        if tensor in self._slices:
            parameter = self.model.get_parameter(self._slices[tensor][0].weight.parameter)
            return fill_experts(torch.empty(parameter.shape, dtype=self.dtype), self._read_experts(tensor))
        stored = self.formats.get(tensor.removesuffix(".weight"))
        if stored is None:
            return self.checkpoint.read(tensor)
        matrix = self.matrix_of(stored)
        return matrix.t() if stored.weight.transposed else matrix

    def _read_experts(self, tensor: str) -> Iterator[Tensor]:
        """The matrices in a tensor of all experts, of which all are stored or none, as `_check_slices` knows."""
        stored = self._slices.get(tensor, [])
        raw = None if stored else read_slices(self.checkpoint.tensors[tensor])
        shape = self.model.get_parameter(self.bindings.parameters_by_tensor[tensor]).shape
        return joined_experts(raw, stored, shape, self.dtype, self.matrix_of)


def _filled_model(checkpoint: Checkpoint, manifest: Manifest) -> transformers.PreTrainedModel:
    """The model of an artifact on the CPU, with stored layers in place of weights."""
    unfilled = Unfilled(checkpoint, manifest)
    model, bindings = unfilled.model, unfilled.bindings
    for name in bindings.sources:
        if not is_replaced(name, unfilled.modules):
            fill(name, unfilled.value(name), model)
    for target, origin in bindings.tied.items():
        owner, _, leaf = target.rpartition(".")
        model.get_submodule(owner)._parameters[leaf] = model.get_parameter(origin)
    for module in unfilled.modules:
        unfilled.place(module)
    tensors = (*model.named_parameters(), *model.named_buffers())
    if (left := next((name for name, value in tensors if value.is_meta), None)) is not None:
        raise ArtifactError(
            f"the manifest has no value for {left}",
            where=MANIFEST,
            hint=BAD_HINT,
            data={"reason": "no-value", "missing": left},
        )
    return model


def is_replaced(name: str, modules: Collection[str]) -> bool:
    """Whether a parameter is the weight of a module that a layer replaces."""
    return name.endswith(".weight") and name.removesuffix(".weight") in modules


def _place_layer(
    model: transformers.PreTrainedModel, module: str, stored: StoredWeight, layer: Any, dtype: torch.dtype
) -> Any:
    """Replace the weight's module by a layer. If the layer has no bias, it gets the module's bias.

    returns  the module, or the parameter of a shortcut; None if there was none
    """
    owner, _, leaf = module.rpartition(".")
    if not (stored.weight.is_function or stored.weight.role == "shortcut"):
        model.get_submodule(module)  # a matrix replaces a module; that of a shortcut replaces a parameter
    before = getattr(model.get_submodule(owner), leaf, None)
    if stored.bias is None:
        layer.bias = getattr(before, "bias", None)
    layer.dtype = dtype
    setattr(model.get_submodule(owner), leaf, layer)
    return before


def _check_places(formats: dict[str, StoredWeight], bindings: Bindings) -> None:
    """Check that each stored matrix fills the parameter that transformers fills with its tensor, and nothing else.

    raises ArtifactError for a weight whose manifest entry names another parameter, or another slice of it
    """
    placed = {
        source.tensor: (name, source.expert, source.rows)
        for name, sources in bindings.sources.items()
        for source in sources
    }
    for name, stored in formats.items():
        weight = stored.weight
        if weight.is_function or weight.role == "shortcut":
            continue
        filled, expert, rows = placed.get(weight.tensor, (None, None, None))
        if weight.is_slice:
            expert, rows = weight.expert, weight.rows  # `_check_slices` compares them
        names = [bindings.tied.get(parameter, parameter) for parameter in (filled, weight.parameter) if parameter]
        if len(set(names)) != 1 or filled is None or (expert, rows) != (weight.expert, weight.rows):
            raise ArtifactError(
                f"the manifest loads {weight.tensor!r} into {_part(weight.parameter, weight.expert, weight.rows)}, "
                f"but transformers loads it into {_part(filled, expert, rows)}",
                where=name,
                hint=BAD_HINT,
                data={
                    "reason": "other-parameter",
                    "manifest": _part(weight.parameter, weight.expert, weight.rows),
                    "transformers": _part(filled, expert, rows),
                },
            )


def _check_slices(formats: dict[str, StoredWeight], model: transformers.PreTrainedModel) -> None:
    """Check that the weights of each tensor of all experts fill its parameter, every row once.

    raises ArtifactError naming the tensor
    """
    tensors: dict[str, list[Weight]] = {}
    for stored in formats.values():
        if stored.weight.is_slice:
            tensors.setdefault(stored.weight.tensor, []).append(stored.weight)
    for tensor, weights in tensors.items():
        parameter = model.get_parameter(weights[0].parameter)
        is_whole = parameter.dim() == 3 and len({(weight.parameter, weight.transposed) for weight in weights}) == 1
        if is_whole:
            experts, rows, columns = (parameter.mT if weights[0].transposed else parameter).shape
            filled = torch.zeros(experts, rows, dtype=torch.bool)
            is_whole = all(_fills(weight, filled, columns) for weight in weights) and bool(filled.all())
        if not is_whole:
            raise ArtifactError(
                f"the {len(weights)} weights of it in the manifest are not each row of each expert once",
                where=tensor,
                hint=BAD_HINT,
                data={"reason": "not-each-once", "weights": len(weights)},
            )


def _fills(weight: Weight, filled: Tensor, columns: int) -> bool:
    """Mark the rows of a weight in (experts, rows). Returns whether they are there and weren't marked before."""
    assert weight.expert is not None and weight.rows is not None
    start, stop = weight.rows
    if weight.expert >= len(filled) or stop > filled.shape[1] or weight.shape != (stop - start, columns):
        return False
    was_filled = bool(filled[weight.expert, start:stop].any())
    filled[weight.expert, start:stop] = True
    return not was_filled


def _part(parameter: str | None, expert: int | None, rows: tuple[int, int] | None) -> str:
    """The name of a parameter, or of a slice of one, for a message."""
    within = "" if expert is None and rows is None else f" (expert {expert}, rows {rows})"
    return f"{parameter or 'nothing'}{within}"


def empty_model(checkpoint: Checkpoint, manifest: Loadable) -> transformers.PreTrainedModel:
    """The model of an artifact on the meta device. raises ArtifactError if its config can't make one"""
    cls: Any = model_class(manifest["architecture"], MANIFEST)
    check_kernels(checkpoint.config)
    left_out = ("quantization_config", "auto_map", "model_type", "compressed_weights")
    with naming("config.json", holds_values=False):
        # as transformers reads config.json, where infinite numbers may be written as {"__float__": "Infinity"}
        read, _ = cls.config_class.get_config_dict(checkpoint.directory, local_files_only=True)
        values = {key: value for key, value in read.items() if key not in left_out}
        config = cls.config_class(**values)
        choose_plain(config, values)
        model = skeleton(class_for(cls, config), config, _dtype(checkpoint), cached=True)
        if model.can_generate() and (checkpoint.directory / "generation_config.json").is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(checkpoint.directory)
    return model


@contextmanager
def naming(where: str, *, holds_values: bool = True) -> Iterator[None]:
    """Turn any error of a class that is built from an artifact's config into an error that names the place.

    holds_values  the built model takes memory; if it is empty, running out of memory means that the sizes are absurd

    raises  ArtifactError, PassError if memory ran out
    """
    try:
        yield
    except CompressError:
        raise
    except Exception as error:
        if holds_values and (lack := ran_out(error)) is not None:
            raise lack from error
        raise ArtifactError(
            f"a model can't be built from it ({type(error).__name__}: {str(error)[:300]})",
            where=where,
            hint="Copy the artifact again from where it was written, or build it again.",
            data={"reason": "not-built", "error": type(error).__name__, "cause": str(error)[:300]},
        ) from error


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    name = checkpoint.config.get("dtype")
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise ArtifactError(
            f"dtype {name!r} is not a dtype of torch",
            where="config.json",
            hint="Copy the artifact again from where it was written, or build it again.",
            data={"reason": "no-dtype", "dtype": str(name)},
        )
    return dtype


def _read_layer(checkpoint: Checkpoint, stored: StoredWeight) -> Any:
    tensors = stored_tensors(checkpoint, stored)
    with naming(stored.weight.name):
        return find_layer(stored.format_name).from_tensors(stored.format_params, tensors)


def stored_tensors(checkpoint: Checkpoint, stored: StoredWeight) -> dict[str, Tensor]:
    """The tensors of a stored weight, by suffix."""
    prefix = stored.weight.name + "."
    return {name.removeprefix(prefix): checkpoint.read(name) for name in _stored_names(checkpoint, stored)}


def _stored_names(checkpoint: Checkpoint, stored: StoredWeight) -> list[str]:
    """Tensors of a weight in its format, without a dense bias beside it, which may have been tied before."""
    prefix = stored.weight.name + "."
    has_dense_bias = not (stored.weight.is_function or find_layer(stored.format_name).holds_bias(stored.format_params))
    dense = {stored.weight.bias, f"{prefix}bias" if has_dense_bias else None}
    return [name for name in checkpoint.tensors if name.startswith(prefix) and name not in dense]


def dense_view(
    checkpoint: Checkpoint,
    formats: dict[str, StoredWeight],
    model: transformers.PreTrainedModel,
    dtype: torch.dtype,
) -> Checkpoint:
    """The checkpoint with each stored weight under its dense name and shape, for translating names.

    model  the artifact's, on the meta device
    """
    tensors, parameters = dict(checkpoint.tensors), dict(model.named_parameters())
    for stored_weight in formats.values():
        stored = _stored_names(checkpoint, stored_weight)
        if not stored:
            raise ArtifactError(
                "all tensors of this stored weight are missing",
                where=stored_weight.weight.name,
                hint=BAD_HINT,
                data={"reason": "no-tensors"},
            )
        if (
            stored_weight.weight.bias is not None
            and stored_weight.bias is None
            and stored_weight.weight.bias not in checkpoint.tensors
        ):
            raise ArtifactError(
                f"its bias {stored_weight.weight.bias!r} is missing",
                where=stored_weight.weight.name,
                hint=BAD_HINT,
                data={"reason": "no-bias", "bias": stored_weight.weight.bias},
            )
        shape: tuple[int, ...] = (
            stored_weight.weight.shape[::-1] if stored_weight.weight.transposed else stored_weight.weight.shape
        )
        if stored_weight.weight.is_slice:
            if stored_weight.weight.parameter not in parameters:
                raise ArtifactError(
                    f"the manifest puts it into {stored_weight.weight.parameter!r}, which the model doesn't have",
                    where=stored_weight.weight.name,
                    hint=BAD_HINT,
                    data={"reason": "no-parameter", "parameter": stored_weight.weight.parameter},
                )
            shape = tuple(parameters[stored_weight.weight.parameter].shape)
        dense = replace(tensors[stored[0]], shape=shape, dtype=dtype)
        for name in stored:
            del tensors[name]
        if stored_weight.weight.tensor:
            tensors[stored_weight.weight.tensor] = dense
        if stored_weight.bias is not None:
            tensors[stored_weight.bias] = replace(dense, shape=(stored_weight.weight.out_features,))
    return replace(checkpoint, tensors=tensors)
