"""Tokenizers of a token per character, with the special tokens and the chat template of a family."""

from __future__ import annotations

import string
from pathlib import Path

import transformers as hf
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
# family -> (begin of text, end of text, whether the tokenizer begins each text with it, chat template)
FAMILIES = {
    "llama": ("<|begin_of_text|>", "<|end_of_text|>", True, "{{ bos_token }}" + TURNS),
    "gemma": ("<bos>", "<eos>", True, "{{ bos_token }}" + TURNS),
    "qwen": (None, "<|endoftext|>", False, TURNS),
    "gpt": ("<|endoftext|>", "<|endoftext|>", False, None),
}


def save(family: str, folder: Path, template: str | None = None) -> hf.PreTrainedTokenizerBase:
    """Write the tokenizer of a family into a folder. template: in place of the family's chat template"""
    bos, eos, adds_bos, own_template = FAMILIES[family]
    special = list(dict.fromkeys(token for token in ("<unk>", bos, eos) if token))
    tokens = [*special, *(char for char in string.printable)]
    made = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    if adds_bos:
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokens.index(bos))]
        )
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=made, bos_token=bos, eos_token=eos, unk_token="<unk>")
    tokenizer.chat_template = template or own_template
    tokenizer.save_pretrained(folder)
    return tokenizer
