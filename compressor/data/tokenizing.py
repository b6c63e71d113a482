"""Turns texts into tokens with the model's own tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from compressor.data.settings import Settings
from compressor.errors import ModelError, RecipeError
from compressor.lazy import torch
from compressor.model.model_files import check_directory
from compressor.model.trusted_code import FLAG, file_of, required_code, tokenizer_code

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's own tokenizer. Code of the directory runs only if the user trusts it.

    raises  RecipeError if there is none that can be used, ModelError if one needs code that is not trusted
    """
    from transformers import AutoTokenizer
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    check_directory(directory)
    where, references = tokenizer_code(directory)
    if references and not trust_remote_code:
        raise ModelError(
            f"its tokenizer is code bundled with the model: {required_code(directory, references)}",
            where=where,
            hint=FLAG,
            data={"reason": "own-tokenizer", "files": sorted({file_of(reference) for reference in references})},
        )
    try:
        if where == "config.json" and references:  # of the slow class and the fast one, if there are both
            cls: Any = get_class_from_dynamic_module(references[-1], directory, local_files_only=True)
            return cast("PreTrainedTokenizerBase", cls.from_pretrained(directory, local_files_only=True))
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # any exception of a library or of the tokenizer's code gives the reason
        raise RecipeError(
            f"the model has no usable tokenizer ({_first_line(error)})",
            where=directory.name,
            hint="Copy tokenizer.json beside config.json, or use data.source: random.",
            data={"reason": "no-tokenizer", "cause": _first_line(error)},
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:160]


def pack(
    documents: list[str],
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    seed: int,
    where: str,
    *,
    special_tokens: bool,
) -> tuple[torch.Tensor, ...]:
    """Join the documents to windows of `length` tokens, and draw `samples` of these.

    Texts are joined with an end-of-text token after each, and divided. Chats have only the tokens of their template.
    Each window begins with a chat, as a prompt does, and the rest of the chat that fills it is left out.

    Windows never overlap, and a document without tokens adds none.

    special_tokens  each window begins with the token with which the tokenizer begins a text, if it does so
    raises          RecipeError if the text is too short
    """
    begin = _begin_of(tokenizer) if special_tokens else []
    length = settings.length - len(begin)
    made = (tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] for document in documents)
    if settings.format == "chat":
        ids = _whole_windows(made, length)
    else:
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        ids = [token for tokens in made if tokens for token in (*tokens, *(() if end is None else (end,)))]
    if not ids and any(document.strip() for document in documents):
        raise RecipeError(
            "the model's tokenizer gives no tokens for its text",
            where=where,
            hint="Copy all files of the tokenizer (tokenizer.json and others) beside config.json.",
            data={"reason": "no-tokens"},
        )
    windows = len(ids) // length
    if windows == 0:
        raise RecipeError(
            f"the text has {len(ids)} tokens, one sample needs {length}",
            where=where,
            hint="Use a longer text, or set a smaller length.",
            data={"tokens": len(ids), "length": settings.length},
        )
    if windows < settings.samples:
        raise RecipeError(
            f"the text gives {windows} samples of {settings.length} tokens, {settings.samples} were asked for",
            where=where,
            hint=f"Set samples to {windows} or less, or use a longer text.",
            data={"available": windows, "samples": settings.samples, "length": settings.length},
        )
    chosen = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))[: settings.samples].sort().values
    stream = torch.tensor(ids[: windows * length]).view(windows, length)[chosen]
    begins = torch.tensor(begin, dtype=torch.int64).expand(len(chosen), -1)
    return tuple(torch.cat([begins, stream], dim=1).unbind())


def _begin_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The begin-of-text token, if the tokenizer puts it before each text by default."""
    bare, whole = (tokenizer("a", add_special_tokens=is_whole)["input_ids"] for is_whole in (False, True))
    begin = [tokenizer.bos_token_id]
    return begin if whole[:1] == begin and bare[:1] != begin else []


def _whole_windows(chats: Iterable[list[int]], length: int) -> list[int]:
    """The tokens of windows, each of which begins with a chat."""
    ids: list[int] = []
    window: list[int] = []
    for chat in chats:
        window += chat
        if len(window) >= length:
            ids += window[:length]
            window = []
    return ids or window


def tokens_of(
    text: str, number: int, tokenizer: PreTrainedTokenizerBase, settings: Settings, special_tokens: bool
) -> torch.Tensor:
    ids = tokenizer(text, truncation=True, max_length=settings.length, add_special_tokens=special_tokens)["input_ids"]
    if not ids:
        raise RecipeError(
            "has no tokens", where=f"{settings.source}, document {number + 1}", hint="Remove documents without text."
        )
    return torch.tensor(ids)
