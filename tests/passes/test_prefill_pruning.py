"""Tokens dropped in prefill: against a slow version that runs whole texts with masks, and through a run."""

from __future__ import annotations

import json
import math

import pytest
import tiny
import torch
import yaml
from raising import raises
from transformers import DynamicCache

import compressor
from compressor.engine.plan import make_plan
from compressor.errors import RecipeError
from compressor.layers.structural.lazy_block import LazyBlock, LazyTokens
from compressor.model.reshaped_class import reshaped_class
from compressor.model.structure import find_blocks
from compressor.passes.prefill_pruning import PrefillPruning
from compressor.recipe.recipe import parse_recipe
from compressor.run import compress
from compressor.testing import check_pass

FAMILIES = ["llama", "qwen3", "opt", "gpt2", "gpt_neox", "phi", "mixtral"]
IDS = torch.arange(5, 45).view(2, 20) % 96


def recipe(*steps):
    tree = {"version": 1, "name": "lazy", "data": {"source": "random", "samples": 4, "length": 16}}
    return parse_recipe(yaml.safe_dump({**tree, "steps": list(steps), "report": {"html": False}}).encode(), "lazy.yaml")


def gated(model, path, keep, *, sink=1, revive=True, min_prompt=4):
    """A copy of a model with gates: `keep` maps blocks to shares."""
    depth, modules = len(model.get_submodule(path)), {}
    for number in range(depth):
        format_params = {"number": number, "begin": min(keep), "last": number == depth - 1, "keep": keep.get(number)}
        format_params |= {"sink": sink, "min_prompt": min_prompt, "revive": revive}
        modules[f"{path}.{number}"] = {"form": "lazy_block", "spec": format_params, "shape": []}
    config = type(model.config)(**{**model.config.to_dict(), "compressed_modules": modules})
    made = reshaped_class(type(model))(config).to(next(model.parameters()).dtype)
    made.load_state_dict(model.state_dict())
    made.set_attn_implementation(model.config._attn_implementation)
    return made.eval()


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def models():
    built = {}

    def get(family, implementation="eager"):
        if family not in built:
            key = "n_layer" if family == "gpt2" else "num_hidden_layers"
            built[family] = tiny.build(family, **{key: 4}).eval().requires_grad_(False)
        built[family].set_attn_implementation(implementation)
        return built[family]

    return get


def cache_of(output):
    return next(value for key, value in output.items() if key in ("cache", "past_key_values"))


def named(output):
    return {key: value for key, value in output.items() if key in ("cache", "past_key_values")}


def slow(model, path, keep, ids, sink=1):
    """Logits of the last token with tokens dropped, by the whole model run once a gate.

    A token that was dropped behind block g is hidden from every query in later blocks. Which tokens these are is read
    off the attention weights that the model itself returns.
    """
    blocks = model.get_submodule(path)
    alive = torch.ones(len(blocks), ids.shape[1], dtype=torch.bool)

    def hidden(value, number):
        """A block's argument, of a mask one that hides what is dropped from all but itself."""
        if not torch.is_tensor(value) or value.dim() != 4:
            return value
        mask, rows = value.clone(), torch.arange(ids.shape[1])
        mask[..., ~alive[number]] = torch.finfo(mask.dtype).min
        mask[..., rows, rows] = 0
        return mask

    def run():
        handles = []
        for number, block in enumerate(blocks):

            def hide(_m, args, kwargs, number=number):
                return tuple(hidden(a, number) for a in args), {k: hidden(v, number) for k, v in kwargs.items()}

            handles.append(block.register_forward_pre_hook(hide, with_kwargs=True))
        out = model(input_ids=ids, output_attentions=True, use_cache=False)
        for handle in handles:
            handle.remove()
        return out

    for gate in sorted(keep):
        weights = run().attentions[gate][0, :, -1].mean(0)
        weights[~alive[gate]] = -1
        weights[:sink], weights[-1] = math.inf, math.inf
        count = max(math.ceil(keep[gate] * int(alive[gate].sum()) - 1e-9), sink + 1)
        dropped = torch.sort(weights, descending=True, stable=True).indices[count:]
        alive[gate + 1 :, dropped] = False
    return run().logits[0, -1], alive


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_prompt_gives_what_hiding_the_tokens_gives(family, models):
    model = models(family)
    path, keep = find_blocks(model), {0: 0.8, 2: 0.5}
    lazy = gated(model, path, keep)
    for row in IDS:
        wanted, alive = slow(model, path, keep, row[None])
        out = lazy(input_ids=row[None], use_cache=True)
        assert out.logits.shape == (1, 20, 96)  # a place for every token
        assert torch.allclose(out.logits[0, -1], wanted, atol=2e-5)
        assert [cache_of(out).get_seq_length(number) for number in range(4)] == [20, 16, 16, 8]
        assert alive.sum(1).tolist() == [20, 16, 16, 8]
    assert not torch.allclose(wanted, model(input_ids=row[None]).logits[0, -1], atol=1e-3)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_rows_of_a_batch_and_padding_in_front_change_nothing(implementation, models):
    model = models("llama", implementation)
    lazy = gated(model, "model.layers", {0: 0.75, 1: 0.5})
    alone = [lazy(input_ids=row[None], use_cache=True).logits[0, -1] for row in IDS]
    together = lazy(input_ids=IDS, use_cache=True).logits[:, -1]
    assert torch.allclose(torch.stack(alone), together, atol=2e-5)
    # a shorter neighbour with padding in front: padding stays behind first, so the longer one loses no more than alone
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.int64), IDS], 1)
    mask = torch.cat([torch.zeros(2, 4, dtype=torch.int64), torch.ones_like(IDS)], 1)
    few = gated(model, "model.layers", {1: 20 / 24})
    unpadded = model(input_ids=IDS).logits[:, -1]
    assert torch.allclose(few(input_ids=padded, attention_mask=mask, use_cache=True).logits[:, -1], unpadded, atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_word_that_takes_all_tokens_back_is_computed_as_if_none_had_been_dropped(family, models):
    """keep 1 while decoding revives everything; the first block's tokens are all there already."""
    model = models(family, "sdpa")
    path = find_blocks(model)
    lazy = gated(model, path, {0: 0.5, 2: 0.4})
    first = lazy(input_ids=IDS, use_cache=True)
    for block in lazy.get_submodule(path):
        block.keep = None if block.keep is None else 1.0
    following = lazy(input_ids=torch.tensor([[7], [9]]), use_cache=True, **named(first))
    lengths = [cache_of(following).get_seq_length(number) for number in range(4)]
    assert lengths == [21, 21, 21, 21]
    # keys of those that came back are those of a model that never dropped them, as far as what they had seen was whole
    plain = model(input_ids=torch.cat([IDS, torch.tensor([[7], [9]])], 1), use_cache=True)
    state = cache_of(following).lazy_tokens
    order = state.columns[1].argsort(1)
    theirs, ours = (cache_of(out).layers[1].keys for out in (plain, following))
    assert torch.allclose(theirs, ours.gather(2, order[:, None, :, None].expand_as(ours)), atol=2e-5)
    assert all(slots.shape[1] == 0 for slots, _ in state.waiting.values())


def test_tokens_come_back_only_where_asked_for_and_only_those_looked_at(models):
    model = models("llama", "sdpa")
    counts = {}
    for revive in (True, False):
        lazy = gated(model, "model.layers", {1: 0.5}, revive=revive)
        out = lazy(input_ids=IDS, use_cache=True)
        for word in (3, 50, 11):
            out = lazy(input_ids=torch.tensor([[word], [word]]), use_cache=True, **named(out))
            assert out.logits.shape == (2, 1, 96)
        counts[revive] = [cache_of(out).get_seq_length(number) for number in range(4)]
    assert counts[False] == [23, 23, 13, 13]
    assert counts[True][:2] == [23, 23] and 13 < counts[True][2] == counts[True][3] < 23


def test_beams_take_their_tokens_along(models):
    lazy = gated(models("llama", "sdpa"), "model.layers", {1: 0.5})
    prompt = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    out = lazy(**prompt, use_cache=True)
    cache = cache_of(out)
    assert isinstance(cache, DynamicCache) and isinstance(cache.lazy_tokens, LazyTokens)
    before = {number: slots.clone() for number, slots in cache.lazy_tokens.columns.items()}
    cache.reorder_cache(torch.tensor([1, 1]))
    for number, slots in cache.lazy_tokens.columns.items():
        assert slots.equal(before[number][[1, 1]])
    made = lazy.generate(**prompt, num_beams=3, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert made.shape == (2, 25)
    with raises(compressor.errors.ModelError, where="DynamicCache", reason="no-crop"):
        cache.crop(-2)


def test_without_a_cache_and_in_short_prompts_nothing_is_dropped(models):
    model = models("llama", "sdpa")
    lazy = gated(model, "model.layers", {0: 0.3}, min_prompt=21)
    dense = model(input_ids=IDS).logits
    assert lazy(input_ids=IDS, use_cache=False).logits.equal(dense)
    out = lazy(input_ids=IDS, use_cache=True)
    assert out.logits.equal(dense) and not hasattr(cache_of(out), "lazy_tokens")
    longer = torch.cat([IDS, IDS], 1)  # a cache that isn't empty is not a prompt's beginning
    assert lazy(input_ids=longer, use_cache=True, **named(out)).logits.shape == (2, 40, 96)


@pytest.mark.parametrize("first", ["gates", pytest.param("bits", marks=pytest.mark.slow)])
def test_a_run_writes_a_model_that_drops_tokens_wherever_it_is_loaded(first, tmp_path):
    model = tiny.save("llama", tmp_path / "model", num_hidden_layers=4)
    steps = [{"pass": "prefill_pruning", "keep": {1: 0.5}, "min_prompt": 8}, {"pass": "rtn", "group_size": -1}]
    report = compress(
        recipe(*(steps if first == "gates" else steps[::-1])), str(model), tmp_path / "out", measure=False
    )
    assert report["verification"]["max_logit_difference"] == 0.0 and report["route"]["name"] == "custom"
    loaded = compressor.load(tmp_path / "out", kernels="reference")
    out = loaded(input_ids=IDS, use_cache=True)
    assert [cache_of(out).get_seq_length(number) for number in range(4)] == [20, 20, 10, 10]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert sorted(config["compressed_modules"]) == [f"model.layers.{number}" for number in range(4)]
    assert isinstance(loaded.model.layers[3], LazyBlock)


def problem(model, **settings):
    (found,) = make_plan(recipe({"pass": "prefill_pruning", **settings}), str(model), prove=False).problems
    return found.where, found.data


def test_what_cannot_be_gated_is_refused_with_the_reason(tmp_path):
    llama = tiny.save("llama", tmp_path / "llama")
    place = "prefill_pruning.keep"
    assert problem(llama, keep={7: 0.5}) == (place, {"reason": "no-block", "block": 7, "blocks": 2})
    assert problem(llama, keep={1: 0.5}) == (place, {"reason": "last-block", "block": 1, "blocks": 2})
    bert = tiny.save("bert", tmp_path / "bert")
    where, data = problem(bert, keep={0: 0.5})
    assert (where, data["reason"], data["because"]) == ("prefill_pruning", "not-gated", {"reason": "not-causal"})
    vit = tiny.save("vit", tmp_path / "vit")
    where, data = problem(vit, keep={0: 0.5})
    assert (where, data["because"]) == ("prefill_pruning", {"reason": "attentions", "count": 0})
    with raises(RecipeError, reason="greater-than", found="0") as failure:
        recipe({"pass": "prefill_pruning", "keep": {0: 0}})
    assert failure.value.where.endswith(" (steps.0.keep.0)")


def test_keeping_every_token_changes_nothing(tmp_path):
    model = tiny.save("llama", tmp_path / "model")
    plan = make_plan(recipe({"pass": "prefill_pruning", "keep": {0: 1.0}}), str(model), prove=False)
    assert not plan.problems and plan.reshapes[0].redefinition.config == {} and plan.export_format.name == "dense"


@pytest.mark.slow
def test_prefill_pruning_keeps_the_contract(tmp_path):
    model = tiny.save("llama", tmp_path / "model", num_hidden_layers=4)
    check_pass("prefill_pruning", PrefillPruning(keep={1: 0.5}, min_prompt=8), model, tmp_path, "*")
