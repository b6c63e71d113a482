"""Tiny models pruned through the sweep that reshapes, in this process, and what the dense model makes with masks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import tiny
import torch
import torch.nn.functional as F
from safetensors import safe_open

from compressor.analysis.model_facts import facts_of
from compressor.analysis.pruning_proof import masked
from compressor.engine.calibration_batch import CalibrationBatch
from compressor.engine.plan_records import parameter_count
from compressor.engine.rewrite_sweep import Reshaper, run_reshape
from compressor.methods.pruning.pruned_parameters import prune
from compressor.methods.pruning.pruned_shapes import pruned_redefinition
from compressor.model.facts import PrunableModule
from compressor.model.probe_model import example_batch
from compressor.model.redefined_structure import check_redefinition
from compressor.model.structure import Structure, read_structure
from compressor.protocol import RewritePass, Traits
from compressor.recipe.recipe import Step
from compressor.storage.journal import Journal


class Fixed(RewritePass):
    """Prunes what it is told to."""

    decision: dict[str, Any]
    ridge: float | None = None
    factors: dict[str, list[float]] | None = None

    @property
    def traits(self):
        return Traits(reads="weights")

    def rewrite(self, view, state):
        found = prune(view, view.facts.prunable(), self.decision, ridge=self.ridge, factors=self.factors)
        for name, repair in found.items():
            view.warn("repaired" if repair.after < repair.before else "cut", name, f"{repair.before} {repair.after}")
        return state


@dataclass
class Pruned:
    """dense  the model as it was
    model     as it is read back from what was written
    after     its structure
    redefinition   what was planned
    """

    dense: Any
    model: Any
    before: Structure
    after: Structure
    prunables: tuple[PrunableModule, ...]
    facts: Any
    redefinition: Any
    directory: Path
    warnings: list[dict[str, str]]


def opened(family: str, directory: Path, **config: Any) -> tuple[Structure, Any]:
    tiny.save(family, directory, dtype=torch.float64, **config)
    structure = read_structure(directory)
    return structure, facts_of(structure, 0)


def middle(prunable: PrunableModule, less: int = 0) -> list[int]:
    """Most units, without one in the middle and others, fewer where `less` is more."""
    removed = (
        {prunable.units // 2 - 1, *range(prunable.units - less - 1, prunable.units - 1)}
        if prunable.units > 2
        else {less % 2}
    )
    return [unit for unit in range(prunable.units) if unit not in removed]


def carry_out(
    directory: Path,
    structure: Structure,
    facts: Any,
    decision: dict[str, Any],
    export: str = "auto",
    batches: Sequence[dict[str, torch.Tensor]] = (),
    **settings: Any,
) -> Pruned:
    """Plan and write it; with `batches` their signals are there while units are written."""
    prunables = facts.prunable()
    redefinition = replace(pruned_redefinition(facts, prunables, decision, export), follows=bool(batches))
    planned = check_redefinition(structure, redefinition, "steps")
    dense = type(structure.model).from_pretrained(structure.checkpoint.directory, dtype=torch.float64).eval()
    step = Step(("steps", 0), "fixed", Fixed(decision=decision, **settings))
    journal = Journal.create(directory, {})
    device = torch.device("cpu")
    streams = [CalibrationBatch(batch, torch.empty(0), []) for batch in batches]
    work = Reshaper(
        0,
        structure,
        planned,
        facts,
        redefinition,
        journal,
        streams,
        device,
        lambda unit: unit,
        lambda: False,
        lambda e: None,
    )
    after, _ = run_reshape(work, step)
    warnings = [warning for line in journal.lines.values() for warning in line.facts["warnings"]]
    journal.close()
    written = directory / "parts" / "s00"
    model, info = type(after.model).from_pretrained(written, dtype=torch.float64, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return Pruned(dense, model.eval(), structure, after, prunables, facts, redefinition, written, warnings)


def batch_of(model: Any) -> dict[str, torch.Tensor]:
    return example_batch(model, torch.device("cpu"), samples=3)


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        output = model(**batch)
    return output.logits if "logits" in output else output.last_hidden_state


def masked_logits(pruned: Pruned, decision: dict[str, Any]) -> torch.Tensor:
    """The output of the dense model with inputs of output projections set to 0, and norms over the kept stream only."""
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(masked(pruned.dense, pruned.prunables, decision))
        if decision.get("hidden") is not None:
            kept = torch.tensor(decision["hidden"])
            for norm in pruned.facts.residual.norms():
                module = pruned.dense.get_submodule(norm.module)
                if norm.formula.kind == "rms":
                    stack.callback(module.register_forward_pre_hook(partial(_only, kept)).remove)
                else:
                    stack.callback(module.register_forward_hook(partial(_over, kept)).remove)
        return logits(pruned.dense, batch_of(pruned.dense))


def _only(kept, _module, args):
    mask = torch.zeros(args[0].shape[-1], dtype=args[0].dtype).index_fill(0, kept, 1.0)
    return (args[0] * mask, *args[1:])


def _over(kept, module, args, _output):
    """A LayerNorm over the kept values, and 0 at the others."""
    x = args[0][..., kept]
    y = F.layer_norm(x, (len(kept),), module.weight[kept], module.bias[kept], module.eps)
    return torch.zeros_like(args[0]).index_copy(-1, kept, y)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def planned_parameters(result: Pruned) -> int:
    """Parameters of the pruned model, as `plan` counts them before anything is written."""
    return parameter_count(check_redefinition(result.before, result.redefinition, "steps"))


def stored_numel(directory: Path) -> int:
    total = 0
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    for file in set(index.values()):
        with safe_open(directory / file, "pt") as tensors:
            total += sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118
    return total
