"""Whatever a file says, the answer is a result or a sentence with the right exit code, and nothing is left behind.

Valid files are changed in one or two places: types, numbers, keys taken away, written twice or out of place, bytes cut
off, turned or put in. 300 inputs a run, the same ones each time. An input that once failed is kept as an `@example`.
"""

from __future__ import annotations

import csv
import gzip
import json
import time

import pytest
import tiny
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

import compressor.data.samples
from compressor.artifact.inspection import inspect_path
from compressor.artifact.loader import load
from compressor.engine.plan import make_plan
from compressor.errors import CompressError
from compressor.evaluation.compare import compare, is_report, read_subject
from compressor.evaluation.render import render_html, render_markdown
from compressor.model import wrong_key
from compressor.model.checkpoint import open_checkpoint
from compressor.model.model_files import demo_path
from compressor.recipe.recipe import parse_recipe, recipe_folders
from compressor.run import compress
from compressor.storage.safetensors_file import read_header

RTN = parse_recipe(b"version: 1\nname: t\nsteps: [{pass: rtn, bits: 8, group_size: -1}]\n")
FAMILIES = ("llama", "gpt2", "bert", "vit", "gemma3", "qwen3_moe")
SECONDS = 20.0  # of processor time for one input; each takes far less than one
VALUES = (
    None, True, False, 0, -1, 1, 7, 10**9, 10**12, 2**70, 1.5, -0.5, 1e40, float("nan"), float("inf"), "", "256", "foo",
    "../../etc/passwd", "a\0b", "ünï\ud800", "x" * 3000, [], [3], [None], [[[]]], {}, {"a": 1}, {"__float__": "NaN"},
)  # fmt: skip
EDITS = ("set", "remove", "twice", "rename")
edits = st.lists(
    st.tuples(st.sampled_from(EDITS), st.integers(0, 10**6), st.integers(0, len(VALUES) - 1)), min_size=1, max_size=2
)
CUTS = ("cut", "turn", "put", "take")
cuts = st.lists(st.tuples(st.sampled_from(CUTS), st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=2)


def inputs(count):
    """The same examples in every run; how long one takes is asserted by `answered`."""
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],  # a change or two need no shrinking
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def nodes(value):
    """Every (container, key) inside a JSON value, in order."""
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in list(members):
        yield value, key
        yield from nodes(member)


def edited(text, changes):
    """JSON with some of its values or keys changed."""
    value = json.loads(text)
    twice = []
    for kind, place, choice in changes:
        found = list(nodes(value))
        if not found:
            continue
        container, key = found[place % len(found)]
        new = json.loads(json.dumps(VALUES[choice]))
        if kind == "remove":
            del container[key]
        elif kind == "rename" and isinstance(container, dict):
            container[str(key)[:-1]] = container.pop(key)
        elif kind == "twice" and isinstance(container, dict):
            twice.append((json.dumps(key) + ": ", json.dumps(new)))
        else:
            container[key] = new
    result = json.dumps(value)
    for key, new in twice:
        result = result.replace(key, f"{key}{new}, {key}", 1)
    return result


def cut(content, changes):
    """Bytes with some of them changed, taken away or put in, or the end cut off."""
    result = bytearray(content)
    for kind, place, byte in changes:
        at = place % (len(result) + 1)
        if kind == "cut":
            del result[at:]
        elif kind == "put":
            result[at:at] = bytes([byte]) * (1 + byte % 3)
        elif kind == "take":
            del result[at : at + 1 + byte % 40]
        elif at < len(result):
            result[at] = byte
    return bytes(result)


def answered(work, codes, folder):
    """The rule: a result, or a CompressError of these codes with a sentence; nothing else, and nothing left behind."""
    before = sorted(path.name for path in folder.rglob("*"))
    began = time.process_time()
    try:
        work()
    except CompressError as error:
        assert error.exit_code in codes, error
        assert error.where and error.what.strip() and "Traceback" not in str(error)
        assert len(str(error)) < 3000, "a sentence, not the file"
    assert time.process_time() - began < SECONDS
    assert sorted(path.name for path in folder.rglob("*")) == before


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def models(folder):
    return {family: tiny.save(family, folder / family) for family in FAMILIES}


@pytest.fixture
def quick(monkeypatch):
    """Looking for the key to blame is tested elsewhere."""
    monkeypatch.setattr(wrong_key, "SEARCH_SECONDS", 0.0)


@pytest.fixture(scope="module")
def configs(models):
    return {family: (path / "config.json").read_text() for family, path in models.items()}


@pytest.mark.slow
@inputs(60)
@given(st.sampled_from(FAMILIES), edits)
@example("llama", [("set", 0, VALUES.index([3]))])  # architectures
@example("llama", [("set", 1, VALUES.index({}))])
def test_config_json(models, configs, quick, family, changes):
    (models[family] / "config.json").write_text(edited(configs[family], changes))
    answered(lambda: make_plan(RTN, str(models[family])), {2, 5, 6}, models[family])


@inputs(15)
@given(cuts)
def test_bytes_of_config_json(models, configs, quick, changes):
    (models["llama"] / "config.json").write_bytes(cut(configs["llama"].encode(), changes))
    answered(lambda: make_plan(RTN, str(models["llama"])), {2, 5, 6}, models["llama"])


@pytest.fixture(scope="module")
def sharded(folder):
    return tiny.save("llama", folder / "sharded", shard="20KB")


def header_of(content):
    length = int.from_bytes(content[:8], "little")
    return content[8 : 8 + length], content[8 + length :]


@inputs(45)
@given(edits)
def test_safetensors_headers(folder, sharded, changes):
    header, data = header_of(min(sharded.glob("*.safetensors")).read_bytes())
    text = edited(header, changes).encode()
    path = folder / "header.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    answered(lambda: read_header(path), {5}, folder)


@inputs(25)
@given(cuts)
def test_bytes_of_safetensors_files(folder, sharded, changes):
    path = folder / "bytes.safetensors"
    path.write_bytes(cut(min(sharded.glob("*.safetensors")).read_bytes()[:2000], changes))
    answered(lambda: read_header(path), {5}, folder)


@pytest.fixture(scope="module")
def index(sharded):
    return (sharded / "model.safetensors.index.json").read_text()


@inputs(30)
@given(edits)
def test_the_index(sharded, index, changes):
    (sharded / "model.safetensors.index.json").write_text(edited(index, changes))
    answered(lambda: open_checkpoint(sharded), {5}, sharded)


RECIPES = sorted(path for folder in recipe_folders() for path in folder.glob("*.yaml"))
TREES = [parse_recipe(path.read_bytes(), path.name).resolved() for path in RECIPES]


@inputs(40)
@given(st.integers(0, len(TREES) - 1), edits)
def test_recipes(folder, number, changes):
    """JSON is YAML, and its values are edited more easily."""
    text = edited(json.dumps(TREES[number]), changes)
    answered(lambda: parse_recipe(text.encode("utf-8", "surrogatepass"), "recipe.yaml"), {2, 6}, folder)


@inputs(25)
@given(st.integers(0, len(RECIPES) - 1), cuts)
def test_bytes_of_recipes(folder, number, changes):
    answered(lambda: parse_recipe(cut(RECIPES[number].read_bytes(), changes), "recipe.yaml"), {2, 6}, folder)


@pytest.fixture(scope="module")
def data(folder):
    """One valid file of each kind that holds text."""
    import pyarrow
    import pyarrow.parquet

    made = folder / "data"
    made.mkdir()
    rows = [{"text": f'line {n} has words, "marks" and\nbreaks ' * 20, "label": n % 3} for n in range(30)]
    (made / "a.txt").write_text("\n\n".join(row["text"] for row in rows))
    (made / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (made / "a.json").write_text(json.dumps(rows))
    with (made / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), made / "a.parquet")
    (made / "a.jsonl.gz").write_bytes(gzip.compress((made / "a.jsonl").read_bytes(), mtime=0))
    return {path.name: path.read_bytes() for path in made.iterdir()}


@pytest.fixture(scope="module")
def tokenizer():
    return compressor.data.tokenizing.load_tokenizer(demo_path())


@inputs(40)
@given(st.sampled_from(("a.txt", "a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz")), st.booleans(), cuts)
def test_data_files(folder, data, tokenizer, monkeypatch, name, pack, changes):
    path = folder / "data" / name
    path.write_bytes(cut(data[name], changes))
    monkeypatch.setattr(compressor.data.samples, "load_tokenizer", lambda *args, **kwargs: tokenizer)
    sizes = {"source": str(path), "samples": 2, "length": 16, "pack": pack}
    asked = RTN.data.model_copy(update=sizes)
    demo = demo_path()
    answered(lambda: compressor.data.samples.load_samples(asked, demo, seed=0, vocabulary=2048), {2, 6}, folder)


@pytest.fixture(scope="module")
def artifact(folder, models, configs):
    for family, text in configs.items():
        (models[family] / "config.json").write_text(text)
    compress(RTN, str(models["llama"]), folder / "artifact", measure=False)
    return folder / "artifact"


def read_report(broken):
    found = read_subject(broken)
    if is_report(found):
        render_markdown(found)
        render_html(found)


# file -> what reads it
READERS = {
    "compress_manifest.json": (
        lambda broken: load(broken, check_hashes=False, kernels="reference"),
        lambda broken: inspect_path(str(broken)),
    ),
    "config.json": (
        lambda broken: load(broken, check_hashes=False, kernels="reference"),
        lambda broken: inspect_path(str(broken)),
    ),
    "report.json": (lambda broken: compare([broken, broken]), read_report),
}


@inputs(20)
@given(st.sampled_from(sorted(READERS)), st.integers(0, 1), edits)
def test_artifact_files(folder, artifact, quick, name, reader, changes):
    valid = (artifact / name).read_text()
    (artifact / name).write_text(edited(valid, changes))
    try:
        answered(lambda: READERS[name][reader](artifact), {2, 4, 5, 6}, artifact)
    finally:
        (artifact / name).write_text(valid)
