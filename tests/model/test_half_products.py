"""Products of 16-bit floats in float32: the same values as torch's own, and the same products for other modes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.model import half_products
from compressor.model.half_products import Float32Products, is_slow, quick_products
from compressor.model.observed_matmul import ObservedMatmul, ObservedMatmuls

HALVES = (torch.bfloat16, torch.float16)

# (function, shapes of its operands)
PRODUCTS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "linear": (F.linear, [(2, 5, 48), (24, 48), (24,)]),
    "linear without a bias": (F.linear, [(7, 48), (24, 48)]),
    "few rows": (F.linear, [(1, 48), (24, 48)]),
    "matmul": (torch.matmul, [(2, 3, 8, 16), (2, 3, 16, 4)]),
    "operator": (lambda x, y: x @ y, [(8, 16), (16, 4)]),
    "bmm": (torch.bmm, [(5, 8, 16), (5, 16, 4)]),
    "addmm": (torch.addmm, [(4,), (8, 16), (16, 4)]),
    "einsum": (lambda x, y: torch.einsum("bqd,bkd->bqk", x, y), [(2, 5, 16), (2, 6, 16)]),
    "patches": (lambda x, y: F.conv2d(x, y, stride=4), [(2, 3, 16, 16), (8, 3, 4, 4)]),
    "attention": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        [(2, 3, 9, 16), (2, 3, 9, 16), (2, 3, 9, 16)],
    ),
}


def operands(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", PRODUCTS)
def test_values_and_gradients_are_those_of_float64_rounded_once(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(half_products, "CONVERTED_VALUES", 300)  # several pieces of each weight
    function, shapes = PRODUCTS[name]
    values = operands(shapes, dtype)
    exact = [value.detach().double().requires_grad_() for value in values]
    with Float32Products(frozenset(HALVES)):
        found = function(*values)
    meant = function(*exact)
    unit = torch.finfo(dtype).eps
    assert found.dtype == dtype
    assert torch.allclose(found.double(), meant, rtol=unit, atol=unit * float(meant.detach().abs().max()) / 2)
    found.float().sum().backward()
    meant.sum().backward()
    for value, other in zip(values, exact):
        assert value.grad is not None and other.grad is not None
        largest = float(other.grad.abs().max())
        assert torch.allclose(value.grad.double(), other.grad, rtol=4 * unit, atol=4 * unit * largest)


@pytest.mark.parametrize("name", [name for name in PRODUCTS if name != "few rows"])
def test_the_product_runs_in_float32(name: str) -> None:
    function, shapes = PRODUCTS[name]
    seen = SeenDtypes()
    with seen, Float32Products(frozenset(HALVES)):
        function(*operands(shapes, torch.bfloat16))
    assert seen.of_products == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_other_dtypes_are_left_to_torch(dtype: torch.dtype) -> None:
    function, shapes = PRODUCTS["linear"]
    values = operands(shapes, dtype)
    with Float32Products(frozenset({torch.bfloat16})):
        found = function(*values)
    assert torch.equal(found, function(*values))


def test_operands_of_two_dtypes_are_an_error_as_in_torch() -> None:
    x, weight = torch.ones(8, 16), torch.ones(4, 16, dtype=torch.bfloat16)
    with Float32Products(frozenset(HALVES)), pytest.raises(RuntimeError):
        F.linear(x, weight)


def test_a_mode_that_is_entered_later_sees_the_product_of_the_model() -> None:
    calls: list[ObservedMatmul] = []
    layer = torch.nn.Linear(16, 4, bias=False, dtype=torch.bfloat16)
    x = torch.ones(8, 16, dtype=torch.bfloat16)
    with Float32Products(frozenset(HALVES)), ObservedMatmuls({"layer": layer.weight}, calls.append):
        layer(x)
    (call,) = calls
    assert call.parameter == "layer" and call.input is x


@pytest.mark.parametrize("has", [True, False])
def test_the_processor_decides(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_products, "_has_instruction", lambda dtype: has)
    assert isinstance(quick_products(torch.bfloat16), Float32Products) is not has
    assert not isinstance(quick_products(torch.float32), Float32Products)
    assert is_slow(torch.float16) is not has


class SeenDtypes(torch.overrides.TorchFunctionMode):
    """Notes the dtypes of the float operands of products. It is entered first, so it sees what is left to torch."""

    def __init__(self) -> None:
        super().__init__()
        self.of_products: set[torch.dtype] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in half_products._PRODUCTS:
            self.of_products |= {value.dtype for value in args if isinstance(value, Tensor)}
        return func(*args, **(kwargs or {}))
