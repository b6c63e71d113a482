"""Samples are read, divided and pinned by hash; bad data gives a clear error."""

from __future__ import annotations

import json
import random
import shutil

import numpy
import pytest
import tiny
import tiny_tokenizer
import torch
from data_settings import ask, read_documents
from raising import raises

from compressor.data.parts import overlap, same_source
from compressor.data.samples import (
    Samples,
    check_data,
    draw_samples,
    load_documents,
    load_samples,
    part_of,
    random_samples,
)
from compressor.data.tokenizing import load_tokenizer
from compressor.errors import RecipeError
from compressor.model.model_files import demo_path


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


@pytest.mark.parametrize("family", tiny_tokenizer.FAMILIES)
def test_samples_of_text_begin_with_a_bos_where_the_tokenizer_adds_one(family, tmp_path):
    tokenizer = tiny_tokenizer.save(family, tmp_path / "m")
    text = "".join(chr(97 + number**2 % 26) for number in range(640))
    (tmp_path / "t.txt").write_text(text)
    begin = [tokenizer.bos_token_id] if family in ("llama", "gemma") else []
    stream = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    size = 32 - len(begin)
    windows = [begin + stream[size * number :][:size] for number in range(len(stream) // size)]
    settings = ask(str(tmp_path / "t.txt"), samples=len(windows))
    samples = load_samples(settings, tmp_path / "m", seed=0, vocabulary=200)
    assert [sample.tolist() for sample in samples.inputs] == windows
    settings.pack, settings.samples = False, 1
    (whole,) = load_samples(settings, tmp_path / "m", seed=0, vocabulary=200).inputs
    assert whole.tolist() == begin + stream[:size]


def test_documents_without_tokens_add_none(tmp_path, monkeypatch):
    """An end-of-text token behind each of them would make samples of nothing else."""
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ["", *["some words of a text " * 20, ""] * 40]))
    packed = load(ask(str(path), samples=4))
    path.write_text("\n".join(json.dumps({"text": text}) for text in ["some words of a text " * 20] * 40))
    assert load(ask(str(path), samples=4)).digest == packed.digest
    path.write_text("\n".join(json.dumps({"text": ""}) for _ in range(4000)))
    with raises(RecipeError, where=path, tokens=0, length=32):
        load(ask(str(path), samples=4))


def test_a_tokenizer_that_makes_nothing_of_a_text_is_told_so(tmp_path):
    """So transformers loads a tokenizer_config.json alone: a vocabulary of three, which knows no word."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (tmp_path / "t.txt").write_text("some words of a text " * 400)
    with raises(RecipeError, where=tmp_path / "t.txt", reason="no-tokens"):
        load_samples(ask(str(tmp_path / "t.txt"), samples=4), tmp_path / "m", seed=0, vocabulary=2048)


def test_a_text_shorter_than_one_sample_is_refused(tmp_path):
    (tmp_path / "t.txt").write_text("too short")
    with raises(RecipeError, where=tmp_path / "t.txt", length=512) as failure:
        load(ask(str(tmp_path / "t.txt"), length=512))
    assert 0 < failure.value.data["tokens"] < 512
    (tmp_path / "t.txt").write_text("a bit longer " * 40)
    with raises(RecipeError, where=tmp_path / "t.txt", samples=100) as failure:
        load(ask(str(tmp_path / "t.txt"), samples=100))
    available = failure.value.data["available"]
    assert 0 < available < 100 and load(ask(str(tmp_path / "t.txt"), samples=available)).tokens == 32 * available


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
    ("name", "content", "changes", "where", "data"),
    [
        ("d.jsonl", '{"text": "a"}\n{oops\n', {}, "d.jsonl:2", {"reason": "bad-json"}),
        ("d.jsonl", '["a"]\n', {}, "d.jsonl:1", {"reason": "no-object"}),
        ("d.jsonl", '{"txt": "a"}\n', {}, "d.jsonl, row 1", {"reason": "no-field", "field": "text", "near": ["txt"]}),
        ("d.txt", "", {}, "d.txt", {"reason": "empty"}),
        ("d.txt", "fine " * 500, {"sha256": "0" * 64}, "PATH", {"pinned": "0" * 64}),
        (
            "d.csv",
            "text,label\na,x\n",
            {"pack": False, "samples": 1},
            "d.csv, row 1",
            {"reason": "no-whole-label", "label": "'x'"},
        ),
    ],
)
def test_bad_data_are_refused_with_their_place(name, content, changes, where, data, tmp_path):
    (tmp_path / name).write_text(content)
    with raises(RecipeError, where=where.replace("PATH", str(tmp_path / name)), **data):
        load(ask(str(tmp_path / name), **changes))


def test_bytes_that_are_not_text_are_refused(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"abc\xff")
    with raises(RecipeError, where="t.txt", reason="bad-encoding", encoding="utf-8", byte=3):
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
    with raises(RecipeError, where=tmp_path / "set", reason="no-field", field="body", known=["text", "n"]):
        load(ask(str(tmp_path / "set"), field="body"))


def test_a_model_without_a_tokenizer_is_told_so(tmp_path):
    model = tiny.save("llama", tmp_path / "m")
    with raises(RecipeError, where="m", reason="no-tokenizer"):
        load_samples(ask(), model, seed=0, vocabulary=96)


def divided(settings, part):
    documents = load_documents(settings, demo_path(), 2048)
    return draw_samples(part_of(documents, part, pack=settings.pack), settings, demo_path(), 0)


def test_one_text_is_divided_without_overlap_and_a_part_does_not_depend_on_what_is_asked(tmp_path):
    draw = random.Random(0)
    words = [
        " ".join(draw.choice(["alpha", "beta", "gamma", "self", "return", "import"]) for _ in range(9))
        for _ in range(2000)
    ]
    for name, text in (("lines.txt", "\n".join(words)), ("line.txt", " ".join(words))):
        (tmp_path / name).write_text(text)
        documents = load_documents(ask(str(tmp_path / name)), demo_path(), 2048)
        parts = {part: part_of(documents, part, pack=True) for part in ("calibration", "evaluation")}
        sizes = {part: sum(map(len, found.texts)) for part, found in parts.items()}
        assert sum(sizes.values()) == len(text) and 0.1 < sizes["evaluation"] / len(text) < 0.45
        assert all(run in text for found in parts.values() for run in found.texts)
        settings = ask(str(tmp_path / name), samples=8)
        seen = {part: {tuple(s.tolist()) for s in divided(settings, part).inputs} for part in parts}
        assert seen["calibration"].isdisjoint(seen["evaluation"])
        assert divided(settings, "evaluation").part["name"] == "evaluation"


def test_rows_are_divided_with_their_labels_and_equal_ones_stay_together(tmp_path):
    rows = [{"text": f"text number {number % 150}", "label": number % 150 % 7} for number in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    documents = load_documents(ask(str(tmp_path / "a.jsonl"), pack=False), demo_path(), 2048)
    parts = [part_of(documents, part, pack=False) for part in ("calibration", "evaluation")]
    assert set(parts[0].texts).isdisjoint(parts[1].texts) and sum(len(part.texts) for part in parts) == 300
    assert 40 < len(parts[1].texts) < 110
    assert all(
        int(t.split()[-1]) % 7 == label for part in parts for t, label in zip(part.texts, part.labels, strict=True)
    )
    told = {"available": len(parts[1].texts), "samples": 200, "of": "documents"}
    with raises(RecipeError, where=f"{tmp_path / 'a.jsonl'}, its part for evaluation", **told):
        divided(ask(str(tmp_path / "a.jsonl"), pack=False, samples=200), "evaluation")


def test_images_are_divided_with_their_labels(tmp_path):
    images = numpy.random.default_rng(0).integers(0, 256, (80, 4, 4), dtype=numpy.uint8)
    numpy.savez(tmp_path / "i.npz", images=images, labels=images[:, 0, 0] % 5)
    documents = load_documents(ask(str(tmp_path / "i.npz")), tmp_path, None)
    parts = [part_of(documents, part, pack=True) for part in ("calibration", "evaluation")]
    assert set(parts[0].contents).isdisjoint(parts[1].contents) and sum(len(p.images) for p in parts) == 80
    assert all(int(i[0, 0, 0]) % 5 == label for p in parts for i, label in zip(p.images, p.labels, strict=True))


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ({"source": "a.txt"}, {"source": "./sub/../a.txt", "split": "heldout"}, True),
        ({"source": "a.txt"}, {"source": "link.txt"}, True),
        ({"source": "a.txt"}, {"source": "b.txt"}, False),
        ({"source": "a.jsonl"}, {"source": "a.jsonl", "field": "body"}, False),
        ({"source": "i.npz"}, {"source": "i.npz", "field": "body"}, True),
        ({"source": "stdlib"}, {"source": "stdlib", "split": "heldout"}, False),
        ({"source": "stdlib"}, {"source": "stdlib"}, True),
        ({"source": "random"}, {"source": "random"}, False),
        ({"source": "table"}, {"source": "dataset:table", "split": "heldout"}, True),
        ({"source": "splits"}, {"source": "splits", "split": "heldout"}, False),
        ({"source": "dataset:x/y"}, {"source": "dataset:x/y"}, True),
        ({"source": "dataset:x/y"}, {"source": "dataset:x/y", "config": "c"}, False),
        ({"source": "a\0b"}, {"source": "a\0b"}, True),
    ],
)
def test_one_source_is_known_by_what_it_reads(one, other, is_same, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt", "a.jsonl", "i.npz"):
        (tmp_path / name).write_text("x")
    (tmp_path / "link.txt").symlink_to("a.txt")
    for folder, file in (("sub", "x"), ("table", "state.json"), ("splits", "dataset_dict.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("{}")
    assert same_source(ask(**one), ask(**other)) is is_same


HEADINGS = [f"= Heading {number} =" for number in range(9)]
LONG = [f"document {number} " * 20 for number in range(200)]


@pytest.mark.parametrize(
    ("calibration", "evaluation", "by_lines", "refused"),
    [
        (LONG[:100], LONG[100:], False, None),
        (LONG[:100], LONG[99:], False, (1, "document 99")),
        (LONG[:100], [" ".join(LONG[99].split()) + "\r\n"], False, (1, "document 99")),
        (LONG[:100] + HEADINGS, LONG[100:] + HEADINGS, False, None),
        (HEADINGS, HEADINGS, False, (1, "= Heading 0")),
        (["", " "], ["", "\n"], False, None),
        (["\n".join(LONG[:100])], ["\n".join(LONG[50:150])], True, (1, "document 50")),
        (["\n".join(LONG[:100])], ["\n".join(LONG[90:190])], True, None),
        ([b"image", b"other"], [b"new", b"image"], False, (2, b"image")),
    ],
)
def test_documents_that_both_sources_hold_are_found(calibration, evaluation, by_lines, refused):
    shared, is_too_much = overlap(calibration, evaluation, by_lines=by_lines)
    assert is_too_much is (refused is not None)
    if refused:
        assert shared[0][0] == refused[0] and shared[0][1].startswith(refused[1])


def test_the_built_in_texts_share_no_documents_and_few_lines():
    texts = [read_documents(ask(split=split))[0] for split in ("train", "heldout")]
    for by_lines in (False, True):
        assert overlap(*texts, by_lines=by_lines)[1] is False


NO_TEXT = {"reason": "no-message-text", "message": 1, "field": "chat"}
CHATS = [[{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": "answer"}] for n in range(6)]


@pytest.fixture
def chatty(tmp_path):
    """A model directory whose tokenizer has a chat template."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_path() / name, folder)
    refusal = "{% if m.content == 'bad' %}{{ raise_exception('no') }}{% endif %}"
    template = f"{{% for m in messages %}}<{{{{ m.role }}}}>{{{{ m.content }}}}{refusal}{{% endfor %}}"
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "set", "lists"])
def test_chats_are_written_by_the_models_template(kind, chatty, tmp_path):
    import datasets
    import pyarrow
    import pyarrow.parquet

    rows = [{"chat": chat} for chat in CHATS]
    path = tmp_path / f"c.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "set":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    else:
        path = tmp_path / "c.jsonl"
        turned = [{key: [message[key] for message in chat] for key in ("role", "content")} for chat in CHATS]
        path.write_text("\n".join(json.dumps({"chat": chat}) for chat in turned))
    settings = ask(str(path), field="chat", pack=False, samples=6)
    samples = load_samples(settings, chatty, seed=0, vocabulary=2048)
    text = load_tokenizer(chatty).decode(samples.inputs[3])
    assert text == "<user>question 3<assistant>answer"
    told = {"where": path if kind == "set" else path.name, "reason": "no-chat-template", "field": "chat"}
    with raises(RecipeError, **told):
        load(settings)
    with raises(RecipeError, **told):
        read_documents(settings)


@pytest.mark.parametrize(
    ("chat", "data"),
    [
        ([{"content": "hi"}], {**NO_TEXT, "key": "role"}),
        ([{"role": "user", "content": None}], {**NO_TEXT, "key": "content"}),
        ([{"role": "user", "content": [{"type": "image"}]}], {**NO_TEXT, "key": "content"}),
        ([{"role": "user", "content": "\ud800"}], {"reason": "half-pair", "field": "chat.content", "character": 1}),
        ([{"role": "user", "content": "bad"}], {"reason": "chat-refused", "cause": "no"}),
        ("text", {"reason": "no-chat", "field": "chat"}),
        (None, {"reason": "no-chat", "field": "chat"}),
        ([], {"reason": "no-chat", "field": "chat"}),
    ],
)
def test_what_is_no_chat_is_refused_with_its_row(chat, data, chatty, tmp_path):
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"chat": value}) for value in (CHATS[0], chat)))
    with raises(RecipeError, where="c.jsonl, row 2", **data):
        load_samples(ask(str(tmp_path / "c.jsonl"), field="chat"), chatty, seed=0, vocabulary=2048)


def test_random_tokens_that_memory_cannot_hold_are_refused_before_they_are_made(monkeypatch):
    monkeypatch.setattr("compressor.data.samples.memory_share", lambda: 8 * 16 * 8 - 1)
    settings = ask("random", samples=8, length=16)
    for make in (lambda: random_samples(settings, 0, 96), lambda: check_data(settings, reads_pixels=False)):
        with raises(RecipeError, where="random", samples=8, length=16, size=1024, limit=1023):
            make()


def test_random_tokens_of_evaluation_are_never_those_of_calibration():
    settings = ask("random", samples=8, length=16)
    both = [random_samples(settings, 0, 96, part) for part in ("calibration", "evaluation")]
    seen = [{tuple(sample.tolist()) for sample in samples.inputs} for samples in both]
    assert seen[0].isdisjoint(seen[1])
    assert both[0].digest == load_samples(settings, demo_path(), seed=0, vocabulary=96).digest


def test_other_labels_are_other_samples():
    one, other = (Samples((torch.arange(3),), "x", "y", torch.tensor([label])) for label in (0, 1))
    assert one.digest != other.digest


@pytest.mark.parametrize(
    ("reads_pixels", "source", "kinds"),
    [
        (True, "stdlib", {"reads": "pixels", "data": "text"}),
        (True, "random", {"reads": "pixels", "data": "text"}),
        (False, "i.npz", {"reads": "text", "data": "images"}),
    ],
)
def test_data_of_another_kind_than_the_model_reads_are_refused(reads_pixels, source, kinds):
    with raises(RecipeError, where=f"data.source {source!r}", **kinds):
        check_data(ask(source), reads_pixels=reads_pixels)
    with raises(RecipeError, where=f"data.source {source!r}", **kinds):
        load_samples(ask(source), demo_path(), seed=0, vocabulary=None if reads_pixels else 96)
