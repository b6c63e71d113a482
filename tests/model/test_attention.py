"""A config that asks for attention or experts that torch alone can't run is run without them, and it is said."""

from __future__ import annotations

import json

import pytest
import tiny
import transformers as hf

from compressor.evaluation.model_loading import load_model
from compressor.model.attention import choose_plain, plain_options, replaced_implementations
from compressor.model.checkpoint import open_checkpoint
from compressor.model.model_class import class_of, config_of

ASKED = {
    "absent": ({}, {}),
    "plain": ({"_attn_implementation": "eager", "_experts_implementation": "grouped_mm"}, {}),
    "flash": ({"_attn_implementation": "flash_attention_2"}, {"attn_implementation": "flash_attention_2"}),
    "without the line": ({"attn_implementation": "flash_attention_3"}, {"attn_implementation": "flash_attention_3"}),
    "flex": ({"_attn_implementation": "flex_attention"}, {"attn_implementation": "flex_attention"}),
    "experts": ({"_experts_implementation": "deepgemm"}, {"experts_implementation": "deepgemm"}),
    "by part": ({"_attn_implementation": {"": "sdpa", "text_config": "paged|x"}}, {"attn_implementation": "paged|x"}),
    "in a part": ({"text_config": {"_attn_implementation": "x"}}, {"attn_implementation": "x"}),
    "a number": ({"_attn_implementation": 2}, {"attn_implementation": "2"}),
    "nothing": ({"_attn_implementation": None}, {}),
}


@pytest.mark.parametrize("case", ASKED)
def test_what_is_replaced(case):
    config, expected = ASKED[case]
    assert replaced_implementations(config) == expected
    assert plain_options(config) == dict.fromkeys(expected)


def test_the_parts_of_a_config_are_changed_too():
    config = hf.Gemma3Config(attn_implementation="flash_attention_2")
    assert config.text_config._attn_implementation == "flash_attention_2"
    choose_plain(config, {"_attn_implementation": "flash_attention_2"})
    assert config._attn_implementation is config.text_config._attn_implementation is None


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_a_model_that_asks_for_flash_attention_is_built_and_measured(key, tmp_path):
    directory = tiny.save("llama", tmp_path / "m")
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: "flash_attention_2"}))
    config = config_of(directory)
    assert class_of(open_checkpoint(directory))._from_config(config).config._attn_implementation == "sdpa"
    assert load_model(directory, False).config._attn_implementation == "sdpa"
