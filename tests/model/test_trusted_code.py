"""No code of a directory runs unless the user says so; what would have run is named."""

from __future__ import annotations

import json
import os
import pty
import shutil
from pathlib import Path

import fresh
import pytest
import tiny
from raising import raises

import compressor
from compressor.artifact.files import file_facts
from compressor.artifact.manifest import read_manifest
from compressor.artifact.stock_loading import load_stock
from compressor.artifact.verify import main, verify
from compressor.data.tokenizing import load_tokenizer
from compressor.engine.plan import make_plan
from compressor.errors import ArtifactError, CompressError, ModelError
from compressor.evaluation.model_loading import load_model
from compressor.model.model_class import config_of
from compressor.model.structure import read_structure
from compressor.model.trusted_code import auto_map, files_behind
from compressor.recipe.recipe import parse_recipe
from compressor.run import compress

OWN = "tokenization_own.OwnTokenizer"
RTN8 = b"version: 1\nname: t\nsteps: [{pass: rtn, bits: 8, group_size: -1}]\n"


@pytest.fixture(scope="module")
def custom(tmp_path_factory):
    """A custom artifact of a GPT-2, whose Conv1D no stock format can hold."""
    folder = tmp_path_factory.mktemp("custom")
    compress(parse_recipe(RTN8, "t"), str(tiny.save("gpt2", folder / "model")), folder / "out", measure=False)
    return folder / "out"


@pytest.fixture
def artifact(custom, tmp_path):
    return Path(shutil.copytree(custom, tmp_path / "artifact"))


@pytest.fixture
def marker(tmp_path):
    """A file that planted code makes when it runs."""
    return tmp_path / "it-ran"


def planted(marker: Path, rest: str = "") -> str:
    return f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n{rest}"


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **changes}))


def plant_in_modeling(artifact, marker):
    file = next(artifact.glob("modeling_*.py"))
    file.write_text(file.read_text() + planted(marker))
    return file.name


def plant_auto_map(artifact, marker):
    (artifact / "other.py").write_text(planted(marker, next(artifact.glob("modeling_*.py")).read_text()))
    edit(
        artifact / "config.json",
        auto_map={"AutoConfig": "other.CompressedConfig", "AutoModelForCausalLM": "other.CompressedGPT2LMHeadModel"},
    )
    return "other.py"


def plant_another_repository(artifact, marker):
    edit(artifact / "config.json", auto_map={"AutoModelForCausalLM": "someone/else--other.CompressedGPT2LMHeadModel"})
    return "someone/else--other.py"


def plant_generate(artifact, marker):
    (artifact / "custom_generate").mkdir()
    (artifact / "custom_generate/generate.py").write_text(planted(marker, "def generate(model, **kw): ...\n"))
    return "custom_generate/generate.py"


def plant_beside(artifact, marker):
    (artifact / "configuration_x.py").write_text(planted(marker))
    return "configuration_x.py"


def plant_package(artifact, marker):
    (artifact / "transformers").mkdir()
    (artifact / "transformers/__init__.py").write_text(planted(marker))
    return "transformers/__init__.py"


def seal_again(artifact: Path) -> None:
    """Whoever plants code can write a manifest too."""
    manifest = {**read_manifest(artifact), "files": file_facts(artifact)}
    (artifact / "compress_manifest.json").write_text(json.dumps(manifest))


REPLACING = [plant_in_modeling, plant_auto_map, plant_another_repository, plant_generate]


@pytest.mark.parametrize("is_listed", [False, True])
@pytest.mark.parametrize("plant", [*REPLACING, plant_beside, plant_package])
def test_code_that_this_release_would_not_write_does_not_run_and_is_named(plant, is_listed, artifact, marker):
    name = plant(artifact, marker)
    if is_listed:
        seal_again(artifact)
    loads = is_listed and plant not in REPLACING  # as the code of a tokenizer does: it lies there, and isn't run
    for load in (lambda: load_stock(artifact, read_manifest(artifact)), lambda: load_model(artifact, False)):
        if loads:
            load()
            continue
        with pytest.raises((ArtifactError, ModelError)) as failure:
            load()
        assert name in str(failure.value)
    compressor.load(artifact, check_hashes=False)
    assert not marker.exists()


@pytest.mark.parametrize("plant", REPLACING)
def test_verify_names_planted_code(plant, artifact, marker):
    name = plant(artifact, marker)
    seal_again(artifact)
    request = {"directory": str(artifact), "batch": None, "sealed": True, "deep": True, "memory": None}
    try:
        problems = main({**request, "source": None, "trust_remote_code": False})["problems"]
    except ArtifactError as error:
        problems = [error.where, *error.data.get("problems", ())]
    assert any(name in problem for problem in problems)
    assert not marker.exists()


def test_the_modeling_file_that_was_compared_is_the_one_that_runs(artifact, marker, monkeypatch):
    """The file is swapped after it was read, as a rival process would."""
    from compressor.artifact import stock_loading

    read = stock_loading.read_generated

    def read_and_swap(directory, name, expected):
        text = read(directory, name, expected)
        (directory / name).write_text(planted(marker, text))
        return text

    monkeypatch.setattr(stock_loading, "read_generated", read_and_swap)
    model, info = load_stock(artifact, read_manifest(artifact))
    assert type(model).__name__ == "CompressedGPT2LMHeadModel" and not info["missing_keys"]
    assert not marker.exists()


def test_a_checkpoint_that_calls_itself_a_custom_artifact_runs_nothing(artifact, tmp_path, marker):
    model = tiny.save("llama", tmp_path / "model")
    shutil.copy(artifact / "compress_manifest.json", model)
    (model / "modeling_compressed_gpt2.py").write_text(planted(marker))
    edit(model / "config.json", auto_map={"AutoModelForCausalLM": "modeling_compressed_gpt2.X"})
    with pytest.raises((ArtifactError, ModelError)):
        load_model(model, trust_remote_code=False)
    assert not marker.exists()


@pytest.fixture
def with_own_code(tmp_path, marker):
    """A model of a class that transformers doesn't have."""
    model = tiny.save("llama", tmp_path / "own")
    code = "from transformers import LlamaConfig, LlamaForCausalLM\n"
    code += "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    code += "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    (model / "modeling_own.py").write_text(planted(marker, code))
    auto = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    edit(model / "config.json", model_type="own", architectures=["OwnForCausalLM"], auto_map=auto)
    return model


@pytest.mark.parametrize("ask", [read_structure, config_of, lambda model: load_model(model, False)])
def test_a_class_of_the_checkpoint_needs_the_flag_and_its_file_is_named(ask, with_own_code, marker):
    with raises(ModelError, reason="own-code", architecture="OwnForCausalLM", files=["modeling_own.py"]):
        ask(with_own_code)
    assert not marker.exists()


def test_a_class_of_the_checkpoint_runs_with_the_flag(with_own_code, marker):
    assert read_structure(with_own_code, trust_remote_code=True).architecture == "OwnForCausalLM"
    assert marker.exists()


@pytest.mark.parametrize("trust", [False, True])
def test_code_beside_a_class_that_transformers_has_is_not_run(trust, tmp_path, marker):
    model = tiny.save("llama", tmp_path / "m")
    (model / "modeling_x.py").write_text(planted(marker))
    edit(model / "config.json", auto_map={"AutoConfig": "modeling_x.C", "AutoModelForCausalLM": "modeling_x.M"})
    assert read_structure(model, trust_remote_code=trust).architecture == "LlamaForCausalLM"
    load_model(model, trust)
    assert not marker.exists()


@pytest.mark.parametrize(
    "value", ["../evil.X", "/abs/evil.X", "evil", 3, "a b.X", {"x": "y"}, ["a.B", 4], "--evil.X", "evil.py.X.", ".x.Y"]
)
def test_an_auto_map_that_names_no_module_beside_it_is_refused(value, tmp_path):
    model = tiny.save("llama", tmp_path / "m")
    edit(model / "config.json", auto_map={"AutoConfig": value})
    with raises(ModelError, where="config.json", reason="auto-map-entry", name="AutoConfig"):
        read_structure(model, trust_remote_code=True)


def test_attention_of_another_repository_is_refused(tmp_path):
    model = tiny.save("llama", tmp_path / "m")
    edit(model / "config.json", attn_implementation="someone/kernel")
    told = {"reason": "code-elsewhere", "key": "attn_implementation", "value": "someone/kernel"}
    with raises(ModelError, where="config.json", **told):
        read_structure(model)


def test_a_class_of_the_checkpoint_is_measured_and_not_compressed(with_own_code):
    recipe = parse_recipe(RTN8, "t")
    told = {"reason": "own-class", "class": "OwnForCausalLM"}
    with raises(ModelError, where="own", **told) as failure:
        make_plan(recipe, str(with_own_code), trust_remote_code=True)
    assert failure.value.exit_code == 5
    assert type(load_model(with_own_code, trust_remote_code=True)).__name__ == "OwnForCausalLM"


def test_code_that_is_not_used_is_a_warning_of_the_plan(tmp_path):
    model = tiny.save("llama", tmp_path / "m")
    edit(model / "config.json", auto_map={"AutoModelForCausalLM": "modeling_x.M", "AutoProcessor": "gone.P"})
    plan = make_plan(parse_recipe(RTN8, "t"), str(model), prove=False)
    assert [(row.code, row.where) for row in plan.warnings] == [("code-not-used", "modeling_x.py")]
    assert "auto_map" not in plan.source.checkpoint.carried_config


@pytest.mark.parametrize(
    ("route", "config", "asked"),
    [
        ("of another release", {}, None),
        ("dense", {"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ("custom", {"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ("compressed-tensors", {"quantization_config": {"quant_method": "torchao"}}, "torchao"),
        ("bitsandbytes", {}, "None"),
        ("dense", {"quantization_config": "x"}, "x"),
    ],
)
def test_a_route_and_a_loader_that_do_not_agree_are_refused(route, config, asked, artifact):
    edit(artifact / "config.json", **config)
    edit(artifact / "compress_manifest.json", route=route)
    told = {"reason": "unknown-export-format"} if asked is None else {"reason": "other-export-format", "asked": asked}
    with raises(ArtifactError, route=route, **told):
        load_stock(artifact, read_manifest(artifact))


@pytest.mark.parametrize(
    "change",
    [
        {"n_embd": "32"},
        {"n_head": 0},
        {"n_layer": -1},
        {"dtype": "load"},
        {"dtype": None},
        {"activation_function": "no such"},
        {"compressed_shapes": 3},
        {"compressed_modules": {"transformer.h.0": {"form": "os", "spec": {}, "shape": []}}},
        {"attn_implementation": "someone/kernel"},
        {"vocab_size": 10**9},
    ],
)
def test_a_config_that_makes_no_model_is_an_error_of_the_artifact(change, artifact):
    edit(artifact / "config.json", **change)
    with pytest.raises((ArtifactError, ModelError)):
        compressor.load(artifact, check_hashes=False)


@pytest.mark.parametrize(
    "change",
    [
        {"spec": {}},
        {"spec": {"bits": 8, "group_size": 10**9, "symmetric": True}},
        {"spec": {"bits": "x"}},
        {"form": "nothing"},
        {"form": "table_activation"},
        {"parameter": "transformer.nowhere.weight"},
        {"shape": [2**40, 2**40]},
        {"bias": "nothing"},
        {"tensor": "nothing"},
        {"parameter": "transformer.wte.weight"},
        {"parameter": "transformer.wte.weight", "role": "norm"},
        {"parameter": "lm_head"},
        {"parameter": "transformer.h.1.attn.c_attn.weight"},
        {"tensor": "transformer.h.1.attn.c_attn.weight"},
        {"expert": 0, "rows": [0, 1]},
    ],
)
def test_a_weight_that_the_manifest_describes_wrongly_is_an_error_of_the_artifact(change, artifact):
    manifest = read_manifest(artifact)
    name = sorted(manifest["weights"])[1]
    manifest["weights"][name].update(change)
    (artifact / "compress_manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CompressError):
        load_stock(artifact, read_manifest(artifact))
        compressor.load(artifact, check_hashes=False)


@pytest.fixture
def with_own_tokenizer(tmp_path, marker):
    """A model whose tokenizer is code of its own."""
    model = tiny.save("llama", tmp_path / "tokenized", vocab_size=2048)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(compressor.__file__).parent / "demo" / name, model)
    code = "from transformers import PreTrainedTokenizerFast\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    (model / "tokenization_own.py").write_text(planted(marker, code))
    auto = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    edit(model / "tokenizer_config.json", auto_map=auto, tokenizer_class="OwnTokenizer")
    return model


def named_in_config(model, value, stated):
    """Another place for what names the tokenizer's code; the class is stated in `stated`."""
    (model / "tokenizer_config.json").write_text("{}")
    edit(model / "config.json", auto_map={"AutoTokenizer": value})
    edit(model / stated, tokenizer_class="OwnTokenizer")


@pytest.mark.parametrize("stated", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("value", [[OWN, None], [None, OWN], OWN])
def test_a_tokenizer_whose_code_config_json_names_needs_the_flag_and_runs_with_it(
    value, stated, with_own_tokenizer, marker
):
    named_in_config(with_own_tokenizer, value, stated)
    with raises(ModelError, where="config.json", reason="own-tokenizer", files=["tokenization_own.py"]):
        load_tokenizer(with_own_tokenizer)
    assert not marker.exists()
    assert type(load_tokenizer(with_own_tokenizer, trust_remote_code=True)).__name__ == "OwnTokenizer"


@pytest.mark.parametrize("names", [None, "config.json", "tokenizer_config.json"])
def test_verify_names_code_of_a_tokenizer_that_is_not_the_sources(names, with_own_tokenizer, tmp_path, marker):
    if names is not None:
        named_in_config(with_own_tokenizer, [OWN, None], names)
    output = tmp_path / "out"
    compress(parse_recipe(RTN8, "t"), str(with_own_tokenizer), output, measure=False)  # it was verified with its source

    def problems(source=None, trust=False):
        return verify(output, None, sealed=True, deep=False, source=source, trust_remote_code=trust).problems

    assert problems(with_own_tokenizer) == [] and problems(trust=True) == []
    assert problems()[0].data["reason"] == "tokenizer-code" and "tokenization_own.py" in problems()[0].data["code"]
    (output / "evil.py").write_text(planted(marker))
    edit(output / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}, tokenizer_class="T")
    seal_again(output)
    (found,) = problems(with_own_tokenizer)
    assert found.data == {"reason": "not-of-source", "file": "evil.py"}
    assert "evil.py" in problems()[0].data["code"] and len(problems()) == 1
    assert not marker.exists()


def test_a_tokenizer_with_code_needs_the_flag_and_its_file_is_named(with_own_tokenizer, marker):
    told = {"where": "tokenizer_config.json", "reason": "own-tokenizer", "files": ["tokenization_own.py"]}
    with raises(ModelError, **told):
        load_tokenizer(with_own_tokenizer)
    assert not marker.exists()


def test_a_tokenizer_with_code_runs_with_the_flag(with_own_tokenizer, marker):
    tokenizer = load_tokenizer(with_own_tokenizer, trust_remote_code=True)
    assert type(tokenizer).__name__ == "OwnTokenizer" and marker.exists()


@pytest.mark.parametrize("command", ["run", "eval"])
def test_nothing_is_asked_on_a_terminal(command, with_own_tokenizer, tmp_path, marker):
    """A terminal as stdin, on which transformers would ask; whoever answers "y" by mistake runs the code."""
    (tmp_path / "r.yaml").write_text(
        "version: 1\nname: t\ndata: {source: stdlib, samples: 2, length: 8}\n"
        "steps: [{pass: gptq, bits: 8, group_size: 32, min_tokens: 8}]\n"
    )
    arguments = {
        "run": ["run", tmp_path / "r.yaml", "--model", with_own_tokenizer, "--output", tmp_path / "o", "--no-eval"],
        "eval": ["eval", with_own_tokenizer],
    }[command]
    ours, theirs = pty.openpty()
    os.write(ours, b"y\n")
    try:
        done = fresh.command(*arguments, terminal=theirs)
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 5 and "tokenization_own.py" in done.stderr and "[y/N]" not in done.stdout + done.stderr
    assert not marker.exists()


def test_files_behind_a_reference_are_those_it_imports(tmp_path):
    (tmp_path / "a.py").write_text("from .b import x\nfrom . import c\nimport d\n")
    for name in "bcd":
        (tmp_path / f"{name}.py").write_text("from .a import y\n")
    assert files_behind(tmp_path, ["a.X", "missing.X", "someone/else--d.X"]) == {"a.py", "b.py", "c.py"}


def test_both_forms_of_a_tokenizers_auto_map_are_read():
    assert auto_map({"auto_map": ["t.A", None]}, "t") == {"AutoTokenizer": ["t.A"]}
    assert auto_map({"auto_map": {"AutoTokenizer": [None, "t.B"]}}, "t") == {"AutoTokenizer": ["t.B"]}
