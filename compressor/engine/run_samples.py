"""Reads the samples of a run for calibration and for evaluation, and makes sure that they are not the same.

If `data` and `eval.data` name the same documents, these are divided (`data/parts.py`). If two sources share documents,
the run is refused. An evaluation without a run reads the same samples as the run of its recipe.
"""

from __future__ import annotations

from pathlib import Path

import torch

from compressor.data.parts import CALIBRATION, EVALUATION, overlap, same_source
from compressor.data.rows import Rows
from compressor.data.samples import (
    Documents,
    Samples,
    check_chats,
    check_data,
    draw_samples,
    load_documents,
    part_of,
    random_samples,
)
from compressor.data.tokenizing import load_tokenizer
from compressor.engine.plan_records import Plan
from compressor.errors import CompressError, PreflightError, RecipeError
from compressor.model.block_runner import output_of
from compressor.model.probe_model import make_probe_model, shallow_config
from compressor.model.structure import Structure
from compressor.model.token_limit import Limit, limit_of
from compressor.recipe.recipe import Recipe
from compressor.recipe.schema import DataSettings


def is_divided(recipe: Recipe) -> bool:
    """Whether calibration and evaluation have one source, of which each gets a part."""
    return recipe.reads_data and same_source(recipe.data, recipe.eval.data)


def read_data(
    recipe: Recipe, directory: Path, vocabulary: int | None, *, measure: bool, trust_remote_code: bool = False
) -> tuple[Samples | None, Samples | None]:
    """(calibration, evaluation); None for samples that aren't needed.

    raises RecipeError for data that can't be used, and for documents that are in both
    """
    calibration = held_out = None
    documents: dict[str, Documents] = {}
    if recipe.reads_data:
        calibration = _samples(recipe, CALIBRATION, directory, vocabulary, documents, trust_remote_code)
    if measure:
        held_out = _samples(recipe, EVALUATION, directory, vocabulary, documents, trust_remote_code)
    if len(documents) == 2 and not is_divided(recipe):
        _check_overlap(recipe, documents[CALIBRATION], documents[EVALUATION])
    return calibration, held_out


def read_evaluation_data(
    recipe: Recipe, directory: Path, vocabulary: int | None, *, trust_remote_code: bool = False
) -> Samples:
    """The evaluation samples of a run of this recipe. raises RecipeError"""
    return _samples(recipe, EVALUATION, directory, vocabulary, {}, trust_remote_code)


def data_problems(
    recipe: Recipe, structure: Structure, *, measure: bool, trust_remote_code: bool = False
) -> list[CompressError]:
    """Problems of the data with this model, as far as they can be found without reading all of the data."""
    problems: list[CompressError] = []
    reads_pixels = vocabulary_of(structure) is None
    reads_text = False
    chats: list[tuple[DataSettings, Rows | None]] = []
    for key, section, is_read in (("data", recipe.data, recipe.reads_data), ("eval.data", recipe.eval.data, measure)):
        if not is_read:
            continue
        try:
            first = check_data(section, reads_pixels=reads_pixels)
            if section.format == "chat":
                chats.append((section, first))
            if not reads_pixels and (section.pack or section.source == "random"):  # samples of exactly this length
                check_length(section.length, limit_of(structure.model), key)
        except CompressError as problem:
            problems.append(problem)
        reads_text |= not reads_pixels and section.source != "random"
    if reads_text:
        try:
            directory = structure.checkpoint.directory
            tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
            for section, first in chats:
                check_chats(section, first, tokenizer, directory)
        except CompressError as problem:
            problems.append(problem)
    return problems


def vocabulary_of(structure: Structure) -> int | None:
    """The number of tokens in the model's vocabulary; None for a model that reads pixels."""
    config = structure.model.config.get_text_config()
    return config.vocab_size if structure.model.main_input_name == "input_ids" else None


def check_samples(samples: Samples | None, structure: Structure, key: str) -> None:
    """raises PreflightError for samples that the model can't read: tokens outside its vocabulary, too many tokens,
    images of another size
    """
    vocabulary = vocabulary_of(structure)
    if samples is None:
        return
    if not samples.is_text or vocabulary is None:
        _answer_shape(samples, structure, key)
        return
    largest = max(int(sample.max()) for sample in samples.inputs)
    if largest >= vocabulary:
        raise PreflightError(
            f"the tokenizer made token id {largest}, the model's vocabulary has {vocabulary} tokens",
            where=key,
            hint="Copy the tokenizer files of this very model beside its config.json, or use data.source: random.",
            data={"reason": "unknown-token", "token": largest, "vocabulary": vocabulary},
        )
    longest = max(len(sample) for sample in samples.inputs)
    check_length(longest, limit_of(structure.model), key)


def check_labels(samples: Samples, structure: Structure, key: str) -> None:
    """raises PreflightError for labels of more classes than the model has, since no accuracy can be computed"""
    shape = None if samples.labels is None else _answer_shape(samples, structure, key)
    if samples.labels is None or shape is None or len(shape) != 2 or int(samples.labels.max()) < shape[1]:
        return
    raise PreflightError(
        f"has the label {int(samples.labels.max())}, the model's classes are 0 to {shape[1] - 1}",
        where=key,
        hint="Use the data that the model was trained for, or leave accuracy out of eval.metrics.",
        data={"reason": "unknown-label", "label": int(samples.labels.max()), "classes": shape[1]},
    )


def _answer_shape(samples: Samples, structure: Structure, key: str) -> torch.Size:
    """The shape of the model's output for one sample, by a probe model. raises PreflightError if that fails"""
    model, sample = structure.model, samples.inputs[0].unsqueeze(0)
    config = shallow_config(model.config, model, structure.pieces)
    failure: Exception | None = None
    for device in (torch.device("meta"), torch.device("cpu")):  # some models look at values
        try:
            probe = make_probe_model(type(model), config, device, torch.float32)
            with torch.no_grad():
                return output_of(probe(**{model.main_input_name: sample.to(device)})).shape
        except CompressError:  # of the probe model, such as too little memory
            raise
        except Exception as error:  # any: it comes from the model's own code
            failure = error
    shape, asked = tuple(sample.shape[1:]), "Use images with the size and channels that the model's config.json names."
    raise PreflightError(
        f"samples of shape {shape} can't be read by the model ({' '.join(str(failure).split())[:200]})",
        where=key,
        hint=f"Set a smaller {key}.length; if that fails too, report this message." if samples.is_text else asked,
        data={"reason": "shape", "shape": list(shape), "cause": str(failure)[:200]},
    ) from failure


def check_length(length: int, limit: Limit, key: str) -> None:
    """raises PreflightError for samples of more tokens than the model can read"""
    most = limit(length)
    if most is not None:
        raise PreflightError(
            f"samples have {length} tokens, the model reads at most {most}",
            where=f"{key}.length",
            hint=f"Set {key}.length to {most} or less.",
            data={"length": length, "limit": most},
        )


def _samples(
    recipe: Recipe,
    part: str,
    directory: Path,
    vocabulary: int | None,
    documents: dict[str, Documents],
    trust: bool,
) -> Samples:
    """Samples for calibration or evaluation. The documents of their source are added to `documents`."""
    settings: DataSettings = recipe.data if part == CALIBRATION else recipe.eval.data
    seed = recipe.seed if settings.seed is None else settings.seed
    if settings.source == "random":
        return random_samples(settings, seed, vocabulary, part)
    found = load_documents(settings, directory, vocabulary, trust_remote_code=trust)
    if is_divided(recipe):
        found = part_of(found, part, pack=settings.pack and settings.format != "chat")  # chats stay whole
    documents[part] = found
    return draw_samples(found, settings, directory, seed, trust_remote_code=trust)


def _check_overlap(recipe: Recipe, calibration: Documents, evaluation: Documents) -> None:
    """raises RecipeError if calibration and evaluation share documents"""
    if recipe.data.source == recipe.eval.data.source == "stdlib":
        return  # its splits are pinned by hash and share no documents
    by_lines = calibration.is_whole_text or evaluation.is_whole_text
    shared, is_too_much = overlap(calibration.contents, evaluation.contents, by_lines=by_lines)
    if not is_too_much:
        return
    number, first = shared[0]
    quoted = f" ({' '.join(first.split())[:60]!r})" if isinstance(first, str) else ""
    source = recipe.data.source
    kind = "lines" if by_lines else "documents" if evaluation.images is None else "images"
    raise RecipeError(
        f"{len(shared)} of its {kind} are in data ({source}) too, the first of them number {number}{quoted}",
        where=f"eval.data ({recipe.eval.data.source})",
        hint="Remove them from one of the two, or give both the same source, which is then divided.",
        data={"reason": "overlap", "shared": len(shared), "kind": kind, "source": source, "first": number},
    )


def read_samples(plan: Plan, *, measure: bool, trust_remote_code: bool) -> tuple[Samples | None, Samples | None]:
    """The samples for calibration and evaluation, checked with the model. raises RecipeError, PreflightError"""
    if problems := data_problems(plan.recipe, plan.source, measure=measure, trust_remote_code=trust_remote_code):
        raise problems[0]
    directory = plan.structure.checkpoint.directory
    calibration, held_out = read_data(
        plan.recipe, directory, vocabulary_of(plan.source), measure=measure, trust_remote_code=trust_remote_code
    )
    check_samples(calibration, plan.source, "data")
    check_samples(held_out, plan.source, "eval.data")
    if held_out is not None and "accuracy" in plan.recipe.eval.metrics:
        check_labels(held_out, plan.source, "eval.data")
    return calibration, held_out
