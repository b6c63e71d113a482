"""Tries the loaders of an artifact on a small probe model, before any work.

The probe model has the model's class, few blocks, and the smallest width that its config allows: sizes that are
dimensions of parameters are divided by one power of two. It gets random weights, is saved, read again and stored with
made-up codes in the formats of the plan. Then the artifact's loaders load it (transformers alone, and
`compressor.load`), and both models must compute the same. This finds what a loader can't do with this class: a class
that initializes the `weight` of modules which have none while packed, code that reads such a weight, and tensors that
the loader renames or joins.
"""

from __future__ import annotations

import copy
import hashlib
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from compressor.artifact.artifact_config import artifact_config
from compressor.artifact.export_format import ExportFormat
from compressor.artifact.loader import load
from compressor.artifact.manifest import Loadable
from compressor.artifact.modeling_file import modeling_source
from compressor.artifact.stock_formats import FAMILIES
from compressor.artifact.stock_loading import load_stock
from compressor.artifact.writer import seal, write_json
from compressor.errors import Because
from compressor.layers.base import Layer
from compressor.layers.byte_linear import ByteLinear
from compressor.layers.int8_split_linear import Int8SplitLinear
from compressor.layers.packed_linear import PackedLinear
from compressor.methods.quantization.uniform_grid import find_grid, quantize
from compressor.model.block_runner import output_of, without_cache
from compressor.model.checkpoint import open_checkpoint
from compressor.model.model_class import config_and_class
from compressor.model.narrow_shapes import divide_shapes
from compressor.model.probe_model import example_batch, make_probe_model, use_eager_experts
from compressor.model.remembered import remembered
from compressor.model.reshaped_class import is_reshaped
from compressor.model.stored_weight import StoredWeight, has_experts, replaced_tensors
from compressor.model.structure import Structure, structure_of
from compressor.model.weight_names import read_matrix

LEAST_WIDTH = 64  # smallest input width of a stored weight
GROUP = 32  # group size in the probe model, if the plan has groups
VOCABULARY = 512
MOST_PARAMETERS = 1 << 26  # of a probe model that is tried; 128 MiB in 16 bits


class NoProbeModel(Exception):
    """No probe model of the class could be made, or none is small enough. obstacle: of the last attempt"""

    def __init__(self, obstacle: Because) -> None:
        self.obstacle = obstacle
        super().__init__(obstacle)


def try_loaders(structure: Structure, formats: Sequence[StoredWeight], export_format: ExportFormat) -> str | None:
    """Why an artifact of these weights in this export format can't load or computes other values; None if it works.

    Only the formats of `EXAMPLES` are tried. raises NoProbeModel if none can be made
    """
    if not {stored.format_name for stored in formats} <= EXAMPLES.keys():
        return None
    planned = hashlib.sha256(repr(formats).encode()).hexdigest()  # a model of many experts has many weights
    key = ("loaders", structure.probes.key, export_format, planned)
    return remembered(key, partial(_try_loaders, structure, formats, export_format))


def _try_loaders(structure: Structure, formats: Sequence[StoredWeight], export_format: ExportFormat) -> str | None:
    """raises NoProbeModel"""
    try:
        bars = io.StringIO()  # hides progress bars of libraries, which are about the probe model
        with tempfile.TemporaryDirectory(prefix="compress-model-") as scratch, redirect_stderr(bars):
            probe = _save_probe_model(structure, formats, Path(scratch) / "probe")
            return _try(probe, formats, export_format, Path(scratch) / "artifact")
    finally:
        logging.enable_progress_bar()


def _try(probe: Structure, formats: Sequence[StoredWeight], export_format: ExportFormat, directory: Path) -> str | None:
    stored = _store(probe, formats, export_format, directory)
    if not stored:
        return None
    manifest: Loadable = {
        "architecture": probe.architecture,
        "route": export_format.name,
        "weights": {stored_weight.weight.name: stored_weight.to_dict() for stored_weight in stored},
        "files": {},
    }
    try:
        stock, info = load_stock(directory, manifest)
    except Exception as error:  # any error of the loader is the result
        cause = error.__cause__ or error
        return f"the loader stops ({type(cause).__name__}: {str(cause)[:200]})"
    for key in ("missing", "unexpected", "mismatched"):
        if info[f"{key}_keys"]:
            name = min(map(str, info[f"{key}_keys"]))
            return f"the loader reports {len(info[f'{key}_keys'])} {key} tensors, such as {name}"
    try:
        own = load(directory, check_hashes=False, kernels="reference")
        for model in (stock, own):
            use_eager_experts(model.config)
        batch = example_batch(stock, torch.device("cpu"))
        with torch.no_grad(), without_cache(stock, own):
            found, expected = output_of(stock(**batch)).float(), output_of(own(**batch)).float()
    except Exception as error:
        return f"the loaded model can't run ({type(error).__name__}: {str(error)[:200]})"
    if export_format.name in FAMILIES and FAMILIES[export_format.name].forward is not None:
        return None  # layers that round in their forward
    numbers = torch.finfo(stock.dtype)
    allowed = max((len(probe.pieces) + 1) * numbers.eps * float(expected.abs().max()), numbers.tiny)
    difference = float((found - expected).abs().max())
    if not difference <= allowed:  # NaN fails too
        return f"the loader's model computes something else (outputs differ by {difference:.3g})"
    return None


def _save_probe_model(structure: Structure, formats: Sequence[StoredWeight], directory: Path) -> Structure:
    """Save a small checkpoint of the model's class. raises NoProbeModel"""
    logging.disable_progress_bar()
    obstacle = Because("")
    cls = type(structure.model)
    shallow = structure.probes.whole.config
    for change in _narrowings(shallow, structure, formats):
        try:
            config = change()
            empty = make_probe_model(cls, config, torch.device("meta"), structure.dtype)
            size = sum(parameter.numel() for parameter in empty.parameters())
            if size > MOST_PARAMETERS:
                text = f"its smallest probe model has {size:,} parameters; at most {MOST_PARAMETERS:,} are tried"
                obstacle = Because(text, reason="large", parameters=size, limit=MOST_PARAMETERS)
                continue
            probe = make_probe_model(cls, config, torch.device("cpu"), structure.dtype, empty)
            with torch.no_grad():  # a class may be made at sizes at which it can't run, as with too few experts
                probe(**example_batch(probe, torch.device("cpu")))
            probe.config.architectures = [structure.architecture]
            for key in (
                "auto_map",
                "transformers_weights",
            ):  # name files of the model's directory, which the probe model's lacks
                vars(probe.config).pop(key, None)
            probe.save_pretrained(directory)
            return _read(directory, structure)
        except Exception as error:  # the class or config rejects these sizes; the next are nearer to its own
            cause = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            obstacle = Because(f"no probe model can be made ({cause})", reason="not-made", cause=cause)
    raise NoProbeModel(obstacle)


def _read(directory: Path, structure: Structure) -> Structure:
    """The structure of a probe model that was saved: its blocks are those of `structure`."""
    checkpoint = open_checkpoint(directory)
    config, cls = config_and_class(checkpoint, False)
    return structure_of(checkpoint, cls, config, str(structure.dtype).removeprefix("torch."), structure)


def _narrowings(
    config: PretrainedConfig, structure: Structure, formats: Sequence[StoredWeight]
) -> Iterator[Callable[[], PretrainedConfig]]:
    """Configs to try: the narrowest first, the config itself last."""
    sizes = {size for parameter in structure.model.parameters() for size in parameter.shape}
    inputs = [stored.weight.in_features for stored in formats if not stored.weight.is_function]
    factor = 1
    while inputs and all(n % (2 * factor * GROUP) == 0 and n // (2 * factor) >= LEAST_WIDTH for n in inputs):
        factor *= 2
    while factor > 1:
        yield partial(_divided, type(structure.model), config, sizes, factor)
        factor //= 2
    yield partial(_divided, type(structure.model), config, set(), 1)
    yield lambda: config


def _divided(cls: type[PreTrainedModel], config: PretrainedConfig, sizes: set[int], factor: int) -> PretrainedConfig:
    """raises ValueError for shapes of a reshaped model that can't be divided"""
    narrow = copy.deepcopy(config)
    parts = [narrow, *(value for value in vars(narrow).values() if isinstance(value, PretrainedConfig))]
    for part in parts:
        vocabulary = getattr(part, "vocab_size", None)
        for key, value in list(vars(part).items()):
            if type(value) is not int:
                continue
            if key == "head_dim" or (value in sizes and value % factor == 0 and value > factor and key != "vocab_size"):
                setattr(part, key, value // factor)
        if isinstance(vocabulary, int) and vocabulary > VOCABULARY:
            part.vocab_size = VOCABULARY
            for key, value in list(vars(part).items()):
                if key.endswith("_token_id") and isinstance(value, int) and value >= VOCABULARY:
                    setattr(part, key, 0)
    if is_reshaped(config) and not divide_shapes(cls, config, narrow):
        raise ValueError(f"its shapes can't be divided by {factor}")
    return narrow


def _store(
    probe: Structure, formats: Sequence[StoredWeight], export_format: ExportFormat, directory: Path
) -> list[StoredWeight]:
    """Write the probe model as an artifact in the planned formats. Returns the stored weights in it."""
    planned = {
        (
            stored_weight.weight.parameter,
            stored_weight.weight.expert,
            stored_weight.weight.rows is not None,
        ): stored_weight
        for stored_weight in formats
    }
    directory.mkdir()
    tensors = {
        name: value
        for file in sorted(probe.checkpoint.directory.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }
    stored = []
    for _, weight in probe.weights():
        stored_weight = planned.get((weight.parameter, weight.expert, weight.rows is not None))
        if stored_weight is None or weight.tensor not in tensors:
            continue
        take = tensors.__getitem__ if weight.is_slice else tensors.pop
        made = _example(stored_weight, read_matrix(weight, probe.bindings, take, probe.model).float(), probe.dtype)
        stored.append(
            StoredWeight(made.format_name, made.format_params(), replace(weight, facts=stored_weight.weight.facts))
        )
        tensors |= {f"{weight.name}.{suffix}": value.contiguous() for suffix, value in made.tensors().items()}
    if not stored:
        return []
    slices = [stored_weight for stored_weight in stored if stored_weight.weight.is_slice]
    for name in replaced_tensors(slices, probe.checkpoint):
        del tensors[name]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    dtype = str(probe.dtype).removeprefix("torch.")
    config = artifact_config(probe.checkpoint.config, export_format, stored, probe.model, dtype, untied=False)
    write_json(directory / "config.json", config)
    if export_format.name == "custom":
        text = modeling_source(
            probe.model, (stored_weight.format_name for stored_weight in stored), experts=has_experts(stored)
        )
        (directory / f"modeling_{config['model_type']}.py").write_text(text)
    seal(
        directory,
        architecture=probe.architecture,
        export_format=export_format,
        formats=stored,
        source={"name": "probe", "sha256": "0" * 64},
    )
    return stored


def _example(stored: StoredWeight, matrix: torch.Tensor, dtype: torch.dtype) -> Layer:
    format_params = dict(stored.format_params)
    if format_params.get("group_size", -1) != -1:
        format_params["group_size"] = GROUP if matrix.shape[1] % GROUP == 0 else -1
    return EXAMPLES[stored.format_name](matrix, format_params, dtype)


def _codes(matrix: torch.Tensor, format_params: dict[str, Any], dtype: torch.dtype) -> Layer:
    width = matrix.shape[1] if format_params["group_size"] == -1 else format_params["group_size"]
    grouped = matrix.reshape(len(matrix), -1, width)
    grid = find_grid(grouped, format_params["bits"], format_params["symmetric"], "minmax", dtype)
    codes, scale = quantize(grouped, grid).reshape(matrix.shape).to(torch.int8), grid.scale.to(dtype)
    zero = None if format_params["symmetric"] else grid.zero_point.to(torch.int8)
    if format_params["bits"] == 8 and zero is not None and not format_params.get("act_order_index"):
        return ByteLinear.from_tensors(
            format_params, {"weight": codes, "weight_scale": scale, "weight_zero_point": zero}
        )
    index = torch.arange(matrix.shape[1]) // width if format_params.pop("act_order_index", False) else None
    return PackedLinear.pack(codes, scale, zero, **format_params, index=index)


def _int8_rows(matrix: torch.Tensor, format_params: dict[str, Any], dtype: torch.dtype) -> Layer:
    columns = torch.arange(format_params["outlier_columns"]) if format_params["outliers"] == "calibrated" else None
    return Int8SplitLinear.pack(matrix, format_params["threshold"], dtype, columns)


# form -> (weight, settings, dtype of the model) -> the weight in that format, by round-to-nearest
EXAMPLES: dict[str, Callable[[torch.Tensor, dict[str, Any], torch.dtype], Layer]] = {
    PackedLinear.format_name: _codes,
    ByteLinear.format_name: _codes,
    Int8SplitLinear.format_name: _int8_rows,
}
