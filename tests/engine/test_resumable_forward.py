"""A forward that pauses and resumes computes the same as a forward from the start, each operation once."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import tiny
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from compressor.engine.resumable_forward import Diverged, Forgotten, RecordedForward, advance, needs, run_on
from compressor.model.block_runner import Pieces, Stop
from compressor.model.probe_model import example_batch, use_eager_experts
from compressor.model.structure import find_blocks


class Counted(TorchFunctionMode):
    """Counts calls of one function that are really computed."""

    def __init__(self, func):
        super().__init__()
        self.func, self.count = func, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func is self.func
        return func(*args, **(kwargs or {}))


class Block(nn.Module):
    """Two products around an expensive middle; `touch` may do something unusual there."""

    def __init__(self, touch=lambda x: x):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.touch = touch

    def forward(self, x):
        with torch.no_grad():
            y = torch.tanh(self.first(x))
            big = torch.cat([y, y])  # not used after the pause
            z = self.touch(big[: len(x)].clone())
            return self.second(z) + x


def named(block):
    return {name: p for name, p in block.named_parameters() if p.dim() > 1}


def pauses_at(name):
    return lambda call: call.parameter == name


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Block().requires_grad_(False)


X = torch.linspace(-1, 1, 12).view(3, 4)


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_a_block_that_pauses_at_every_product_computes_the_same_bits(family):
    model = tiny.build(family, dtype=torch.bfloat16).requires_grad_(False)
    model.config.use_cache = False
    use_eager_experts(model.config)
    pieces = Pieces(model, find_blocks(model))
    hidden, calls = pieces.embeddings(example_batch(model, torch.device("cpu")))
    block = pieces.blocks[0]
    watched = named(block)
    work = partial(pieces.block, 0, hidden, calls[0])
    expected = work()
    recorded, seen = RecordedForward(), []
    while True:
        known = set(seen)
        reached = advance(recorded, watched, work, lambda call, known=known: call.parameter not in known)
        if reached is None:
            break
        seen.append(reached.parameter)
        went_on = run_on(recorded, watched, work, lambda call: None)
        assert torch.equal(went_on, expected)
        if recorded.is_spent:  # this family changes tensors that are kept: start again, as the sweep does
            recorded = RecordedForward()
    assert set(seen) == set(watched)


def test_what_lies_before_the_halt_is_computed_once(block):
    recorded, work = RecordedForward(), partial(block, X)
    with Counted(torch.tanh) as counted:
        advance(recorded, named(block), work, pauses_at("second.weight"))
        run_on(recorded, named(block), work, lambda call: None)
        run_on(recorded, named(block), work, lambda call: None)
    assert counted.count == 1
    assert recorded.passed == {"first.weight"}


def test_a_weight_changed_at_the_halt_is_the_one_that_multiplies(block):
    recorded, work = RecordedForward(), partial(block, X)
    call = advance(recorded, named(block), work, pauses_at("second.weight"))
    block.second.weight.zero_()
    assert torch.equal(run_on(recorded, named(block), work, lambda call: None), block.second.bias + X)
    assert torch.equal(call.input, torch.tanh(block.first(X)))


def test_only_what_the_frames_refer_to_is_kept(block):
    recorded = RecordedForward()
    advance(recorded, named(block), partial(block, X), pauses_at("second.weight"))
    shapes = sorted(tuple(t.shape) for t in recorded.kept())
    assert shapes == [(3, 4), (3, 4), (6, 4)]  # y, z and big are locals of forward; the products are not
    assert recorded.nbytes == 4 * (12 + 12 + 24)


def test_what_is_kept_is_let_go_when_the_pass_goes_on(block):
    recorded, work = RecordedForward(), partial(block, X)
    call = advance(recorded, named(block), work, pauses_at("second.weight"))
    held = weakref.ref(recorded.kept()[0])
    del call
    gc.disable()
    try:
        assert advance(recorded, named(block), work, pauses_at("nothing")) is None
        assert recorded.is_spent and held() is None
    finally:
        gc.enable()


def test_a_forward_that_goes_another_way_is_noticed():
    ways = iter([torch.sin, torch.cos])
    block = Block(touch=lambda x: next(ways)(x)).requires_grad_(False)
    recorded = RecordedForward()
    advance(recorded, named(block), partial(block, X), pauses_at("second.weight"))
    with pytest.raises(Diverged):
        run_on(recorded, named(block), partial(block, X), lambda call: None)


def test_a_fault_before_the_halt_sends_the_caller_back_to_the_start(block):
    recorded = RecordedForward()
    advance(recorded, named(block), partial(block, X), pauses_at("second.weight"))

    def faulty():
        raise ValueError("out of reach of the recorded")

    with pytest.raises(Diverged) as caught:
        run_on(recorded, named(block), faulty, lambda call: None)
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(ValueError):
        run_on(RecordedForward(), named(block), faulty, lambda call: None)


def test_writing_into_what_is_kept_spends_the_tape():
    class InPlace(Block):
        def forward(self, x):
            y = torch.tanh(self.first(x))
            return y.add_(self.second(y))

    block = InPlace().requires_grad_(False)
    expected = block(X)
    recorded = RecordedForward()
    advance(recorded, named(block), partial(block, X), pauses_at("second.weight"))
    assert torch.equal(run_on(recorded, named(block), partial(block, X), lambda call: None), expected)
    assert recorded.is_spent


def test_running_on_may_be_stopped_and_repeated(block):
    recorded, work = RecordedForward(), partial(block, X)
    advance(recorded, named(block), work, pauses_at("first.weight"))
    inputs = []

    def visit(call):
        inputs.append(call.input)
        if call.parameter == "second.weight":
            raise Stop

    assert run_on(recorded, named(block), work, visit) is None
    assert len(inputs) == 2 and not recorded.is_spent
    assert torch.equal(run_on(recorded, named(block), work, lambda call: None), block(X))


def test_what_the_rest_never_reads_is_let_go(block):
    work = partial(block, X)
    first, second = RecordedForward(), RecordedForward()
    advance(first, named(block), work, pauses_at("second.weight"))
    needed = needs(first, work)
    assert not first.is_spent and len(first.kept()) == 3  # looking changes nothing
    advance(second, named(block), work, pauses_at("second.weight"))
    assert first.calls == second.calls
    second.keep_only(needed)
    assert [tuple(t.shape) for t in second.kept()] == [(3, 4)]  # z, the input of the product
    assert torch.equal(run_on(second, named(block), work, lambda call: None), block(X))


def test_reading_what_was_let_go_is_noticed(block):
    recorded, work = RecordedForward(), partial(block, X)
    advance(recorded, named(block), work, pauses_at("second.weight"))
    recorded.keep_only(frozenset())
    with pytest.raises(Diverged, match="reads"):
        run_on(recorded, named(block), work, lambda call: None)


def test_returning_what_was_let_go_is_noticed():
    class Returns(Block):
        def forward(self, x):
            y = torch.tanh(self.first(x))
            self.second(x)
            return y

    block = Returns().requires_grad_(False)
    recorded, work = RecordedForward(), partial(block, X)
    advance(recorded, named(block), work, pauses_at("second.weight"))
    assert len(needs(recorded, work)) == 1
    recorded.keep_only(frozenset())
    with pytest.raises(Diverged, match="returns"):
        run_on(recorded, named(block), work, lambda call: None)


def test_a_forgotten_tensor_can_not_be_computed_with():
    with pytest.raises(Diverged):
        torch.empty(0).as_subclass(Forgotten) + 1
