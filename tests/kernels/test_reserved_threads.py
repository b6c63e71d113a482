"""A step of few tokens leaves torch's team of threads to the compiled library, and gives it back."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compressor.kernels.cpu import Library, library
from compressor.kernels.cpu.reserved_threads import FEW_CACHED, FEW_TOKENS, reserve_for_few, reserved_threads
from compressor.kernels.ops.dense_product import MOST_ROWS
from compressor.kernels.ops.linear import BYTES_A_THREAD, threads_for
from compressor.kernels.prepared.dispatch import Choice
from compressor.kernels.prepared.prepare import prepare
from compressor.kernels.prepared.prepared_dense import PreparedDense
from compressor.layers.packed_linear import PackedLinear

pytestmark = pytest.mark.skipif(not isinstance(library(), Library), reason=f"{library()}")
THREADS = 4
LARGE = 100 * BYTES_A_THREAD


class Cache:
    def __init__(self, length):
        self.length = length

    def get_seq_length(self):
        return self.length


class Model(nn.Module):
    """It returns the threads of torch's operations and of the library, and may run another model or fail within."""

    def __init__(self, inner=None):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids=None, inputs_embeds=None, past_key_values=None, fail=False):
        if self.inner is not None:
            self.inner(input_ids)
        if fail:
            raise RuntimeError("within")
        return torch.get_num_threads(), threads_for(LARGE)


@pytest.fixture(autouse=True)
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    assert (torch.get_num_threads(), reserved_threads()) == (THREADS, 0)
    torch.set_num_threads(before)


def made(inner=None):
    model = Model(inner)
    reserve_for_few(model)
    return model


def tokens(sequences, length):
    return torch.zeros(sequences, length, dtype=torch.int64)


@pytest.mark.parametrize(
    "given",
    [
        {"input_ids": tokens(1, 1)},
        {"input_ids": tokens(FEW_TOKENS // THREADS, 1)},
        {"input_ids": None, "inputs_embeds": torch.zeros(2, 1, 8)},
        {"input_ids": tokens(2, 1), "past_key_values": Cache(FEW_CACHED // THREADS // 2 - 1)},
    ],
    ids=["one", "most", "vectors", "longest"],
)
def test_few_tokens_leave_the_team_to_the_library(given):
    assert made()(**given) == (1, THREADS)


@pytest.mark.parametrize("rows, threads", [(1, 1), (MOST_ROWS[torch.float32] + 1, THREADS)])
def test_a_dense_product_of_torch_has_all_threads(rows, threads, monkeypatch):
    layer = PreparedDense(nn.Linear(8, 8).requires_grad_(False), Choice("cpu library", "linear_dense", ()))
    found = []
    monkeypatch.setattr(F, "linear", lambda *given: found.append(torch.get_num_threads()))
    model = made()
    model.forward = lambda input_ids: (layer(torch.zeros(rows, 8)), found.append(torch.get_num_threads()))
    model(tokens(1, 1))
    assert found == ([1] if rows == 1 else [threads, 1])


def prepared(**more):
    model = nn.ModuleDict({"layer": PackedLinear.pack(torch.zeros(8, 64, dtype=torch.int8), torch.ones(8, 1),
        None, bits=4, group_size=64, symmetric=True), **more})  # fmt: skip
    prepare(model)
    return model


def test_a_model_with_large_weights_of_torch_reserves_nothing():
    assert prepared()._forward_pre_hooks and prepared(embeddings=nn.Embedding(2048, 256))._forward_pre_hooks
    assert prepared(head=nn.Linear(256, 2048))._forward_pre_hooks
    assert not prepared(other=nn.Conv1d(512, 512, 1))._forward_pre_hooks


@pytest.mark.parametrize(
    "given",
    [
        {"input_ids": tokens(1, FEW_TOKENS // THREADS + 1)},
        {"input_ids": tokens(2, 1), "past_key_values": Cache(FEW_CACHED // THREADS // 2)},
        {"input_ids": None},
        {"input_ids": tokens(1, 0)},
    ],
    ids=["tokens", "cache", "unknown", "none"],
)
def test_more_work_or_unknown_work_shares_it(given):
    assert made()(**given) == (THREADS, THREADS)


def test_one_thread_stays_one():
    torch.set_num_threads(1)
    assert made()(tokens(1, 1)) == (1, 1)
    torch.set_num_threads(THREADS)


def test_the_team_is_given_back_after_an_error_and_by_the_outer_of_two_models():
    with pytest.raises(RuntimeError, match="within"):
        made()(tokens(1, 1), fail=True)
    assert torch.get_num_threads() == THREADS
    assert made(inner=made())(tokens(1, 1)) == (1, THREADS)


def test_a_model_reserves_once_and_so_does_its_copy():
    model = made()
    reserve_for_few(model)
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
    reserve_for_few(copied := copy.deepcopy(model))
    assert len(copied._forward_pre_hooks) == 1 and copied(tokens(1, 1)) == (1, THREADS)
