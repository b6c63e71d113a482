"""Lookup-table layers in a prepared model: the bits of the replaced layer, and the reasons of the choice."""

from __future__ import annotations

import copy
import io

import pytest
import tiny
import torch
import yaml
from raising import raises
from torch import nn

import compressor
from compressor.errors import KernelError
from compressor.kernels.cpu import LEVELS, Library, library
from compressor.kernels.prepared import dispatch
from compressor.kernels.prepared.prepare import chosen_kernels, explain, prepare
from compressor.kernels.prepared.prepared_lookup_table import PreparedLookupTable
from compressor.layers import find_layer
from compressor.layers.base import Layer
from compressor.methods.quantization.lookup_tables import activation_table, exp_table, root_table
from compressor.model.activations import KNOWN
from compressor.recipe.recipe import parse_recipe
from compressor.run import compress

pytestmark = pytest.mark.skipif(not isinstance(library(), Library), reason=f"{library()}")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTH = 40


def activation(name="silu", lookup="linear", entries=256):
    table = activation_table(name, -3.0, 3.0, entries)
    format_params = {"function": name, "entries": entries, "low": table.low, "step": table.step, "lookup": lookup}
    layer = find_layer("table_activation")
    return layer.from_tensors({**format_params, "slopes": list(KNOWN[name].slopes)}, {"table": table.values})


def norm(kind="rms", lookup="linear", entries=256, offset=0.0, gain=True, bias=False, dtype=torch.float32):
    made, table = torch.Generator().manual_seed(3), root_table(entries)
    format_params = {
        "kind": kind,
        "offset": offset,
        "eps": 1e-5,
        "entries": entries,
        "step": table.step,
        "lookup": lookup,
    }
    weight = {"weight": torch.randn(WIDTH, generator=made).to(dtype)} if gain else {}
    added = torch.randn(WIDTH, generator=made).to(dtype) if bias else None
    return find_layer("table_norm").from_tensors(format_params, {**weight, "table": table.values}, added)


def attention(block=None, lookup="linear", entries=256):
    table = exp_table(-16.0, entries)
    format_params = {"entries": entries, "step": table.step, "lookup": lookup, "bits": block and 8, "block": block}
    return find_layer("block_attention").from_tensors(format_params, {"table": table.values})


LAYERS = [
    *[(activation, {"name": name}) for name in ("silu", "gelu", "tanh", "sigmoid")],
    (norm, {"kind": "layer", "bias": True}),
    (norm, {"offset": 1.0, "dtype": torch.bfloat16}),
    (norm, {"gain": False}),
    (attention, {}),
    (attention, {"block": 16}),
]


def inputs(dtype):
    """Rows of several scales, values beyond every table, what is masked or no number; also strided and empty."""
    made = torch.Generator().manual_seed(1)
    x = torch.randn(2, 9, WIDTH, generator=made) * torch.logspace(-2, 2, 9)[:, None]
    x[0, 1, 3:] = torch.finfo(dtype).min
    odd = x[:1, :2].clone()
    odd[0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    return [part.to(dtype) for part in (x, x[:, ::2], x.transpose(0, 1), x[0, 0], x[:0], odd)]


@pytest.mark.parametrize("lookup", ["linear", "nearest"])
@pytest.mark.parametrize(("build", "settings"), LAYERS, ids=lambda value: str(getattr(value, "__name__", value)))
def test_a_prepared_table_gives_the_bits_of_its_layer(build, settings, lookup):
    for entries in (256, 1024):
        layer = build(lookup=lookup, entries=entries, **settings)
        model = nn.Sequential(layer)
        op = "table_inverse_root" if build is norm else "table_lookup"
        assert prepare(model, strict=True)["0"].op == op and type(model[0]) is PreparedLookupTable
        for dtype in DTYPES:
            for x in inputs(dtype):
                y, expected = model(x), layer(x)
                assert y.dtype == expected.dtype and torch.equal(y.isnan(), expected.isnan())
                assert torch.equal(y.nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("block", [None, 16])
def test_prepared_attention_rounds_what_is_multiplied_as_its_layer(block):
    layer, x = attention(block), torch.randn(2, 3, 5, 32)
    model = nn.Sequential(layer)
    prepare(model)
    assert torch.equal(model[0].round(x), layer.round(x)) and torch.equal(model[0].round(x), x) == (block is None)


class Block(nn.Module):
    """All three kinds under names, as a model has them."""

    def __init__(self, seed=0):
        super().__init__()
        self.norm, self.act, self.products = norm(bias=True), activation(), attention()
        if seed:
            self.norm.weight = self.norm.weight * seed
            self.act.table = self.act.table * seed

    def forward(self, x):
        return self.products(self.act(self.norm(x)))


def test_explain_and_the_report_name_tables_with_their_kernel():
    model = Block()
    prepare(model, strict=True)
    level = LEVELS[library().level]
    lines = explain(model).splitlines()
    assert lines[2] == f"act   256 entries, linear   cpu library, {level}   table_lookup"
    assert len(lines) == 6 and all("nvrtc (no CUDA device)" in line for line in lines[1::2])
    rows = chosen_kernels(model)
    assert [row["op"] for row in rows] == ["table_norm", "table_activation", "block_attention"]
    ops = ["table_inverse_root", "table_lookup", "table_lookup"]
    assert [row["chosen"] for row in rows] == [f"cpu library, {level}: {op}" for op in ops]
    before = list(model.children())
    assert list(prepare(model, strict=True)) == ["norm", "act", "products"]
    assert all(a is b for a, b in zip(before, model.children(), strict=True))  # and it is not done twice


def test_a_state_dict_is_what_it_was_and_what_is_loaded_counts():
    model, other = Block(), Block(seed=2)
    before = model.state_dict()
    prepare(model)
    after = model.state_dict()
    assert list(after) == list(before) and all(map(torch.equal, after.values(), before.values()))
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(4))
    first = model(x)
    assert torch.equal(first, Block()(x)) and not torch.equal(first, other(x))
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(x), other(x))


def test_copies_and_saved_models_stay_prepared():
    model, x = Block(), torch.randn(3, WIDTH)
    prepare(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert type(again.act) is PreparedLookupTable and torch.equal(again(x), model(x))
        again.act.table.zero_()
        assert not torch.equal(again(x), model(x))


def test_prepared_tables_compile_with_any_number_of_rows():
    model = Block()
    prepare(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for rows in (3, 2, 7):
            x = torch.randn(rows, WIDTH)
            assert torch.equal(compiled(x), model(x))


def test_without_the_library_tables_stay_with_the_reason_and_strict_refuses(monkeypatch):
    monkeypatch.setattr(dispatch, "tried_library", lambda: "cpu library not built: no compiler")
    model, layer = Block(), Block().act
    with pytest.warns(UserWarning, match="no compiler"):
        choices = prepare(model)
    assert {choice.kernel for choice in choices.values()} == {"reference"} and isinstance(model.act, Layer)
    assert "act   table_activation   reference" in explain(model) and "no compiler" in explain(model)
    assert torch.equal(model.act(torch.arange(-4.0, 4.0)), layer(torch.arange(-4.0, 4.0)))
    with raises(KernelError, where="norm", reason="fallback", kernel="reference") as failure:
        prepare(Block(), strict=True)
    assert any("no compiler" in skipped for skipped in failure.value.data["skipped"])


def test_tables_elsewhere_than_on_the_cpu_stay_with_the_reason():
    with pytest.warns(UserWarning, match=r"tables .* meta"):
        model = Block().to("meta")
        prepare(model)
    assert isinstance(model.act, Layer)


def test_a_table_of_one_entry_is_left_to_the_reference():
    choice = dispatch.choose_lookup_table(torch.zeros(1), "table_lookup")
    assert choice.is_fallback and "cpu library (1 entries of torch.float32" in choice.skipped[1]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_loaded_model_reads_all_its_tables_by_the_library_and_says_the_same(family, tmp_path):
    step = {"pass": "bct", "block_shape": [16, 16], "only": ["@activation!", "@norm", "@softmax"]}
    tree = {
        "version": 1,
        "name": "tables",
        "data": {"source": "random", "samples": 4, "length": 16},
        "steps": [step],
        "report": {"html": False},
    }
    model = tiny.save(family, tmp_path / "model")
    recipe = parse_recipe(yaml.safe_dump(tree).encode(), "tables.yaml")
    compress(recipe, str(model), tmp_path / "out", measure=False)
    reference = compressor.load(tmp_path / "out", kernels="reference")
    ours = compressor.load(tmp_path / "out", kernels="strict")
    assert type(ours) is type(reference) and list(ours.state_dict()) == list(reference.state_dict())
    kinds = {module.format_name for module in ours.modules() if isinstance(module, PreparedLookupTable)}
    assert kinds == {"table_activation", "table_norm", "block_attention"}
    assert not any(isinstance(module, Layer) for module in ours.modules())
    ids = torch.arange(32).view(2, 16)
    with torch.no_grad():
        assert torch.equal(ours(input_ids=ids).logits, reference(input_ids=ids).logits)
