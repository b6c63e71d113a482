"""Implements dense linear layers that multiply few rows with the CPU library."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.kernels.cpu.reserved_threads import shared_by_torch
from compressor.kernels.ops.dense_product import MOST_ROWS, linear_dense
from compressor.kernels.ops.visible_calls import must_be_visible
from compressor.kernels.prepared.dispatch import Choice


class PreparedDense(nn.Linear):
    """A dense linear layer of a model with prepared layers. It multiplies few rows with `linear_dense`.

    Its parameters are those of the replaced layer, so a tied weight stays tied. It uses torch for many rows, for
    gradients, autocast and compiled graphs.
    """

    def __init__(self, layer: nn.Linear, choice: Choice) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.train(layer.training)
        self.choice, self.format_name = choice, "dense"
        self.words = f"dense {str(layer.weight.dtype).removeprefix('torch.')}"

    def _is_ours(self, x: Tensor) -> bool:
        weight = self.weight
        if x.dtype != weight.dtype or not (x.is_cpu and weight.is_cpu):
            return False
        if torch.is_autocast_enabled("cpu") or x.shape[:-1].numel() > MOST_ROWS.get(x.dtype, 0):
            return False
        return not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))

    def forward(self, x: Tensor) -> Tensor:
        if must_be_visible(x):
            return F.linear(x, self.weight, self.bias)
        if self._is_ours(x):
            return linear_dense(x, self.weight, self.bias)
        with shared_by_torch():
            return F.linear(x, self.weight, self.bias)
