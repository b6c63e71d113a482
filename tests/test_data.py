"""Samples are read, cut and pinned; bad data end in a sentence."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy
import pytest
import tiny
import torch

from compressor.data import Samples, demo_path, load_samples, load_tokenizer, read_documents
from compressor.errors import RecipeError


def ask(source="stdlib", **changes):
    base = {"source": source, "config": None, "split": "train", "field": "text", "samples": 4, "length": 32,
            "pack": True, "sha256": None}  # fmt: skip
    return SimpleNamespace(**{**base, **changes})


def load(settings, seed=0):
    return load_samples(settings, demo_path(), seed=seed, vocabulary=2048)


def test_the_built_in_text_gives_enough_samples_and_is_pinned():
    train, held_out = load(ask(samples=128, length=512)), load(ask(split="heldout", samples=64, length=512))
    assert train.tokens == 128 * 512 and held_out.tokens == 64 * 512
    assert train.sha256 != held_out.sha256
    documents = set(read_documents(ask())[0])
    assert documents.isdisjoint(read_documents(ask(split="heldout"))[0])


def test_samples_are_the_same_for_a_seed_and_differ_between_seeds():
    assert load(ask(), 1).digest == load(ask(), 1).digest != load(ask(), 2).digest


def test_packed_samples_do_not_overlap_and_lie_in_the_text(tmp_path):
    words = " ".join(f"word{number}" for number in range(2000))
    (tmp_path / "t.txt").write_text(words)
    samples = load(ask(str(tmp_path / "t.txt"), samples=20))
    tokenizer = load_tokenizer(demo_path())
    whole = tokenizer(words, add_special_tokens=False)["input_ids"]
    starts = []
    for sample in samples.inputs:
        ids = sample.tolist()
        found = [at for at in range(0, len(whole) - 31, 32) if whole[at : at + 32] == ids]
        assert found
        starts += found[:1]
    assert len(set(starts)) == 20


def test_a_text_shorter_than_one_sample_is_refused(tmp_path):
    (tmp_path / "t.txt").write_text("too short")
    with pytest.raises(RecipeError, match=r"the text has \d+ tokens, one sample needs 512"):
        load(ask(str(tmp_path / "t.txt"), length=512))
    (tmp_path / "t.txt").write_text("a bit longer " * 40)
    with pytest.raises(RecipeError, match=r"Set samples to \d+ or less"):
        load(ask(str(tmp_path / "t.txt"), samples=100))


def test_rows_of_jsonl_and_csv_keep_their_labels_when_not_packed(tmp_path):
    rows = [{"text": f"def f{i}(): pass", "label": i % 2} for i in range(6)]
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "d.csv").write_text("text,label\n" + "\n".join(f"{r['text']},{r['label']}" for r in rows))
    for name in ("d.jsonl", "d.csv"):
        samples = load(ask(str(tmp_path / name), samples=6, pack=False))
        assert samples.labels.tolist() == [0, 1, 0, 1, 0, 1]
        assert samples.inputs[3].tolist() == load_tokenizer(demo_path())("def f3(): pass")["input_ids"]


def test_batches_hold_samples_of_one_length_only():
    inputs = tuple(torch.arange(n) for n in (3, 5, 3, 3, 5))
    batches = list(Samples(inputs, "x", "y").batches(2))
    assert [(numbers, tuple(stacked.shape)) for numbers, stacked in batches] == [
        ([0, 2], (2, 3)), ([3], (1, 3)), ([1, 4], (2, 5)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "changes", "message"),
    [
        ("d.jsonl", '{"text": "a"}\n{oops\n', {}, r"d\.jsonl:2: is not JSON"),
        ("d.jsonl", '["a"]\n', {}, r"d\.jsonl:1: is not a JSON object"),
        ("d.jsonl", '{"txt": "a"}\n', {}, "has no text in 'text'.*'txt'"),
        ("d.txt", "", {}, "is empty"),
        ("d.txt", "fine " * 500, {"sha256": "0" * 64}, "the recipe pins 0000"),
        ("d.csv", "text,label\na,x\n", {"pack": False, "samples": 1}, "label is missing or not"),
    ],
)
def test_bad_data_are_refused_with_their_place(name, content, changes, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(RecipeError, match=message):
        load(ask(str(tmp_path / name), **changes))


def test_bytes_that_are_not_text_are_refused(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"abc\xff")
    with pytest.raises(RecipeError, match=r"not UTF-8 \(byte 3\)"):
        load(ask(str(tmp_path / "t.txt")))


def test_images_are_scaled_and_normalised_as_the_model_says(tmp_path):
    images = numpy.arange(2 * 4 * 4, dtype=numpy.uint8).reshape(2, 4, 4)
    numpy.savez(tmp_path / "i.npz", images=images, labels=numpy.array([1, 0]))
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5], "image_std": [0.25]}')
    samples = load_samples(ask(str(tmp_path / "i.npz"), samples=2), tmp_path, seed=0, vocabulary=None)
    expected = (torch.from_numpy(images).float() / 255 - 0.5) / 0.25
    torch.testing.assert_close(torch.stack(samples.inputs)[:, 0], expected)
    assert samples.labels.tolist() == [1, 0]


def test_a_local_data_set_is_read_through_its_library(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": ["some words of text " * 40], "n": [1]}).save_to_disk(tmp_path / "set")
    assert load(ask(str(tmp_path / "set"))).tokens == 4 * 32
    with pytest.raises(RecipeError, match="no column 'body'"):
        load(ask(str(tmp_path / "set"), field="body"))


def test_a_model_without_a_tokenizer_is_told_so(tmp_path):
    model = tiny.save("llama", tmp_path / "m")
    with pytest.raises(RecipeError, match="no usable tokenizer"):
        load_samples(ask(), model, seed=0, vocabulary=96)
