"""Chooses the export format of an artifact.

A layer names the family of stock loaders that reads its tensors (`Layer.stock`), if there is one. If one family of
`FAMILIES` reads all of them, plain transformers loads the artifact. Otherwise the format is `custom`: one modeling file
is generated from the layers (`modeling_file`). It is loaded with trust_remote_code=True and needs only torch and
transformers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from compressor.artifact.stock_formats import FAMILIES, described_by, sorted_params, stocks_of
from compressor.errors import Because, PreflightError, values_of
from compressor.layers import find_layer
from compressor.layers.base import Stock
from compressor.model.reshaped_class import is_reshaped, reshaping
from compressor.model.stored_weight import StoredWeight
from compressor.model.weights import Weight


@dataclass(frozen=True)
class ExportFormat:
    """An export format.

    name        dense | custom | a family of FAMILIES
    reason      one sentence for the report and the model card
    dequantize  the loader of compressed-tensors dequantizes weights while it loads them, not at the first forward pass
    """

    name: str
    reason: str
    dequantize: bool = False


def choose_export_format(
    formats: Sequence[StoredWeight], asked: str, stock_only: bool, model: PreTrainedModel
) -> ExportFormat:
    """The export format. raises PreflightError if none holds every weight, or stock_only forbids the one that does"""
    shaped = is_reshaped(model.config)
    if not formats and not shaped:
        return ExportFormat("dense", "no weight changed its format")
    _check_experts(formats)
    family, foreign = (None, [_why_reshaped(model)]) if shaped else _stock_family(formats, model)
    if family is not None and asked in ("auto", family):
        return ExportFormat(family, f"every weight fits {family}; plain transformers loads it")
    if stock_only and asked == "custom":
        raise PreflightError(
            "format: custom and stock_only: true exclude each other",
            where="export",
            hint="Set export.stock_only: false, or export.format: auto.",
        )
    reason = f"{foreign[0][0]} {foreign[0][1]}" if foreign else "the recipe asks for it"
    because = values_of(foreign[0][1]) if foreign else {}
    at = foreign[0][0] if foreign else None
    if stock_only or asked not in ("auto", "custom"):
        raise _no_stock_loader(reason, because, None if shaped else len(foreign), at)
    if lost := _not_in_modeling_file(formats, shaped, model):
        raise _no_custom_experts(reason, because, lost, at, shaped)
    return ExportFormat("custom", f"{reason}; a modeling file is bundled, load with trust_remote_code=True")


def _not_in_modeling_file(formats: Sequence[StoredWeight], shaped: bool, model: PreTrainedModel) -> Weight | None:
    """An expert that a modeling file can't hold; None if there is none.

    It holds experts that one tensor of the source contains, if all of them are stored and the model isn't reshaped.
    """
    stored: Counter[str] = Counter()  # parameter of all experts -> its elements that are stored
    experts = [stored_weight.weight for stored_weight in formats if stored_weight.weight.expert is not None]
    for weight in experts:
        stored[weight.parameter] += math.prod(weight.shape)
    whole = {name for name, count in stored.items() if count == model.get_parameter(name).numel()}
    return next((w for w in experts if shaped or not w.is_slice or w.parameter not in whole), None)


def _check_experts(formats: Sequence[StoredWeight]) -> None:
    """raises PreflightError for a format that experts can't have, or for several formats"""
    experts = [stored for stored in formats if stored.weight.expert is not None]
    names = {stored.format_name: stored.weight.name for stored in experts}
    for kind, name in names.items():
        if not find_layer(kind).weight_only:
            raise PreflightError(
                f"{kind} also changes the layer's inputs, but an expert is a slice of a larger tensor and not a layer",
                where=name,
                hint='Set except: ["@experts"] for this step, or use a weight-only pass such as gptq or rtn.',
                data={"reason": "expert-format", "format_name": kind},
            )
    if len({str(sorted_params(stored)) for stored in experts}) > 1:
        raise PreflightError(
            "the experts have more than one quantization format",
            where="steps",
            hint="Give all experts to one step, or to steps with the same bits and group_size.",
        )


def _no_stock_loader(reason: str, because: dict[str, Any], weights: int | None, at: str | None) -> PreflightError:
    """The problem that no stock loader fits. weights: number of weights that it can't load; None: the model itself"""
    what = "this model" if weights is None else f"{weights} weights"
    return PreflightError(
        f"stock transformers can't load {what}; {reason}",
        where="export",
        hint="Set export.stock_only: false and export.format: auto"
        + (" (or custom)." if weights is None else ", or leave these weights out with `except`."),
        data={"reason": "no-stock-loader", "because": because, "weights": weights, "weight": at},
    )


def _no_custom_experts(
    reason: str, because: dict[str, Any], expert: Weight, at: str | None, shaped: bool
) -> PreflightError:
    lacks = "some of the experts of a tensor" if expert.is_slice and not shaped else "experts"
    return PreflightError(
        f"a modeling file can't hold {lacks}, and no stock format fits: {reason}",
        where=expert.name,
        hint='Set except: ["@experts"] for the steps that quantize.'
        if shaped
        else 'Select all experts of the tensor, or leave them out with except: ["@experts"].'
        if expert.is_slice
        else 'Set symmetric: true for the experts, or leave them out with except: ["@experts"].',
        data={"reason": "no-custom-experts", "because": because, "weight": at},
    )


def next_export_format(
    export_format: ExportFormat,
    why: str,
    formats: Sequence[StoredWeight],
    asked: str,
    stock_only: bool,
    model: PreTrainedModel,
) -> ExportFormat:
    """The next export format to try, after the loader of one fails with this class.

    why     the error of the loader, as the end of a sentence
    raises  PreflightError when no format is left
    """
    schemes = {str(settings) for _, settings in described_by(formats)}
    if export_format.name == "compressed-tensors" and not export_format.dequantize and len(schemes) == 1:
        reason = f"{export_format.reason}, with dequantize: true, since otherwise {why}"
        return ExportFormat(export_format.name, reason, dequantize=True)
    can_be_custom = _not_in_modeling_file(formats, False, model) is None
    if export_format.name in FAMILIES and asked == "auto" and not stock_only and can_be_custom:
        reason = f"plain transformers can't load {export_format.name} into this class: {why}"
        return ExportFormat("custom", f"{reason}; a modeling file is bundled, load with trust_remote_code=True")
    raise PreflightError(
        f"an artifact of this model in the format {export_format.name} can't be loaded: {why}",
        where="export",
        hint="Set export.format: auto and stock_only: false, leave experts out with `except`, or use another pass.",
        data={"reason": "loader-fails", "format": export_format.name, "cause": why},
    )


def _why_reshaped(model: PreTrainedModel) -> tuple[str, Because]:
    """A change of the model that its stock class can't represent, and why."""
    shapes, modules = reshaping(model.config)
    name = next(iter(modules or shapes))
    by_format = {"removed": "replaces a removed part of the model", "resized": "has changed attributes"}
    format_name = modules[name]["form"] if modules else None
    what = (
        by_format.get(format_name, f"is a {format_name}")
        if format_name
        else f"has shape {shapes[name]}"
        if shapes[name]
        else "is removed"
    )
    cls = type(model).__name__
    why = f"{what}, which {cls} of stock transformers doesn't have"
    return name, Because(why, reason="reshaped", format_name=format_name, shape=shapes.get(name), model=cls)


def _stock_family(
    formats: Sequence[StoredWeight], model: PreTrainedModel
) -> tuple[str | None, list[tuple[str, Because]]]:
    """The family that reads every weight, or None and (weight name, why) for weights that no common family reads."""
    stocks = stocks_of(formats)
    foreign = [(stored.weight.name, stock) for stored, stock in stocks if isinstance(stock, Because)]
    if foreign:
        return None, foreign
    families = [(stored, stock.family) for stored, stock in stocks if isinstance(stock, Stock)]
    first = families[0][1]
    foreign = [
        (
            stored.weight.name,
            Because(
                f"is stored for {family} and others for {first}, but a checkpoint has only one loader",
                reason="two-loaders",
                loader=family,
                others=first,
            ),
        )
        for stored, family in families
        if family != first
    ]
    if foreign or (foreign := FAMILIES[first].refuses(described_by(formats), model)):
        return None, foreign
    return first, []
