"""A parameter that is changed slice by slice has the value of the whole change."""

import pytest
import torch

from compressor.engine import changed_parameter
from compressor.engine.changed_parameter import Changed


@pytest.mark.parametrize(("shape", "axis"), [((7, 6), 0), ((7, 6), 1), ((3, 5, 6), 1), ((3, 5, 6), 2), ((6,), 0)])
@pytest.mark.parametrize("elements", [1, 20, 1000])
def test_slices_give_the_whole_change(shape, axis, elements, monkeypatch):
    monkeypatch.setattr(changed_parameter, "SLICE_ELEMENTS", elements)
    torch.manual_seed(0)
    value, q = torch.randn(shape).bfloat16(), torch.randn(shape[axis], 4, dtype=torch.float64)

    def rotate(part):
        assert part.shape[axis] == q.shape[0] and part.dtype == torch.float64
        return (part.movedim(axis, -1) @ q).movedim(-1, axis)

    made = Changed(value, (rotate,), axis).then(lambda part: part * 3).made(torch.float64)
    meant = (value.double().movedim(axis, -1) @ q).movedim(-1, axis) * 3
    assert made.shape == meant.shape
    torch.testing.assert_close(made, meant, rtol=1e-14, atol=1e-14)
