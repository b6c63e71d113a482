"""Gives norms, gated MLPs and attention of a prepared model forwards with fewer operations.

A decoding step of transformers has about 60 small operations in each block beside the products, and each takes longer
to call than to compute. `fuse` finds modules by what they compute, whatever their family:

    RMSNorm      a module of this name, with one weight, whose outputs on a sample are those of `rms_norm`
    gated MLP    down_proj(act_fn(gate_proj(x)) * up_proj(x)), where act_fn is SiLU
    attention    q_proj, k_proj and v_proj, norms of heads if there are any, rotary embeddings that rotate halves, the
                 cache, torch's scaled dot product attention, o_proj

The formulas of MLPs and attention are proven by samples with the operations of torch that the module has: the outputs
are equal bit by bit. Some rows of a sample are so large that a limit of values would show. In use, `rms_norm` and
`silu_product` differ from torch by rounding in float32 alone.

A fused forward is an attribute `forward` of the module. So the module, its class, parameters and hooks stay, and the
forward of the class is used for gradients, autocast, compilers, training mode, other devices, dtypes and arguments.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.errors import ShapeError
from compressor.kernels.ops.block_functions import TYPES, rms_norm, rotate_halves, silu_product
from compressor.kernels.ops.visible_calls import must_be_visible

EPS_NAMES = ("variance_epsilon", "eps")
NORMS = ((0.0, True), (0.0, False), (1.0, False))  # added to the weight; whether the normalized x is rounded before it
UNEQUAL = 0.02  # share of 16-bit outputs of a norm that another order of the sum may round to the neighbouring number
LARGE = 2.0**20  # of rows of a sample: beyond the limits of values that a family may have, such as clip_qkv of OLMo
# raised by a module that takes something else
UNLIKE = (AttributeError, KeyError, RuntimeError, ShapeError, TypeError, ValueError)


def _is_plain(x: Any, *others: Any) -> bool:
    """Whether the library can take these: tensors of one dtype on the CPU, seen by no compiler and no gradient."""
    if not isinstance(x, Tensor) or must_be_visible(x) or x.dtype not in TYPES or torch.is_autocast_enabled("cpu"):
        return False
    gradients, dtype = torch.is_grad_enabled(), x.dtype
    for tensor in (x, *others):  # a generator takes twice the time
        if not (isinstance(tensor, Tensor) and tensor.is_cpu and tensor.dtype == dtype):
            return False
        if gradients and tensor.requires_grad:
            return False
    return True


class FusedForward:
    """A forward of `module`, which calls `original` for what it doesn't take."""

    words: ClassVar[str]

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    @classmethod
    def of(cls, module: nn.Module, dtype: torch.dtype) -> Self | None:
        """The forward of a module with inputs of `dtype`, proven on a sample; None if it computes another formula."""
        raise NotImplementedError

    def original(self, *arguments: Any, **named: Any) -> Any:
        return type(self.module).forward(self.module, *arguments, **named)


def _sample(*shape: int, dtype: torch.dtype) -> Tensor:
    made = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=made, dtype=torch.float32, device="cpu").to(dtype)


class FusedNorm(FusedForward):
    """RMSNorm. offset, rounds: as in `rms_norm`"""

    words = "rms_norm"

    def __init__(self, module: nn.Module, eps: float, offset: float, rounds: bool) -> None:
        super().__init__(module)
        self.eps, self.offset, self.rounds = eps, offset, rounds

    @classmethod
    def of(cls, module: nn.Module, dtype: torch.dtype) -> Self | None:
        eps = next((value for name in EPS_NAMES if isinstance(value := getattr(module, name, None), float)), None)
        weight = module._parameters.get("weight")
        if not type(module).__name__.endswith("RMSNorm") or eps is None or weight is None or weight.dim() != 1:
            return None
        if len([*module.parameters(), *module.buffers()]) > 1:
            return None
        for offset, rounds in NORMS:
            fused = cls(module, eps, offset, rounds)
            if all(fused._agrees(kind) for kind in TYPES):  # only numbers of 16 bits show what is rounded
                return fused
        return None

    def _agrees(self, dtype: torch.dtype) -> bool:
        """Whether the module with a sample for its weight has the outputs of this forward."""
        probe, columns = copy.copy(self.module), len(self.module.weight)
        weight = nn.Parameter(_sample(columns, dtype=dtype) + 1, requires_grad=False)
        vars(probe)["_parameters"] = {"weight": weight}  # a copy has the dictionary of its original
        x = _sample(5, columns, dtype=dtype)
        x[2:4] *= self.eps**0.5  # the mean of squares is about eps there
        x[4] *= LARGE
        try:
            expected = type(probe).forward(probe, x)
        except UNLIKE:
            return False
        if not isinstance(expected, Tensor) or expected.shape != x.shape or expected.dtype != dtype:
            return False
        found = rms_norm(x, weight, self.eps, self.offset, self.rounds)
        many = dtype == torch.float32
        allowed = (8 if many else 1) * torch.finfo(dtype).eps * expected.double().abs()
        is_close = bool(((found.double() - expected.double()).abs() <= allowed).all())
        return is_close and (many or float((found != expected).double().mean()) <= UNEQUAL)

    def __call__(self, *arguments: Any, **named: Any) -> Tensor:
        weight: Any = self.module._parameters["weight"]
        x: Any = arguments[0] if len(arguments) == 1 and not named else None
        if not _is_plain(x, weight) or x.shape[-1:] != weight.shape:
            return self.original(*arguments, **named)
        return rms_norm(x, weight, self.eps, self.offset, self.rounds)


class FusedMLP(FusedForward):
    """A gated MLP with SiLU. dtype, activation: of its proof"""

    words = "silu_product"
    CHILDREN: ClassVar = {"gate_proj", "up_proj", "down_proj", "act_fn"}

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__(module)
        self.dtype, self.activation = dtype, self.module.act_fn

    @classmethod
    def of(cls, module: nn.Module, dtype: torch.dtype) -> Self | None:
        children: dict[str, Any] = dict(module.named_children())
        if children.keys() != cls.CHILDREN or not hasattr(children["gate_proj"], "in_features"):
            return None
        spread = torch.linspace(-20, 20, 999, device="cpu")
        x = _sample(3, children["gate_proj"].in_features, dtype=dtype)
        x[1] *= LARGE**0.5
        x[2] *= LARGE
        fused = cls(module, dtype)
        try:
            is_silu = torch.equal(children["act_fn"](spread), F.silu(spread))
            is_equal = is_silu and torch.equal(fused._forward(x, F.silu), fused.original(x))
        except UNLIKE:
            return None
        return fused if is_equal else None

    def _forward(self, x: Tensor, activation: Callable[[Tensor], Tensor] | None) -> Tensor:
        """activation: None for `silu_product`"""
        gate, up = self.module.gate_proj(x), self.module.up_proj(x)
        return self.module.down_proj(silu_product(gate, up) if activation is None else activation(gate) * up)

    def __call__(self, *arguments: Any, **named: Any) -> Tensor:
        module = self.module
        x: Any = arguments[0] if len(arguments) == 1 and not named else None
        is_ours = (
            _is_plain(x)
            and x.dtype == self.dtype
            and _is_the_same(module.act_fn, self.activation)
            and not module.training
            and not _wants_gradient(module)
        )
        return self._forward(x, None) if is_ours else self.original(*arguments, **named)


def _is_the_same(function: nn.Module, proven: nn.Module) -> bool:
    """Whether a module without parameters is the one that was proven, and nothing was put around it since."""
    is_hooked = function._forward_hooks or function._forward_pre_hooks or "forward" in vars(function)
    return function is proven and not is_hooked


def _wants_gradient(module: nn.Module) -> bool:
    """Whether a parameter of a child would get a gradient, such as the weight of a dense layer."""
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters())


class _RecordedCache:
    """Stands for a cache in a sample. It records its arguments, and returns other keys and values: those of later
    tokens first, and keys as small as their queries are large, so that no query has one key alone.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, int]] = []
        self.named: set[str] = set()

    def update(self, keys: Tensor, values: Tensor, layer: int, **named: Any) -> tuple[Tensor, Tensor]:
        self.calls.append((keys, values, layer))
        self.named |= named.keys()
        return (keys / keys.abs().amax((1, 2, 3), True).square()).flip(2), values.flip(2)


CACHES = {"cache", "past_key_values"}  # names of the argument for the cache, new and old
TAKEN = {"self", "hidden_states", "position_embeddings", "attention_mask"}  # the arguments of attention, with **kwargs


class FusedAttention(FusedForward):
    """Attention with rotary embeddings.

    dtype        of its proof
    cache        the name of the argument for the cache
    passes_kwargs  whether the cache is told the other arguments
    """

    words = "rotate_halves"
    cache, passes_kwargs = "cache", False

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__(module)
        self.dtype = dtype

    @classmethod
    def of(cls, module: nn.Module, dtype: torch.dtype) -> Self | None:
        children: dict[str, Any] = dict(module.named_children())
        named = {p.name for p in inspect.signature(type(module).forward).parameters.values() if p.kind != p.VAR_KEYWORD}
        own = all(hasattr(module, name) for name in ("head_dim", "scaling", "layer_idx", "config"))
        if not own or not {"q_proj", "k_proj", "v_proj", "o_proj"} <= children.keys() or not named >= TAKEN:
            return None
        fused = cls(module, dtype)
        fused.cache = "cache" if "cache" in named else "past_key_values"
        columns = getattr(children["q_proj"], "in_features", None)
        attend = fused._attention()
        if named != TAKEN | {fused.cache} or module.training or columns is None or attend is None:
            return None
        return fused if isinstance(module.head_dim, int) and fused._agrees(attend, columns) else None

    def _agrees(self, attend: Callable[..., Any], columns: int) -> bool:
        """Whether the module has the bits of this forward, without a mask and with one, at places of a long text."""
        tokens, dtype = 3, self.dtype
        cos, sin = _sample(2, 1, tokens, self.module.head_dim, dtype=dtype)
        x = _sample(2, tokens, columns, dtype=dtype)
        x[1] *= LARGE
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device="cpu").tril().expand(2, 1, tokens, tokens)
        places = {"position_ids": 2**20 + torch.arange(tokens, device="cpu").expand(2, tokens)}
        more: dict[str, Any]
        for seen, more in ((None, {}), (mask, places)):
            theirs, ours = _RecordedCache(), _RecordedCache()
            named = {"position_embeddings": (cos, sin), "attention_mask": seen, self.cache: theirs}
            try:
                expected, _ = self.original(hidden_states=x, **named, **more)
                self.passes_kwargs = "kwargs" in theirs.named
                found, _ = self._forward(attend, x, cos, sin, seen, ours, more)
            except UNLIKE:
                return False
            pairs = [(expected, found)]
            for (keys, values, layer), (own_keys, own_values, own_layer) in zip(theirs.calls, ours.calls):
                pairs += [(keys, own_keys), (values, own_values), (torch.tensor(layer), torch.tensor(own_layer))]
            is_told = len(theirs.calls) == 1 and theirs.named <= {"kwargs"}
            if not is_told or not all(torch.equal(a, b) for a, b in pairs):
                return False
        return True

    def _attention(self) -> Callable[..., Any] | None:
        """transformers' call of torch's scaled dot product attention, if the model uses it."""
        return _interfaces()["sdpa"] if self.module.config._attn_implementation == "sdpa" else None

    def _forward(
        self,
        attend: Callable[..., Any],
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        cache: Any,
        rest: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        module, lead = self.module, x.shape[:-1]
        q, k, v = (layer(x).view(*lead, -1, module.head_dim) for layer in (module.q_proj, module.k_proj, module.v_proj))
        if "q_norm" in module._modules:
            q, k = module.q_norm(q), module.k_norm(k)
        q, k, v = rotate_halves(q, cos, sin), rotate_halves(k, cos, sin), v.transpose(1, 2)
        if cache is not None:
            more = {"kwargs": rest} if self.passes_kwargs else {}
            k, v = cache.update(k, v, module.layer_idx, **more)
        y, weights = attend(module, q, k, v, mask, dropout=0.0, scaling=module.scaling, **rest)
        return module.o_proj(y.reshape(*lead, -1).contiguous()), weights

    def _fit(self, x: Tensor, cos: Tensor, sin: Tensor) -> bool:
        """Whether these have the shapes of `rotate_halves`."""
        tail = (*x.shape[1:2], self.module.head_dim)
        return x.dim() == 3 and cos.shape == sin.shape and cos.shape in ((1, *tail), (len(x), *tail))

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        rest = dict(named)
        x, mask, cache = rest.pop("hidden_states", None), rest.pop("attention_mask", None), rest.pop(self.cache, None)
        positions = rest.pop("position_embeddings", None)
        is_ours = (
            not arguments
            and isinstance(positions, tuple)
            and len(positions) == 2
            and _is_plain(x, *positions)
            and x.dtype == self.dtype
            and self._fit(x, *positions)
            and not rest.keys() & CACHES
            and not self.module.training
            and not _wants_gradient(self.module)
        )
        attend = self._attention() if is_ours else None  # the config takes microseconds to answer
        if attend is None:
            return self.original(*arguments, **named)
        cos, sin = positions
        return self._forward(attend, x, cos, sin, mask, cache, rest)


@cache
def _interfaces() -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # only models of transformers have attention

    return ALL_ATTENTION_FUNCTIONS


KINDS: tuple[type[FusedForward], ...] = (FusedNorm, FusedMLP, FusedAttention)


@torch.no_grad()
def fuse(model: nn.Module, dtype: torch.dtype) -> None:
    """Put fused forwards into the modules of a prepared model on the CPU. A module with another forward is left alone.

    Each module is proven, since modules of a class may differ: some models rotate in some of their layers only. That
    takes about as long as three steps of decoding. A second call proves them again, for what has changed.

    dtype  of its hidden states; nothing is fused for one that the library doesn't take
    """
    for module in model.modules():
        if fused_forward(module) is not None:
            del module.forward
    if dtype not in TYPES:
        return
    for module in model.modules():
        tensors = [*module.parameters(), *module.buffers()]
        if "forward" in vars(module) or any(not t.is_cpu or must_be_visible(t) for t in tensors):
            continue
        if any(child._forward_hooks or child._forward_pre_hooks for child in module.children()):
            continue  # they would see the samples
        fused = next((found for kind in KINDS if (found := kind.of(module, dtype)) is not None), None)
        if fused is not None:
            module.forward = fused  # type: ignore[assignment]


def fused_forward(module: nn.Module) -> FusedForward | None:
    """The fused forward of a module, if it has one."""
    found = vars(module).get("forward")
    return found if isinstance(found, FusedForward) else None
