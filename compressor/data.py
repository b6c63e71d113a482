"""Calibration and evaluation samples: read, tokenized, cut, and pinned by hash.

The built-in text `stdlib` is shipped, not read from the running interpreter: the standard library's sources change with
every patch release and distributions strip parts of them, so figures would not be comparable. It is a fixed excerpt
of CPython 3.11's library (PSF licence, compressor/demo/LICENSE), cut by scripts/train_demo.py from files that the demo
model was trained on (`train`) and from files held out of its training (`heldout`).
"""

from __future__ import annotations

import csv
import difflib
import gzip
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from compressor.errors import DependencyError, ModelError, RecipeError
from compressor.lazy import torch
from compressor.model_files import check_directory
from compressor.trusted_code import FLAG, required_code, tokenizer_code

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STDLIB_SHA256 = {
    "train": "524556d663c685d48ab3b115447846fa96792538a641d1a0e9e3bfef28d34167",
    "heldout": "152d374f58f298a159562eb9d5d85eff78123e29b095796fd278843ddd8704ed",
}
DOCUMENT_BREAK = "\n\f\n"  # between the documents of the built-in text


class Settings(Protocol):
    """The `data` section of a recipe (`recipe.DataSettings`)."""

    @property
    def source(self) -> str: ...
    @property
    def config(self) -> str | None: ...
    @property
    def split(self) -> str: ...
    @property
    def field(self) -> str: ...
    @property
    def samples(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def pack(self) -> bool: ...
    @property
    def sha256(self) -> str | None: ...


@dataclass(frozen=True)
class Samples:
    """What the model reads, without padding: samples of unequal length stay apart.

    inputs  one entry a sample: token ids (length,) int64, or pixels (channels, height, width) float32
    labels  (samples,) int64 when the data has them
    sha256  of the source's content; `digest` is that of the samples themselves
    """

    inputs: tuple[torch.Tensor, ...]
    source: str
    sha256: str
    labels: torch.Tensor | None = None

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
        return total.hexdigest()

    def batches(self, size: int) -> Iterator[tuple[list[int], torch.Tensor]]:
        """(sample numbers, stacked samples) of at most `size` samples of one length; no padding ever."""
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for number, sample in enumerate(self.inputs):
            by_shape.setdefault(tuple(sample.shape), []).append(number)
        for numbers in by_shape.values():
            for start in range(0, len(numbers), size):
                chosen = numbers[start : start + size]
                yield chosen, torch.stack([self.inputs[number] for number in chosen])


def demo_path() -> Path:
    """The directory of the embedded demo model."""
    return Path(__file__).parent / "demo"


def load_samples(
    settings: Settings, model_directory: Path, *, seed: int, vocabulary: int | None, trust_remote_code: bool = False
) -> Samples:
    """Samples as `settings` describe them, tokenized by the model's own tokenizer.

    vocabulary  size, for `random`; None for models that read pixels
    trust_remote_code  a tokenizer's own code may run
    raises      RecipeError for data that can't be used, DependencyError for a missing package
    """
    if settings.source == "random":
        return _random(settings, seed, vocabulary)
    if settings.source.endswith(".npz"):
        return _images(settings, model_directory, seed)
    if vocabulary is None:
        raise RecipeError(
            "this model reads pixels, the data is text",
            where=f"data.source {settings.source!r}",
            hint="Give a .npz file with `images` and `labels`.",
        )
    documents, labels, digest = read_documents(settings)
    _check_hash(settings, digest)
    tokenizer = load_tokenizer(model_directory, trust_remote_code=trust_remote_code)
    if settings.pack:
        if labels is not None:
            labels = None  # packed text has no sample of its own for a label
        return Samples(pack(documents, tokenizer, settings, seed), settings.source, digest)
    return _one_per_document(documents, labels, tokenizer, settings, seed, digest)


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's own tokenizer; code of the directory runs only where the user trusts it.

    raises RecipeError if there is none that can be used, ModelError if one needs code that isn't trusted
    """
    from transformers import AutoTokenizer

    check_directory(directory)
    if not trust_remote_code and (references := tokenizer_code(directory)):
        raise ModelError(
            f"its tokenizer is code that comes with the model: {required_code(directory, references)}",
            where="tokenizer_config.json",
            hint=FLAG,
        )
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # of a library, or of the tokenizer's code: whatever it raises says why
        raise RecipeError(
            f"the model has no usable tokenizer ({_first_line(error)})",
            where=directory.name,
            hint="Copy tokenizer.json beside config.json, or use data.source: random.",
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:160]


def read_documents(settings: Settings) -> tuple[list[str], list[int] | None, str]:
    """(texts, labels or None, sha256 of the content)."""
    source = settings.source
    if source == "stdlib":
        return _stdlib(settings.split)
    if source.startswith("dataset:") or Path(source).is_dir():
        return _datasets(settings)
    path = Path(os.path.expanduser(source))
    if not path.is_file():
        raise RecipeError(
            "no such data file", where=source, hint="Built in: stdlib, random. Else a path or dataset:NAME."
        )
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"is not UTF-8 (byte {error.start})", where=path.name, hint="Save it as UTF-8.") from error
    if not text.strip():
        raise RecipeError("is empty", where=path.name)
    digest = hashlib.sha256(content).hexdigest()
    if path.suffix == ".jsonl":
        rows = [_json_row(line, number, path) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    elif path.suffix in (".csv", ".tsv"):
        rows = list(csv.DictReader(text.splitlines(), delimiter="\t" if path.suffix == ".tsv" else ","))
    else:
        return [text], None, digest
    texts = [_field(row, settings.field, number, path.name) for number, row in enumerate(rows, 1)]
    try:
        labels = [int(row["label"]) for row in rows] if rows and "label" in rows[0] else None
    except (KeyError, TypeError, ValueError) as error:
        raise RecipeError(f"a label is missing or not a whole number ({error})", where=path.name) from error
    return texts, labels, digest


def pack(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, settings: Settings, seed: int
) -> tuple[torch.Tensor, ...]:
    """Documents end to end, an end-of-text token behind each, cut into windows; `samples` of them, drawn by seed.

    Windows never overlap. raises RecipeError when the text is too short
    """
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    ids: list[int] = []
    for document in documents:
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        if end is not None:
            ids.append(end)
    windows = len(ids) // settings.length
    if windows == 0:
        raise RecipeError(
            f"the text has {len(ids)} tokens, one sample needs {settings.length}",
            where=settings.source,
            hint="Give more text or set a smaller length.",
        )
    if windows < settings.samples:
        raise RecipeError(
            f"the text gives {windows} samples of {settings.length} tokens, {settings.samples} were asked for",
            where=settings.source,
            hint=f"Set samples to {windows} or less, or give more text.",
        )
    chosen = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))[: settings.samples].sort().values
    stream = torch.tensor(ids[: windows * settings.length]).view(windows, settings.length)
    return tuple(stream[chosen].unbind())


def _stdlib(split: str) -> tuple[list[str], None, str]:
    if split not in STDLIB_SHA256:
        raise RecipeError(f"split {split!r} is unknown", where="stdlib", hint="It has train and heldout.")
    content = gzip.decompress((Path(__file__).parent / "text" / f"{split}.txt.gz").read_bytes())
    digest = hashlib.sha256(content).hexdigest()
    if digest != STDLIB_SHA256[split]:
        raise RecipeError(f"the shipped text has hash {digest}", where=f"stdlib {split}", hint="Reinstall the package.")
    return content.decode().split(DOCUMENT_BREAK), None, digest


def _datasets(settings: Settings) -> tuple[list[str], list[int] | None, str]:
    try:
        import datasets
    except ImportError as error:
        raise DependencyError(
            "needs the package `datasets`", where=settings.source, hint="pip install datasets"
        ) from error
    name = settings.source.removeprefix("dataset:")
    try:
        if Path(name).is_dir() and (Path(name) / "dataset_dict.json").is_file():
            table = datasets.load_from_disk(name)[settings.split]
        elif Path(name).is_dir() and (Path(name) / "state.json").is_file():
            table = datasets.load_from_disk(name)
        else:
            table = datasets.load_dataset(name, settings.config, split=settings.split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise RecipeError(f"can't be loaded ({str(error)[:200]})", where=settings.source) from error
    if settings.field not in table.column_names:
        raise RecipeError(
            f"has no column {settings.field!r}",
            where=settings.source,
            hint=f"Columns: {', '.join(table.column_names)}.",
        )
    texts = [str(text) for text in table[settings.field]]
    labels = [int(label) for label in table["label"]] if "label" in table.column_names else None
    return texts, labels, hashlib.sha256("\0".join(texts).encode()).hexdigest()


def _one_per_document(
    documents: list[str],
    labels: list[int] | None,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    seed: int,
    digest: str,
) -> Samples:
    if len(documents) < settings.samples:
        raise RecipeError(
            f"{len(documents)} documents were found, {settings.samples} samples were asked for",
            where=settings.source,
            hint=f"Set samples to {len(documents)} or less.",
        )
    chosen = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))[: settings.samples]
    numbers = chosen.sort().values.tolist()
    inputs = []
    for number in numbers:
        ids = tokenizer(documents[number], truncation=True, max_length=settings.length)["input_ids"]
        if not ids:
            raise RecipeError(f"document {number + 1} has no tokens", where=settings.source)
        inputs.append(torch.tensor(ids))
    kept = None if labels is None else torch.tensor([labels[number] for number in numbers])
    return Samples(tuple(inputs), settings.source, digest, kept)


def _random(settings: Settings, seed: int, vocabulary: int | None) -> Samples:
    if vocabulary is None:
        raise RecipeError(
            "random data are tokens, this model reads pixels", where="data.source", hint="Give a .npz file."
        )
    ids = torch.randint(
        0, vocabulary, (settings.samples, settings.length), generator=torch.Generator().manual_seed(seed)
    )
    digest = hashlib.sha256(f"random {vocabulary} {settings.samples} {settings.length} {seed}".encode()).hexdigest()
    _check_hash(settings, digest)
    return Samples(tuple(ids.unbind()), "random", digest)


def _images(settings: Settings, model_directory: Path, seed: int) -> Samples:
    """`images` (n, h, w) or (n, h, w, c) uint8 and `labels` (n,), normalised as preprocessor_config.json says."""
    import numpy

    path = Path(os.path.expanduser(settings.source))
    if not path.is_file():
        raise RecipeError("no such data file", where=settings.source)
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    _check_hash(settings, digest)
    try:
        with numpy.load(path, allow_pickle=False) as arrays:
            images, labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"]).long()
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(f"is not an .npz with `images` and `labels` ({error})", where=path.name) from error
    images = images.unsqueeze(-1) if images.dim() == 3 else images
    pixels = images.permute(0, 3, 1, 2).float() / 255
    processor = model_directory / "preprocessor_config.json"
    if processor.is_file():
        stated = json.loads(processor.read_text())
        mean, std = (
            torch.tensor(stated.get(key, default)).view(1, -1, 1, 1)
            for key, default in (("image_mean", [0.0]), ("image_std", [1.0]))
        )
        pixels = (pixels - mean) / std
    if len(pixels) < settings.samples:
        raise RecipeError(f"has {len(pixels)} images, {settings.samples} were asked for", where=path.name)
    chosen = (
        torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))[: settings.samples].sort().values
    )
    return Samples(tuple(pixels[chosen].unbind()), settings.source, digest, labels[chosen])


def _json_row(line: str, number: int, path: Path) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"is not JSON ({error})", where=f"{path.name}:{number}") from error
    if not isinstance(row, dict):
        raise RecipeError("is not a JSON object", where=f"{path.name}:{number}")
    return row


def _field(row: dict[str, Any], field: str, number: int, name: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        near = difflib.get_close_matches(field, [str(key) for key in row], 1)
        hint = f"Did you mean {near[0]!r}?" if near and value is None else f"Keys: {', '.join(map(str, row))}."
        raise RecipeError(f"has no text in {field!r}", where=f"{name}, row {number}", hint=hint)
    return value


def _check_hash(settings: Settings, digest: str) -> None:
    if settings.sha256 is not None and settings.sha256 != digest:
        raise RecipeError(
            f"has sha256 {digest}, the recipe pins {settings.sha256}",
            where=settings.source,
            hint="Use the pinned data, or update data.sha256.",
        )
