"""What the scripts behind the published figures do to models and text."""

from __future__ import annotations

import argparse
import gzip
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import model_in_memory
import pytest
import tiny
import torch
from bench import (
    awq,
    cpu_kernels,
    draw,
    factorization,
    family_check,
    family_models,
    family_page,
    pruning,
    result_file,
    slicegpt,
    threads,
    whole_model,
    zero_tprune,
)
from safetensors.torch import load_file, save_file
from train import lm, vit

from compressor.analysis.model_facts import facts_of
from compressor.analysis.residual_stream import residual_of
from compressor.kernels import cpu
from compressor.kernels.ops.pack_codes import pack_codes
from compressor.methods.rotation.rotation import random_orthogonal
from compressor.model.block_runner import Pieces
from compressor.model.structure import find_blocks, read_structure


@torch.no_grad()
def test_a_model_turned_at_its_whole_width_keeps_its_logits():
    model = tiny.build("llama")
    slicegpt.untie(model)
    residual = residual_of(model, Pieces(model, find_blocks(model)))
    tokens = torch.randint(0, model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    wanted = model(input_ids=tokens).logits
    q = random_orthogonal(residual.width, torch.Generator().manual_seed(0))
    for found in (
        slicegpt.narrow(model, residual, q, residual.width)(input_ids=tokens).logits,
        slicegpt.slice_per_site(model, residual, tokens, residual.width)(tokens, use_cache=False).logits,
    ):
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()  # float32 through a few dozen products


@torch.no_grad()
def test_channels_that_carry_nothing_are_dropped_first_and_without_loss():
    model = tiny.build("llama")
    slicegpt.untie(model)
    residual = residual_of(model, Pieces(model, find_blocks(model)))
    idle = [3, 4, 11, 17, 18, 20, 25, 30]
    for write in residual.writes():
        model.get_parameter(write.parameter).movedim(write.axis, 0)[idle] = 0
    for norm in residual.norms():
        for consumer in norm.consumers:
            model.get_parameter(consumer.parameter).movedim(consumer.axis, 0)[idle] = 0
    tokens = torch.randint(0, model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    wanted = model(input_ids=tokens).logits
    bases = slicegpt.find_bases(model, residual, tokens)
    for method in ("magnitude", "energy", "pca_global", "pca_global_rms"):
        columns = bases[method][0][:, : residual.width - len(idle)]
        found = slicegpt.narrow(model, residual, columns, residual.width)(input_ids=tokens).logits
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max(), method


def test_text_is_written_as_wikitext_is():
    articles = [
        "Ada\n\nLife.\nAda's well-known U.S. prize was 1,000.5 &lt;br&gt; dollars, once.\n",
        "Ada\n\nAda's well-known U.S. prize was 1,000.5 dollars.\n",
        "Ada\n\nAda's well-known U.S. prize was 1,000.5 dollars.\n",
    ]
    written = lm.wikitext_style(articles)
    line = " Ada 's well @-@ known U.S. prize was 1 @,@ 000 @.@ 5 dollars {}. \n"
    assert written[0] == " \n = Ada = \n \n \n = = <unk> = = \n \n" + line.format("<unk> <unk> ")
    assert written[1] == " \n = Ada = \n \n" + line.format("")


def test_articles_are_split_at_their_marks_and_empty_ones_dropped(tmp_path):
    file = tmp_path / "wiki.txt"
    file.write_text('<doc id="1" title="A">\nA\n\nText of A.\n\n</doc>\n<doc id="2" title="B">\nB\n\n\n</doc>\n')
    assert lm.read_articles(file) == ["A\n\nText of A.\n"]
    file.write_text("One line\n")
    assert lm.read_articles(file) == ["One line\n"]


def test_bytes_saved_are_read_off_the_rivals_curve_at_equal_divergence():
    """Halfway between two points on logarithmic scales low_rank takes 200 bytes; beyond its curve nothing is said."""
    curve = [("low_rank float16", 100, 0.4), ("low_rank float16", 400, 0.1)]
    points = [("dsformer float16", 150, 0.2), ("dsformer float16", 500, 0.05), ("dsformer int8", 150, 0.2)]
    rows = [{"method": m, "asked": n, "bytes": n, "kl_divergence": kl} for m, n, kl in curve + points]
    (saved,) = factorization.bytes_saved(rows)
    assert saved == {"method": "dsformer float16", "asked": 150, "bytes_saved": pytest.approx(0.25)}


def test_magnitude_of_a_unit_is_the_mean_square_of_all_that_goes_with_it(tmp_path):
    directory = tiny.save("llama", tmp_path / "m")
    model = tiny.build("llama")
    with torch.no_grad():
        layer = model.model.layers[1]
        layer.mlp.gate_proj.weight[5] *= 3
        layer.mlp.down_proj.weight[:, 9] = 0
    facts = facts_of(read_structure(directory), 0)
    found = pruning.magnitudes(model_in_memory.Whole(model, [], facts=facts), facts.prunable())
    mlp, attention = (found[f"model.layers.1.{name}"] for name in ("mlp", "self_attn"))
    own = [layer.mlp.gate_proj.weight[5], layer.mlp.up_proj.weight[5], layer.mlp.down_proj.weight[:, 5]]
    less = [layer.mlp.gate_proj.weight[9], layer.mlp.up_proj.weight[9]]
    squares = [sum(float(part.double().square().sum()) for part in parts) for parts in (own, less)]
    assert mlp[5] / mlp[9] == pytest.approx(squares[0] / squares[1], rel=1e-6)
    assert mlp[5] == max(mlp) and len(mlp) == 64 and len(attention) == 2
    every = [score for name, scores in found.items() if name.endswith("mlp") for score in scores]
    assert sum(every) / len(every) == pytest.approx(1)


def test_merging_keeps_what_tokens_stand_for():
    generator = torch.Generator().manual_seed(0)
    x, metric = (torch.randn(2, 9, width, generator=generator) for width in (6, 4))
    metric[:, 2] = metric[:, 5]  # the pair most alike
    size = torch.ones(2, 9, 1)
    fewer, larger = zero_tprune.merge(x, size, metric, 1)
    assert fewer.shape == (2, 8, 6) and torch.equal(fewer[:, 0], x[:, 0])
    assert torch.equal(larger.sum(1), size.sum(1)) and torch.allclose((fewer * larger).sum(1), x.sum(1), atol=1e-5)
    assert torch.allclose(fewer[:, 6], (x[:, 2] + x[:, 5]) / 2)  # even ones that stay, then odd ones


def test_digits_are_read_from_idx_files(tmp_path):
    file = tmp_path / "images.gz"
    file.write_bytes(gzip.compress(bytes([0, 0, 8, 2, 0, 0, 0, 1, 0, 0, 0, 3, 7, 8, 9])))
    assert vit.read_idx(file).tolist() == [[7, 8, 9]]
    file.write_bytes(gzip.compress(bytes([0, 0, 13, 1, 0, 0, 0, 0])))
    with pytest.raises(ValueError, match="IDX"):
        vit.read_idx(file)


@pytest.mark.skipif(isinstance(cpu.library(), str) or not shutil.which("g++"), reason="no compiled kernels or no g++")
def test_kernels_are_timed_beside_their_peers_and_all_answers_are_right(tmp_path):
    pytest.importorskip("bitsandbytes")
    target = tmp_path / "results" / "kernels.json"
    cpu_kernels.main(["--quick", "--decode", "--cache-mb", "1", "--output", str(target)])
    report = json.loads(target.read_text())
    names = {row["name"] for row in report["rows"]}
    assert {
        "ours W4A8 g64",
        "ours W4A8 g64, order, bias",
        "ours W8A8",
        "ours W4A16 g64",
        "oneDNN W8A8",
        "bitsandbytes int8",
    } <= names
    assert len(report["rows"]) == len(names) * len(cpu_kernels.QUICK_ROWS)
    assert all(row["seconds"] > 0 and 0 < row["error"] < 0.03 for row in report["rows"])
    measured = ("read bandwidth", "triad bandwidth", "int8 peak", "float peak", "bf16 product", "int8 product")
    assert min(report["ceilings"][name] for name in measured) > 1e9
    assert {operation["name"].split()[0] for operation in report["operations"]} == {"hadamard", "dense", "table"}
    assert all(min(operation["ratios"].values()) > 0 for operation in report["operations"])
    assert report["decoding"].keys() == {"1", "16"} and min(report["decoding"]["16"].values()) > 0


def test_a_goal_is_judged_by_its_worst_case_and_left_open_without_a_peer():
    def row(shape: str, name: str, seconds: float) -> cpu_kernels.Row:
        return cpu_kernels.Row(shape, 1, name, seconds, 5, 1.0, 1.0, 0.9, 0.1, 0.01, "")

    rows = [row("a", "ours W4A8 g64", 1), row("a", "torch float32", 9), row("a", "torch bf16", 6)]
    rows += [row("b", "ours W4A8 g64", 1), row("b", "torch float32", 4), row("b", "torch bf16", 8)]
    found = {goal.name: goal for goal in cpu_kernels.goals(rows, 1, {"overhead": 4e-6, "packing": 2.0}, {})}
    dense = found["W4A8 M=1, against the faster dense"]
    assert (dense.measured, dense.holds, dense.where) == (4, False, "b M=1")
    assert found["W4A8 M=1, of read bandwidth"].holds is True
    assert found["W4A8 M=1, against llama.cpp Q4_0"].holds is None
    assert found["operation beyond its kernel, M=1"].holds is True
    assert found["packing a GB of codes"].holds is False


def test_a_whole_model_is_judged_by_the_median_of_rounds_against_those_that_were_measured():
    times = {task: {"W4A8": [1.0, 2.0, 1.0], "dense bf16": [4.5, 4.0, 4.1]} for task in whole_model.TASKS}
    found = whole_model.judged(times)
    assert {goal["against"] for goal in found} == {"dense bf16"}
    assert [(goal["goal"], goal["measured"], goal["holds"]) for goal in found] == [
        ("decode 1", 4.1, True), ("decode 16", 4.1, True), ("prefill 512", 4.1, True),
    ]  # fmt: skip
    times["decode", 1]["llama.cpp Q4_0"] = [0.9, 1.9, 0.9]
    assert not whole_model.judged(times)[1]["holds"]


def test_a_default_slower_than_one_thread_or_beyond_its_share_misses_its_goal():
    times = {
        (False, 1): {"default": [2.0, 2.0, 9.0], "one thread": [1.0, 4.0, 9.1], "passive": [2.0, 2.0, 9.0]},
        (True, 4): {"default": [3.0, 3.0], "one thread": [2.0, 2.0], "passive": [3.0, 2.9]},
    }
    found = threads.judged(times, {False: [10.0, 10.0], True: [20.0, 25.0]})
    assert [(goal["measured"], goal["holds"]) for goal in found] == [
        (pytest.approx(9.1 / 9), True), (1, True), (pytest.approx(2 / 3), False), (pytest.approx(5.9 / 6), True),
        (0.45, True),
    ]  # fmt: skip
    assert not threads.judged(times, {False: [10.0], True: [30.0]})[-1]["holds"]


def test_plots_are_drawn_from_what_the_benchmarks_wrote(tmp_path):
    pruned = {"method": "vtrans", "parameters": 2, "accuracy": 1.0}
    sliced = {"method": "energy", "parameters": 2, "perplexity": 2.0}
    factored = {"method": "gptq", "bytes": 2, "perplexity": 2.0}
    steps = {name: [1.0, 2.0] for name in draw.STEPS}
    solves = [{"what": what, "threads": count, "other_over_ours": 2.0} for what in draw.SOLVER for count in (1, 2)]
    kernels = {name for pair in draw.KERNELS.values() for name in pair}
    results = {
        "kernels": {
            "cpu": "a",
            "level": "amx",
            "rows": [{"name": name, "rows": 1, "shape": draw.SHAPE, "seconds": 1.0} for name in kernels],
        },
        "pruning": {"rows": [{**pruned, "method": "dense"}, {**pruned, "repaired": True}]},
        "slicing": {"rows": [{**sliced, "method": "dense"}, sliced]},
        "factorization": {"dense": factored, "rows": [factored]},
        "decoding": {"decoding": [{"beside": beside, "sequences": 1, "seconds": steps} for beside in (False, True)]},
        "solver": {"cpu": "a", "rows": solves},
    }
    for name, result in results.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result))

    def drawn(command: str, **files: str) -> str:
        given = [part for option, name in files.items() for part in (f"--{option}", str(tmp_path / f"{name}.json"))]
        draw.main([command, *given, "--output", str(tmp_path / "plots" / "plot.svg")])
        return (tmp_path / "plots" / "plot.svg").read_text()

    assert ">W8A8, oneDNN<" in drawn("kernels", files="kernels")
    quality = drawn("quality", pruning="pruning", slicing="slicing", factorization="factorization")
    assert all(f">{label}<" in quality for label in ("vtrans, repaired", "by signal, no rotation", "gptq"))
    assert ">one thread<" in drawn("threads", decoding="decoding", solver="solver")


def test_figures_go_out_of_the_tree_or_to_a_file_that_is_named(tmp_path):
    parser = argparse.ArgumentParser()
    result_file.add_output(parser, "some")
    assert parser.parse_args([]).output == Path("out/bench/some.json")
    result_file.write({"rows": []}, tmp_path / "new" / "some.json")
    assert json.loads((tmp_path / "new" / "some.json").read_text()) == {"rows": []}


@torch.no_grad()
def test_planted_outliers_keep_what_a_model_computes():
    model = tiny.build("llama", dtype=torch.float64)
    tokens = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(0))
    wanted, gains = model(input_ids=tokens).logits, model.model.layers[1].input_layernorm.weight.clone()
    awq.plant(model, torch.Generator().manual_seed(0))
    grown = model.model.layers[1].input_layernorm.weight / gains
    assert sorted(grown.tolist())[-awq.FEATURES :] == pytest.approx([awq.FACTOR] * awq.FEATURES)
    assert (model(input_ids=tokens).logits - wanted).abs().max() < 1e-6 * wanted.abs().max()


@pytest.mark.slow
def test_families_are_compressed_compared_and_told_of_on_a_page(tmp_path):
    figures, page = tmp_path / "families.json", tmp_path / "families.md"
    script = Path(family_page.__file__).with_name("families.py")
    asked = ["bert-base", "--output", str(figures), "--docs", str(page)]
    subprocess.run([sys.executable, str(script), *asked], check=True, cwd=tmp_path)
    rows = json.loads(figures.read_text())["rows"]
    outcomes = {
        name: {recipe: found["outcome"] for recipe, found in row["recipes"].items()} for name, row in rows.items()
    }
    assert outcomes == {"bert-base": {"gptq": "exact", "vtrans": "works", "zero-tprune": "works"}}
    assert rows["bert-base"]["recipes"]["gptq"]["quantized_weights"] == 12
    assert "| `bert-base` | BertModel | yes, 66% | yes | yes |" in page.read_text()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_unpacking_that_shares_no_code_gives_what_was_packed(bits, symmetric):
    generator = torch.Generator().manual_seed(0)
    codes, zeros = (torch.randint(0, 2**bits, size, generator=generator) for size in ((6, 64), (6, 2)))
    scale = torch.rand(6, 2, generator=generator)
    tensors = {"m.weight_packed": pack_codes(codes.to(torch.uint8), bits), "m.weight_scale": scale}
    tensors["m.weight_zero_point"] = pack_codes(zeros.t().contiguous().to(torch.uint8), bits).t()
    format_params = {"bits": bits, "group_size": 32, "symmetric": symmetric}
    entry = {"name": "m", "form": "packed_linear", "spec": format_params, "shape": [6, 64]}
    shift = 2 ** (bits - 1) if symmetric else zeros.repeat_interleave(32, 1)
    assert torch.equal(family_check.unpacked(entry, tensors), (codes - shift) * scale.repeat_interleave(32, 1))


@pytest.fixture(scope="module")
def compressed_family(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    family_models.build(family_models.FAMILIES["llama"]).save_pretrained(folder / "source")
    (folder / "r.yaml").write_text(
        "{version: 1, name: r, data: {source: random, samples: 4, length: 32}, "
        "steps: [{pass: gptq, bits: 4, group_size: 32}]}"
    )
    assert family_check.compress(folder / "r.yaml", folder / "source", folder / "r")["outcome"] == "works"
    return folder


def test_an_artifact_as_it_was_written_is_exact(compressed_family):
    found = family_check.compare(compressed_family / "source", compressed_family / "r")
    assert (found["outcome"], found["quantized_weights"], found["lost"], found["differs"]) == ("exact", 14, [], [])


@pytest.mark.parametrize(
    ("tensor", "outcome", "told"),
    [
        ("model.layers.1.mlp.up_proj.weight_packed", "differs", "model.layers.1.mlp.up_proj has a relative error"),
        ("model.layers.0.input_layernorm.weight", "differs", "model.layers.0.input_layernorm.weight is"),
        ("unknown.weight", "lost tensors", "unknown.weight"),
    ],
)
def test_a_tensor_that_was_changed_or_lost_is_found(tensor, outcome, told, compressed_family, tmp_path):
    source, artifact = tmp_path / "source", tmp_path / "artifact"
    shutil.copytree(compressed_family / "source", source)
    shutil.copytree(compressed_family / "r", artifact)
    changed = (artifact if outcome == "differs" else source) / "model.safetensors"
    tensors = load_file(changed)
    tensors[tensor] = tensors[tensor] + 1 if tensor in tensors else torch.ones(4)
    save_file(tensors, changed, {"format": "pt"})
    found = family_check.compare(source, artifact)
    assert found["outcome"] == outcome
    assert any(text.startswith(told) for text in found["differs"] + found["lost"])


def test_the_introduction_of_the_page_of_families_is_what_the_script_writes():
    """The page is a measured result, so the tables are checked by their sums only."""
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    known = re.search(r"transformers ([\d.]+),\s+torch ([\d.]+)\)", page)
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    exact = sum(line.split(" | ")[2].startswith("yes") for line in lines)
    assert page.startswith(
        family_page.introduction(transformers=known[1], torch=known[2], tried=len(lines), exact=exact) + "\n\n## "
    )


def test_the_page_groups_families_by_what_they_were_told(tmp_path):
    refused = {"outcome": "refused", "message": "a [name] is_wrong", "hint": "Mend it."}
    exact = {"outcome": "exact", "quantized_share": 0.5, "export_format": "custom"}
    rows = {
        name: {"class": "C", "kind": "decoder", "recipes": recipes}
        for name, recipes in {
            "qwen2": {"gptq": refused},
            "llama": {"gptq": exact, "slicegpt": refused},
            "mpt": {"build": {"outcome": "not built", "message": "ValueError: no"}},
        }.items()
    }
    page = family_page.page({"rows": rows, "transformers": "5.1", "torch": "2.1+cpu"})
    assert "| `llama` | C | yes, 50%, modeling file | refused 1 |" in page
    assert "| `qwen2` | C | refused 1 |  |" in page
    assert "1. refused: `llama` (slicegpt), `qwen2` (gptq). a \\[name\\] is\\_wrong. Mend it." in page
    assert "Of 2 families, 1 are quantized exactly." in page and "- `mpt`: ValueError: no" in page
