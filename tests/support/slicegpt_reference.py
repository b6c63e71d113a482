"""SliceGPT as the paper says it, slow and plain: one sublayer after another, in float64, with the model in memory.

Ashkboos et al. 2024, arXiv 2401.15024, algorithm 1. A sublayer is where branches leave the stream and come back; the
signal between sublayers is carried in the original basis, with all errors of the sublayers before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compressor.analysis.perturbation import InDouble, answering
from compressor.analysis.rotation_proof import center_writes, fold_norm
from compressor.methods.rotation.rotation import Covariance, pca, rotate
from compressor.model.block_runner import Batch, Call, Pieces
from compressor.model.residual_records import Residual, ResidualSublayer

Basis = Callable[[Tensor], Tensor]  # signal (tokens, D) -> orthogonal matrix (D, D)


@dataclass
class Sliced:
    """The probe model with sliced matrices, and the matrices that its own forward doesn't have.

    whole      the model before slicing; its output head is also that of the sliced one
    shortcuts  one (w_k, w_k+1) for each sublayer, on its residual path
    carried    the signal after the last block of the sweep, (..., D)
    """

    pieces: Pieces
    residual: Residual
    whole: Pieces
    shortcuts: list[Tensor] = field(default_factory=list)
    carried: Tensor | None = None


def principal(x: Tensor) -> Tensor:
    return pca(Covariance.zeros(x.shape[-1]).add(x).matrix)[1]


def branches(block: nn.Module, call: Call) -> list[Callable[[Tensor], Tensor]]:
    """What each sublayer of a block adds, given the normed stream."""
    if hasattr(block, "attn"):  # GPT-2
        return [lambda h: block.attn(h)[0], block.mlp]  # without padding no mask is needed
    if hasattr(block, "layernorm_before"):  # ViT
        return [lambda h: block.attention(h, *call.args, **call.kwargs)[0], block.mlp]
    if hasattr(block, "fc1"):  # OPT
        return [lambda h: block.self_attn(h, **call.kwargs)[0], lambda h: block.fc2(block.activation_fn(block.fc1(h)))]
    if not hasattr(block, "post_attention_layernorm"):  # Phi: both branches read one norm
        return [lambda h: block.self_attn(h, **call.kwargs)[0] + block.mlp(h)]
    mlp = block.mlp if not hasattr(block.mlp, "experts") else lambda h: mixture(block.mlp, h)
    return [lambda h: block.self_attn(h, **call.kwargs)[0], mlp]


def mixture(mlp: Any, h: Tensor) -> Tensor:
    """Mixtral's experts; its own code takes what comes in and what goes out to be of one width."""
    gates, chosen = (h @ mlp.gate.weight.t()).softmax(-1).topk(mlp.gate.top_k)
    gates = gates / gates.sum(-1, keepdim=True)
    out = 0
    for expert, (gate_up, down) in enumerate(zip(mlp.experts.gate_up_proj, mlp.experts.down_proj)):
        gate, up = (h @ gate_up.t()).chunk(2, dim=-1)
        share = (gates * (chosen == expert)).sum(-1, keepdim=True)  # 0 where another was chosen
        out = out + share * ((mlp.experts.act_fn(gate) * up) @ down.t())
    return out


def normed(x: Tensor, width: int, eps: float) -> Tensor:
    """x of any width, divided by the root of its sum of squares over the *original* width."""
    return x / (x.square().sum(-1, keepdim=True) / width + eps).sqrt()


def all_sublayers(model: Pieces, residual: Residual, calls: Sequence[Call]) -> list[tuple[ResidualSublayer, Any]]:
    return [
        (sublayer, branch)
        for block, call, sublayers in zip(model.blocks, calls, residual.blocks)
        for sublayer, branch in zip(sublayers, branches(block, call), strict=True)
    ]


def fold(model: nn.Module, residual: Residual) -> None:
    for norm in residual.norms():
        fold_norm(model, norm)
    if residual.kind == "layer":
        center_writes(model, residual.writes())


def cut(model: nn.Module, edges: Sequence[Any], columns: Tensor) -> None:
    """Rotate and slice parameters along the axis with which they read or write the stream."""
    for edge in edges:
        parameter = model.get_parameter(edge.parameter)
        parameter.data = rotate(parameter.data, columns, edge.axis)
        owner = model.get_submodule(edge.parameter.rpartition(".")[0])
        if isinstance(owner, Conv1D):  # computes with the width that it notes
            owner.nf = owner.weight.shape[1]


def slice_model(
    pieces: Pieces, residual: Residual, batch: Batch, widths: Sequence[int], basis: Basis = principal
) -> Sliced:
    """Slice a folded float64 model in place; widths of every sublayer and, last, of the output head (not sliced)."""
    assert widths[-1] == residual.width
    sliced = Sliced(pieces, residual, Pieces(copy.deepcopy(pieces.model), pieces.blocks_path))
    model, width = pieces.model, residual.width
    with InDouble(), torch.no_grad():
        x, calls = pieces.embeddings(batch)
        sublayers = all_sublayers(pieces, residual, calls)
        q = basis(x)
        cut(model, residual.embeddings, q[:, : widths[0]])
        for index, (sublayer, branch) in enumerate(sublayers):
            kept = q[:, : widths[index]]  # (D, w)
            for norm in sublayer.norms:
                cut(model, norm.consumers, kept)
            x_sliced = x @ kept
            # back to the original basis for now: the next rotation depends on what comes out here
            x = x_sliced @ kept.t() + branch(normed(x_sliced, width, sublayer.norms[0].formula.eps))
            last = index == len(sublayers) - 1
            q = torch.eye(width, dtype=torch.float64) if last else basis(x)
            following = q[:, : widths[index + 1]]
            sliced.shortcuts.append(kept.t() @ following)
            cut(model, sublayer.writes, following)
    sliced.carried = x
    return sliced


def run(sliced: Sliced, batch: Batch) -> tuple[Tensor, Tensor]:
    """The signal after the last block, and the logits, of the sliced model on its own."""
    width = sliced.residual.width
    with InDouble(), torch.no_grad():
        x, calls = sliced.pieces.embeddings(batch)
        for (sublayer, branch), shortcut in zip(all_sublayers(sliced.pieces, sliced.residual, calls), sliced.shortcuts):
            x = x @ shortcut + branch(normed(x, width, sublayer.norms[0].formula.eps))
        end = sliced.residual.end
        last = {end.module: sliced.whole.model.get_submodule(end.module)}
        with answering(last, {end.module: lambda h: normed(h, width, end.formula.eps)}):
            sliced.whole.answers = sliced.pieces.answers  # the head runs alone
            return x, sliced.whole.output_head(batch, x)


def run_projected(pieces: Pieces, residual: Residual, batch: Batch, bases: Sequence[Tensor]) -> Tensor:
    """The same function without sliced matrices: a whole folded model whose stream is projected at each sublayer.

    bases    (D, w) of each sublayer
    returns  logits
    """
    with InDouble(), torch.no_grad():
        x, calls = pieces.embeddings(batch)
        for (sublayer, branch), kept in zip(all_sublayers(pieces, residual, calls), bases, strict=True):
            x = x @ kept @ kept.t()
            x = x + branch(normed(x, residual.width, sublayer.norms[0].formula.eps))
        return pieces.model.get_output_embeddings()(normed(x, residual.width, residual.end.formula.eps))
