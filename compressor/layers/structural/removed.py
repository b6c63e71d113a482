"""Replaces a removed sub-block, or a part of it, by a layer that returns zeros or its remaining bias.

    y = bias, or 0, for every token          for any x

Tensors

    bias  (width,) in the dtype of the model, if the spec has one: the write of a sub-block without units

In place of an attention it still writes to the key-value cache, with a key and a value of one zero per token, because
models read the number of tokens from the cache of some layer, often the first.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache

from compressor.layers.base import Layer


class Removed(Layer):
    """Accepts all arguments of the replaced module. The first tensor gives the numbers of samples and tokens.

    width    values for each token, D; 0 if what follows is removed too
    returns  None: a tensor; n: a tuple of n, the tensor first and the others None
    layer    layer number of an attention in the cache; else None
    has_bias it has a bias
    of       heads or ffn: the kind of the removed sub-block, as information in the config
    """

    format_name = "removed"
    stands_for = "module"
    weight_only = False
    bias: Tensor | None

    def __init__(
        self, width: int, returns: int | None, layer: int | None, has_bias: bool, of: str, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.width, self.returns, self.layer, self.of = width, returns, layer, of
        bias = nn.Parameter(torch.zeros(width, dtype=dtype), requires_grad=False) if has_bias else None
        self.register_parameter("bias", bias)

    @classmethod
    def empty(cls, shape: tuple[int, ...], format_params: dict[str, Any], dtype: torch.dtype, bias: bool) -> Self:
        return cls(shape[0], **format_params, dtype=dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        x = next(value for value in given if isinstance(value, Tensor))
        y = x.new_zeros(*x.shape[:-1], self.width)
        if self.bias is not None:
            y = y + self.bias
        cache = next((value for value in given if isinstance(value, Cache)), None)
        if self.layer is not None and cache is not None:
            own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
            seen = x.new_zeros(x.shape[0], 1, x.shape[1], 1)
            own.update(seen, seen, self.layer)
        return y if self.returns is None else (y, *(None,) * (self.returns - 1))

    def format_params(self) -> dict[str, Any]:
        return {"returns": self.returns, "layer": self.layer, "has_bias": self.bias is not None, "of": self.of}

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.bias is None else {"bias": self.bias}

    def extra_repr(self) -> str:
        return f"{self.width}" + (", bias" if self.bias is not None else "")
