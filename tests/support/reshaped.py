"""Sliced models as checkpoints: what the plain SliceGPT of the tests made, written down with its two config keys."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import slicegpt_reference as reference
import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor

from compressor.analysis.branch_calls import branches_of
from compressor.analysis.float64_probe import float64_probe_model
from compressor.analysis.residual_stream import residual_of
from compressor.model.block_runner import Batch, Pieces
from compressor.model.probe_model import example_batch, signature
from compressor.model.residual_records import Residual
from compressor.model.structure import find_blocks

UNEVEN = [31, 24, 17, 8, 29, 20]


@dataclass
class Written:
    """A sliced checkpoint, what was sliced, and what the reference computes with it."""

    directory: Path
    residual: Residual
    batch: Batch
    logits: Tensor


def norms_of(residual: Residual, widths: list[int]) -> dict[str, Any]:
    """An rms_norm for every norm on the stream; one width for each sublayer, and one for the end."""
    sublayers = [sublayer for block in residual.blocks for sublayer in block]
    norms = [(norm, width) for sublayer, width in zip(sublayers, widths) for norm in sublayer.norms]
    return {
        norm.module: {"form": "rms_norm", "spec": {"width": residual.width, "eps": norm.formula.eps}, "shape": [width]}
        for norm, width in [*norms, (residual.end, widths[-1])]
    }


def write(directory: Path, model: Any, modules: dict[str, Any], dtype: torch.dtype, extra: dict[str, Tensor]) -> Path:
    """A checkpoint of a model whose parameters were changed in place, and further tensors."""
    kept = {
        name: value.to(dtype).contiguous()
        for name, value in model.state_dict().items()
        if name.rpartition(".")[0] not in modules
    }
    model.config.tie_word_embeddings = False
    stock = {name: list(value.shape) for name, value in type(model)(model.config).state_dict().items()}
    shapes = {name: list(value.shape) for name, value in kept.items() if list(value.shape) != stock.get(name)}
    config = {**model.config.to_dict(), "dtype": str(dtype).removeprefix("torch.")}
    config |= {"architectures": [type(model).__name__], "tie_word_embeddings": False}
    directory.mkdir(parents=True)
    text = json.dumps({**config, "compressed_shapes": shapes, "compressed_modules": modules}, indent=2)
    (directory / "config.json").write_text(text)
    kept |= {name: value.to(dtype).contiguous() for name, value in extra.items()}
    save_file(kept, directory / "model.safetensors")
    return directory


def untied(family: str, **config: Any) -> Any:
    """A tiny float64 model whose head has its own weights."""
    model = tiny.build(family, dtype=torch.float64, **config).requires_grad_(False)
    head = model.get_output_embeddings()
    if head is not None:
        head.weight = torch.nn.Parameter(head.weight.clone(), requires_grad=False)
    return model


@cache
def taken_apart(family: str, **config: Any) -> tuple[Residual, dict[Any, Any]]:
    """The residual-stream reads and writes, and the settings of rotated blocks."""
    model = tiny.build(family, **config).to("meta")
    pieces = Pieces(model, find_blocks(model))
    residual = residual_of(model, pieces)
    return residual, branches_of(float64_probe_model(model, pieces), pieces.blocks_path, residual)


def sliced(
    family: str,
    directory: Path,
    width: int | None,
    *,
    dtype: torch.dtype = torch.float32,
    layers: int = 3,
    project: bool = False,
    **config: Any,
) -> Written:
    """Slice a tiny model at each sublayer, to one width or (None) to another at each, and write its checkpoint.

    project  keep the embeddings whole, and rotate and slice their sum: a first sublayer of block 0 without branches
    """
    config |= {"n_layer": layers} if family == "gpt2" else {"num_hidden_layers": layers}
    model = untied(family, **config)
    pieces = Pieces(model, find_blocks(model))
    residual, all_params = taken_apart(family, **config)
    params_of = [all_params[signature(model.config, block, index)] for index, block in enumerate(pieces.blocks)]
    batch = example_batch(model, torch.device("cpu"), samples=4)
    reference.fold(model, residual)
    count = sum(map(len, residual.blocks))
    widths = [*([width] * count if width else UNEVEN[:count]), residual.width]
    bases: list[Tensor] = []

    def basis(x: Tensor) -> Tensor:
        bases.append(reference.principal(x))
        return bases[-1]

    cut = reference.slice_model(pieces, residual, batch, widths, basis)
    logits = reference.run(cut, batch)[1]
    if project:
        for added in residual.embeddings:
            model.get_parameter(added.parameter).data = cut.whole.model.get_parameter(added.parameter).data
    modules, shortcuts, at = norms_of(residual, widths), {}, 0
    for index, (format_params, sublayers) in enumerate(zip(params_of, residual.blocks)):
        path = f"{pieces.blocks_path}.{index}"
        shape, beside = widths[at : at + len(sublayers) + 1], cut.shortcuts[at : at + len(sublayers)]
        if project and index == 0:
            turning = {"norm": [], "branches": [], "shortcut": True}
            format_params = {**format_params, "sites": [turning, *format_params["sites"]]}
            shape, beside = [residual.width, *shape], [bases[0][:, : widths[0]], *beside]
        modules[path] = {"form": "rotated_block", "spec": format_params, "shape": shape}
        shortcuts |= {f"{path}.shortcut_{number}": shortcut for number, shortcut in enumerate(beside)}
        at += len(sublayers)
    write(directory, model, modules, dtype, shortcuts)
    return Written(directory, residual, batch, logits)


def fused(family: str, directory: Path, *, dtype: torch.dtype = torch.float64, **config: Any) -> Written:
    """The same with norms folded and nothing sliced."""
    model = untied(family, **config)
    residual = taken_apart(family, **config)[0]
    batch = example_batch(model, torch.device("cpu"), samples=4)
    with reference.InDouble(), torch.no_grad():
        output = model(**batch).logits
    reference.fold(model, residual)
    widths = [residual.width] * (sum(map(len, residual.blocks)) + 1)
    write(directory, model, norms_of(residual, widths), dtype, {})
    return Written(directory, residual, batch, output)
