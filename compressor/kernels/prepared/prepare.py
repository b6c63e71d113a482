"""Replaces the layers of a model by prepared ones, which call kernels.

prepare(model)         let quantized linear layers and lookup tables use the best kernels of this machine
explain(model)         the kernel of each layer, with the reasons against better ones
chosen_kernels(model)  the same as rows of a report
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TypedDict, TypeGuard

from torch import nn

from compressor.errors import KernelError
from compressor.kernels.cpu.reserved_threads import reserve_for_few
from compressor.kernels.ops.dense_product import MOST_ROWS
from compressor.kernels.ops.linear import BYTES_A_THREAD
from compressor.kernels.prepared.dispatch import (
    DYNAMIC_INT8,
    Choice,
    choose,
    choose_dense,
    choose_lookup_table,
    fast_library,
)
from compressor.kernels.prepared.fused_forward import fuse, fused_forward
from compressor.kernels.prepared.prepared_dense import PreparedDense
from compressor.kernels.prepared.prepared_linear import PreparedInteger, PreparedLinear, prepared_linear
from compressor.kernels.prepared.prepared_lookup_table import OPS, PreparedLookupTable, reads_lookup_table
from compressor.kernels.prepared.shared_input import SharedInput
from compressor.kernels.prepared.stock import adopt

# names of a module's children in transformers that all read the same tensor
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("w1", "w3"))


def prepare(model: nn.Module, *, activations: str | None = None, strict: bool = False) -> dict[str, Choice]:
    """Put kernels into a model, in place. Its class, its other modules and its state_dict don't change.

    model        with layers of this package (`compressor.load`), or of compressed-tensors as transformers loads them;
                 if it has any, its dense linear layers multiply few rows with the CPU library too, and its norms, gated
                 MLPs and attention get fused forwards (`fused_forward`)
    activations  None: weight-only; results differ from the reference by float32 rounding. "int8": dynamic activation
                 quantization, row by row: faster and less exact. A prepared model can be prepared again with other
                 activations, or after it was moved
    strict       a layer that falls back to a torch op or the reference is an error
    returns      the choice for each quantized layer, by name
    raises       KernelError with strict, or for other activations
    """
    if activations not in (None, DYNAMIC_INT8):
        raise KernelError(
            f"activations={activations!r} is unknown",
            hint=f"Pass activations=None (weight-only) or {DYNAMIC_INT8!r} (dynamic activation quantization).",
            data={"reason": "activations", "activations": activations},
        )
    choices: dict[str, Choice] = {}
    inputs = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    for name, module in list(model.named_modules()):
        stored = module.stored() if isinstance(module, PreparedLinear) else adopt(module)
        if stored is not None:
            format_name = stored.format_name
            replaced = "forward" in vars(module) and format_name != UNPACKING
            weight = "its forward was replaced" if replaced else stored.read(stored.tensors)
            choice = choose(weight, activations, inputs)
        elif isinstance(module, PreparedLookupTable):
            format_name, choice = module.format_name, module.choice
        elif reads_lookup_table(module):
            format_name = str(module.format_name)
            choice = choose_lookup_table(module.table, OPS[format_name])  # type: ignore[arg-type]
        else:
            continue
        choices[name] = choice
        if choice.is_fallback and strict:
            hint = f"Pass strict=False to use the {choice.kernel} for this layer."
            raise KernelError(
                "; ".join(choice.skipped),
                where=name,
                hint=hint,
                data={"reason": "fallback", "kernel": choice.kernel, "skipped": list(choice.skipped)},
            )
        if isinstance(module, (PreparedLinear, PreparedLookupTable)) and module.choice == choice:
            continue
        if choice.op is None:
            module.kernel_choice = (format_name, choice)  # type: ignore[assignment]
            continue
        made: nn.Module
        if stored is None:
            made = PreparedLookupTable(module, choice)
        else:
            assert not isinstance(weight, str)
            made = prepared_linear(stored, weight, choice)
        if format_name != UNPACKING:
            _keep_hooks(module, made)
        _put(model, name, made)
    if any(isinstance(module, PreparedLinear) for module in model.modules()):
        _prepare_dense(model)
        if _multiplies_by_kernels(model):
            reserve_for_few(model)
    _share_inputs(model)
    if inputs is not None and any(isinstance(module, PreparedLinear) for module in model.modules()) and fast_library():
        fuse(model, inputs)
    for reason in sorted({" | ".join(choice.skipped) for choice in choices.values() if choice.is_fallback}):
        warnings.warn(f"layers are left to a torch op or the reference: {reason}", stacklevel=2)
    return choices


def _share_inputs(model: nn.Module) -> None:
    """Let neighbouring prepared layers with the names in TOGETHER share calls, if their formats are equal."""
    for module in model.modules():
        children = dict(module.named_children())
        for names in TOGETHER:
            layers = [child for name in names if isinstance(child := children.get(name), PreparedInteger)]
            if len(layers) > 1 and len(layers) == len(names) and len({layer.fused_format() for layer in layers}) == 1:
                shared = SharedInput(layers)
                for number, layer in enumerate(layers):
                    layer.shared = (shared, number)


def _multiplies_by_kernels(model: nn.Module) -> bool:
    """Whether torch multiplies by no large weight of the model, such as experts or layers without a kernel."""
    for module in model.modules():
        if isinstance(module, (PreparedDense, nn.Embedding)):
            continue
        if isinstance(module, PreparedLinear) and not module.choice.is_fallback:
            continue
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(tensor.numel() * tensor.element_size() > BYTES_A_THREAD for tensor in own):
            return False
    return True


def _put(model: nn.Module, name: str, made: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, made)


UNPACKING = "compressed-tensors"  # the format whose layers have their own forward and hooks, which unpack weights
HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip


def _keep_hooks(module: nn.Module, made: nn.Module) -> None:
    """Move hooks to another module with their dictionaries, so that their handles can still remove them."""
    for name in HOOKS:
        setattr(made, name, getattr(module, name))


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is torch's linear layer without hooks or another forward, which could change its weight."""
    return type(module) is nn.Linear and "forward" not in vars(module) and not any(getattr(module, h) for h in HOOKS)


def _prepare_dense(model: nn.Module) -> None:
    for name, module in list(model.named_modules()):
        if _is_plain(module) and (choice := choose_dense(module.weight)) is not None:
            _put(model, name, PreparedDense(module, choice))


def _chosen(model: nn.Module) -> Iterator[tuple[str, str, Choice, nn.Module]]:
    """Name, format, choice and module of each layer with a choice of `prepare`."""
    for name, module in model.named_modules():
        if isinstance(module, (PreparedLinear, PreparedDense, PreparedLookupTable)):
            yield name, module.format_name, module.choice, module
        elif isinstance(found := getattr(module, "kernel_choice", None), tuple):
            yield name, *found, module


def explain(model: nn.Module) -> str:
    """One line for each prepared layer with its kernel, and below it the unused kernels with the reasons."""
    lines = []
    for name, format_name, choice, module in _chosen(model):
        if isinstance(module, PreparedLinear):
            bits = sum(8 * read.numel() * read.element_size() for read in module.read_tensors() if read is not None)
            size = f"{bits / (module.out_features * module.in_features):.2f} bits a weight"
            shared = module.shared[0] if isinstance(module, PreparedInteger) and module.shared else None
            call = f"   one call for {len(shared.layers)}" if shared and shared.together else ""
            lines.append(f"{name}   {module.words}   {choice.kernel}   {choice.op}   {size}{call}")
        elif isinstance(module, PreparedDense):
            most = MOST_ROWS[module.weight.dtype]
            lines.append(f"{name}   {module.words}   {choice.kernel}   {choice.op}   up to {most} rows")
        elif isinstance(module, PreparedLookupTable):
            lines.append(f"{name}   {module.words}   {choice.kernel}   {choice.op}")
        else:
            lines.append(f"{name}   {format_name}   {choice.kernel}")
        lines.append(f"  not used: {' | '.join(choice.skipped)}")
    for name, module in model.named_modules():
        if (fused := fused_forward(module)) is not None:
            lines.append(f"{name}   {type(module).__name__}   fused forward   {fused.words}")
    return "\n".join(lines)


class KernelRow(TypedDict):
    """op: a quantization format; chosen: what multiplies it; why: the reason for that."""

    op: str
    chosen: str
    why: str


def chosen_kernels(model: nn.Module) -> list[KernelRow]:
    """The rows of a report: for each format, or "dense" (`op`), and kernel `chosen`: numbers of layers and calls, and
    `why`.
    """
    layers: dict[tuple[str, Choice], list[nn.Module]] = {}
    for _, format_name, choice, module in _chosen(model):
        layers.setdefault((format_name, choice), []).append(module)
    rows: list[KernelRow] = []
    for (format_name, choice), modules in layers.items():
        shared = [module.shared[0] for module in modules if isinstance(module, PreparedInteger) and module.shared]
        calls = len(modules) - len(shared) + len({id(one) for one in shared})
        chosen = choice.kernel if choice.op is None else f"{choice.kernel}: {choice.op}"
        why = f"{len(modules)} layers in {calls} calls; not used: {' | '.join(choice.skipped)}"
        rows.append({"op": format_name, "chosen": chosen, "why": why})
    return rows
