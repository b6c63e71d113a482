"""The modeling file of a custom artifact: any quantization format, also another package's, without this package."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from importlib.metadata import EntryPoint

import pytest
import tiny
import torch
import transformers
import yaml
from fresh import logits_without_this_package
from installed import announce
from raising import raises
from stored_as_planned import store_as_planned

import compressor
from compressor import layers
from compressor.artifact.artifact_config import artifact_config
from compressor.artifact.export_format import choose_export_format
from compressor.artifact.loader import empty_model
from compressor.artifact.modeling_file import modeling_source
from compressor.artifact.stock_formats import FAMILIES, Family
from compressor.engine.plan import make_plan
from compressor.errors import ArtifactError, PreflightError
from compressor.layers.base import Stock
from compressor.model.checkpoint import open_checkpoint
from compressor.model.stored_weight import StoredWeight
from compressor.model.weights import Weight
from compressor.recipe.recipe import parse_recipe
from compressor.run import compress

HALVES = '''
"""Arithmetic of the other package."""
from __future__ import annotations

import math

from torch import Tensor

HALF = 0.5
ROUND = math.floor(HALF)


def double(x: Tensor) -> Tensor:
    return x + x
'''
SIGNS = '''
"""A form that keeps the sign and one magnitude a row, in a package that isn't ours."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.errors import ShapeError
from compressor.layers.base import Layer

from .halves import HALF, double

if TYPE_CHECKING:
    import something_heavy

try:
    import no_such_accelerator
except ImportError:
    no_such_accelerator = None

RANKS = (1, 2)


class SignLinear(Layer):
    format_name = "signs"
    helpers: ClassVar[tuple[str, ...]] = ("other_package.halves",)

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, bias: bool) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.register_buffer("weight_signs", torch.zeros(shape, dtype=torch.int8))
        self.register_buffer("weight_size", torch.zeros(shape[0], 1, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(shape[0], dtype=dtype), requires_grad=False) if bias else None

    @classmethod
    def empty(cls, shape: tuple[int, int], format_params: dict[str, Any], dtype: torch.dtype, bias: bool) -> Self:
        if format_params["rank"] not in RANKS:
            raise ShapeError(f"rank {format_params['rank']}")
        return cls(shape, dtype, bias)

    def format_params(self) -> dict[str, Any]:
        return {"rank": 1}

    def tensors(self) -> dict[str, Tensor]:
        return {"weight_signs": self.weight_signs, "weight_size": self.weight_size}

    @classmethod
    def from_tensors(cls, format_params: dict[str, Any], tensors: dict[str, Tensor], bias=None) -> Self:
        layer = cls.empty(tensors["weight_signs"].shape, format_params, tensors["weight_size"].dtype, bias is not None)
        layer.weight_signs, layer.weight_size = tensors["weight_signs"], tensors["weight_size"]
        return layer

    def matrix(self, dtype: torch.dtype) -> Tensor:
        return double(self.weight_signs.to(dtype) * self.weight_size.to(dtype) * HALF)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix(x.dtype), self.bias)
'''
PASS = '''
from compressor.protocol import Traits, WeightPass


class Signs(WeightPass):
    """Keep signs."""

    @property
    def traits(self):
        return Traits(reads="weights", stores="signs")

    def format_params(self, weight):
        return {"rank": 1}

    def block(self, view):
        from other_package.signs import SignLinear

        for stage in view.stages(sequential=False):
            for group in stage:
                for weight in group:
                    matrix = view.matrix(weight)
                    layer = SignLinear(weight.shape, view.dtype, bias=False)
                    layer.weight_signs = matrix.sign().to(layer.weight_signs.dtype)
                    layer.weight_size = matrix.abs().mean(1, keepdim=True).to(view.dtype)
                    view.put(weight, layer)
'''


@pytest.fixture
def other_package(tmp_path, monkeypatch):
    """A distribution with a quantization format and a pass, registered through entry points like an installed one."""
    root = tmp_path / "site"
    (root / "other_package").mkdir(parents=True)
    for name, text in (("__init__", ""), ("halves", HALVES), ("signs", SIGNS), ("passes", PASS)):
        (root / "other_package" / f"{name}.py").write_text(text)
    points = {"compressor.layers": "other_package.signs:SignLinear", "compressor.passes": "other_package.passes:Signs"}
    announce(monkeypatch, root, {group: {"signs": place} for group, place in points.items()})
    yield root
    for name in [name for name in sys.modules if name.partition(".")[0] == "other_package"]:
        del sys.modules[name]


def run(step, model, output, **sections):
    tree = {"version": 1, "steps": [step], "report": {"html": False}, **sections}
    return compress(parse_recipe(yaml.safe_dump(tree).encode()), str(model), output, measure=False)


def stored(kind, format_params, name="m.0.fc", **weight):
    fields = {"tensor": f"{name}.weight", "parameter": f"{name}.weight", "shape": (8, 32), "role": "mlp"}
    return StoredWeight(kind, format_params, Weight(name, **{**fields, **weight}))


LLAMA = tiny.build("llama")


class Eights:
    """A form that another stock loader reads."""

    weight_only = True

    @classmethod
    def stock(cls, format_params):
        return Stock("another-loader", {"width": 8})


@pytest.fixture
def eights(monkeypatch):
    point = EntryPoint("eights", "test_modeling_file:Eights", "compressor.layers")
    monkeypatch.setattr(layers, "_plugins", lambda path: (point,))
    return stored("eights", {}, "m.0.eights")


@pytest.mark.slow
def test_a_form_of_another_package_is_stored_verified_and_loaded_without_either_package(other_package, tmp_path):
    model = tiny.save("llama", tmp_path / "m", dtype=torch.bfloat16)
    steps = [
        {"pass": "signs", "only": ["down_proj"]},
        {"pass": "rtn", "bits": 3, "group_size": 32, "only": ["*_proj"], "except": ["down_proj"]},
    ]
    report = run(steps[0], model, tmp_path / "out", steps=steps)
    assert report["route"]["name"] == "custom" and "stored as signs" in report["route"]["reason"]
    assert report["verification"]["max_logit_difference"] == 0.0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    down = config["compressed_weights"]["model.layers.0.mlp.down_proj"]
    assert down == {"form": "signs", "spec": {"rank": 1}, "shape": [32, 64]}
    own = compressor.load(tmp_path / "out", kernels="reference")
    assert type(own.model.layers[0].mlp.down_proj).__name__ == "SignLinear"
    expected = own(input_ids=torch.arange(8).view(1, 8)).logits
    assert torch.equal(logits_without_this_package(tmp_path / "out", tmp_path), expected)
    manifest = json.loads((tmp_path / "out" / "compress_manifest.json").read_text())
    assert manifest["layers"] == {"packed_linear": "compressor", "signs": "other_package"}


def test_the_file_holds_the_forms_it_needs_and_no_other(other_package):
    model = tiny.build("llama")
    both, one = modeling_source(model, ["signs", "packed_linear", "signs"]), modeling_source(model, ["packed_linear"])
    assert both == modeling_source(model, ["packed_linear", "signs"])
    assert '"packed_linear": PackedLinear, "signs": SignLinear' in both
    assert "SignLinear" not in one and "HALF = 0.5\nROUND" in both and "something_heavy" not in both
    assert "other_package" not in both.replace('("other_package.halves",)', "")
    assert "    import no_such_accelerator" in both
    compile(both, "modeling.py", "exec")


@pytest.mark.parametrize(
    ("line", "reason", "name"),
    [
        ("import numpy", "imports-module", "numpy"),
        ("from numpy import array", "imports-from", "numpy.array"),
        ("from other_package.halves import double as twice", "imports-as", "double"),
        ("def pack_codes(): pass", "defined-twice", "pack_codes"),
        ("def late():\n    import numpy", "imports-late", "numpy"),
        ("print('loaded')", "other-statement", None),
    ],
)
def test_a_layer_whose_source_cannot_stand_alone_is_refused_by_line(line, reason, name, other_package):
    path = other_package / "other_package" / "signs.py"
    path.write_text(path.read_text() + line + "\n")
    number = len(path.read_text().splitlines())
    with raises(ArtifactError, where=f"other_package.signs, line {number}", reason=reason, name=name):
        modeling_source(tiny.build("llama"), ["packed_linear", "signs"])


def test_a_stock_loader_takes_one_entry(eights, monkeypatch):
    told = {"reason": "no-stock-loader", "weights": 1, "weight": "m.0.eights"}
    because = {"reason": "unknown-loader", "loader": "another-loader"}
    with raises(PreflightError, where="export", **told, because=because):
        choose_export_format([eights], "auto", stock_only=True, model=LLAMA)
    family = Family(
        lambda described, model: [], lambda described, model: dict(described[0][1], quant_method="another-loader")
    )
    monkeypatch.setitem(FAMILIES, "another-loader", family)
    export_format = choose_export_format([eights], "auto", stock_only=True, model=LLAMA)
    assert export_format.name == "another-loader"
    config = artifact_config(
        {"model_type": "llama"}, export_format, [eights], tiny.build("llama"), "float16", untied=False
    )
    assert config["quantization_config"] == {"width": 8, "quant_method": "another-loader"}


def test_forms_of_two_stock_loaders_take_the_modeling_file(eights, monkeypatch):
    monkeypatch.setitem(FAMILIES, "another-loader", Family(lambda described, model: [], lambda described, model: {}))
    packed = stored("packed_linear", {"bits": 4, "group_size": 32, "symmetric": True})
    export_format = choose_export_format([packed, eights], "auto", stock_only=False, model=LLAMA)
    assert export_format.name == "custom"
    assert export_format.reason.startswith("m.0.eights is stored for another-loader and others for compressed-tensors")


def test_an_expert_in_a_form_that_must_stand_in_the_model_is_refused(eights, monkeypatch):
    monkeypatch.setattr(Eights, "weight_only", False)
    with raises(PreflightError, where="m.0.fc", reason="expert-format", format_name="eights"):
        choose_export_format([stored("eights", {}, expert=1)], "auto", stock_only=False, model=LLAMA)


def test_a_family_whose_tensors_are_renamed_while_loading_says_so_and_no_other():
    assert "register_checkpoint_conversion_mapping" not in modeling_source(LLAMA, ["packed_linear"])
    text = modeling_source(tiny.build("mixtral"), ["packed_linear"])
    assert 'get_checkpoint_conversion_mapping("mixtral"), overwrite=True' in text


def import_file(path):
    specification = importlib.util.spec_from_file_location(f"made_{path.stem}_{abs(hash(path))}", path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[module.__name__] = module  # where dataclasses look for it
    specification.loader.exec_module(module)
    return module


def custom_artifact(model, source, output):
    """An artifact of a saved model in the custom format, every weight in 8 bits, without a run."""
    model.save_pretrained(source)
    steps = [{"pass": "rtn", "bits": 8, "group_size": 32}]
    tree = {"version": 1, "steps": steps, "export": {"format": "custom"}}
    plan = make_plan(parse_recipe(yaml.safe_dump(tree).encode()), str(source), prove=False)
    assert plan.export_format.name == "custom" and not plan.problems
    layers = store_as_planned(plan, output)
    (path,) = {
        value.partition(".")[0] for value in json.loads((output / "config.json").read_text())["auto_map"].values()
    }
    (output / f"{path}.py").write_text(
        modeling_source(plan.structure.model, [stored.format_name for stored in plan.formats.values()])
    )
    for module, layer in layers.items():
        model.get_submodule(module).weight.data = layer.matrix(torch.bfloat16)
    return import_file(output / f"{path}.py")


HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForCausalLM")
DECODERS = {"Llama": {}, "Qwen3": {"head_dim": 8}, "Mistral": {}, "Qwen2": {}, "Phi3": {}}


@pytest.mark.parametrize(
    ("family", "head"),
    [(family, head) for family in DECODERS for head in HEADS if hasattr(transformers, family + head)],
)
def test_a_head_whose_backbone_automodel_makes_loads_by_the_modeling_file(family, head, tmp_path):
    sizes = {**tiny.COMMON, "num_key_value_heads": 2, "num_labels": 3, **DECODERS[family]}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, family + head)._from_config(config, dtype=torch.bfloat16).eval()
    made = custom_artifact(model, tmp_path / "m", tmp_path / "out")
    loaded, info = getattr(made, f"Compressed{family}{head}").from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    ids = torch.arange(8).view(1, 8) + 3
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids)[0], loaded.eval()(input_ids=ids)[0])
        backbone = getattr(made, f"Compressed{family}Model").from_pretrained(tmp_path / "out").eval()
        assert torch.equal(model.base_model(input_ids=ids)[0], backbone(input_ids=ids)[0])
        assert isinstance(transformers.AutoModel.from_config(backbone.config), type(backbone))


@pytest.mark.parametrize("value", [{"__float__": "Infinity"}, float("inf")])
def test_a_config_with_infinite_numbers_is_read_as_transformers_reads_it(value, tmp_path):
    model = transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            vocab_size=96, hidden_size=32, num_hidden_layers=1, num_heads=8, head_dim=8, n_groups=1, state_size=16
        )
    )
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"time_step_limit": [0.0, value]}))
    empty = empty_model(open_checkpoint(tmp_path), {"architecture": "Mamba2ForCausalLM"})
    assert list(empty.config.time_step_limit) == [0.0, float("inf")]
