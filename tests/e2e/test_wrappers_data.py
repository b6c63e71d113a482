"""The text stack of a model that reads images and text is calibrated with the tokenizer of its processor."""

from __future__ import annotations

import json

import pytest
import tiny
import tiny_tokenizer
import transformers as hf
import yaml

from compressor import load
from compressor.engine.plan import make_plan
from compressor.engine.run_samples import read_samples
from compressor.recipe.recipe import parse_recipe
from compressor.run import compress

TEXT = {**tiny.TEXT, "vocab_size": 128}
# Prints only the parts of a content, as the templates of such models do.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{% for part in m.content %}"
    "{% if part.type == 'image' %}#{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)


def llava():
    vision = {"model_type": "clip_vision_model", **tiny.VISION}
    text = {"model_type": "llama", **TEXT}
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=120)
    )


def qwen2_vl():
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    special = ("image", "video", "vision_start", "vision_end")
    ids = {f"{name}_token_id": 120 + number for number, name in enumerate(special)}
    config = hf.Qwen2VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, **ids)
    return hf.Qwen2VLForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("make", "processor", "place"),
    [
        (llava, "LlavaProcessor", "processor_config.json"),
        (llava, "LlavaProcessor", "chat_template.jinja"),
        (qwen2_vl, "Qwen2VLProcessor", "chat_template.json"),
    ],
)
def test_text_and_chats_are_read_with_the_tokenizer_of_the_processor(make, processor, place, tmp_path):
    folder = tmp_path / "m"
    make().save_pretrained(folder)
    tokenizer = tiny_tokenizer.save("llama", folder, TEMPLATE)
    files = {
        "preprocessor_config.json": {"image_processor_type": "CLIPImageProcessor", "processor_class": processor},
        "processor_config.json": {"processor_class": processor, "image_token": "#"},
    }
    if place != "chat_template.jinja":
        (folder / "chat_template.jinja").unlink()
        files[place] = {**files.get(place, {}), "chat_template": TEMPLATE}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (tmp_path / "t.txt").write_text("some words of a text\n" * 80)
    chats = [{"messages": [{"role": "user", "content": f"{number} and more"}]} for number in range(80)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, chats)))
    tree = {
        "version": 1,
        "data": {"source": str(tmp_path / "c.jsonl"), "format": "chat", "samples": 8, "length": 16},
        "steps": [{"pass": "gptq", "bits": 8, "group_size": 32}],
        "eval": {"metrics": ["perplexity"], "data": {"source": str(tmp_path / "t.txt"), "samples": 4, "length": 16}},
    }
    recipe = parse_recipe(yaml.safe_dump(tree).encode())
    calibration, held_out = read_samples(make_plan(recipe, str(folder)), measure=True, trust_remote_code=False)
    begin = tokenizer.encode("<|begin_of_text|><user>", add_special_tokens=False)
    digits = set(tokenizer.encode("0123456789", add_special_tokens=False))
    for sample in calibration.inputs:
        assert sample[: len(begin)].tolist() == begin and int(sample[len(begin)]) in digits
    assert all(int(sample[0]) == tokenizer.bos_token_id for sample in held_out.inputs)
    if place != "chat_template.jinja":
        return
    compress(recipe, str(folder), tmp_path / "out", measure=False)
    assert load(tmp_path / "out").config.model_type == "llava"
