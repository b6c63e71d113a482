"""Layers that multiply by a kernel, and the walk over a model that puts them in.

    prepare(model)         the linear layers of stored forms multiply by the best kernel there is, tables are read by it
    explain(model)         which kernel each layer got, and why not a better one
    chosen_kernels(model)  the same as rows of a report

A prepared layer keeps the stored tensors under their names, so that a state_dict is what it was, and beside them one
packed copy for the kernel, which no state_dict holds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from compressor.errors import KernelError
from compressor.kernels.cuda import ds1
from compressor.kernels.cuda import ops as cuda_ops
from compressor.kernels.ops import linear as ops
from compressor.kernels.ops import torch_products as torch_ops
from compressor.kernels.ops.dense_product import MOST_ROWS, PreparedDense
from compressor.kernels.ops.dense_sparse import linear_dense_sparse
from compressor.kernels.ops.watched import is_watched, without_gradient
from compressor.kernels.prepare.dispatch import (
    DYNAMIC_INT8,
    FACTORS,
    Choice,
    FactorWeight,
    OutlierWeight,
    Weight,
    choose,
    choose_dense,
    choose_table,
    shape_of,
)
from compressor.kernels.prepare.linear_call import LinearCall
from compressor.kernels.prepare.prepared_table import OPS, PreparedTable, reads_table
from compressor.kernels.prepare.shared_input import SharedInput, share_inputs
from compressor.kernels.prepare.stock import StoredWeight, adopt

# by layout, which says where it runs, and by name
RUN: dict[str | None, dict[str, Callable[..., Tensor]]] = {
    ops.LAYOUT: {"linear_int8_outlier": ops.linear_int8_outlier},  # the others have a LinearCall
    FACTORS: {"linear_dense_sparse": linear_dense_sparse},
    **dict.fromkeys(cuda_ops.LAYOUTS.values(), cuda_ops.RUN),
    **dict.fromkeys(torch_ops.LAYOUTS, torch_ops.RUN),
}


SCALES = ("absmax", "atom_scale", "value_scale")


class PreparedLinear(nn.Module):
    """A linear layer of a stored form that multiplies by a kernel.

    packed  what the kernel reads of the weight: codes in its layout, or the index of factors (on CUDA with the values)
    words   the format, for people

    Not for training: the product has no gradient, and a backward pass through it is an error.
    """

    packed: Tensor
    permutation: Tensor
    call: LinearCall | None = None  # of this layer alone, with what is known of it looked up
    shared: tuple[SharedInput, int] | None = None  # the layers that it is multiplied with, and its number among them

    def __init__(self, stored: StoredWeight, weight: Weight, choice: Choice) -> None:
        """weight: what `stored` stands for"""
        super().__init__()
        self.choice, self.read, self.names = choice, stored.read, tuple(stored.tensors)
        self.form = stored.form
        for name, tensor in stored.tensors.items():
            self.register_buffer(name, tensor)
        self.bias = stored.bias
        self._take(weight)
        if choice.layout == ops.LAYOUT and choice.op in ops.BITS:
            self.call = LinearCall([self])
        self.register_load_state_dict_post_hook(_take_again)

    def _take(self, weight: Weight) -> None:
        """What the kernel reads, and its other arguments, from the stored tensors."""
        self.out_features, self.in_features = shape_of(weight)
        self.ordered = False
        more: dict[str, Tensor | None]
        if isinstance(weight, FactorWeight):
            packed, more = weight.index, {"atoms": weight.atoms, "values": weight.values}
            more |= {"atom_scale": weight.atom_scale, "value_scale": weight.value_scale}
            if self.choice.layout == ds1.LAYOUT:
                packed = ds1.pack(weight.index, weight.values, weight.atoms.shape[1])
            self.words = f"{weight.values.shape[2]} of {weight.atoms.shape[1]} atoms"
        elif isinstance(weight, OutlierWeight):
            packed, columns = weight.codes, weight.columns
            if self.choice.layout == ops.LAYOUT:
                packed = ops.pack_int8_rows(weight.codes, weight.absmax)
            elif columns is not None:
                columns = columns.int()
            more = {"absmax": weight.absmax, "columns": columns, "columns_weight": weight.weight}
            self.threshold, self.words = weight.threshold, "W8 rows"
        else:
            order, layout = weight.permutation(), self.choice.layout
            assert layout is not None
            if layout in torch_ops.LAYOUTS:
                codes = weight.codes if order is None else weight.codes.index_select(1, order)
                packed = torch_ops.pack(codes, weight.scale, weight.zero_point, layout)
            else:
                packed = ops.pack_weight(
                    weight.codes, weight.scale, weight.zero_point, order, weight.bits, weight.group_size, layout
                )
            more = {"permutation": order}
            self.ordered = order is not None
            self.bits, self.group_size = weight.bits, weight.group_size
            self.words = f"W{weight.bits} " + ("rows" if weight.group_size == -1 else f"g{weight.group_size}")
        for name, tensor in {"packed": packed, **more}.items():
            self.register_buffer(name, tensor, persistent=False)
        self._forget()

    def stored(self) -> StoredWeight:
        """What it was made from."""
        tensors = {name: getattr(self, name) for name in self.names}
        return StoredWeight(self.form, tensors, self.bias, self.read)

    def _forget(self) -> None:
        for call in (self.call, self.shared and self.shared[0].call):
            if call is not None:
                call.forget()

    def _apply(self, *arguments: Any, **named: Any) -> PreparedLinear:
        """`to` and its like: the packed weight may move."""
        kept = {name: getattr(self, name, None) for name in SCALES}
        super()._apply(*arguments, **named)
        for name, scale in kept.items():  # kernels read these as float32, whatever the model is cast to
            if scale is not None and (now := getattr(self, name)).dtype != torch.float32:
                setattr(self, name, scale.to(now.device))
        self._forget()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in the dtype of x"""
        watched, name = is_watched(x), self.choice.op
        assert name is not None
        if self.call is not None and not watched:
            y = None if self.shared is None else self.shared[0].product(self.shared[1], x)
            if y is None:
                y = self.call(x.index_select(-1, self.permutation) if self.ordered else x)[0]
            return without_gradient(x, y, name)
        arguments: tuple[Any, ...]
        if name == "linear_dense_sparse":
            scales = () if self.value_scale is None else (self.atom_scale, self.value_scale)
            arguments = (self.atoms, self.packed, self.values, self.bias, *scales)
        elif name == "linear_int8_outlier":
            arguments = (self.packed, self.absmax, self.columns, self.columns_weight, self.bias, self.threshold)
        else:
            arguments = (
                self.packed, self.bias, self.permutation, self.out_features, self.bits, self.group_size,
                self.choice.layout,
            )  # fmt: skip
        if watched and self.choice.layout not in torch_ops.LAYOUTS:
            return getattr(torch.ops.compressor, name)(x, *arguments)
        with torch.no_grad():  # the registry costs as much as a small product, so it is for those who watch
            y = RUN[self.choice.layout][name](x.detach(), *arguments)
        return without_gradient(x, y, name)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.words}, {self.choice.kernel}"


def _take_again(layer: PreparedLinear, keys: Any) -> None:
    """After load_state_dict the kernel's copy is made again from what was loaded."""
    stored = layer.stored()
    weight = stored.read(stored.tensors)
    assert not isinstance(weight, str)  # the same form as before
    layer._take(weight)


def prepare(model: nn.Module, *, activations: str | None = None, strict: bool = False) -> dict[str, Choice]:
    """Put kernels into a model, in place: its class, its other modules and its state_dict stay as they are.

    model        with layers of this package (`compressor.load`), or of compressed-tensors as transformers loads them;
                 where there are some, linear layers that stay dense multiply few rows by the CPU library too
    activations  None: inputs are taken as they are, results differ from the reference as float32 sums do.
                 "int8": inputs are rounded to int8, row by row: faster, and less exact. A model that was prepared
                 before is prepared anew where this or the machine asks for other kernels
    strict       a layer that falls back to a torch op or the reference is an error
    returns      what was chosen for each layer of a stored form, by name
    raises       KernelError with strict, or for other activations
    """
    if activations not in (None, DYNAMIC_INT8):
        raise KernelError(
            f"activations {activations!r}",
            hint=f"Use None or {DYNAMIC_INT8!r}.",
            data={"reason": "activations", "activations": activations},
        )
    choices: dict[str, Choice] = {}
    inputs = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    for name, module in list(model.named_modules()):
        stored = module.stored() if isinstance(module, PreparedLinear) else adopt(module)
        if stored is not None:
            form = stored.form
            replaced = "forward" in vars(module) and form != UNPACKING
            weight = "its forward was replaced" if replaced else stored.read(stored.tensors)
            choice = choose(weight, activations, inputs)
        elif isinstance(module, PreparedTable):
            form, choice = module.form, module.choice
        elif reads_table(module):
            form = str(module.form)
            choice = choose_table(module.table, OPS[form])  # type: ignore[arg-type]
        else:
            continue
        choices[name] = choice
        if choice.is_fallback and strict:
            hint = f"Leave strict out to use the {choice.kernel}."
            raise KernelError(
                "; ".join(choice.skipped),
                where=name,
                hint=hint,
                data={"reason": "fallback", "kernel": choice.kernel, "skipped": list(choice.skipped)},
            )
        if isinstance(module, (PreparedLinear, PreparedTable)) and module.choice == choice:
            continue
        if choice.op is None:
            module.kernel_choice = (form, choice)  # type: ignore[assignment]
            continue
        made: nn.Module
        if stored is None:
            made = PreparedTable(module, choice)
        else:
            assert not isinstance(weight, str)
            made = PreparedLinear(stored, weight, choice)
        if form != UNPACKING:
            _keep_hooks(module, made)
        _put(model, name, made)
    if any(isinstance(module, PreparedLinear) for module in model.modules()):
        _prepare_dense(model)
    share_inputs(model, PreparedLinear)
    for reason in sorted({" | ".join(choice.skipped) for choice in choices.values() if choice.is_fallback}):
        warnings.warn(f"layers are left to a torch op or the reference: {reason}", stacklevel=2)
    return choices


def _put(model: nn.Module, name: str, made: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, made)


UNPACKING = "compressed-tensors"  # the form whose layers have a forward and hooks of their own, which unpack weights
HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip


def _keep_hooks(module: nn.Module, made: nn.Module) -> None:
    """A hook's handle holds the very dictionary, so that it can still be removed."""
    for name in HOOKS:
        setattr(made, name, getattr(module, name))


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """A linear layer of torch without hooks and without another forward, which might be about what it multiplies by."""
    return type(module) is nn.Linear and "forward" not in vars(module) and not any(getattr(module, h) for h in HOOKS)


def _prepare_dense(model: nn.Module) -> None:
    for name, module in list(model.named_modules()):
        if _is_plain(module) and (choice := choose_dense(module.weight)) is not None:
            _put(model, name, PreparedDense(module, choice))


def _chosen(model: nn.Module) -> Iterator[tuple[str, str, Choice, nn.Module]]:
    """Name, form, choice and module of each layer that `prepare` has chosen for."""
    for name, module in model.named_modules():
        if isinstance(module, (PreparedLinear, PreparedDense, PreparedTable)):
            yield name, module.form, module.choice, module
        elif isinstance(found := getattr(module, "kernel_choice", None), tuple):
            yield name, *found, module


def explain(model: nn.Module) -> str:
    """One line for each prepared layer: what computes, and beneath it what was not used and why."""
    lines = []
    for name, form, choice, module in _chosen(model):
        if isinstance(module, PreparedLinear):
            read: list[Any] = [module.packed]
            if choice.op == "linear_dense_sparse":
                read += [module.atoms, module.atom_scale, module.value_scale]
                read += [module.values] if choice.layout == FACTORS else []
            bits = sum(8 * tensor.numel() * tensor.element_size() for tensor in read if tensor is not None)
            size = f"{bits / (module.out_features * module.in_features):.2f} bits a weight"
            shared = module.shared[0] if module.shared else None
            call = f"   one call for {len(shared.layers)}" if shared and shared.together else ""
            lines.append(f"{name}   {module.words}   {choice.kernel}   {choice.op}   {size}{call}")
        elif isinstance(module, PreparedDense):
            most = MOST_ROWS[module.weight.dtype]
            lines.append(f"{name}   {module.words}   {choice.kernel}   {choice.op}   up to {most} rows")
        elif isinstance(module, PreparedTable):
            lines.append(f"{name}   {module.words}   {choice.kernel}   {choice.op}")
        else:
            lines.append(f"{name}   {form}   {choice.kernel}")
        lines.append(f"  not used: {' | '.join(choice.skipped)}")
    return "\n".join(lines)


def chosen_kernels(model: nn.Module) -> list[dict[str, str]]:
    """The rows of a report: for each stored form, or "dense" (`op`), and kernel `chosen`: how many layers and calls,
    and `why`.
    """
    layers: dict[tuple[str, Choice], list[nn.Module]] = {}
    for _, form, choice, module in _chosen(model):
        layers.setdefault((form, choice), []).append(module)
    rows = []
    for (form, choice), modules in layers.items():
        shared = [module.shared[0] for module in modules if isinstance(module, PreparedLinear) and module.shared]
        calls = len(modules) - len(shared) + len({id(one) for one in shared})
        chosen = choice.kernel if choice.op is None else f"{choice.kernel}: {choice.op}"
        why = f"{len(modules)} layers in {calls} calls; not used: {' | '.join(choice.skipped)}"
        rows.append({"op": form, "chosen": chosen, "why": why})
    return rows
