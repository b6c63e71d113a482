"""Models on the meta device are made without initializing each of their tensors."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import initialization

from compressor.model.empty_model import skeleton
from compressor.model.meta_init import quick_on_meta


def functions():
    return {**initialization.TORCH_INIT_FUNCTIONS}, {
        name: getattr(torch.nn.init, name) for name in ("normal_", "ones_")
    }


def test_what_torch_has_is_there_again_and_real_tensors_are_initialized_meanwhile():
    before = functions()
    with quick_on_meta(), quick_on_meta():
        assert functions() != before
        for _ in range(2):
            assert torch.equal(torch.nn.init.ones_(torch.zeros(3)), torch.ones(3))
            assert initialization.zeros_(torch.ones(3)).sum() == 0
            assert torch.nn.init.normal_(torch.empty(3, device="meta")).is_meta
    assert functions() == before


@pytest.mark.parametrize("dims", [(2, 3), (3,)])
def test_what_a_function_refuses_it_refuses_each_time(dims):
    with quick_on_meta():
        torch.nn.init.normal_(torch.empty(dims, device="meta"), 0.0, 1.0)
        for _ in range(2):
            with pytest.raises(RuntimeError):
                torch.nn.init.normal_(torch.empty(dims, device="meta"), 0.0, -1.0)
            with pytest.raises(ValueError):
                torch.nn.init.kaiming_uniform_(torch.empty(3, device="meta"))


def test_buffers_of_a_skeleton_are_those_of_a_whole_model():
    whole = tiny.build("llama")
    empty = skeleton(type(whole), whole.config, torch.float32)
    assert all(value.is_meta for value in empty.parameters())
    assert dict(empty.named_buffers()).keys() == dict(whole.named_buffers()).keys()
    for name, value in empty.named_buffers():
        assert torch.equal(value, whole.get_buffer(name)), name
