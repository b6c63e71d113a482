"""Finds by running a model how many tokens it accepts in one sample.

`max_position_embeddings` is not reliable: a model may reserve rows of its position embedding for padding (RoBERTa has
two positions fewer), or not have the key. So the embeddings run on the CPU with parameters that need no memory, where
a missing row is an error. A shallow probe model runs on the meta device, where a mask or bias of another size is one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from compressor.model.block_runner import Pieces
from compressor.model.empty_model import skeleton
from compressor.model.probe_model import PROBE_TOKENS, make_probe_model, shallow_config
from compressor.model.remembered import config_key, remembered
from compressor.model.structure import find_blocks

Runs = Callable[[int], bool]
Limit = Callable[
    [int], int | None
]  # number of tokens -> None if a model accepts them in one sample, else the largest number that it accepts


def token_limit(cls: type[PreTrainedModel], config: PretrainedConfig, length: int) -> int | None:
    """None if a model of this class accepts samples of `length` tokens, or reads no tokens; else its limit."""
    return _limit(cls, config, lambda: skeleton(cls, config, torch.float32), length)


def limit_of(model: PreTrainedModel) -> Limit:
    """`token_limit` of a model's class and config."""
    return partial(_limit, type(model), model.config, lambda: model)


def _limit(
    cls: type[PreTrainedModel], config: PretrainedConfig, empty: Callable[[], PreTrainedModel], length: int
) -> int | None:
    """empty: the model on the meta device"""
    if cls.main_input_name != "input_ids":
        return None
    stated = getattr(config.get_text_config(), "max_position_embeddings", None)
    most = min(length, stated) if isinstance(stated, int) and stated > 0 else length
    for runs in remembered(("tokens", cls, config_key(config)), lambda: _probes(empty())):
        if runs(min(PROBE_TOKENS, most)) and not runs(most):  # if it can't run on few tokens, there is no answer
            most = _largest(runs, min(PROBE_TOKENS, most), most)
    return None if most == length else most


def _largest(runs: Runs, good: int, bad: int) -> int:
    """The largest number that runs, given one that does and a larger one that doesn't."""
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if runs(middle) else (good, middle)
    return good


def _probes(model: PreTrainedModel) -> list[Runs]:
    """Whether a number of tokens runs, by each of two shallow probe models of a model on the meta device."""
    cls, config = type(model), model.config
    shallow = shallow_config(config, model, Pieces(model, find_blocks(model)))
    start = skeleton(cls, shallow, torch.float32)
    for module in start.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            zeros = torch.zeros((), dtype=parameter.dtype).expand(
                parameter.shape
            )  # one number, repeated without memory
            setattr(module, name, nn.Parameter(zeros, requires_grad=False))
    pieces = Pieces(start, find_blocks(start))
    whole = make_probe_model(cls, shallow, torch.device("meta"), torch.float32)
    padding = getattr(config.get_text_config(), "pad_token_id", None)
    token = 2 if padding == 1 else 1  # a padding token has no position

    def start_runs(count: int) -> bool:
        return _succeeds(lambda: pieces.embeddings({"input_ids": torch.full((1, count), token)}))

    def whole_runs(count: int) -> bool:
        return _succeeds(lambda: whole(input_ids=torch.full((1, count), token, device="meta")))

    return [start_runs, whole_runs]


def _succeeds(run: Callable[[], object]) -> bool:
    try:
        with torch.no_grad():
            run()
    except Exception:  # any exception of the model's code for more positions than it has
        return False
    return True
