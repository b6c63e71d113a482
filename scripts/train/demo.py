"""Trains the demo model and writes the built-in text, both from the Python standard library's own sources.

    python scripts/train/demo.py --out compressor/demo --text compressor/text

Writes the model (config.json, generation_config.json, model.safetensors in bfloat16), its tokenizer, and
training_log.json into --out, and train.txt.gz and heldout.txt.gz into --text. The figures in docs/demo.md are those
of training_log.json. Deterministic for one Python version, one seed, one thread count and one set of library versions;
all of them are in the log. About 40 minutes on two CPU cores.

The split is by file content: a document whose sha256 starts with a byte below 26 is held out (about a tenth). No fitted
model, tokenizer and unigram model included, sees a held-out document.
"""

from __future__ import annotations

import compressor  # noqa: F401 isort: skip (before torch, whose threads then sleep while they wait)

import argparse
import ast
import gzip
import hashlib
import json
import math
import platform
import re
import shutil
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import softmax
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HELDOUT_BELOW = 26  # of 256: first byte of the document's sha256
TEST_FILES_BELOW = 128  # of 256: second byte; half of the small test files, so that tests don't crowd out the library
TEST_FILE_BYTES = 48_000
SEPARATOR, PADDING = "<|endoftext|>", "<|pad|>"
VOCABULARY = 2048
EVALUATION_LENGTH = 512
SKIPPED_FOLDERS = {"site-packages", "__pycache__", "encodings", "data", "encoded_modules", "__phello__", "ensurepip"}
SKIPPED_NAMES = ("_sysconfigdata", "cjkencodings", "test_unicode_identifiers", "badsyntax_", "bad_coding", "re_tests")


@dataclass(frozen=True)
class Document:
    """One file of the corpus. `digest` is the sha256 of its text and decides its split."""

    name: str
    text: str
    digest: bytes

    @property
    def is_heldout(self) -> bool:
        return self.digest[0] < HELDOUT_BELOW


def read_corpus(library: Path) -> list[Document]:
    """The library's modules, half of its small tests, and the language reference that pydoc carries; sorted by name."""
    texts: dict[str, str] = {}
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library).as_posix()
        if SKIPPED_FOLDERS & set(path.parts[len(library.parts) :]) or path.name.startswith(SKIPPED_NAMES):
            continue
        if name.startswith("config-"):
            continue  # build paths of one machine
        content = path.read_bytes()
        if name == "pydoc_data/topics.py":
            texts[name] = "\n".join(read_topics(content.decode()).values())
        elif is_test(name) and (
            len(content) > TEST_FILE_BYTES or hashlib.sha256(content).digest()[1] >= TEST_FILES_BELOW
        ):
            continue
        else:
            try:
                texts[name] = content.decode()
            except UnicodeDecodeError:
                continue  # a test of source encodings
    documents = [Document(name, text, hashlib.sha256(text.encode()).digest()) for name, text in texts.items()]
    return [document for document in documents if is_prose_or_code(document.text)]


def is_test(name: str) -> bool:
    return any(part in ("test", "tests", "idle_test") for part in name.split("/")[:-1])


def is_prose_or_code(text: str) -> bool:
    """False for empty files and for tables: more than an eighth digits, or a twentieth outside ASCII."""
    if len(text) < 200:
        return False
    digits = sum(text.count(digit) for digit in "0123456789")
    return digits < len(text) / 8 and sum(map(str.isascii, text)) > len(text) * 19 / 20


def read_topics(source: str) -> dict[str, str]:
    """The `topics` dictionary of pydoc_data/topics.py: reference manual sections as plain text."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "topics":
            return ast.literal_eval(node.value)
    raise SystemExit("pydoc_data/topics.py has no `topics`; this Python's pydoc differs from those the script knows")


def train_tokenizer(documents: list[Document]) -> PreTrainedTokenizerFast:
    """Byte-level BPE. One token separates documents and stands for both their beginning and their end, as in GPT-2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[SEPARATOR, PADDING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        pad_token=PADDING,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def encode(documents: list[Document], tokenizer: PreTrainedTokenizerFast) -> list[torch.Tensor]:
    """Token ids of each document, int64, each ending in the separator."""
    encodings = tokenizer.backend_tokenizer.encode_batch([document.text for document in documents])
    return [torch.tensor([*encoding.ids, tokenizer.eos_token_id]) for encoding in encodings]


def batches(
    documents: list[torch.Tensor], batch_tokens: int, length: int, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """Endless (batch_tokens // length, length) int64. Each epoch reads every document once, in a new order."""
    rest = torch.empty(0, dtype=torch.int64)
    while True:
        order = torch.randperm(len(documents), generator=generator)
        stream = torch.cat([rest, *(documents[index] for index in order)])
        usable = len(stream) // length
        sequences = stream[: usable * length].view(usable, length)
        sequences = sequences[torch.randperm(usable, generator=generator)]
        rows = batch_tokens // length
        for start in range(0, usable - rows + 1, rows):
            yield sequences[start : start + rows]
        rest = stream[usable * length :]


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def loss_and_backward(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """Mean next-token loss in nats of (batch, length) tokens; adds its gradients to the parameters.

    The gradient of the loss, (softmax(logits) - one_hot(target)) / count, is written out, because on a CPU the
    library's backward of log_softmax takes a sixth of the step.
    """
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    targets = tokens[:, 1:].unsqueeze(-1)
    probabilities = softmax(logits.detach().float(), dim=-1)
    loss = -probabilities.gather(-1, targets).clamp_min(1e-30).log().mean()
    gradient = probabilities.scatter_add_(-1, targets, torch.full_like(targets, -1.0, dtype=torch.float32))
    logits.backward((gradient / targets.numel()).to(logits.dtype))
    return loss.item()


def train(
    model: LlamaForCausalLM, documents: list[torch.Tensor], settings: argparse.Namespace
) -> tuple[list[dict[str, float]], int]:
    """AdamW under a cosine schedule; the last third reads sequences twice as long. Returns (log, tokens)."""
    generator = torch.Generator().manual_seed(settings.seed)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        fused=True,
    )
    log: list[dict[str, float]] = []
    seen, running, began = 0, 0.0, time.monotonic()
    phases = [(settings.steps * 2 // 3, settings.length // 2), (settings.steps, settings.length)]
    step = 0
    model.train()
    for until, length in phases:
        for tokens in batches(documents, settings.batch_tokens, length, generator):
            if step == until:
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, settings.steps, settings.warmup, settings.peak)
            loss = loss_and_backward(model, tokens)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step, seen = step + 1, seen + tokens.numel()
            running = loss if step == 1 else 0.98 * running + 0.02 * loss
            if step % settings.log_every == 0 or step == settings.steps:
                log.append({"step": step, "tokens": seen, "length": length, "loss": round(running, 4)})
                print(f"{log[-1]} {seen / (time.monotonic() - began):.0f} tokens/s", flush=True)
    model.eval()
    return log, seen


def windows(documents: list[torch.Tensor], length: int) -> torch.Tensor:
    """(windows, length) int64: the joined documents, divided without overlap, without the incomplete last window."""
    stream = torch.cat(documents)
    return stream[: len(stream) // length * length].view(-1, length)


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """exp of the mean negative log likelihood of each window's tokens but its first, float64 sums."""
    total, count = 0.0, 0
    for batch in tokens.split(8):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        targets = batch[:, 1:]
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        count += targets.numel()
    return math.exp(total / count)


def unigram_perplexity(train_tokens: torch.Tensor, tokens: torch.Tensor) -> float:
    """The same tokens under a unigram model of the training tokens, one added to each count."""
    counts = torch.bincount(train_tokens, minlength=VOCABULARY).double() + 1
    log_probability = (counts / counts.sum()).log()
    return math.exp(-log_probability[tokens[:, 1:]].mean().item())


def write_text(documents: list[Document], limit_bytes: int, path: Path) -> dict[str, object]:
    """Documents in the order of their hash, whole, up to limit_bytes, joined by a form feed line; gzip without a date.

    The order by hash mixes library, tests and reference in the corpus's own proportion; documents above a tenth of
    the limit are left out, so that no single module dominates.
    """
    chosen: list[str] = []
    size = 0
    for document in sorted(documents, key=lambda document: document.digest[::-1]):
        text = re.sub(r"\f", "", document.text).strip("\n") + "\n"
        if len(text.encode()) <= limit_bytes // 10 and size + len(text.encode()) + 2 <= limit_bytes:
            chosen.append(text)
            size += len(text.encode()) + 2
    content = "\f\n".join(chosen).encode()
    path.write_bytes(gzip.compress(content, 9, mtime=0))
    return {"documents": len(chosen), "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def corpus_sha256(documents: list[Document]) -> str:
    """Hash over the documents' own hashes, in the order of their names."""
    return hashlib.sha256(b"".join(document.digest for document in documents)).hexdigest()


def line_overlap(heldout: list[Document], training: list[Document]) -> float:
    """Fraction of held-out lines of 40 characters or more that are in a training document too."""
    known = {line.strip() for document in training for line in document.text.splitlines()}
    lines = [line.strip() for document in heldout for line in document.text.splitlines() if len(line.strip()) >= 40]
    return sum(line in known for line in lines) / len(lines)


def build_model(hidden: int, intermediate: int, layers: int, heads: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=hidden // heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and training_log.json")
    parser.add_argument("--text", type=Path, help="folder for train.txt.gz and heldout.txt.gz; left out: not written")
    parser.add_argument("--library", type=Path, default=Path(sysconfig.get_path("stdlib")), help="a Lib folder")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--peak", type=float, default=4e-3, help="highest learning rate")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence in the last third of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--log-every", type=int, default=50)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    torch.use_deterministic_algorithms(True)

    documents = read_corpus(settings.library)
    heldout = [document for document in documents if document.is_heldout]
    training = [document for document in documents if not document.is_heldout]
    tokenizer = train_tokenizer(training)
    train_ids, heldout_ids = encode(training, tokenizer), encode(heldout, tokenizer)
    train_stream, heldout_windows = torch.cat(train_ids), windows(heldout_ids, EVALUATION_LENGTH)
    figures: dict[str, object] = {
        "documents": {"train": len(training), "heldout": len(heldout)},
        "text_bytes": {
            "train": sum(len(document.text.encode()) for document in training),
            "heldout": sum(len(document.text.encode()) for document in heldout),
        },
        "tokens": {"train": len(train_stream), "heldout": heldout_windows.numel()},
        "heldout_lines_in_train": round(line_overlap(heldout, training), 4),
        "unigram_perplexity": round(unigram_perplexity(train_stream, heldout_windows), 3),
        "corpus_sha256": corpus_sha256(documents),
    }
    print(json.dumps(figures), flush=True)

    settings.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(settings.out)
    if settings.text:
        settings.text.mkdir(parents=True, exist_ok=True)
        figures["shipped_text"] = {
            "train": write_text(training, 700_000, settings.text / "train.txt.gz"),
            "heldout": write_text(heldout, 350_000, settings.text / "heldout.txt.gz"),
        }

    model = build_model(hidden=128, intermediate=384, layers=6, heads=4)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters} parameters", flush=True)
    began = time.monotonic()
    log, seen = train(model, train_ids, settings)
    seconds = time.monotonic() - began

    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=0, pad_token_id=1, do_sample=False, max_new_tokens=64
    )
    model.save_pretrained(settings.out)
    stored = AutoModelForCausalLM.from_pretrained(settings.out, dtype=torch.float32).eval()
    reached = perplexity(stored, heldout_windows)
    unigram = unigram_perplexity(train_stream, heldout_windows)
    figures |= {
        "parameters": parameters,
        "steps": settings.steps,
        "tokens_seen": seen,
        "seconds": round(seconds),
        "heldout_perplexity": round(reached, 4),
        "ratio_to_unigram": round(unigram / reached, 2),
        "final_loss": log[-1]["loss"],
        "weights_sha256": hashlib.sha256((settings.out / "model.safetensors").read_bytes()).hexdigest(),
        "settings": {
            key: getattr(settings, key) for key in ("warmup", "peak", "batch_tokens", "length", "seed", "threads")
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "numpy": np.__version__,
        },
        "log": log,
    }
    (settings.out / "training_log.json").write_text(json.dumps(figures, indent=1) + "\n")
    licence = settings.library / "LICENSE.txt"
    if licence.exists():
        shutil.copyfile(licence, settings.out / "LICENSE")
    print(json.dumps({key: value for key, value in figures.items() if key != "log"}, indent=1))


if __name__ == "__main__":
    main()
