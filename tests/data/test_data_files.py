"""Files of every kind are read unchanged; a damaged, unknown or non-text file gives an error with its place."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import socket

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from data_settings import ask, read_documents
from raising import raises

from compressor.data import files, sources
from compressor.data.files import kind_of
from compressor.data.samples import check_data, load_samples
from compressor.errors import DependencyError, RecipeError

ROWS = [{"text": f"alpha beta {i}", "label": i % 3} for i in range(5)]
TEXTS, LABELS = [row["text"] for row in ROWS], [row["label"] for row in ROWS]
LINES = "\n".join(map(json.dumps, ROWS)).encode()
CSV = ("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in ROWS)).encode()
TABLE = pa.Table.from_pylist(ROWS)


def arrow_bytes(write, table=TABLE):
    sink = io.BytesIO()
    write(table, sink)
    return sink.getvalue()


def ipc_stream(table, sink):
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def packed(codec, content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PARQUET = arrow_bytes(pa.parquet.write_table)
FEATHER = arrow_bytes(pa.feather.write_feather)
STREAM = arrow_bytes(ipc_stream)


def read(tmp_path, name, content, **changes):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_documents(ask(str(tmp_path / name), **changes))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("A.JSONL", LINES),
        ("a.ndjson", LINES),
        ("a.jsonl", LINES.replace(b"\n", b"\r\n\n \n")),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES),
        ("a.jsonl", LINES.decode().encode("utf-16")),
        ("a.jsonl", b"\xff\xfe\0\0" + LINES.decode().encode("utf-32-le")),
        ("a.json", json.dumps(ROWS)),
        ("a.JSON", json.dumps({"version": 1, "data": ROWS}, indent=2)),
        ("a.json", json.dumps({"text": TEXTS, "label": LABELS})),
        ("a.csv", CSV.replace(b"text,label", b"text, label ")),
        ("a.json", LINES),
        ("a.csv", CSV),
        ("a.CSV", CSV.replace(b"\n", b"\r\n\r\n")),
        ("a.csv", b"\xef\xbb\xbf" + CSV),
        ("a.tsv", CSV.replace(b",", b"\t")),
        ("a.parquet", PARQUET),
        ("a.pq", PARQUET),
        ("a.feather", FEATHER),
        ("a.arrow", FEATHER),
        ("a.arrow", STREAM),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("a.jsonl.gz", gzip.compress(LINES[:40], mtime=0) + gzip.compress(LINES[40:], mtime=0)),
        ("a.csv.bz2", bz2.compress(CSV)),
        ("a.ndjson.XZ", lzma.compress(LINES)),
        ("a.json.zst", packed("zstd", LINES)),
        ("a.csv.lz4", packed("lz4", CSV)),
        ("a.parquet.gz", gzip.compress(PARQUET, mtime=0)),
    ],
)
def test_rows_are_the_same_in_every_kind_of_file(name, content, tmp_path):
    texts, labels, _ = read(tmp_path, name, content)
    assert (texts, labels) == (TEXTS, LABELS)
    check_data(ask(str(tmp_path / name)), reads_pixels=False)


@pytest.mark.parametrize(
    "text", ["a\u2028b\u0085c\x0bd\x0ce\x1cf", "line\nbreak", 'a "quote", and\r\nmore', "x" * 200_000, ""]
)
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_a_text_may_hold_any_separator_and_be_of_any_length(kind, text, tmp_path):
    rows, before = [{"text": text}, {"text": "next"}], csv.field_size_limit()
    if kind in ("csv", "tsv"):
        sink = io.StringIO(newline="")
        writer = csv.writer(sink, delimiter="\t" if kind == "tsv" else ",", quoting=csv.QUOTE_ALL)
        writer.writerows([["text"], *([row["text"]] for row in rows)])
        content = sink.getvalue().encode()
    elif kind == "parquet":
        content = arrow_bytes(pa.parquet.write_table, pa.Table.from_pylist(rows))
    else:
        raw = [json.dumps(row, ensure_ascii=False) for row in rows]
        content = ("\n".join(raw) if kind == "jsonl" else f"[{','.join(raw)}]").encode()
    assert read(tmp_path, f"a.{kind}", content)[0] == [text, "next"]
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("name", ["a.txt", "a", "a.md", "a.py", "a.v1.2", "a.txt.gz", "README.GZ"])
def test_other_endings_are_one_text_without_mark_and_carriage_returns(name, tmp_path):
    content = b"\xef\xbb\xbfone\r\ntwo \xc3\xa9\n"
    content = gzip.compress(content, mtime=0) if name.lower().endswith("gz") else content
    assert read(tmp_path, name, content)[:2] == (["one\ntwo é\n"], None)


MALFORMED = [
    ("a.txt", b"", "", {"reason": "empty"}),
    ("a.txt", b" \n\t\r\n", "", {"reason": "empty"}),
    ("a.txt", b"\xef\xbb\xbf", "", {"reason": "empty"}),
    ("a.txt", b"abc\xff", "", {"reason": "bad-encoding", "encoding": "utf-8", "byte": 3}),
    ("a.txt", b"one\ntw\0o", "", {"reason": "null-character", "line": 2}),
    ("a.txt", "words".encode("utf-16-le"), "", {"reason": "null-character", "line": 1}),
    ("a.txt", b"\xff\xfea", "", {"reason": "bad-encoding", "encoding": "utf-16-le", "byte": 2}),
    ("a.gz", b"no gzip", "", {"reason": "not-read"}),
    ("a.txt.gz", gzip.compress(b"words " * 99, mtime=0)[:-9], "", {"reason": "not-read", "error": "EOFError"}),
    ("a.txt.gz", gzip.compress(b"", mtime=0), "", {"reason": "empty"}),
    ("a.csv.bz2", bz2.compress(CSV)[:-5], "", {"reason": "not-read"}),
    ("a.csv.xz", lzma.compress(CSV)[:-5], "", {"reason": "not-read"}),
    ("a.csv.zst", packed("zstd", CSV)[:-5], "", {"reason": "not-read"}),
    ("a.jsonl", b'{"text": "a"}\n\n{oops\n', ":3", {"reason": "bad-json"}),
    ("a.jsonl", b'["a"]\n', ":1", {"reason": "no-object"}),
    ("a.jsonl", b'{"text": "a", "text": "b"}', ":1", {"reason": "bad-json", "repeated": "text"}),
    ("a.jsonl", b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", ":1", {"reason": "bad-json"}),
    ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", ":1", {"reason": "bad-json"}),
    ("a.jsonl", b'{"txt": "a"}', ", row 1", {"reason": "no-field", "field": "text", "near": ["txt"]}),
    ("a.jsonl", b'{"text": "a"}\n{"label": 1}', ", row 2", {"reason": "no-field", "field": "text", "known": ["label"]}),
    ("a.jsonl", b'{"text": "a"}\n{"text": null}', ", row 2", {"reason": "no-text", "found": "null", "field": "text"}),
    ("a.jsonl", b'{"text": 1}', ", row 1", {"reason": "no-text", "found": "a number", "field": "text"}),
    ("a.jsonl", b'{"text": true}', ", row 1", {"reason": "no-text", "found": "a truth value", "field": "text"}),
    ("a.jsonl", b'{"text": NaN}', ", row 1", {"reason": "no-text", "found": "a number", "field": "text"}),
    ("a.jsonl", b'{"text": ["a"]}', ", row 1", {"reason": "no-text", "found": "a list", "field": "text"}),
    ("a.jsonl", b'{"text": {"a": 1}}', ", row 1", {"reason": "no-text", "found": "an object", "field": "text"}),
    ("a.jsonl", b'{"text": "\\ud800"}', ", row 1", {"reason": "half-pair", "field": "text", "character": 1}),
    ("a.json", b"[]", "", {"reason": "no-rows"}),
    ("a.json", b"3", "", {"reason": "no-rows"}),
    ("a.json", b'["a", "b"]', ", row 1", {"reason": "no-object"}),
    ("a.json", b'{"text": ["a", null]}', ", row 2", {"reason": "no-text", "found": "null", "field": "text"}),
    ("a.json", b'{"text": ["a", "b"], "label": [1]}', "", {"reason": "unequal-columns", "columns": ["text", "label"]}),
    ("a.json", b'{"text": {"0": "a"}}', ", row 1", {"reason": "no-text", "found": "an object", "field": "text"}),
    ("a.json", b"[" * 100_000, "", {"reason": "bad-json"}),
    ("a.json", b'[{"text": "a"}', "", {"reason": "bad-json"}),
    ("a.csv", b"text,label\n", "", {"reason": "no-rows"}),
    ("a.csv", b"txt\na\n", "", {"reason": "no-field", "field": "text", "near": ["txt"]}),
    ("a.csv", b"a;text\n1;b\n", "", {"reason": "no-field", "field": "text", "known": ["a;text"]}),
    ("a.csv", b"text,text\na,b\n", "", {"reason": "two-columns", "column": "text"}),
    ("a.csv", b"text,label,label\na,1,2\n", "", {"reason": "two-columns", "column": "label"}),
    ("a.csv", b"text,label\na\n", ":2", {"fields": 1, "header": 2}),
    ("a.csv", b"text\na\nb,c\n", ":3", {"fields": 2, "header": 1}),
    ("a.csv", b'text\n"a\nb\n', ":3", {"reason": "bad-csv", "cause": "unexpected end of data"}),
    ("a.csv", b'text\n"a"b\n', ":2", {"reason": "bad-csv"}),
    ("a.csv", b"text\na\0b\n", "", {"reason": "null-character", "line": 2}),
    ("a.parquet", b"", "", {"reason": "not-read"}),
    ("a.parquet", b"PAR1" + b"x" * 40 + b"PAR1", "", {"reason": "not-read"}),
    ("a.parquet", PARQUET[:-20], "", {"reason": "not-read"}),
    ("a.parquet", arrow_bytes(pa.parquet.write_table, TABLE.slice(0, 0)), "", {"reason": "no-rows"}),
    (
        "a.parquet",
        arrow_bytes(pa.parquet.write_table, TABLE.rename_columns(["body", "label"])),
        "",
        {"reason": "no-field", "field": "text", "known": ["body", "label"]},
    ),
    (
        "a.parquet",
        arrow_bytes(pa.parquet.write_table, pa.table({"text": [b"a"]})),
        ", row 1",
        {"reason": "no-text", "found": "bytes", "field": "text"},
    ),
    (
        "a.parquet",
        arrow_bytes(pa.parquet.write_table, pa.table({"text": ["a", None]})),
        ", row 2",
        {"reason": "no-text", "found": "null", "field": "text"},
    ),
    ("a.arrow", FEATHER[:50], "", {"reason": "not-read"}),
    ("a.arrow", b"\xff" * 64, "", {"reason": "not-read"}),
    (
        "a.arrow",
        arrow_bytes(ipc_stream, TABLE.rename_columns(["text", "text"])),
        "",
        {"reason": "two-columns", "column": "text"},
    ),
    ("a.pdf", b"%PDF-1.4", "", {"reason": "other-format", "ending": ".pdf"}),
    ("a.zip", b"PK", "", {"reason": "other-format", "ending": ".zip"}),
    ("a.tar.gz", b"x", "", {"reason": "other-format", "ending": ".tar"}),
    ("a.SAFETENSORS", b"x", "", {"reason": "other-format", "ending": ".safetensors"}),
    ("a.npz.gz", b"x", "", {"reason": "other-format", "ending": ".npz"}),
]


@pytest.mark.parametrize(("name", "content", "place", "data"), MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_data_end_in_a_sentence(name, content, place, data, tmp_path):
    with raises(RecipeError, where=name + place, **data) as caught:
        read(tmp_path, name, content)
    assert caught.value.hint or data["reason"] in ("empty", "no-rows")


def test_random_bytes_and_cut_files_are_read_or_refused(tmp_path):
    draw = random.Random(0)
    whole = {"jsonl": LINES, "json": json.dumps(ROWS).encode(), "csv": CSV, "txt": CSV, "parquet": PARQUET}
    whole |= {"arrow": FEATHER, "feather": STREAM, "csv.zst": packed("zstd", CSV)}
    whole |= {"jsonl.gz": gzip.compress(LINES, mtime=0)}
    for kind, content in whole.items():
        for _ in range(40):
            changed = bytearray(content if draw.random() < 0.8 else draw.randbytes(draw.randrange(80)))
            for _ in range(draw.randrange(4)):
                if changed:
                    changed[draw.randrange(len(changed))] = draw.randrange(256)
            path = tmp_path / f"a.{kind}"
            path.write_bytes(changed[: draw.randrange(len(changed) + 1)] if draw.random() < 0.5 else changed)
            for use in (read_documents, lambda settings: check_data(settings, reads_pixels=False)):
                try:
                    use(ask(str(path)))
                except (RecipeError, DependencyError) as error:
                    assert str(error)


@pytest.mark.parametrize(
    ("label", "reason", "found"),
    [
        ("0.7", "no-whole-label", "0.7"),
        ("NaN", "no-whole-label", "nan"),
        ("1e999", "no-whole-label", "inf"),
        ("null", "no-whole-label", None),
        ("true", "no-whole-label", "True"),
        ('"1"', "no-whole-label", "'1'"),
        ("[1]", "no-whole-label", "[1]"),
        ("-1", "label-out-of-range", -1),
        ("99999999999", "label-out-of-range", 99999999999),
    ],
)
def test_labels_that_are_no_class_numbers_are_refused_where_they_are_used(label, reason, found, tmp_path):
    content = f'{{"text": "a", "label": 2.0}}\n{{"text": "b", "label": {label}}}'
    settings = ask(str(tmp_path / "a.jsonl"), pack=False, samples=2)
    (tmp_path / "a.jsonl").write_text(content)
    with raises(RecipeError, where="a.jsonl, row 2", reason=reason, label=found):
        load(settings)
    (tmp_path / "a.jsonl").write_text(content.replace(label, "1"))
    assert load(settings).labels.tolist() == [2, 1]


def test_a_row_without_a_label_among_others_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\na,1\nb,\n")
    with raises(RecipeError, where="a.csv, row 2", reason="no-whole-label", label=None):
        load(ask(str(tmp_path / "a.csv"), pack=False, samples=2))


def load(settings):
    from compressor.model.model_files import demo_path

    return load_samples(settings, demo_path(), seed=0, vocabulary=2048)


def special(kind, tmp_path):
    path = tmp_path / "special.jsonl"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            os.chdir(tmp_path)
            made.bind(path.name)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling":
        path.symlink_to(tmp_path / "gone")
    return path


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("fifo", {"reason": "no-regular-file", "kind": "FIFO"}),
        ("socket", {"reason": "no-regular-file", "kind": "socket"}),
        ("device", {"reason": "no-regular-file", "kind": "device"}),
        ("loop", {"reason": "not-looked-up"}),
        ("dangling", {"reason": "broken-link"}),
        ("gone", {"reason": "no-such-file"}),
    ],
)
def test_only_regular_files_are_opened(kind, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = special(kind, tmp_path)
    for source in (str(path), str(path).replace(".jsonl", ".npz")):
        if source != str(path) and os.path.lexists(path):
            os.rename(path, source)
        for use in (load, lambda settings: check_data(settings, reads_pixels=False)):
            if source.endswith(".npz"):
                renamed = {"reason": "broken-link"} if kind == "loop" else data  # it leads to its old name
                with raises(RecipeError, where=source, **renamed):
                    load_samples(ask(source), tmp_path, seed=0, vocabulary=None)
            else:
                with raises(RecipeError, where=source, **data):
                    use(ask(source))


@pytest.mark.parametrize("source", ["a\0b", "x" * 5000, "dataset:a\0b", "dataset:" + "x" * 5000])
def test_a_path_that_cannot_be_is_refused(source):
    with pytest.raises(RecipeError):
        read_documents(ask(source))


def test_a_fifo_in_the_folder_of_a_data_set_is_refused(tmp_path):
    (tmp_path / "set" / "inner").mkdir(parents=True)
    os.mkfifo(tmp_path / "set" / "inner" / "a.jsonl")
    (tmp_path / "set" / "again").symlink_to(tmp_path / "set")
    with raises(RecipeError, where=tmp_path / "set" / "inner" / "a.jsonl", reason="no-regular-file", kind="FIFO"):
        read_documents(ask(str(tmp_path / "set")))


@pytest.mark.parametrize("name", ["../ff.arrow", "/abs/ff.arrow", "a/../../ff.arrow"])
def test_a_data_set_that_names_files_elsewhere_is_refused(name, tmp_path):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    os.mkfifo(tmp_path / "ff.arrow")
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    (tmp_path / "saved" / "state.json").write_text(json.dumps(state | {"_data_files": [{"filename": name}]}))
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "dataset_dict.json").write_text(json.dumps({"splits": [name]}))
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {name}\n---\n"
    )
    for place in ("saved/state.json", "splits/dataset_dict.json", "card/README.md"):
        with raises(RecipeError, where=tmp_path / place, reason="leads-out", name=name):
            read_documents(ask(str((tmp_path / place).parent)))


def test_more_than_memory_holds_is_refused_by_size(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "memory_share", lambda: 5000)
    for name, content in (
        ("a.txt", b"x" * 6000),
        ("a.txt.gz", gzip.compress(b"x" * 6000, mtime=0)),
        ("a.txt.zst", packed("zstd", b"x" * 6000)),
        ("a.parquet", arrow_bytes(pa.parquet.write_table, pa.table({"text": ["x"] * 6000}))),
    ):
        with raises(RecipeError, where=name, limit=5000) as failure:
            read(tmp_path, name, content)
        assert failure.value.data["size"] > 5000


def test_a_home_folder_is_expanded_for_files_and_data_sets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_bytes(LINES)
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    for source in ("~/a.jsonl", "~/saved", "dataset:~/saved"):
        assert read_documents(ask(source))[:2] == (TEXTS, LABELS)


def test_a_saved_data_set_is_read_with_its_rows_chosen_and_its_damage_told(tmp_path):
    import datasets

    table = datasets.Dataset.from_list(ROWS).cast_column("label", datasets.ClassLabel(names=["a", "b", "c"]))
    table.select([3, 1]).save_to_disk(tmp_path / "set")
    assert read_documents(ask(str(tmp_path / "set")))[:2] == ([TEXTS[3], TEXTS[1]], [LABELS[3], LABELS[1]])
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "splits")
    assert read_documents(ask(str(tmp_path / "splits")))[0] == TEXTS
    with raises(RecipeError, where=tmp_path / "splits", split="heldout", known=["train"]):
        check_data(ask(str(tmp_path / "splits"), split="heldout"), reads_pixels=False)
    with raises(RecipeError, where=tmp_path / "set", reason="no-field", field="txt", near=["text"]):
        check_data(ask(str(tmp_path / "set"), field="txt"), reads_pixels=False)
    for name in ("state.json", "dataset_info.json"):
        whole = (tmp_path / "set" / name).read_bytes()
        for content in (b"", b"[]", b"{}", whole[:20], b"\xff"):
            (tmp_path / "set" / name).write_bytes(content)
            try:
                read_documents(ask(str(tmp_path / "set")))
            except RecipeError as error:
                assert str(error)
        (tmp_path / "set" / name).write_bytes(whole)


def test_plan_looks_at_the_first_rows_of_a_long_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "HEAD_BYTES", 100)
    long = {"a.jsonl": LINES * 9, "a.csv": CSV + b'"a\nb",1\n' * 50, "a.txt": "é".encode() * 99 + b"\xff",
            "a.json": b"[" * 999, "a.csv.gz": gzip.compress(CSV * 9, mtime=0)}  # fmt: skip
    for name, content in long.items():
        (tmp_path / name).write_bytes(content)
        check_data(ask(str(tmp_path / name)), reads_pixels=False)
    (tmp_path / "a.csv").write_bytes(b"body,label\n" + b"a,1\n" * 90)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": 3}\n' * 90)
    for name, place, data in (
        ("a.csv", "", {"reason": "no-field", "field": "text", "known": ["body", "label"]}),
        ("a.jsonl", ", row 1", {"reason": "no-text", "found": "a number", "field": "text"}),
    ):
        with raises(RecipeError, where=name + place, **data):
            check_data(ask(str(tmp_path / name)), reads_pixels=False)


def test_every_kind_that_is_told_is_known(tmp_path):
    for ending in (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather"):
        assert ending in files.KNOWN and kind_of(tmp_path / f"a{ending}.gz") == (ending, ".gz")
