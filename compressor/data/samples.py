"""Makes calibration and evaluation samples: tokenizes, divides and draws documents, and checks their hash.

The built-in text `stdlib` is bundled and not read from the running interpreter: the standard library's sources change
with every patch release and distributions remove parts of them, so results would not be comparable. It is a fixed
excerpt of CPython 3.11's library (PSF licence, compressor/demo/LICENSE). scripts/train/demo.py takes it from files on
which the demo model was trained (`train`) and from files held out of its training (`heldout`).
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.data.chat_template import chat_renderer
from compressor.data.chats import Render, no_template, texts_of
from compressor.data.files import memory_share
from compressor.data.images import check_images, normalised, read_images
from compressor.data.parts import EVALUATION, SourcePart, part_of_texts, positions_of
from compressor.data.rows import Rows, whole_labels
from compressor.data.settings import Settings
from compressor.data.sources import check_rows, is_dataset, read_rows
from compressor.data.tokenizing import load_tokenizer, pack, tokens_of
from compressor.errors import RecipeError
from compressor.lazy import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STDLIB_SHA256 = {
    "train": "524556d663c685d48ab3b115447846fa96792538a641d1a0e9e3bfef28d34167",
    "heldout": "152d374f58f298a159562eb9d5d85eff78123e29b095796fd278843ddd8704ed",
}
TOKEN_BYTES = 8
DOCUMENT_BREAK = "\n\f\n"  # between the documents of the built-in text


@dataclass(frozen=True)
class Samples:
    """The inputs of the model, without padding: samples of different lengths are not batched together.

    inputs  one entry per sample: token ids (length,) int64, or pixels (channels, height, width) float32
    labels  (samples,) int64 if the data has them
    sha256  of the source's content; `digest` is that of the samples themselves
    part    the part of a divided source: `name`, number of `documents` in it, `of` how many; None for all of it
    """

    inputs: tuple[torch.Tensor, ...]
    source: str
    sha256: str
    labels: torch.Tensor | None = None
    part: SourcePart | None = None

    @property
    def is_text(self) -> bool:
        return self.inputs[0].dim() == 1

    @property
    def tokens(self) -> int:
        return sum(len(sample) for sample in self.inputs) if self.is_text else 0

    @property
    def distinct_tokens(self) -> int:
        return len(torch.cat(self.inputs).unique()) if self.is_text else 0

    @property
    def digest(self) -> str:
        total = hashlib.sha256()
        for sample in self.inputs:
            total.update(str(tuple(sample.shape)).encode())
            total.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
        if self.labels is not None:
            total.update(self.labels.numpy().tobytes())
        return total.hexdigest()

    def batches(self, size: int) -> Iterator[tuple[list[int], torch.Tensor]]:
        """(sample numbers, stacked samples) of at most `size` samples of one length, always without padding."""
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for number, sample in enumerate(self.inputs):
            by_shape.setdefault(tuple(sample.shape), []).append(number)
        for numbers in by_shape.values():
            for start in range(0, len(numbers), size):
                chosen = numbers[start : start + size]
                yield chosen, torch.stack([self.inputs[number] for number in chosen])


@dataclass(frozen=True)
class Documents:
    """The documents of a source: texts, or images (n, height, width, channels) uint8.

    labels  a class number for each; None if there are none
    has_special_tokens  the texts already contain them, as chats from the model's template do
    is_whole_text  one text that may be divided anywhere
    part    as `Samples.part`
    """

    texts: list[str]
    images: torch.Tensor | None
    labels: list[int] | None
    sha256: str
    has_special_tokens: bool = False
    is_whole_text: bool = False
    part: SourcePart | None = None

    @property
    def contents(self) -> list[str] | list[bytes]:
        """The contents that identify the documents."""
        return self.texts if self.images is None else [image.numpy().tobytes() for image in self.images]


def load_samples(
    settings: Settings, model_directory: Path, *, seed: int, vocabulary: int | None, trust_remote_code: bool = False
) -> Samples:
    """Samples as `settings` describe them, tokenized by the model's own tokenizer.

    vocabulary  size, for `random`; None for models that read pixels
    trust_remote_code  a tokenizer's own code may run
    raises      RecipeError for data that can't be used, DependencyError for a missing package
    """
    if settings.source == "random":
        return random_samples(settings, seed, vocabulary)
    found = load_documents(settings, model_directory, vocabulary, trust_remote_code=trust_remote_code)
    return draw_samples(found, settings, model_directory, seed, trust_remote_code=trust_remote_code)


def load_documents(
    settings: Settings, model_directory: Path, vocabulary: int | None, *, trust_remote_code: bool = False
) -> Documents:
    """All documents of the source, with the hash in the recipe if it has one. raises as `load_samples` does"""
    _check_kind(settings, reads_pixels=vocabulary is None)
    if _is_images(settings.source):
        images, labels, content = read_images(settings.source)
        found = Documents([], images, labels, hashlib.sha256(content).hexdigest())
    else:
        texts, has_special_tokens, rows = _read_texts(settings, model_directory, trust_remote_code)
        # packed text has no sample for a single label
        labels = None if settings.pack or rows.labels is None else whole_labels(rows.labels, rows.name)
        found = Documents(texts, None, labels, rows.sha256, has_special_tokens, rows.is_whole_text)
    _check_hash(settings, found.sha256)
    return found


def part_of(documents: Documents, part: str, *, pack: bool) -> Documents:
    """One part of the documents of a source for both calibration and evaluation (`parts`).

    pack  whether the texts may be divided, because a sample is not a document
    """
    if pack and documents.images is None:
        texts = part_of_texts(documents.texts, part)
        reported: SourcePart = {"name": part, "documents": len(texts), "of": len(documents.texts)}
        return replace(documents, texts=texts, labels=None, part=reported)
    numbers = positions_of(documents.contents, part)
    return replace(
        documents,
        texts=[documents.texts[number] for number in numbers] if documents.images is None else [],
        images=None if documents.images is None else documents.images[numbers],
        labels=None if documents.labels is None else [documents.labels[number] for number in numbers],
        part={"name": part, "documents": len(numbers), "of": len(documents.contents)},
    )


def draw_samples(
    documents: Documents, settings: Settings, model_directory: Path, seed: int, *, trust_remote_code: bool = False
) -> Samples:
    """Draw `samples` of the documents by the seed. raises RecipeError if they are too few or too short"""
    where = settings.source if documents.part is None else f"{settings.source}, its part for {documents.part['name']}"
    if documents.images is not None:
        numbers = _draw(len(documents.images), settings.samples, seed, where, "images")
        pixels = normalised(documents.images[numbers], model_directory)
        inputs = tuple(pixels.unbind())
    else:
        tokenizer = load_tokenizer(model_directory, trust_remote_code=trust_remote_code)
        special = not documents.has_special_tokens
        if settings.pack:
            packed = pack(documents.texts, tokenizer, settings, seed, where, special_tokens=special)
            return Samples(packed, settings.source, documents.sha256, part=documents.part)
        numbers = _draw(len(documents.texts), settings.samples, seed, where, "documents")
        inputs = tuple(tokens_of(documents.texts[number], number, tokenizer, settings, special) for number in numbers)
    labels = documents.labels
    kept = None if labels is None else torch.tensor([labels[number] for number in numbers])
    return Samples(inputs, settings.source, documents.sha256, kept, documents.part)


def random_samples(settings: Settings, seed: int, vocabulary: int | None, part: str = "") -> Samples:
    """Random tokens (length,) in [0, vocabulary). Those of evaluation are never those of calibration."""
    _check_kind(settings, reads_pixels=vocabulary is None)
    assert vocabulary is not None  # else the model reads pixels
    _check_room(settings)
    drawn = seed if part != EVALUATION else int.from_bytes(hashlib.sha256(f"{part} {seed}".encode()).digest()[:4])
    shape = (settings.samples, settings.length)
    ids = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(drawn))
    digest = hashlib.sha256(f"random {vocabulary} {settings.samples} {settings.length} {drawn}".encode()).hexdigest()
    _check_hash(settings, digest)
    return Samples(tuple(ids.unbind()), "random", digest)


def check_data(settings: Settings, *, reads_pixels: bool) -> Rows | None:
    """Check without reading all of the data that it is there, that the model reads its kind, and that its first rows
    have the field.

    returns  the first rows, for `check_chats`; None if the source has no rows or can't be read in part
    raises   RecipeError, DependencyError for a missing package
    """
    _check_kind(settings, reads_pixels=reads_pixels)
    if settings.source == "stdlib":
        _stdlib(settings.split)
    elif _is_images(settings.source):
        check_images(settings.source)
    elif settings.source == "random":
        _check_room(settings)
    else:
        return check_rows(settings)
    return None


def check_chats(
    settings: Settings, first: Rows | None, tokenizer: PreTrainedTokenizerBase, model_directory: Path
) -> None:
    """raises RecipeError if the model has no chat template, or if that refuses one of the first rows"""
    render = chat_renderer(tokenizer, model_directory, is_request=True)
    if render is None:
        raise no_template(settings.source, settings.field if first is None else first.field)
    if first is not None:
        texts_of(first, render, is_chat=True)


def _check_room(settings: Settings) -> None:
    """raises RecipeError for more random tokens than fit into memory"""
    asked = f"{settings.samples} samples of {settings.length} tokens"
    size, most = settings.samples * settings.length * TOKEN_BYTES, memory_share()
    if size > most:
        raise RecipeError(
            f"{asked} take {size:,} bytes, and {most:,} fit into memory here",
            where="random",
            hint="Set a smaller samples or length.",
            data={"samples": settings.samples, "length": settings.length, "size": size, "limit": most},
        )


def _read_texts(settings: Settings, model_directory: Path | None, trust: bool) -> tuple[list[str], bool, Rows]:
    """(texts, whether they are chats from the model's template, the rows of the texts)."""
    if settings.source == "stdlib":
        texts, _, digest = _stdlib(settings.split)
        return texts, False, Rows([], None, digest, "stdlib", settings.field)
    rows, is_chat = read_rows(settings), settings.format == "chat"
    render: Render | None = None
    if model_directory is not None and rows.values and not isinstance(rows.values[0], str):
        tokenizer = load_tokenizer(model_directory, trust_remote_code=trust)
        render = chat_renderer(tokenizer, model_directory, is_request=is_chat)
    texts, is_rendered = texts_of(rows, render, is_chat=is_chat)
    return texts, is_rendered, rows


def _is_images(source: str) -> bool:
    return source.lower().endswith(".npz") and not is_dataset(source)


def _check_kind(settings: Settings, *, reads_pixels: bool) -> None:
    """raises RecipeError if the model reads text and the source has images, or the other way round, and for a source
    that has no chats
    """
    if settings.format == "chat" and settings.source in ("stdlib", "random"):
        raise RecipeError(
            f"{settings.source} has no chats",
            where=f"data.source {settings.source!r}",
            hint="Set source to a file or data set with rows of chats, or format to text.",
            data={"reason": "no-chats", "source": settings.source},
        )
    if _is_images(settings.source) == reads_pixels:
        return
    if reads_pixels:
        raise RecipeError(
            "the model reads pixels, but the data is text",
            where=f"data.source {settings.source!r}",
            hint="Set source to a .npz file with `images` and `labels`.",
            data={"reads": "pixels", "data": "text"},
        )
    raise RecipeError(
        "the model reads text, but the data is images",
        where=f"data.source {settings.source!r}",
        hint="Set source to stdlib, a text file, a file with rows of text, or dataset:NAME.",
        data={"reads": "text", "data": "images"},
    )


def _stdlib(split: str) -> tuple[list[str], None, str]:
    if split not in STDLIB_SHA256:
        raise RecipeError(
            f"split {split!r} is unknown",
            where="stdlib",
            hint="Set split to train or heldout.",
            data={"reason": "no-split", "split": split},
        )
    content = gzip.decompress((Path(__file__).parent.parent / "text" / f"{split}.txt.gz").read_bytes())
    digest = hashlib.sha256(content).hexdigest()
    if digest != STDLIB_SHA256[split]:
        raise RecipeError(
            f"the built-in text has sha256 {digest}, {STDLIB_SHA256[split]} is expected",
            where=f"stdlib {split}",
            hint="Run pip install --force-reinstall compress-model.",
            data={"reason": "sha256", "found": digest, "expected": STDLIB_SHA256[split]},
        )
    return content.decode().split(DOCUMENT_BREAK), None, digest


def _draw(count: int, samples: int, seed: int, where: str, of: str) -> list[int]:
    """Numbers of the drawn documents or images, in order. raises RecipeError if there are too few"""
    if count < samples:
        hint = f"Set samples to {count} or less, or use larger data." if count else "Use larger data."
        values = {"available": count, "samples": samples, "of": of}
        raise RecipeError(f"has {count} {of}, {samples} samples were asked for", where=where, hint=hint, data=values)
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples]
    return chosen.sort().values.tolist()


def _check_hash(settings: Settings, digest: str) -> None:
    if settings.sha256 is not None and settings.sha256 != digest:
        raise RecipeError(
            f"has sha256 {digest}, the recipe pins {settings.sha256}",
            where=settings.source,
            hint="Use the data of that hash, or set sha256 to the new one if this data is the right one.",
            data={"reason": "sha256", "found": digest, "pinned": settings.sha256},
        )
