"""Trains a Llama of 7 million parameters on encyclopedia text, so that compression has a quality to measure.

    python scripts/train/lm.py --text TEXT_FILE --valid TEXT_FILE --out CHECKPOINT_DIRECTORY

--text is any UTF-8 text. Lines `<doc ... title="T">` and `</doc>` split it into articles, as WikiExtractor writes them;
without any it is one article. With --wikitext the articles are first written the way WikiText-2 is (`wikitext_style`),
because a model that never saw `<unk>` or ` @-@ ` would spend its perplexity on those. --valid is text in the form it
has. Writes the checkpoint in float32 with its tokenizer, train.txt (the text as trained on, for calibration) and
training_log.json. Every --evaluate-every steps the first windows of --valid are scored, and the best weights so far
are what is written.

Most parameters are in the blocks: the byte-level BPE has 3072 tokens, and output head and embedding are two matrices.
Deterministic for one seed, one thread count and one set of library versions, which the log names. Half an hour on a
CPU core of its own with AVX512-BF16, where bfloat16 autocast makes a step 1.45 times as fast as float32.
"""

from __future__ import annotations

import compressor  # noqa: F401 isort: skip (before torch, whose threads then sleep while they wait)

import argparse
import copy
import hashlib
import html
import json
import math
import platform
import re
import sys
import time
from collections import Counter
from pathlib import Path

import tokenizers
import torch
import transformers
from demo import batches, learning_rate, loss_and_backward, perplexity, windows
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compressor.evaluation.environment import cpu_name

SEPARATOR, PADDING, UNKNOWN = "<|endoftext|>", "<|pad|>", "<unk>"
VOCABULARY = 3072
RARE = 3  # WikiText-2 writes <unk> for words seen fewer times (Merity et al. 2016, arXiv 1609.07843, section 4.3)
HEADING_WORDS = 8
WORD = re.compile(r"@[-,.]@|(?:\w\.){2,}|(?<=\w)'\w+|\w+|[^\w\s]")
QUICK_WINDOWS = 128  # of --valid, for choosing the best weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="text to train on")
    parser.add_argument("--valid", type=Path, required=True, help="text to score and to choose the best weights by")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--wikitext", action=argparse.BooleanOptionalAction, default=True, help="rewrite --text so")
    parser.add_argument("--tokens", type=int, default=4_000_000, help="tokens to train on, all epochs together")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--peak", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--decay", type=float, default=0.1, help="weight decay of matrices")
    parser.add_argument("--warmup", type=int, default=50, help="steps")
    parser.add_argument("--evaluate-every", type=int, default=100, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    settings = parser.parse_args()
    if settings.tokens // settings.batch_tokens <= settings.warmup:
        sys.exit(f"--tokens {settings.tokens} are fewer steps than --warmup {settings.warmup}; give more tokens")
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    torch.use_deterministic_algorithms(True)

    articles = read_articles(settings.text)
    if settings.wikitext:
        articles = wikitext_style(articles)
    tokenizer = train_tokenizer(articles)
    training = [ids(text, tokenizer, [tokenizer.eos_token_id]) for text in articles]
    valid_text = settings.valid.read_text(encoding="utf-8")
    valid = windows([ids(valid_text, tokenizer, [])], settings.length)
    figures = {
        "text": {
            "articles": len(articles),
            "tokens": sum(map(len, training)),
            "sha256": hashlib.sha256(settings.text.read_bytes()).hexdigest(),
        },
        "valid": {"tokens": valid.numel(), "sha256": hashlib.sha256(settings.valid.read_bytes()).hexdigest()},
    }
    print(json.dumps(figures), flush=True)
    settings.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(settings.out)
    (settings.out / "train.txt").write_text("".join(articles), encoding="utf-8")

    model = build_model()
    blocks = sum(parameter.numel() for parameter in model.model.layers.parameters())
    figures["parameters"] = {"all": sum(parameter.numel() for parameter in model.parameters()), "blocks": blocks}
    began = time.monotonic()
    log = train(model, training, valid, settings)
    figures["seconds"] = round(time.monotonic() - began)
    model.save_pretrained(settings.out)
    reached = perplexity(model, valid)
    counts = torch.bincount(torch.cat(training), minlength=VOCABULARY).double() + 1
    unigram = math.exp(-(counts / counts.sum()).log()[valid[:, 1:]].mean().item())
    figures |= {
        "valid_perplexity": round(reached, 4),
        "valid_unigram_perplexity": round(unigram, 2),
        "best_step": min(log, key=lambda row: row["valid_perplexity"])["step"],
        "weights_sha256": hashlib.sha256((settings.out / "model.safetensors").read_bytes()).hexdigest(),
        "settings": {key: value for key, value in vars(settings).items() if not isinstance(value, Path)},
        "cpu": cpu_name(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "log": log,
    }
    (settings.out / "training_log.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps({key: value for key, value in figures.items() if key != "log"}, indent=1))


def read_articles(path: Path) -> list[str]:
    """The articles of a text, without the lines that split it and without empty ones."""
    text = re.sub(r"^<doc [^>]*>$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    articles = [article.strip() for article in re.split(r"^</doc>$", text, flags=re.MULTILINE)]
    return [article + "\n" for article in articles if article.count("\n") or len(articles) == 1]


def wikitext_style(articles: list[str]) -> list[str]:
    """Articles as WikiText-2 has them: words apart, ` @-@ ` inside compounds, = headings =, `<unk>` for rare words.

    The first line is the title; a short line that ends in its only full stop is a heading, as WikiExtractor writes
    it. The rules are ours, after what WikiText-2 looks like.
    """
    split = [
        [(mark, words) for line in article.split("\n") for mark, words in [split_line(line)]] for article in articles
    ]
    seen = Counter(word for lines in split for _, words in lines for word in words)
    written = []
    for lines in split:
        out = []
        for number, (is_heading, words) in enumerate(lines):
            line = " ".join(word if seen[word] >= RARE else UNKNOWN for word in words)
            if not line:
                continue
            if number == 0:
                out.append(f" \n = {line} = \n \n")
            else:
                out.append(f" \n = = {line} = = \n \n" if is_heading else f" {line} \n")
        written.append("".join(out))
    return written


def split_line(line: str) -> tuple[bool, list[str]]:
    """Whether the line is a heading, and its words."""
    line = re.sub(r"</?\w[^>]*>", " ", html.unescape(html.unescape(line))).strip()
    is_heading = line.endswith(".") and line.count(".") == 1 and len(line.split()) <= HEADING_WORDS
    line = re.sub(r"(?<=\w)-(?=\w)", " @-@ ", line.removesuffix(".") if is_heading else line)
    line = re.sub(r"(?<=\d)([.,])(?=\d)", r" @\1@ ", line)
    return is_heading, WORD.findall(line)


def train_tokenizer(articles: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE. `<unk>` is one token, with the space before it, as WikiText writes it inside text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[SEPARATOR, PADDING, AddedToken(UNKNOWN, lstrip=True, special=True)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text.replace(UNKNOWN, "") for text in articles), trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        sys.exit(f"--text gives {tokenizer.get_vocab_size()} tokens, not {VOCABULARY}; it needs to be longer")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        pad_token=PADDING,
        unk_token=AddedToken(UNKNOWN, lstrip=True, special=True),
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def ids(text: str, tokenizer: PreTrainedTokenizerFast, end: list[int]) -> torch.Tensor:
    return torch.tensor([*tokenizer.backend_tokenizer.encode(text).ids, *end])


def build_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=0, pad_token_id=1, do_sample=False, max_new_tokens=64
    )
    return model


def train(
    model: LlamaForCausalLM, articles: list[torch.Tensor], valid: torch.Tensor, settings: argparse.Namespace
) -> list[dict[str, float]]:
    """AdamW under a cosine schedule; leaves the weights with the best score on the first windows of `valid`."""
    generator = torch.Generator().manual_seed(settings.seed)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": settings.decay},
        {"params": [p for p in model.parameters() if p.ndim != 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    steps = settings.tokens // settings.batch_tokens
    log: list[dict[str, float]] = []
    running, best, kept, began = 0.0, math.inf, copy.deepcopy(model.state_dict()), time.monotonic()
    stream = batches(articles, settings.batch_tokens, settings.length, generator)
    for step, tokens in zip(range(1, steps + 1), stream, strict=False):  # the stream is endless
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, steps, settings.warmup, settings.peak)
        loss = loss_and_backward(model, tokens)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        running = loss if step == 1 else 0.98 * running + 0.02 * loss
        if step % settings.evaluate_every == 0 or step == steps:
            found = perplexity(model.eval(), valid[:QUICK_WINDOWS])
            log.append(
                {
                    "step": step,
                    "tokens": step * settings.batch_tokens,
                    "train_loss": round(running, 4),
                    "valid_perplexity": round(found, 3),
                }
            )
            print(f"{log[-1]} {round(time.monotonic() - began)} s", flush=True)
            if found < best:
                best, kept = found, copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)
    model.eval()
    return log


if __name__ == "__main__":
    main()
