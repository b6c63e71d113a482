"""Decides whether a quantized layer can replace the module of a weight.

A quantized layer replaces a module that multiplies by its weight, adds its bias and does nothing else. It can't replace
a router that also chooses experts, or a parameter that is not the `weight` of a module: such a weight can be quantized,
but no loader of the artifact would compute with it. It can't replace a module whose `weight` other code reads, even
only for its dtype, because a quantized layer has no `weight`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compressor.errors import Because
from compressor.model.weights import Weight

SELF_EVIDENT = (nn.Linear.forward, Conv1D.forward)
# Bound for two orders of float32 sums over random values. A module that does more differs by far more.
TOLERANCE = 1e-3
ROWS = 3  # rows of the input with which a module is tried


def why_not_replaceable(
    model: PreTrainedModel, weight: Weight, known: dict[type, bool], is_read: bool
) -> Because | None:
    """The reason why a quantized layer can't replace a weight's module; None if it can.

    Embeddings are looked up by rows, and experts are stored by their names in the checkpoint, so both have other rules.

    known    class of module -> whether it multiplies and does nothing else; new results are added
    is_read  other code than its module's own reads the weight (`watch_reads`)
    """
    if is_read:
        message = "is read by other code than its module's own, and a quantized layer has no such tensor"
        return Because(message, reason="read-elsewhere")
    if weight.expert is not None or weight.role in ("embedding", "shortcut") or weight.is_function:
        return None
    owner, _, leaf = weight.parameter.rpartition(".")
    module = model.get_submodule(owner)
    if leaf != "weight":
        message = f"is a parameter of a {type(module).__name__}, which multiplies by it and does other work"
        return Because(message, reason="multiplies-beside", module=type(module).__name__)
    cls = type(module)
    if cls not in known:
        known[cls] = cls.forward in SELF_EVIDENT or _computes_product(module)
    if known[cls]:
        return None
    message = f"belongs to a {type(module).__name__}, which does more than multiply by it"
    return Because(message, reason="does-more", module=type(module).__name__)


@contextmanager
def watch_reads(model: nn.Module) -> Iterator[set[str]]:
    """The parameters called `weight` that are read while the forward of their module doesn't run."""
    names = {module: f"{name}.weight" for name, module in model.named_modules() if "weight" in module._parameters}
    running: dict[nn.Module, int] = dict.fromkeys(names, 0)
    read: set[str] = set()

    def enter(module: nn.Module, _args: Any) -> None:
        running[module] += 1

    def leave(module: nn.Module, _args: Any, _output: Any) -> None:
        running[module] -= 1

    def watching(plain: Callable[[nn.Module, str], Any]) -> Callable[[nn.Module, str], Any]:
        def watched(module: nn.Module, name: str) -> Any:
            if name == "weight" and running.get(module) == 0:
                read.add(names[module])
            return plain(module, name)

        return watched

    handles: list[Any] = []
    for module in names:
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    # Only their classes are changed: a change of nn.Module empties what Python has cached of thousands of subclasses.
    watches = {cls: watching(cls.__getattr__) for cls in {type(module) for module in names}}
    own = {cls: vars(cls)["__getattr__"] for cls in watches if "__getattr__" in vars(cls)}
    for cls, watched in watches.items():
        cls.__getattr__ = watched  # type: ignore[method-assign, assignment]
    try:
        yield read
    finally:
        for cls in watches:
            if cls in own:
                cls.__getattr__ = own[cls]  # type: ignore[method-assign]
            else:
                del cls.__getattr__
        for handle in handles:
            handle.remove()


def _computes_product(module: nn.Module) -> bool:
    """Whether a copy of the module with random weights computes x W^T + b."""
    made = copy.deepcopy(module).to_empty(device="cpu").float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*made.parameters(), *made.buffers()]:
            if tensor.is_floating_point():
                tensor.normal_(generator=generator)
        weight, bias = made.weight, getattr(made, "bias", None)
        assert isinstance(weight, Tensor)
        x = torch.randn(ROWS, weight.shape[1], generator=generator)
        try:
            found = made(x)
        except (TypeError, RuntimeError, ValueError, IndexError, AttributeError):  # it needs more than one input
            return False
        expected = F.linear(x, weight, bias if isinstance(bias, Tensor) else None)
    return isinstance(found, Tensor) and found.shape == expected.shape and _close(found, expected)


def _close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())
