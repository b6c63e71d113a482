"""Which format an artifact takes, and what config.json has to say for it.

Two routes. `compressed-tensors`: `pack-quantized`, loaded by plain transformers. `custom`: one modelling file generated
from `layers/`, loaded with trust_remote_code=True and needing torch and transformers only. What stock loaders can
hold was established by loading (docs/format.md).
"""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import auto_factory, modeling_auto

from compressor import __version__ as VERSION
from compressor.errors import PreflightError
from compressor.units import Form

STOCK_TENSORS_VERSION = "0.20.0"  # the compressed-tensors release that the layout was checked with


@dataclass(frozen=True)
class Route:
    """name    compressed-tensors | custom | dense
    reason  one sentence for the report and the card
    """

    name: str
    reason: str


def choose_route(forms: Sequence[Form], asked: str, stock_only: bool) -> Route:
    """raises PreflightError when no route holds every weight, or stock_only forbids the one that does"""
    if not forms:
        return Route("dense", "no weight changed its form")
    foreign = [(form.weight.name, problem) for form in forms if (problem := _not_stock(form)) is not None]
    expert_specs = {str(form.spec) for form in forms if form.weight.expert is not None}
    if len(expert_specs) > 1:
        raise PreflightError(
            "experts are stored in more than one scheme",
            where="steps",
            hint="Stock loaders read all experts with one scheme: use the same bits and group_size for all of them.",
        )
    if not foreign and asked in ("auto", "compressed-tensors"):
        return Route("compressed-tensors", "every weight fits pack-quantized; plain transformers loads it")
    reason = f"{foreign[0][0]} {foreign[0][1]}" if foreign else "the recipe asks for it"
    if stock_only or asked == "compressed-tensors":
        raise PreflightError(
            f"stock transformers can't load {len(foreign)} weights; {reason}",
            where="export",
            hint="Set export.stock_only: false and export.format: auto, or leave these weights out.",
        )
    expert = next((form.weight.name for form in forms if form.weight.expert is not None), None)
    if expert is not None:
        raise PreflightError(
            "the modelling file can't hold experts",
            where=expert,
            hint="Use symmetric: true for experts, so that the stock format holds them.",
        )
    return Route("custom", f"{reason}; a modelling file comes along, load with trust_remote_code=True")


def _not_stock(form: Form) -> str | None:
    if form.form != "packed_linear":
        return f"is stored as {form.form}, which compressed-tensors doesn't know"
    if form.weight.transposed:
        return "is a Conv1D, which compressed-tensors can't target"
    if not form.spec["symmetric"]:
        return "has packed zero points, which the stock loader misreads"
    return None


def quantization_config(forms: Sequence[Form], model: PreTrainedModel) -> dict[str, Any]:
    """The `quantization_config` of compressed-tensors: exact module names, every other Linear ignored by name."""
    groups: dict[str, Any] = {}
    by_spec: dict[tuple[Any, ...], list[Form]] = {}
    for form in forms:
        expert = form.weight.expert is not None
        by_spec.setdefault((form.spec["bits"], form.spec["group_size"], expert), []).append(form)
    for number, ((bits, group_size, expert), members) in enumerate(sorted(by_spec.items())):
        targets = sorted({_module(form) for form in members})
        if expert:  # not modules of the running model; the loader looks for a regex that says experts
            targets = ["re:.*experts.*"]
        groups[f"group_{number}"] = {
            "targets": targets,
            "format": "pack-quantized",
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": True,
                "strategy": "channel" if group_size == -1 else "group",
                "group_size": None if group_size == -1 else group_size,
                "dynamic": False,
                "actorder": None,
            },
            "input_activations": None,
            "output_activations": None,
        }
    packed = {_module(form) for form in forms}
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": [name for name in linears if name not in packed],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": STOCK_TENSORS_VERSION,
        "config_groups": groups,
    }


def artifact_config(
    source: dict[str, Any], route: Route, forms: Sequence[Form], model: PreTrainedModel, dtype: str, untied: bool
) -> dict[str, Any]:
    """The artifact's config.json: the source's own keys, and what the route needs."""
    config = copy.deepcopy(source)
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    if untied:
        config["tie_word_embeddings"] = False
    if route.name == "compressed-tensors":
        config["quantization_config"] = quantization_config(forms, model)
    elif route.name == "custom":
        kind = custom_type(source["model_type"])
        config["model_type"] = kind
        config["architectures"] = [f"Compressed{type(model).__name__}"]
        config["compressed_weights"] = {
            _module(form): {**form.spec, "shape": list(form.weight.shape)} for form in forms
        }
        file = f"modeling_{kind}"
        config["auto_map"] = {"AutoConfig": f"{file}.CompressedConfig"} | {
            auto: f"{file}.Compressed{type(model).__name__}" for auto in auto_classes(model)
        }
    return config


def custom_type(model_type: str) -> str:
    """A model type of our own, so that no stock class loads a custom file in silence."""
    return "compressed_" + re.sub(r"\W", "_", model_type)


def auto_classes(model: PreTrainedModel) -> list[str]:
    """The Auto classes that transformers would load this architecture with."""
    found = []
    for name in dir(modeling_auto):
        cls = getattr(modeling_auto, name)
        if not (isinstance(cls, type) and issubclass(cls, auto_factory._BaseAutoModelClass)):
            continue
        mapping = getattr(cls, "_model_mapping", None)
        classes = mapping.get(type(model.config), None) if mapping is not None else None
        if classes is not None and type(model) in (classes if isinstance(classes, tuple) else (classes,)):
            found.append(name)
    if not found:
        raise PreflightError("no Auto class loads this architecture", where=type(model).__name__)
    return sorted(found)


def modelling_file(model: PreTrainedModel) -> str:
    """Source of the one file that loads a custom artifact; the same for the same model class."""
    base, config = type(model).__name__, type(model.config).__name__
    here = Path(__file__).parent
    reference = _definitions(here / "kernels" / "reference.py")
    layer = _definitions(here / "layers" / "packed_linear.py")
    return f'''# SPDX-License-Identifier: Apache-2.0
# Generated by compress-model {VERSION} from its stored forms. Needs torch and transformers only.
"""{base} with some weights stored as packed integer codes, rebuilt at each multiplication."""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import {base}, {config}


class ShapeError(ValueError):
    pass


class Layer(nn.Module):
    pass


{reference}


{layer}


class CompressedConfig({config}):
    model_type = "{custom_type(model.config.model_type)}"


class Compressed{base}({base}):
    config_class = CompressedConfig

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        for name, entry in config.compressed_weights.items():
            owner, _, leaf = name.rpartition(".")
            old = self.get_submodule(name)
            out_features, in_features = entry["shape"]
            setattr(
                self.get_submodule(owner),
                leaf,
                PackedLinear(
                    in_features,
                    out_features,
                    entry["bits"],
                    entry["group_size"],
                    entry["symmetric"],
                    torch.get_default_dtype(),
                    bias=old.bias is not None,
                ),
            )
'''


def _module(form: Form) -> str:
    return form.weight.parameter.removesuffix(".weight")


def _definitions(path: Path) -> str:
    """Functions and classes of a module as they stand, without imports and the module docstring."""
    text = path.read_text()
    lines = text.splitlines()
    parts = []
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            parts.append("\n".join(lines[node.lineno - 1 : node.end_lineno]))
    return "\n\n\n".join(parts)
