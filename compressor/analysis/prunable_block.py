"""Finds the prunable units of one block by perturbing and differentiating it. `prunable_units` describes the method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from compressor.analysis.perturbation import TOLERANCE, size
from compressor.analysis.unit_codes import columns_of_units, decoded_units, unit_codes
from compressor.errors import ModelError
from compressor.model.block_runner import Call
from compressor.model.facts import PrunableModule, PrunedSlice, PruningLayout, RemovedModule
from compressor.model.norms import describe_norm
from compressor.model.observed_matmul import ObservedMatmul, ObservedMatmuls
from compressor.model.plain_attention import ObservedAttention
from compressor.model.probe_model import PROBE_SEED
from compressor.model.recorded_modules import recorded_outputs
from compressor.model.tracing import Product

HINT = "Leave vtrans and greedy_removal out for this model; gptq, rtn and llm_int8 don't need this."
ROUNDS = 4  # inputs tried until every row of a matrix has shown its unit: half the units of a ReLU are 0 for a token


class Finder:
    """Finds the prunable modules of one block of the probe model."""

    def __init__(
        self,
        block: nn.Module,
        call: Call,
        shape: torch.Size,
        products: Sequence[Product],
        where: str,
        index: int,
        attention: ObservedAttention,
    ) -> None:
        self.block, self.call, self.where, self.index, self.attention = block, call, where, index, attention
        self.parameters = dict(block.named_parameters())
        self.products = {product.parameter: product for product in products}
        self.generator = torch.Generator().manual_seed(PROBE_SEED)
        self.inputs = [self._random(shape) for _ in range(ROUNDS)]
        self.attention_projections: list[str] = []

    def _random(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), dtype=torch.float64, generator=self.generator)

    def _run(self, x: Tensor) -> list[ObservedMatmul]:
        """The block's matmuls, in forward order."""
        self.attention.calls.clear()
        calls: list[ObservedMatmul] = []
        with ObservedMatmuls(self.parameters, calls.append):
            self.block(x, *self.call.args, **self.call.kwargs)
        return calls

    def heads(self, attributes: Mapping[str, Mapping[str, int]]) -> PrunableModule:
        with torch.no_grad():
            before = self._run(self.inputs[0])
        if len(self.attention.calls) != 1:
            what = f"calls it {len(self.attention.calls)} times" if self.attention.calls else "doesn't call it"
            raise ModelError(
                f"attention is found by transformers' AttentionInterface, and this block {what}",
                where=self.where,
                hint=HINT,
                data={"reason": "no-attention-interface", "calls": len(self.attention.calls)},
            )
        (seen,) = self.attention.calls
        query_heads, groups, head_dim = seen.heads, seen.groups, seen.value_width
        caller = next(name for name, other in self.block.named_modules() if other is seen.module)
        per_group = query_heads // groups
        unit_of_head = torch.arange(query_heads) // per_group
        projection, units = self._read_by_heads(before, unit_of_head, groups, query_heads, head_dim)
        self.attention_projections.append(projection)
        columns = columns_of_units(units, groups)
        slices, shared = self._slices_of(projection, units, groups)
        made = PruningLayout(
            head_dim,
            per_group,
            {f"{self.where}.{caller}": dict(attributes.get(f"{self.index}.{caller}", {}))},
            tuple(name for name in shared if _common([name, caller]) == caller),
        )
        return self._prunable("heads", groups, projection, columns, slices, caller, made)

    def _read_by_heads(
        self, before: list[ObservedMatmul], unit_of_head: Tensor, groups: int, heads: int, head_dim: int
    ) -> tuple[str, Tensor]:
        """The matmul that reads the output of attention, and the unit of each of its input columns."""
        where = self.where
        push = self._random((*self.inputs[0].shape[:-1], heads, head_dim))
        changes = []
        for codes in [torch.ones(groups, dtype=torch.float64), *unit_codes(groups)]:
            weighted = push * codes[unit_of_head].view(heads, 1)
            self.attention.change = lambda output, weighted=weighted: output + weighted.view(output.shape)  # type: ignore[misc]
            with torch.no_grad():
                after = self._run(self.inputs[0])
            self.attention.change = None
            changes.append(after)
        for number, call in enumerate(before):
            moved = [after[number].input - call.input for after in changes]
            if size(moved[0]) > TOLERANCE * size(call.input):
                units = decoded_units([m.reshape(-1, m.shape[-1]) for m in moved], 1, groups)
                if bool((units < 0).any()):
                    raise ModelError(
                        "the outputs of its heads are mixed before a matrix reads them",
                        where=f"{where}.{_owner(call.parameter)}",
                        hint=HINT,
                        data={"reason": "heads-mixed"},
                    )
                return call.parameter, units
        raise ModelError(
            "no matrix reads the outputs of its heads", where=where, hint=HINT, data={"reason": "no-output-projection"}
        )

    def ffn(self) -> PrunableModule:
        if fused := [name for name, product in self.products.items() if product.fused_experts]:
            raise ModelError(
                "its experts are parts of one tensor, of which each sees other tokens",
                where=f"{self.where}.{_owner(fused[0])}",
                hint=HINT,
                data={"reason": "experts-in-one-tensor"},
            )
        projections = [
            name for name in self.products if name not in self.attention_projections and self._is_column_by_column(name)
        ]
        if not projections:
            raise ModelError(
                "no matrix reads the output of another of its matrices column by column",
                where=self.where,
                hint=HINT,
                data={"reason": "no-output-projection"},
            )
        prunables = []
        for projection in projections:
            width = self._width(projection)
            slices, _ = self._slices_of(projection, torch.arange(width), width)
            columns = tuple((column,) for column in range(width))
            prunables.append(self._prunable("ffn", width, projection, columns, slices, None, PruningLayout()))
        if len(prunables) > 1:
            names = " and ".join(prunable.output_projection for prunable in prunables)
            raise ModelError(
                f"{names} both read outputs of its activation, and only the inputs of one matrix can be pruned",
                where=self.where,
                hint=HINT,
                data={
                    "reason": "two-output-projections",
                    "output_projections": [prunable.output_projection for prunable in prunables],
                },
            )
        return prunables[0]

    def _width(self, name: str) -> int:
        """Number of input columns of a matmul."""
        return self.parameters[name].shape[0 if self.products[name].transposed else 1]

    def _output_axis(self, name: str) -> int:
        return 1 if name in self.products and self.products[name].transposed else 0

    def _is_column_by_column(self, projection: str) -> bool:
        """Whether one column of a matmul's input depends, token by token, on few rows of some other matrix."""
        x = self.inputs[0].clone().requires_grad_(True)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        try:
            with torch.enable_grad():
                calls = self._run(x)
                read = next((call.input for call in calls if call.parameter == projection), None)
                if read is None:
                    return False
                others = [call for call in calls if call.parameter != projection]
                weights = [self.parameters[call.parameter] for call in others]
                for column in range(min(8, self._width(projection))):  # a ReLU may be 0 for some
                    last = read.view(*x.shape[:-1], -1)[:, -1, column].sum()
                    found = torch.autograd.grad(last, weights, retain_graph=True, allow_unused=True)
                    for call, gradient in zip(others, found):
                        if gradient is None or gradient.dim() != 2:
                            continue
                        axis = self._output_axis(call.parameter)
                        rows = int((gradient != 0).any(1 - axis).sum())
                        if 0 < rows <= max(2, gradient.shape[axis] // self._width(projection)):
                            (given,) = torch.autograd.grad(last, [call.input], retain_graph=True)
                            given = given.view(*x.shape[:-1], -1)
                            return not bool(
                                (given[:, :-1] != 0).any()
                            )  # the values of attention depend on other tokens too
                return False
        finally:
            for parameter in self.parameters.values():
                parameter.requires_grad_(False)

    def _gradients(self, projection: str, x: Tensor, sums: Callable[[Tensor], list[Tensor]]) -> list[dict[str, Tensor]]:
        """Gradients, by parameter, of the numbers that `sums` computes from a matmul's input."""
        wanted = {name: p for name, p in self.parameters.items() if p.dim() <= 2 and name != projection}
        for parameter in wanted.values():
            parameter.requires_grad_(True)
        try:
            with torch.enable_grad():
                read = next(call.input for call in self._run(x) if call.parameter == projection)
                results = []
                for total in sums(read):
                    found = torch.autograd.grad(total, list(wanted.values()), retain_graph=True, allow_unused=True)
                    results.append({name: g for name, g in zip(wanted, found) if g is not None})
                return results
        finally:
            for parameter in wanted.values():
                parameter.requires_grad_(False)

    def _slices_of(self, projection: str, units: Tensor, count: int) -> tuple[tuple[PrunedSlice, ...], list[str]]:
        """The slices of each of `count` units. `units` (columns,) is the unit of each input column of `projection`.

        Also returns the matrices whose rows act on more than one of them.
        """
        codes = [torch.ones(count, dtype=torch.float64), *unit_codes(count)]
        owned: dict[str, Tensor] = {}
        for x in self.inputs:
            weights = self._random((*x.shape[:-1], len(units)))

            def sums(read: Tensor, weights: Tensor = weights) -> list[Tensor]:
                flat = weights.view(read.shape)
                return [(read * flat * code[units]).sum() for code in codes]

            gradients = self._gradients(projection, x, sums)
            for name in gradients[0]:
                # with one unit, every earlier parameter would belong to it, so only matrices are tried
                if name not in self.products and (count == 1 or self.parameters[name].dim() != 1):
                    continue
                found = decoded_units([g[name] for g in gradients], self._output_axis(name), count)
                owned[name] = torch.where(owned[name] < 0, found, owned[name]) if name in owned else found
            if all(bool((found >= 0).all()) for found in owned.values() if bool((found >= 0).any())):
                break
        shared = [name for name, found in owned.items() if name in self.products and not bool((found >= 0).any())]
        slices = [
            PrunedSlice(projection, 0 if self.products[projection].transposed else 1, columns_of_units(units, count))
        ]
        made: set[str] = set()
        for name, found in sorted(owned.items(), key=lambda item: item[0] not in self.products):  # biases after weights
            if not bool((found >= 0).any()) or name in made:
                continue
            rows = columns_of_units(found, count)
            slices.append(PrunedSlice(name, self._output_axis(name), rows))
            bias = self._bias(name, len(found))
            if bias is not None and bias not in made:
                slices.append(PrunedSlice(bias, 0, rows))
                made.add(bias)
        if len(slices) == 1:
            raise ModelError(
                "no matrix computes its heads or neurons one by one",
                where=f"{self.where}.{_owner(projection)}",
                hint=HINT,
                data={"reason": "no-input-projection"},
            )
        return tuple(slices), shared

    def _bias(self, weight: str, length: int) -> str | None:
        """The bias of a weight. Attention ignores a shift of its keys, so no gradient shows the bias of the keys."""
        owner = _owner(weight)
        name = f"{owner}.bias" if owner else "bias"
        found = self.parameters.get(name)
        return name if found is not None and tuple(found.shape) == (length,) else None

    def _prunable(
        self,
        kind: str,
        units: int,
        projection: str,
        columns: tuple[tuple[int, ...], ...],
        slices: tuple[PrunedSlice, ...],
        caller: str | None,
        layout: PruningLayout,
    ) -> PrunableModule:
        inside = [_owner(sliced.parameter) for sliced in slices] + ([caller] if caller is not None else [])
        common = _common(inside)
        bias = self._bias(projection, self.parameters[projection].shape[self._output_axis(projection)])
        removal = self._removal(_owner(projection), inside, caller)
        name = common or (caller if caller is not None else _owner(projection))
        prefix = self.where + "."
        cost = sum(
            len(sliced.rows[0])
            * prod(n for axis, n in enumerate(self.parameters[sliced.parameter].shape) if axis != sliced.axis)
            for sliced in slices
        )
        return PrunableModule(
            prefix + name,
            self.index,
            kind,  # type: ignore[arg-type]
            units,
            prefix + _owner(projection),
            columns,
            tuple(replace(sliced, parameter=prefix + sliced.parameter) for sliced in slices),
            prefix + bias if bias else None,
            cost,
            replace(layout, has_norms=self._has_other_norms(), removal=removal),
        )

    def _has_other_norms(self) -> bool:
        norms = [describe_norm(module) for module in self.block.modules()]
        return any(norm is not None and norm.width != self.inputs[0].shape[-1] for norm in norms)

    def _removal(self, projection: str, inside: Sequence[str], caller: str | None) -> tuple[RemovedModule, ...]:
        """Modules that are removed if no unit is kept: the one that contains all of them if its output is that of
        `projection`, else `projection` and the modules that compute its input.
        """
        layer = getattr(self.block.get_submodule(caller), "layer_idx", None) if caller is not None else None

        def entry(path: str, returns: int | None, adds: bool, layer: int | None = None) -> RemovedModule:
            return RemovedModule(f"{self.where}.{path}", returns, layer, adds)

        common = _common(inside)
        paths = [path for path in {projection, common, *inside} if path]
        outputs = self._outputs(paths)
        whole = outputs.get(common) if common else None
        if (
            whole is not None
            and whole[0].shape == outputs[projection][0].shape
            and torch.equal(whole[0], outputs[projection][0])
        ):
            return (entry(common, whole[1], True, layer),)
        makers = [path for path in dict.fromkeys(inside) if path != projection]
        holder = _common(makers)
        if caller is not None:
            makers = [holder] if holder else []
        elif holder and not (projection + ".").startswith(holder + "."):
            makers = [holder]
        outputs |= self._outputs([path for path in makers if path not in outputs])
        return (
            entry(projection, outputs[projection][1], True),
            *(entry(path, outputs[path][1], False, layer) for path in makers),
        )

    def _outputs(self, paths: Sequence[str]) -> dict[str, tuple[Tensor, int | None]]:
        """The outputs of modules: the tensor, or the first of a tuple, and the length of the tuple."""

        def keep(output: Any) -> tuple[Tensor, int | None]:
            return (output[0], len(output)) if isinstance(output, tuple) else (output, None)

        modules = {path: self.block.get_submodule(path) for path in paths}
        with recorded_outputs(modules, keep) as seen, torch.no_grad():
            self._run(self.inputs[0])
        return dict(seen)


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _common(paths: Sequence[str]) -> str:
    """The innermost module that contains all of them, or is the only one; "" is the block itself."""
    parts = [path.split(".") for path in paths]
    common = []
    for names in zip(*parts):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    return ".".join(common)
