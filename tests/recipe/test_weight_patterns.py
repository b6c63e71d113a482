"""The glob language against a slow obvious matcher, and its refusals."""

from __future__ import annotations

import itertools
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raising import raises

from compressor.errors import RecipeError
from compressor.model.weights import Weight
from compressor.recipe.weight_patterns import compile_pattern, select


def weight(name: str, role: str = "mlp") -> Weight:
    return Weight(name, name + ".weight", name + ".weight", (4, 4), role)


MODEL = [
    weight(f"model.layers.{i}.{part}", role)
    for i in range(3)
    for part, role in (("self_attn.q_proj", "attention"), ("self_attn.o_proj", "attention"), ("mlp.gate_proj", "mlp"),
                       ("mlp.down_proj", "mlp"), ("mlp.experts.0.w1", "experts"), ("mlp.gate", "router"))
] + [weight("lm_head", "head")]  # fmt: skip


def names(only, excluded=()):
    return [found.name for found in select(only, excluded, MODEL, "steps.0")]


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("q_proj", "q_proj", True),
        ("*_proj", "model.layers.0.self_attn.q_proj", True),
        ("model.*.q_proj", "model.layers.0.self_attn.q_proj", False),
        ("model.**.q_proj", "model.layers.0.self_attn.q_proj", True),
        ("model.layers.{0..2}.**", "model.layers.2.mlp.gate_proj", True),
        ("model.layers.{0..2}.**", "model.layers.3.mlp.gate_proj", False),
        ("{q,k}_proj", "a.k_proj", True),
        ("{q,k}_proj", "a.v_proj", False),
        ("model.layers.[0-3].**", "model.layers.1.x", True),
        ("?_proj", "a.qq_proj", False),
        ("**", "anything.at.all", True),
        ("layer.0", "layerx0", False),
    ],
)
def test_patterns_mean_what_the_docs_say(pattern, name, expected):
    assert compile_pattern(pattern, "p").fullmatch(name) is expected


def test_everything_leaves_out_head_and_router_unless_they_are_named():
    assert "lm_head" not in names(["*"]) and not any(n.endswith(".gate") for n in names(["**"]))
    assert names(["lm_head"]) == ["lm_head"] and names(["@head"]) == ["lm_head"]
    assert len(names(["@router"])) == 3


def test_except_wins():
    assert not any("q_proj" in n for n in names(["@attention"], ["q_proj"]))


def test_roles_select_disjoint_weights():
    found = [set(names([f"@{role}"])) for role in ("attention", "mlp", "experts", "router", "head")]
    assert sum(map(len, found)) == len(set.union(*found)) == len(MODEL)


@pytest.mark.parametrize(
    ("only", "excluded", "data"),
    [
        (["q_porj"], [], {"reason": "matches-none", "weights": 19}),
        (["q_proj"], ["@attention"], {"reason": "left-out"}),
        (["re:.*q_proj"], [], {"reason": "regex", "glob": "**q_proj"}),
        ([".*mlp.*"], [], {"reason": "regex", "glob": "**mlp**"}),
        (["@heads"], [], {"reason": "unknown-role", "near": ["head"]}),
        (["{a,b"], [], {"reason": "malformed"}),
        (["{5..1}"], [], {"reason": "malformed"}),
        (["*"], ["nothing_here"], {"reason": "matches-none"}),
    ],
)
def test_bad_patterns_are_refused_with_advice(only, excluded, data):
    place, pattern = ("except", excluded[0]) if excluded == ["nothing_here"] else ("only[0]", only[0])
    with raises(RecipeError, where=f"steps.0.{place}", pattern=pattern, **data) as failure:
        names(only, excluded)
    if pattern == "q_porj":
        assert "q_proj" in failure.value.data["near"]


def test_a_pattern_may_be_absent_when_it_says_so():
    assert names(["q_proj", "shared_expert*!"]) == names(["q_proj"])


def slow(pattern: str, name: str) -> bool:
    """Character by character, trying every length for a star."""
    if not pattern:
        return not name
    if pattern.startswith("**"):
        return any(slow(pattern[2:], name[i:]) for i in range(len(name) + 1))
    if pattern[0] == "*":
        return any("." not in name[:i] and slow(pattern[1:], name[i:]) for i in range(len(name) + 1))
    if not name:
        return False
    if pattern[0] == "?":
        return name[0] != "." and slow(pattern[1:], name[1:])
    return pattern[0] == name[0] and slow(pattern[1:], name[1:])


@settings(max_examples=500, deadline=None)
@given(st.text("ab.*?", min_size=1, max_size=7), st.text("ab.", max_size=7))
def test_globs_agree_with_the_slow_matcher(pattern, name):
    if pattern.startswith(".*"):
        return  # read as a regex and refused
    full = pattern if "." in pattern or pattern == "**" else f"**.{pattern}"
    expected = slow(full, name) or (full.startswith("**.") and slow(full[3:], name))
    assert compile_pattern(pattern, "p").fullmatch(name) == expected


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("**a" * 150, False),
        ("**.a" * 60 + "**", False),
        ("*a**" * 150, False),
        ("**{a,aa}" * 40 + "b", False),
        ("**" * 2000 + "x", False),
        ("**a" * 50 + "**", True),
        ("?**" * 60, True),
        ("[a-b]**" * 60, True),
        ("{0..999}**" * 3, False),
    ],
)
def test_a_pattern_of_many_stars_takes_linear_time(pattern, expected):
    """With a regular expression each of these took longer than anybody waits."""
    name = "model." + "a" * 52 + ".a" * 50
    assert "a" * 52 in name
    began = time.perf_counter()
    assert compile_pattern(pattern, "p").fullmatch(name) is expected
    assert time.perf_counter() - began < 5


def test_a_pattern_of_too_many_places_is_refused():
    pattern = "{0..999}" * 30
    with raises(RecipeError, where="p", reason="too-many-places", pattern=pattern[:200]):
        compile_pattern(pattern, "p")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", ".", "*", "**", "?", "{a,bb}", "{1..12}", "[ab]", "[!a]"]), max_size=6),
       st.text("ab.1", max_size=8))  # fmt: skip
def test_globs_agree_with_a_regular_expression(parts, name):
    pattern = "x." + "".join(parts)
    if any(one[0] == two[0] == "*" for one, two in itertools.pairwise(parts)):
        return  # a run of stars means something else
    signs = {"*": "[^.]*", "**": ".*", "?": "[^.]", "{a,bb}": "(?:a|bb)", "[ab]": "[ab]", "[!a]": "[^a]", ".": r"\."}
    signs["{1..12}"] = "(?:" + "|".join(map(str, range(1, 13))) + ")"
    expression = r"x\." + "".join(signs.get(part, part) for part in parts)
    assert compile_pattern(pattern, "p").fullmatch("x." + name) == bool(re.fullmatch(expression, "x." + name))


def test_functions_are_selected_by_role_and_left_out_by_name():
    functions = [
        Weight(f"m.{i}.{leaf}", "", f"m.{i}.{leaf}", (), role)
        for i in (0, 1)
        for leaf, role in (("act", "activation"), ("norm", "norm"))
    ]
    found = [w.name for w in select(["**", "@activation"], ["m.1.act"], [*MODEL, *functions], "p")]
    assert "m.0.act" in found and not {"m.1.act", "m.0.norm", "m.1.norm"} & set(found)
    with raises(RecipeError, where="p.only[0]", reason="matches-none", pattern="act"):
        select(["act"], [], [*MODEL, *functions], "p")
