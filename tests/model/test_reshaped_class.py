"""A model that is no longer its stock class is read, taken apart, run, compressed and loaded like any other."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import reshaped
import tiny
import torch
import transformers as hf
import yaml
from fresh import stranger
from raising import raises
from safetensors.torch import load_file, save_file

import compressor
from compressor.analysis.float64_probe import float64_probe_model
from compressor.analysis.residual_stream import read_residual
from compressor.artifact import writer
from compressor.artifact.artifact_config import auto_classes
from compressor.artifact.export_format import choose_export_format
from compressor.artifact.inspection import inspect_path
from compressor.artifact.manifest import read_manifest
from compressor.artifact.modeling_file import modeling_source
from compressor.artifact.stock_loading import load_stock
from compressor.artifact.verify import verify
from compressor.engine.plan import make_plan
from compressor.errors import ModelError, PreflightError
from compressor.layers.structural.rotated_block import RotatedBlock
from compressor.model.functions import find_functions
from compressor.model.probe_model import shallow_config
from compressor.model.replay_proof import prove_by_replay
from compressor.model.reshaped_class import class_for, is_reshaped, reshaped_class, stock_class
from compressor.model.structure import read_structure
from compressor.recipe.recipe import parse_recipe
from compressor.run import compress

FAMILIES = ["llama", "opt", "gpt2", "vit", "phi"]
WIDTHS = {"one width": 24, "a width for each site": None}
# float32 norms and weights of tiny models, whatever their logits are; a wrong divisor is off by a hundredth
TOLERANCE = 1e-5
STRANGER = """
import torch, transformers
for line in sys.stdin.read().splitlines():
    auto, directory = line.split()
    model, info = getattr(transformers, auto).from_pretrained(
        directory, trust_remote_code=True, output_loading_info=True)
    assert not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info
    batch = torch.load(directory + '.batch')
    found = {}
    with torch.no_grad():
        found['logits'] = model.eval()(**batch).logits
        if model.can_generate():
            ids = batch['input_ids'][:1, :6]
            found['made'] = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False,
                                           attention_mask=torch.ones_like(ids))
    torch.save(found, directory + '.found')
"""


def error(found, wanted):
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


def logits_of(model, batch):
    with torch.no_grad():
        return model(**{k: v.to(model.dtype) if v.is_floating_point() else v for k, v in batch.items()}).logits


@pytest.fixture(scope="module")
def sliced(tmp_path_factory):
    """Sliced checkpoints, each written once.

    GPT-2's own code wants the stream to end as wide as it began, so its embeddings are projected.
    """
    written = {}

    def get(family, width=24, *, project=False, layers=3):
        key = (family, width, project or family == "gpt2", layers)
        if key not in written:
            directory = tmp_path_factory.mktemp(family) / "sliced"
            written[key] = reshaped.sliced(family, directory, width, project=key[2], layers=layers)
        return written[key]

    return get


def recipe(*steps, **sections):
    tree = {
        "version": 1,
        "name": "reshaped",
        "data": {"source": "random", "samples": 8, "length": 16},
        "steps": list(steps),
        "report": {"html": False},
        **sections,
    }
    return parse_recipe(yaml.safe_dump(tree).encode(), "reshaped.yaml")


def as_artifact(written, directory):
    """The checkpoint as an artifact without a quantized weight."""
    structure = read_structure(written.directory)
    export_format = choose_export_format([], "auto", False, structure.model)
    units = [written.directory / "model.safetensors"]
    writer.write_artifact(directory, structure, units, [], export_format, 10**9, False, "version: 1\n")
    source = {"name": "tiny", "sha256": ""}
    writer.seal(directory, architecture=structure.architecture, export_format=export_format, formats=[], source=source)
    return directory


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sliced_checkpoint_is_taken_apart_and_computes_what_the_reference_does(family, width, sliced):
    written = sliced(family, width)
    structure = read_structure(written.directory)
    prove_by_replay(structure)
    model, info = type(structure.model).from_pretrained(written.directory, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert error(logits_of(model.eval(), written.batch), written.logits) < TOLERANCE
    names = [w.name for unit in (1, 2, 3) for stage in structure.stages(unit) for group in stage for w in group]
    sublayers = sum(map(len, written.residual.blocks)) + (family == "gpt2")
    assert len([name for name in names if "shortcut" in name]) == sublayers
    readers = {
        r.parameter for block in written.residual.blocks for s in block for norm in s.norms for r in norm.consumers
    }
    assert {name.removesuffix(".weight") for name in readers} < set(names)


@pytest.mark.slow
def test_what_is_written_as_an_artifact_loads_here_and_where_this_package_is_not(sliced, tmp_path):
    cases, lines = {}, []
    for family, width in (("llama", 24), ("llama", None), ("opt", None), ("gpt2", 24), ("vit", 24), ("phi", None)):
        directory = tmp_path / f"{family}-{width}"
        written = sliced(family, width)
        as_artifact(written, directory)
        cases[directory] = written
        batch = {k: v.float() if v.is_floating_point() else v for k, v in written.batch.items()}
        torch.save(batch, f"{directory}.batch")
        auto = "AutoModelForImageClassification" if family == "vit" else "AutoModelForCausalLM"
        lines.append(f"{auto} {directory}")
    stranger(STRANGER, input="\n".join(lines))
    for directory, written in cases.items():
        ours, theirs = compressor.load(directory, kernels="reference"), torch.load(f"{directory}.found")
        config = json.loads((directory / "config.json").read_text())
        assert config["model_type"].startswith("compressed_") and config["compressed_weights"] == {}
        logits = logits_of(ours, written.batch)
        assert error(logits, written.logits) < TOLERANCE, directory.name
        assert torch.equal(theirs["logits"], logits), directory.name
        if "made" in theirs:
            again = ours(input_ids=theirs["made"][:, :-1], use_cache=False).logits[:, 5:].argmax(-1)
            assert theirs["made"][:, 6:].equal(again), directory.name  # with the cache as without


def test_padding_and_a_cache_reach_the_attention_of_a_rotated_block(sliced):
    for family in ("llama", "gpt2", "opt"):
        written = sliced(family)
        model = type(read_structure(written.directory).model).from_pretrained(written.directory).eval()
        ids = written.batch["input_ids"][:1]
        padded, mask = torch.cat([torch.zeros_like(ids[:, :3]), ids], 1), torch.ones(1, 15, dtype=torch.int64)
        mask[:, :3] = 0
        with torch.no_grad():
            wanted = model(input_ids=ids).logits
            given = {"position_ids": mask.cumsum(-1).sub(1).clamp(min=0)} if family != "opt" else {}
            assert error(model(input_ids=padded, attention_mask=mask, **given).logits[:, 3:], wanted) < TOLERANCE
            first = model(input_ids=ids[:, :5], use_cache=True)
            cache = next(value for key, value in first.items() if key in ("cache", "past_key_values"))
            name = next(key for key in first if key in ("cache", "past_key_values"))
            rest = model(input_ids=ids[:, 5:], **{name: cache}, use_cache=True)
            assert error(torch.cat([first.logits, rest.logits], 1), wanted) < TOLERANCE
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
        assert [state.shape[-1] for state in states][1:-1] == [24, 24]


def test_projected_embeddings_give_what_sliced_tables_give(sliced):
    tables, whole = (sliced("llama", project=project) for project in (False, True))
    assert tables.logits.equal(whole.logits)
    models = [type(read_structure(w.directory).model).from_pretrained(w.directory).eval() for w in (tables, whole)]
    assert error(logits_of(models[1], whole.batch), logits_of(models[0], whole.batch).double()) < TOLERANCE
    assert [model.model.embed_tokens.embedding_dim for model in models] == [24, 32]


def test_a_projected_table_stays_tied_to_the_head_after_loading(sliced, tmp_path):
    written = sliced("llama", project=True)
    tensors = load_file(written.directory / "model.safetensors")
    del tensors["lm_head.weight"]
    config = json.loads((written.directory / "config.json").read_text())
    path = tmp_path / "tied"
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    structure = read_structure(path)
    assert structure.bindings.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    model = compressor.load(as_artifact(replace(written, directory=path), tmp_path / "out"), kernels="reference")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert inspect_path(str(tmp_path / "out")).block_count == 3


def test_the_probe_of_a_uniformly_sliced_model_stays_shallow(sliced):
    written = sliced("llama", layers=4)
    structure = read_structure(written.directory)
    config = shallow_config(structure.model.config, structure.model, structure.pieces)
    assert config.num_hidden_layers == 2
    assert config.compressed_modules["model.layers.1"]["shape"] == [24, 24, 32]
    assert structure.model.config.compressed_modules["model.layers.1"]["shape"] == [24, 24, 24]
    prove_by_replay(structure)


@pytest.mark.parametrize("family", ["llama", pytest.param("opt", marks=pytest.mark.slow)])
def test_norms_without_parameters_are_norms_on_the_stream(family, tmp_path):
    written = reshaped.fused(family, tmp_path / "m")
    structure = read_structure(written.directory)
    prove_by_replay(structure)
    residual = read_residual(structure)
    assert residual.kind == "rms" and not any(norm.formula.has_weight for norm in residual.norms())
    assert [norm.module for norm in residual.norms()] == [norm.module for norm in written.residual.norms()]
    functions = find_functions(structure)
    assert not functions.refused and len([w for _, w in functions.all() if w.role == "norm"]) == len(
        [*residual.norms()]
    )
    model = type(structure.model).from_pretrained(written.directory).eval()
    assert error(logits_of(model, written.batch), written.logits) < TOLERANCE


def test_a_small_vocabulary_of_the_probe_goes_with_reshaped_embeddings(tmp_path):
    written = reshaped.fused("opt", tmp_path / "m", vocab_size=1000)  # its head has a new bias of 1000
    structure = read_structure(written.directory)
    assert structure.model.config.compressed_shapes["lm_head.bias"] == [1000]
    assert float64_probe_model(structure.model, structure.pieces).lm_head.bias.shape == (256,)


def test_norms_of_a_narrower_stream_are_not_offered_to_tables(sliced):
    structure = read_structure(sliced("llama").directory)
    found = find_functions(structure)
    assert "input_layernorm divides by 32 for 24 values" in found.refused["norm"]
    assert {weight.role for _, weight in found.all()} == {"activation", "softmax"} | {"norm"}


def test_a_sliced_model_is_not_sliced_again(sliced):
    structure = read_structure(sliced("llama").directory)
    with raises(ModelError, where="model.layers.0", reason="sliced-already"):
        read_residual(structure)


def test_the_class_of_a_reshaped_model_is_one_and_knows_its_stock_class():
    cls = reshaped_class(hf.LlamaForCausalLM)
    assert cls is reshaped_class(hf.LlamaForCausalLM) and cls.__name__ == "LlamaForCausalLM"
    assert stock_class(cls) is stock_class(hf.LlamaForCausalLM) is hf.LlamaForCausalLM
    assert class_for(hf.LlamaForCausalLM, {"compressed_shapes": {}}) is hf.LlamaForCausalLM
    config = hf.LlamaConfig(**tiny.COMMON, compressed_shapes={"lm_head.bias": [96]})
    assert class_for(hf.LlamaForCausalLM, config) is cls and is_reshaped(config)
    assert auto_classes(cls(config)) == auto_classes(hf.LlamaForCausalLM(config))


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("compressed_shapes", ["lm_head.bias"], {"where": "config.json: compressed_shapes"}),
        ("compressed_shapes", {"lm_head.bias": 96}, {"where": "config.json: compressed_shapes"}),
        ("compressed_modules", {"model.norm": {"form": "rms_norm"}}, {"where": "config.json: compressed_modules"}),
        ("compressed_modules", {"model.norm": {"form": "x", "spec": {}, "shape": []}}, {"format_name": "x"}),
    ],
)
def test_a_config_that_is_not_as_written_is_an_error(key, value, told, tmp_path):
    path = tiny.save("llama", tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, key: value}))
    with raises(compressor.errors.CompressError, **told):
        read_structure(path)


def test_a_reshaped_model_takes_the_modeling_file_and_stock_only_refuses_it(sliced):
    structure = read_structure(sliced("llama").directory)
    export_format = choose_export_format([], "auto", False, structure.model)
    assert export_format.name == "custom" and "is a rms_norm, which LlamaForCausalLM of stock" in export_format.reason
    for asked, stock_only in (("auto", True), ("compressed-tensors", False)):
        with raises(PreflightError, where="export", reason="no-stock-loader", weights=None):
            choose_export_format([], asked, stock_only, structure.model)
    text = modeling_source(structure.model, ["packed_linear"])
    assert "def reshape(" in text and '"rms_norm": RmsNorm' in text and "class PackedLinear" in text
    stock = modeling_source(tiny.build("llama"), ["packed_linear"])
    assert "def reshape(" not in stock and "RmsNorm" not in stock


def test_a_changed_modeling_file_is_not_run(sliced, tmp_path):
    directory = as_artifact(sliced("llama"), tmp_path / "out")
    assert isinstance(load_stock(directory, read_manifest(directory))[0].model.layers[0], torch.nn.Module)
    assert verify(directory, None, sealed=True, deep=True).problems == []
    file = directory / "modeling_compressed_llama.py"
    file.write_text(file.read_text() + "\n")
    with raises(compressor.errors.ArtifactError, where=file.name, reason="changed-code"):
        load_stock(directory, read_manifest(directory))


GPTQ = {"pass": "gptq", "bits": 4, "group_size": -1}
SHORTCUTS = {"pass": "rtn", "bits": 8, "group_size": -1, "only": ["@shortcut"]}


@pytest.mark.parametrize(
    ("family", "steps", "stored"),
    [
        pytest.param("llama", [GPTQ, SHORTCUTS], 27, marks=pytest.mark.slow),
        pytest.param("gpt2", [GPTQ], 12, marks=pytest.mark.slow),
        pytest.param("opt", [{"pass": "llm_int8"}], 18, marks=pytest.mark.slow),
        pytest.param("vit", [{"pass": "rtn", "group_size": -1}], 18, marks=pytest.mark.slow),
    ],
    ids=["llama", "gpt2", "opt", "vit"],
)
def test_weights_inside_rotated_blocks_are_quantized_and_stored(family, steps, stored, sliced, tmp_path):
    written = sliced(family)
    report = compress(recipe(*steps), str(written.directory), tmp_path / "out", measure=False)
    checked = report["verification"]
    assert checked["problems"] == [] and checked["max_logit_difference"] == 0.0
    assert len([row for row in report["weights"] if row["form"] != "dense"]) == stored
    predicted, actual = report["sizes"]["predicted_bytes"], report["sizes"]["after_bytes"]
    assert abs(predicted - actual) <= 0.01 * actual
    ours = compressor.load(tmp_path / "out", kernels="reference")
    assert isinstance(artifact_block(ours), RotatedBlock)
    # 4 bits on 24 to 64 random columns; nothing is lost beside that
    assert 0 < error(logits_of(ours, written.batch), written.logits) < 0.3


def artifact_block(model):
    return next(module for module in model.modules() if isinstance(module, RotatedBlock))


def test_shortcuts_stay_dense_unless_named(sliced):
    written = sliced("llama")
    plan = make_plan(recipe(GPTQ), str(written.directory), prove=False)
    assert not plan.problems and len(plan.formats) == 21
    assert not any("shortcut" in name for name in plan.formats)
    plan = make_plan(recipe(SHORTCUTS), str(written.directory), prove=False)
    assert {name.rpartition(".")[2] for name in plan.formats} == {"shortcut_0", "shortcut_1"} and len(plan.formats) == 6
