"""The recipe reader: every error names its place; what is resolved can be read again."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import tiny
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from raising import raises

from compressor.bounds import MOST_BYTES
from compressor.engine.plan import make_plan
from compressor.errors import RecipeError
from compressor.process.utf8 import printable
from compressor.protocol import WeightPass
from compressor.recipe.json_schema import recipe_json_schema
from compressor.recipe.recipe import find_recipe, parse_recipe, read_recipe, recipe_folders
from compressor.recipe.schema import bare_source

SHIPPED = sorted(path.stem for path in recipe_folders()[0].glob("*.yaml"))
SCHEMA = jsonschema.Draft202012Validator(recipe_json_schema())
GOOD = b"version: 1\nsteps: [{pass: rtn}]\n"


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_read_and_resolve_to_a_fixed_point(name):
    recipe = read_recipe(name)
    assert recipe.name == name
    again = parse_recipe(recipe.to_yaml().encode(), "again.yaml")
    assert again.resolved() == recipe.resolved() and again.sha256 == recipe.sha256


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_plan_on_the_demo_model(name, tmp_path):
    recipe = read_recipe(name)
    prunes_tokens = any(step.name == "zero_tprune" for step in recipe.steps)  # which a causal model can't bear
    model, matrices = "demo", 42
    if prunes_tokens:  # of as many blocks and patches as real ones: of fewer no gates reach the target
        sizes = {"num_hidden_layers": 12, "image_size": 112}
        model, matrices = str(tiny.save("vit", tmp_path / "model", **sizes)), 72
    plan = make_plan(recipe, model, prove=False)
    found = [row for row in plan.rows if len(row.shape) == 2]
    assert not plan.problems
    assert len({row.name for row in found}) == (
        matrices if any(isinstance(s.settings, WeightPass) for s in recipe.steps) else 0
    )


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_satisfy_the_schema(name):
    SCHEMA.validate(yaml.safe_load(find_recipe(name).read_text()))


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA.schema)


# what is wrong -> the recipe, where that is told, and what is told of it
BAD = {
    "empty": (b"", "r.yaml", {"reason": "empty"}),
    "list": (b"- 1\n", "r.yaml:1:1", {"reason": "not-a-map"}),
    "no version": (b"steps: [{pass: rtn}]\n", "r.yaml:1:1 (version)", {"reason": "version", "found": "none"}),
    "other version": (
        b"version: 2\nsteps: [{pass: rtn}]\n", "r.yaml:1:1 (version)", {"reason": "version", "found": "2"}
    ),
    "no steps": (b"version: 1\n", "r.yaml:1:1 (steps)", {"reason": "no-steps"}),
    "unknown key": (
        b"version: 1\nsteps: [{pass: rtn}]\nevil: 2\n",
        "r.yaml:3:1 (evil)",
        {"reason": "unknown-key", "key": "evil", "near": ["eval"]},
    ),
    "unknown pass": (
        b"version: 1\nsteps:\n  - pass: gptk\n",
        "r.yaml:3:5 (steps.0.pass)",
        {"reason": "unknown-pass", "name": "gptk", "near": ["gptq"]},
    ),
    "unknown setting": (
        b"version: 1\nsteps: [{pass: gptq, bitz: 3}]\n",
        "r.yaml:2:22 (steps.0.bitz)",
        {"reason": "unknown-key", "key": "bitz", "near": ["bits"]},
    ),
    "bad value": (
        b"version: 1\nsteps: [{pass: gptq, bits: 5}]\n",
        "r.yaml:2:22 (steps.0.bits)",
        {"reason": "literal-error", "found": "5", "expected": "2, 3, 4 or 8"},
    ),
    "nested unknown": (
        GOOD + b"eval: {data: {sample: 1}}\n",
        "r.yaml:3:15 (eval.data.sample)",
        {"reason": "unknown-key", "key": "sample", "near": ["samples"]},
    ),
    "unknown gate": (
        b"version: 1\nsteps: [{pass: rtn}]\neval: {gates: {size: 1}}\n",
        "r.yaml:3:8 (eval.gates)",
        {"reason": "unknown-gate", "gate": "size"},
    ),
    "twice": (
        b"version: 1\nversion: 1\nsteps: [{pass: rtn}]\n", "r.yaml:2:1", {"reason": "key-twice", "key": "version"}
    ),
    "tag": (
        b"version: 1\nsteps: !!python/object:os.system x\n",
        "r.yaml:2:8",
        {"reason": "tag", "tag": "tag:yaml.org,2002:python/object:os.system"},
    ),
    "syntax": (b"version: [1\n", "r.yaml:2:1", {"reason": "not-yaml"}),
    "not utf-8": (b"version: \xff\n", "r.yaml", {"reason": "not-utf-8", "byte": 9}),
    "too large": (b"#" * (1 << 20) + b"\n", "r.yaml", {"reason": "too-large", "limit": 1 << 20}),
    "pass missing": (b"version: 1\nsteps: [{bits: 3}]\n", "r.yaml:2:9 (steps.0)", {"reason": "step-without-pass"}),
    "empty sweep": (
        b"version: 1\nsteps: [{sweep: []}]\n", "r.yaml:2:10 (steps.0.sweep)", {"reason": "sweep-without-steps"}
    ),
    "bad size": (
        b"version: 1\nsteps: [{pass: rtn}]\nexport: {shard_bytes: 4 boxes}\n",
        "r.yaml:3:10 (export.shard_bytes)",
        {"reason": "no-size", "found": "'4 boxes'"},
    ),
    "billion laughs": (
        b"version: 1\na: &a [x,x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\n"
        b"c: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\nsteps: [*d,*d]\n",
        "r.yaml:2:24",
        {"reason": "too-many-nodes", "nodes": 10_000},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(BAD))
def test_a_bad_recipe_is_refused_with_its_place(case):
    content, where, data = BAD[case]
    with raises(RecipeError, where=where, **data) as failure:
        parse_recipe(content, "r.yaml")
    assert failure.value.exit_code == 2


def test_several_problems_are_reported_together():
    with raises(RecipeError, where="r.yaml:2:22 (steps.0.bits)", found="5") as failure:
        parse_recipe(b"version: 1\nsteps: [{pass: gptq, bits: 5, group_size: 7}]\n", "r.yaml")
    (other,) = failure.value.data["also"]
    assert (other["where"], other["found"]) == ("r.yaml:2:31 (steps.0.group_size)", "7")
    assert other["where"] in str(failure.value), "people see both, too"


def test_set_changes_a_value_with_the_same_validation():
    assert read_recipe("gptq-w4a16", ["steps.0.bits=3"]).steps[0].settings.bits == 3
    assert read_recipe("gptq-w4a16", ['steps.0.only=["@mlp"]']).steps[0].settings.only == ("@mlp",)
    assert read_recipe("rtn-w8", ["data.samples=7"]).data.samples == 7
    assert read_recipe("rtn-w8", ["limits.memory=3GiB"]).limits.memory == 3 << 30
    assert read_recipe("rtn-w8", ["eval.gates.kl_divergence=1e-3"]).eval.gates["kl_divergence"] == 1e-3


@pytest.mark.parametrize(
    ("override", "place", "data"),
    [
        ("steps.0.bits=5", " (steps.0.bits)", {"reason": "literal-error", "found": "5"}),
        ("steps.4.bits=3", "", {"reason": "not-in-recipe", "key": "steps.4"}),
        ("nonsense.key=1", "", {"reason": "not-in-recipe", "key": "nonsense"}),
        ("steps.0.bitz=3", " (steps.0.bitz)", {"reason": "unknown-key", "key": "bitz", "near": ["bits"]}),
        ("novalue", "", {"reason": "no-key-and-value"}),
        ("steps=[{pass: rtn}]", "", {"reason": "changes-steps"}),
        ("steps.0={pass: rtn}", "", {"reason": "changes-steps"}),
        ("steps.0.only.9=x", "", {"reason": "not-in-recipe", "key": "steps.0.only"}),
        ("steps.\u00b2.bits=3", "", {"reason": "not-in-recipe", "key": "steps.\u00b2"}),
        ("steps.0.bits=true", " (steps.0.bits)", {"reason": "stray-boolean"}),
        ("eval.data.samples=true", " (eval.data.samples)", {"reason": "stray-boolean"}),
        ("eval.gates.size_ratio=false", " (eval.gates.size_ratio)", {"reason": "stray-boolean"}),
        ("eval.gates.size_ratio=.inf", " (eval.gates.size_ratio)", {"reason": "finite-number"}),
        (
            "eval.gates.size_ratio_drop_points=1",
            "gptq-w4a16.yaml:11:3 (eval.gates)",
            {"reason": "unknown-gate", "gate": "size_ratio_drop_points"},
        ),
        (
            "eval.gates.accuracy_min=0.5",
            "gptq-w4a16.yaml:9:1 (eval)",
            {"reason": "gate-unmeasured", "gate": "accuracy_min", "metric": "accuracy"},
        ),
        ("eval.metrics=[size]", "gptq-w4a16.yaml:9:1 (eval)", {"reason": "gate-unmeasured", "metric": "perplexity"}),
        ("data.seed=4294967296", " (data.seed)", {"reason": "less-than", "lt": 2**32}),
        ("data.sha256=abc", " (data.sha256)", {"reason": "string-pattern-mismatch", "found": "'abc'"}),
        ("limits.memory=1..5GiB", " (limits.memory)", {"reason": "no-size", "found": "'1..5GiB'"}),
        ("data.0=1", " (data.0)", {"reason": "invalid-key", "found": "0"}),
        (
            f"export.shard_bytes={'9' * 400}GB",
            " (export.shard_bytes)",
            {"reason": "size-limit", "limit": MOST_BYTES},
        ),
        ("limits.memory=2305843009213693952", " (limits.memory)", {"reason": "less-than-equal", "le": MOST_BYTES}),
        ("eval.data.samples=9000000000000000000", " (eval.data.samples)", {"reason": "less-than-equal"}),
        (
            "eval.data.samples=100000000000000000000",
            ":1:1",
            {"reason": "too-large-number", "value": "'100000000000000000000'"},
        ),
        (f"data.length=0x{'f' * 9000}", ":1:1", {"reason": "too-large-number"}),
        ("data.length=100000000", " (data.length)", {"reason": "less-than-equal"}),
        ("eval.batch_size=100000000", " (eval.batch_size)", {"reason": "less-than-equal"}),
        ("steps.0.min_tokens=100000000", " (steps.0.min_tokens)", {"reason": "less-than-equal"}),
        ("data.seed=!!int ''", ":1:1", {"reason": "unreadable", "value": "''"}),
        ("data.pack=!!bool x", ":1:1", {"reason": "unreadable", "value": "'x'"}),
        ("steps.0.bits=\udcff", "", {"reason": "not-utf-8"}),
        ('data.source="\\ud800"', ":1:1", {"reason": "surrogate", "value": r"'\ud800'"}),
        ('eval.gates={"\\ud800": 1}', ":1:2", {"reason": "surrogate", "value": r"'\ud800'"}),
    ],
)
def test_a_bad_set_is_refused_by_name(override, place, data):
    where = place if place.startswith("gptq-w4a16.yaml:") else printable(f"--set {override}{place}")
    with raises(RecipeError, where=where, **data):
        read_recipe("gptq-w4a16", [override])


def test_a_pinned_recipe_names_no_folder_and_is_a_fixed_point():
    tree = {
        "version": 1,
        "data": {"source": "/home/someone/notes.txt"},
        "steps": [{"pass": "gptq"}],
        "eval": {"data": {"source": "dataset:/srv/secret/x"}},
    }
    recipe = parse_recipe(yaml.safe_dump(tree).encode(), "My Recipe (2).yaml")
    pinned = recipe.pinned("a" * 64, "b" * 64)
    assert (pinned.data.source, pinned.data.sha256) == ("notes.txt", "a" * 64)
    assert (pinned.eval.data.source, pinned.eval.data.sha256) == ("dataset:x", "b" * 64)
    again = parse_recipe(pinned.to_yaml().encode())
    assert again == pinned and again.name == "my-recipe-2" and again.pinned("a" * 64, "b" * 64) == again
    assert recipe.pinned(None, None).data.sha256 is None


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("stdlib", "stdlib"),
        ("data/notes.txt", "data/notes.txt"),
        ("~/notes.txt", "notes.txt"),
        ("~nobody-here/notes.txt", "~nobody-here/notes.txt"),
        ("../someone/notes.txt", "notes.txt"),
        ("dataset:org/name", "dataset:org/name"),
    ],
)
def test_only_sources_that_tell_of_the_machine_are_shortened(source, told):
    assert bare_source(source) == told


def test_options_reach_the_recipe_without_being_read_as_yaml():
    recipe = parse_recipe(GOOD, options=[("--data", ("eval", "data", "source"), "my file #1: x.txt")])
    assert recipe.eval.data.source == "my file #1: x.txt"
    with raises(RecipeError, where="--metrics a (eval.metrics.0)", reason="literal-error", found="'a'"):
        parse_recipe(GOOD, options=[("--metrics a", ("eval", "metrics"), ["a"])])


def test_evaluation_reads_held_out_text_even_when_only_samples_are_given():
    recipe = parse_recipe(GOOD + b"eval: {data: {samples: 2}}\n")
    assert (recipe.eval.data.split, recipe.eval.data.samples) == ("heldout", 2)


def test_steps_under_one_sweep_share_it():
    recipe = parse_recipe(b"version: 1\nsteps: [{sweep: [{pass: rtn, only: ['@mlp']}, {pass: gptq}]}, {pass: rtn}]\n")
    assert [[step.name for step in sweep] for sweep in recipe.sweeps] == [["rtn", "gptq"], ["rtn"]]
    assert recipe.sweeps[0][1].path == ("steps", 0, "sweep", 1)


def test_a_missing_recipe_names_those_that_come_along():
    with raises(RecipeError, where="no-such-recipe", reason="no-such-recipe", known=SHIPPED):
        read_recipe("no-such-recipe")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_read_or_end_in_a_recipe_error(content):
    try:
        assert parse_recipe(content, "fuzz.yaml").steps
    except RecipeError as error:
        assert error.where


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
trees = st.recursive(scalars, lambda t: st.lists(t, max_size=3) | st.dictionaries(st.text(max_size=6), t, max_size=3))


@settings(max_examples=300, deadline=None)
@given(trees, trees, trees)
def test_any_tree_in_any_section_reads_or_ends_in_a_recipe_error(steps, data, evaluation):
    text = yaml.safe_dump({"version": 1, "steps": steps, "data": data, "eval": evaluation})
    try:
        parse_recipe(text.encode(), "fuzz.yaml")
    except RecipeError as error:
        assert error.where


@settings(max_examples=200, deadline=None)
@given(
    st.fixed_dictionaries(
        {"pass": st.sampled_from(["gptq", "rtn"])},
        optional={
            "bits": st.sampled_from([2, 3, 4, 5, 8]),
            "group_size": st.sampled_from([-1, 32, 64, 100]),
            "symmetric": st.booleans(),
            "act_order": st.sampled_from(["none", "static", "wild"]),
            "extra": st.just(1),
        },
    )
)
def test_the_schema_accepts_what_the_reader_accepts(step):
    tree = {"version": 1, "steps": [step]}
    try:
        parse_recipe(yaml.safe_dump(tree).encode())
        reader = True
    except RecipeError:
        reader = False
    assert reader == SCHEMA.is_valid(tree)


def test_the_recipe_reference_in_the_docs_is_what_the_code_says():
    from compressor.recipe.reference_docs import recipe_reference

    page = (Path(__file__).parents[2] / "docs" / "settings.md").read_text()
    assert recipe_reference() in page, "run scripts/gen_reference.py"
