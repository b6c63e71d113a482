"""A norm is described by what it computes, whatever its family calls it."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

from compressor.model.norms import Norm, apply_norm, describe_norm

# kind, offset and eps of every norm of a family, all modules alike
RMS = ("rms", 0.0, 1e-6)
LAYER = ("layer", 0.0, 1e-5)
FORMULAS = {
    "llama": RMS,
    "qwen3": RMS,
    "mistral": RMS,
    "opt": LAYER,
    "gpt2": LAYER,
    "phi": LAYER,
    "phi3": ("rms", 0.0, 1e-5),
    "gemma": ("rms", 1.0, 1e-6),
    "gemma2": ("rms", 1.0, 1e-6),
    "gemma3": ("rms", 1.0, 1e-6),
    "olmo2": ("rms", 0.0, 1e-5),
    "gpt_neox": LAYER,
    "mixtral": ("rms", 0.0, 1e-5),
    "qwen3_moe": RMS,
    "bert": ("layer", 0.0, 1e-12),
    "bert_base": ("layer", 0.0, 1e-12),
    "vit": ("layer", 0.0, 1e-12),
}


def norms_of(model):
    """Every module that its family names a norm, without asking describe_norm."""
    found = {name: m for name, m in model.named_modules() if "norm" in type(m).__name__.lower()}
    assert found
    return found


def test_every_family_is_in_the_table():
    assert set(FORMULAS) == set(tiny.FAMILIES)


@pytest.mark.parametrize("family", sorted(FORMULAS))
def test_every_norm_of_a_family_is_described_and_reproduced(family):
    model = tiny.build(family)
    for name, module in norms_of(model).items():
        norm = describe_norm(module)
        assert norm is not None, name
        assert (norm.kind, norm.offset, norm.eps) == FORMULAS[family], name
        assert norm.width == module.weight.numel()
        assert norm.has_bias == (getattr(module, "bias", None) is not None)
        x = torch.randn(2, 5, norm.width) * 3 + 0.5
        with torch.no_grad():
            expected = module(x)
        # both float32, rounded in another order
        torch.testing.assert_close(apply_norm(x, module.weight, getattr(module, "bias", None), norm), expected)


def test_norms_of_the_query_and_key_heads_have_the_head_width():
    attention = tiny.build("qwen3").model.layers[0].self_attn
    assert describe_norm(attention.q_norm) == Norm("rms", 0.0, 1e-6, 8, has_weight=True, has_bias=False)


def test_a_norm_on_the_meta_device_is_described():
    model = tiny.build("gemma").to("meta")
    assert describe_norm(model.model.norm) == Norm("rms", 1.0, 1e-6, 32, has_weight=True, has_bias=False)


def test_the_module_itself_is_neither_run_nor_changed():
    module = nn.LayerNorm(8).half()
    seen = []
    module.register_forward_hook(lambda *_: seen.append(1))
    before = module.weight.clone()
    assert describe_norm(module) is not None
    assert not seen and torch.equal(module.weight, before) and module.weight.dtype == torch.float16


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.LayerNorm(8, eps=0.1), Norm("layer", 0.0, 0.1, 8, True, True)),
        (nn.LayerNorm(8, bias=False), Norm("layer", 0.0, 1e-5, 8, True, False)),
        (nn.LayerNorm(8, elementwise_affine=False), Norm("layer", 0.0, 1e-5, 8, False, False)),
        (nn.RMSNorm(8, eps=1e-3), Norm("rms", 0.0, 1e-3, 8, True, False)),
        (nn.RMSNorm(8, eps=0.0), Norm("rms", 0.0, 0.0, 8, True, False)),
        (nn.RMSNorm(8, eps=1e-3, elementwise_affine=False), Norm("rms", 0.0, 1e-3, 8, False, False)),
    ],
    ids=str,
)
def test_torch_norms_are_described_with_and_without_gain_and_shift(module, expected):
    assert describe_norm(module) == expected


class WrongEps(nn.RMSNorm):
    """Says one eps and uses another."""

    def forward(self, x):
        return nn.functional.rms_norm(x, self.normalized_shape, self.weight, 2 * self.eps)


class Sum(nn.RMSNorm):
    """Divides by the root of the sum of squares."""

    def forward(self, x):
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + self.eps) * self.weight


@pytest.mark.parametrize(
    "module",
    [
        WrongEps(8, eps=1e-6),
        WrongEps(8, eps=0.1),
        Sum(8, eps=1e-6),
        nn.Linear(8, 8),
        nn.Linear(1, 8),
        nn.PReLU(8),
        nn.BatchNorm1d(8),
        nn.GroupNorm(2, 8),
        nn.LayerNorm((4, 8)),
        nn.RMSNorm(8),  # its eps follows the dtype
        nn.GELU(),
        nn.Sequential(nn.LayerNorm(8)),
    ],
    ids=str,
)
def test_what_follows_no_formula_is_no_norm(module):
    assert describe_norm(module) is None


def test_float64_stays_float64_and_bfloat16_is_computed_in_float32():
    norm = Norm("layer", 1.0, 0.1, 4, True, True)
    x = torch.tensor([[1.0, -2.0, 3.0, 6.0]], dtype=torch.float64)
    weight, bias = torch.tensor([1.0, 0.5, 0.0, -1.0]), torch.tensor([0.0, 1.0, 2.0, 3.0])
    # mean 2, squares of the rest 1 16 1 16: mean 8.5; gain 2 1.5 1 0
    root = 8.6**0.5
    expected = torch.tensor([[-2 / root, 1 - 6 / root, 2 + 1 / root, 3.0]], dtype=torch.float64)
    torch.testing.assert_close(apply_norm(x, weight, bias, norm), expected, rtol=1e-15, atol=1e-15)
    low = apply_norm(x.bfloat16(), weight, bias, norm)
    assert low.dtype == torch.bfloat16 and torch.equal(low, expected.float().bfloat16())
