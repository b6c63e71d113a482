"""Chats become the tokens that a server would send; what is no chat gives an error with its row."""

from __future__ import annotations

import json

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
import tiny_tokenizer
from data_settings import ask
from raising import raises

from compressor.data.parts import same_source
from compressor.data.samples import (
    check_chats,
    check_data,
    draw_samples,
    load_documents,
    load_samples,
    part_of,
)
from compressor.data.tokenizing import load_tokenizer
from compressor.errors import RecipeError

TEMPLATE = (
    "{{ bos_token or '' }}{% if tools %}[{% for tool in tools %}{{ tool.function.name }}{% endfor %}]{% endif %}"
    "{% for m in messages %}{% if m.role == 'narrator' %}{{ raise_exception('no such role') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% for call in m.tool_calls %}"
    "({{ call.function.name }} {{ call.function.arguments.city }}){% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SYSTEM, USER = {"role": "system", "content": "be brief"}, {"role": "user", "content": "weather?"}
ANSWER = {"role": "assistant", "content": "sunny"}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"city": "Bonn"}}}
TEXT_CALL = {"type": "function", "function": {"name": "look", "arguments": '{"city": "Bonn"}'}}
RESULT = {"role": "tool", "content": "22"}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
BOS = "<|begin_of_text|>"
# name -> (row, the text that its template gives)
CHATS = {
    "turns": ({"messages": [SYSTEM, USER, ANSWER]}, "<system>be brief<user>weather?<assistant>sunny"),
    "tools": (
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, RESULT, ANSWER],
         "tools": TOOLS},
        "[look]<user>weather?<assistant>(look Bonn)<tool>22<assistant>sunny",
    ),
    "tools as text": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [TEXT_CALL]}, RESULT, ANSWER],
         "tools": json.dumps(TOOLS)},
        "[look]<user>weather?<assistant>(look Bonn)<tool>22<assistant>sunny",
    ),
    "prompt": ({"messages": [USER]}, "<user>weather?<assistant>"),
    "speakers": (
        {"conversations": [{"from": "system", "value": "a"}, {"from": "human", "value": "b"},
                           {"from": "gpt", "value": "c"}]},
        "<system>a<user>b<assistant>c",
    ),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
        "<user>a\nb<assistant>",
    ),
}  # fmt: skip


@pytest.fixture
def model(tmp_path):
    tiny_tokenizer.save("llama", tmp_path / "model", TEMPLATE)
    return tmp_path / "model"


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return ask(str(path), format="chat", pack=False, samples=len(rows), length=256)


def load(settings, model):
    return load_samples(settings, model, seed=0, vocabulary=200)


@pytest.mark.parametrize("kind", ["jsonl", "json", "columns", "parquet", "set"])
@pytest.mark.parametrize("chat", CHATS)
def test_a_chat_has_the_tokens_that_the_models_template_gives(chat, kind, model, tmp_path):
    row, text = CHATS[chat]
    path = tmp_path / {"columns": "c.json", "set": "c"}.get(kind, f"c.{kind}")
    settings = write(tmp_path / "c.jsonl", [row, row])
    settings.source = str(path)
    if kind == "json":
        path.write_text(json.dumps([row, row]))
    elif kind == "columns":
        path.write_text(json.dumps({key: [value, value] for key, value in row.items()}))
    elif kind == "parquet":
        pa.parquet.write_table(pa.Table.from_pylist([row, row]), path)
    elif kind == "set":
        datasets.Dataset.from_list([row, row]).save_to_disk(path)
    check_chats(settings, check_data(settings, reads_pixels=False), load_tokenizer(model), model)
    samples = load(settings, model)
    tokenizer = load_tokenizer(model)
    for sample in samples.inputs:
        assert sample.tolist() == tokenizer(BOS + text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("family", ["llama", "gemma", "qwen"])
@pytest.mark.parametrize("pack", [True, False])
def test_each_sample_begins_as_the_template_does_with_one_bos(family, pack, tmp_path):
    tokenizer = tiny_tokenizer.save(family, tmp_path / "model")
    rows = [{"messages": [{"role": "user", "content": f"{number:03} " * 7}]} for number in range(40)]
    settings = write(tmp_path / "c.jsonl", rows)
    settings.pack, settings.samples, settings.length = pack, 8, 60
    samples = load(settings, tmp_path / "model")
    begin = "".join(token for token in (tokenizer.bos_token, "<user>") if token)
    chats = [begin + row["messages"][0]["content"] for row in rows]
    begun = set()
    for sample in samples.inputs:
        text = tokenizer.decode(sample).replace(" ", "")
        first = next(n for n, chat in enumerate(chats) if text.startswith(chat.replace(" ", "")))
        begun.add(first)
        # one chat has 34 tokens or 35 with a BOS, so a packed sample of 60 has a beginning of the next one
        assert text.count(begin) == (2 if pack else 1)
        assert len(sample) == (60 if pack else 34 + (tokenizer.bos_token is not None))
    assert len(begun) == 8


def test_chats_in_a_column_of_texts_get_no_second_bos(tmp_path):
    tokenizer = tiny_tokenizer.save("llama", tmp_path / "model")
    chat = [{"role": "user", "content": "a" * 20}]
    settings = write(tmp_path / "c.jsonl", [{"messages": chat}] * 4)
    settings.format, settings.field, settings.pack, settings.samples, settings.length = "text", "messages", True, 4, 28
    text = f"{BOS}<user>{'a' * 20}{tokenizer.eos_token}"  # 28 tokens
    for sample in load(settings, tmp_path / "model").inputs:
        assert sample.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_damaged_template_of_the_processor_is_refused_by_its_name(tmp_path):
    tiny_tokenizer.save("gpt", tmp_path / "model")
    (tmp_path / "model" / "chat_template.json").write_text("{")
    with raises(RecipeError, where="chat_template.json", reason="not-read"):
        load(write(tmp_path / "c.jsonl", [CHATS["turns"][0]]), tmp_path / "model")


def test_a_template_that_prints_only_parts_gets_parts(tmp_path):
    """So do those of models with images: the text of a content that isn't a list would be lost."""
    parts = "{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
    tokenizer = tiny_tokenizer.save(
        "qwen", tmp_path / "model", f"{{% for m in messages %}}<{{{{ m.role }}}}>{parts}{{% endfor %}}"
    )
    samples = load(write(tmp_path / "c.jsonl", [CHATS["turns"][0]]), tmp_path / "model")
    assert samples.inputs[0].tolist() == tokenizer(CHATS["turns"][1])["input_ids"]


@pytest.mark.parametrize(
    ("format", "day"), [("%d %b %Y", "26 Jul 2024"), ("%A, %B %-d", "Friday, July 26"), ("%Y-%m-%d", "2024-07-26")]
)
def test_the_date_in_a_template_is_always_the_same(format, day, tmp_path):
    template = f"\n  {{% if true %}}\n{{{{ strftime_now('{format}') }}}}{{% endif %}}{{{{ messages[0].content }}}}"
    tokenizer = tiny_tokenizer.save("qwen", tmp_path / "model", template)
    samples = load(write(tmp_path / "c.jsonl", [CHATS["prompt"][0]]), tmp_path / "model")
    assert samples.inputs[0].tolist() == tokenizer(f"\n{day}weather?")["input_ids"]


def test_few_chats_are_divided_whole(model, tmp_path):
    rows = [{"messages": [{**USER, "content": f"question {number} " * 9}]} for number in range(24)]
    settings = write(tmp_path / "c.jsonl", rows)
    documents = load_documents(settings, model, 200)
    parts = [part_of(documents, part, pack=False) for part in ("calibration", "evaluation")]
    assert all(part.texts for part in parts)
    assert sorted(text for part in parts for text in part.texts) == sorted(documents.texts)
    settings.pack, settings.length, settings.samples = True, 32, 2
    assert all(len(sample) == 32 for sample in draw_samples(parts[1], settings, model, 0).inputs)


def test_the_chats_of_a_file_are_other_documents_than_its_texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", [CHATS["turns"][0]])
    assert same_source(ask("a.jsonl", format="chat"), ask("./a.jsonl", format="chat"))
    assert not same_source(ask("a.jsonl", format="chat"), ask("a.jsonl"))


NO_TEXT = {"reason": "no-message-text", "message": 1, "field": "messages"}


@pytest.mark.parametrize(
    ("row", "data"),
    [
        ({"other": []}, {"reason": "no-field", "field": "messages"}),
        ({"messages": []}, {"reason": "no-chat", "field": "messages"}),
        ({"messages": "text"}, {"reason": "no-chat"}),
        ({"messages": ["text"]}, {"reason": "no-chat"}),
        ({"messages": None}, {"reason": "no-chat"}),
        ({"messages": [{"role": "user"}]}, {**NO_TEXT, "key": "content"}),
        ({"messages": [{"content": "x"}]}, {**NO_TEXT, "key": "role"}),
        ({"messages": [{"role": 3, "content": "x"}]}, {**NO_TEXT, "key": "role"}),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, {**NO_TEXT, "key": "content"}),
        ({"messages": [{"role": "user", "content": []}]}, {**NO_TEXT, "key": "content"}),
        ({"messages": [{"from": "bard", "value": "x"}]}, {"reason": "unknown-speaker", "speaker": "bard"}),
        ({"messages": [{"from": "gpt", "text": "x"}]}, {**NO_TEXT, "key": "content"}),
        ({"messages": [USER], "tools": "text"}, {"reason": "no-tools"}),
        ({"messages": [USER], "tools": [3]}, {"reason": "no-tools"}),
        ({"messages": [{"role": "narrator", "content": "x"}]}, {"reason": "chat-refused", "cause": "no such role"}),
    ],
)
def test_what_is_no_chat_is_known_in_plan_and_in_run_with_its_row(row, data, model, tmp_path):
    settings = write(tmp_path / "c.jsonl", [CHATS["turns"][0], row])
    with raises(RecipeError, where="c.jsonl, row 2", **data):
        check_chats(settings, check_data(settings, reads_pixels=False), load_tokenizer(model), model)
    with raises(RecipeError, where="c.jsonl, row 2", **data):
        load(settings, model)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_tokenizer_without_a_chat_template_is_known_in_plan_and_in_run(kind, tmp_path):
    tokenizer = tiny_tokenizer.save("gpt", tmp_path / "model")
    settings = write(tmp_path / "c.jsonl", [CHATS["turns"][0]])
    if kind == "parquet":
        settings.source = str(tmp_path / "c.parquet")
        pa.parquet.write_table(pa.Table.from_pylist([CHATS["turns"][0]]), settings.source)
    with raises(RecipeError, reason="no-chat-template"):
        check_chats(settings, check_data(settings, reads_pixels=False), tokenizer, tmp_path / "model")
    with raises(RecipeError, where=f"c.{kind}", reason="no-chat-template", field="messages"):
        load(settings, tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("stdlib", {"reason": "no-chats"}),
        ("random", {"reason": "no-chats"}),
        ("t.txt", {"reason": "no-chat"}),
        ("t.csv", {"reason": "no-chat"}),
    ],
)
def test_a_source_without_chats_is_refused(name, data, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("some text")
    (tmp_path / "t.csv").write_text("messages,label\nsome text,1\n")
    settings = ask(name, format="chat")
    with raises(RecipeError, **data):
        check_data(settings, reads_pixels=False)
    with raises(RecipeError, **data):
        load(settings, model)
