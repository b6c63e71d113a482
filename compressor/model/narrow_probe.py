"""Chooses configs of probe models whose widths are small, so that structure is found in seconds at any size.

The structure of a model doesn't depend on its widths. So a probe model has the heads, experts, kinds of blocks and
modules of the model, and a fraction of its widths: the hidden width, the width of a head and the width of an MLP are
divided by one power of two. No family is named. Which keys of a config are widths is guessed by their names, and the
guess is checked (`_stands_for`): the narrow model has the same modules and parameters, every axis of a block's
parameter is the model's own divided by a whole number, and the narrow model runs. A factor that fails is dropped, and
the next smaller one is tried. At last the probe has the model's own widths.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import tee
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from compressor.model.block_runner import Pieces, output_of
from compressor.model.class_changes import MODULES, SHAPES
from compressor.model.narrow_shapes import divide_shapes, divisor
from compressor.model.probe_model import (
    Kind,
    example_batch,
    make_probe_model,
    shallow_config,
    shorten_vocabulary,
    signature,
    with_parts,
)
from compressor.model.remembered import config_key
from compressor.model.reshaped_class import is_reshaped

SMALL = 1 << 22  # entries of a probe model that is used as it is; 32 MiB in float64
LEAST_HEAD = 4  # values of a head: rotary embeddings need an even number, also of a part of it
LEAST_WIDTH = 32  # of the residual stream
LARGEST_FACTOR = 64

# The names of widths in configs; those of a head; and those of an MLP.
WIDTHS = re.compile(r"hidden|intermediate|inner|ffn|embd|rank|lru|mlp|^d_|dim(_|$)|embed(ding)?_size|head_size")
OTHERS = re.compile(
    r"^n(um)?_(?!embd|inner)|vocab|position|token|act|layer(s|_)(?!input)|heads|experts|drop|prob|bias|norm|init|coef"
    r"|conv|kernel|loss"
)
HEADS = re.compile(r"head.*dim|head_size|^d_kv$|rotary_dim")
UNITS = re.compile(r"intermediate|inner|ffn|mlp|^d_ff$")
SECTIONS = "mrope_section"  # the parts of a head in the rotary settings


@dataclass(frozen=True)
class Probe:
    """A config of a probe model, and what it stands for.

    config    of the probe model
    empty     the probe model on the meta device
    kinds     of its blocks: the signatures of the model's own blocks
    shapes    parameter -> its shape in the probe model
    width     of the residual stream; None if the config has no such key
    is_whole  it has the model's own widths
    """

    config: PretrainedConfig
    empty: PreTrainedModel
    kinds: tuple[Kind, ...]
    shapes: Mapping[str, tuple[int, ...]]
    width: int | None
    is_whole: bool

    @property
    def is_large(self) -> bool:
        """Whether it takes real time and memory to run."""
        return self.is_whole and sum(parameter.numel() for parameter in self.empty.parameters()) > SMALL

    def first_of(self, kind: Kind) -> int:
        """The number of the first block of a kind."""
        return self.kinds.index(kind)


class Probes:
    """The probes of one model. Each is made once, when it is first asked for.

    model  may be on the meta device: its weights are not read
    dtype  of the models of the probes on the meta device
    """

    def __init__(self, model: PreTrainedModel, pieces: Pieces, dtype: torch.dtype) -> None:
        self.model, self.pieces, self.dtype = model, pieces, dtype
        self._narrow: dict[bool, Iterator[Probe]] = {}

    @cached_property
    def whole(self) -> Probe:
        """The probe that has the model's own widths."""
        config = shallow_config(self.model.config, self.model, self.pieces)
        empty = make_probe_model(type(self.model), config, torch.device("meta"), self.dtype)
        blocks = _blocks(empty, self.pieces.blocks_path)
        kinds = tuple(signature(config, block, index) for index, block in enumerate(blocks))
        return Probe(config, empty, kinds, _shapes(empty), width_of(config), is_whole=True)

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """What the probes depend on, as a part of a key of `remembered`."""
        return type(self.model), config_key(self.model.config), self.dtype, self.pieces.blocks_path

    @property
    def narrowest(self) -> Probe:
        return next(self.narrow(), self.whole)

    def narrow(self, *, keeps_units: bool = False) -> Iterator[Probe]:
        """Narrower probes, the narrowest first; none of a small model.

        keeps_units  MLPs keep their widths
        """
        if keeps_units not in self._narrow:
            self._narrow[keeps_units] = _narrow_probes(self.whole, self.pieces.blocks_path, keeps_units)
        self._narrow[keeps_units], probes = tee(self._narrow[keeps_units])  # the one that is kept stays at the first
        return probes


def _narrow_probes(whole: Probe, path: str, keeps_units: bool) -> Iterator[Probe]:
    if not whole.is_large:
        return
    for factor in _factors(whole.config):
        config = narrow_config(type(whole.empty), whole.config, factor, keeps_units)
        empty = None if config is None else _if_it_fits(config, whole, path)
        if config is not None and empty is not None:
            yield Probe(config, empty, whole.kinds, _shapes(empty), width_of(config), is_whole=False)


def narrow_config(
    cls: type[PreTrainedModel], config: PretrainedConfig, factor: int, keeps_units: bool = False
) -> PretrainedConfig | None:
    """The config with its widths divided by a factor, and a small vocabulary; None if some shape can't be divided."""
    narrow = copy.deepcopy(config)
    for part in with_parts(narrow):
        for key, value in list(vars(part).items()):
            if key not in (SHAPES, MODULES) and not key.startswith("_"):
                divided = _divided(key, value, factor, keeps_units)
                if divided != value:
                    setattr(part, key, divided)
    shorten_vocabulary(narrow)
    if not is_reshaped(config):
        return narrow
    return narrow if divide_shapes(cls, config, narrow) else None


def _divided(key: str, value: Any, factor: int, keeps_units: bool) -> Any:
    if isinstance(value, dict):
        return {name: _divided(str(name), other, factor, keeps_units) for name, other in value.items()}
    if isinstance(value, list):
        return [_divided(key, other, factor, keeps_units) for other in value]
    is_width = key == SECTIONS or (_is_width(key, value) and not (keeps_units and UNITS.search(key)))
    return value // factor if is_width and type(value) is int and value % factor == 0 else value


def _is_width(key: str, value: Any, names: re.Pattern[str] = WIDTHS) -> bool:
    is_number = type(value) is int and value > 0
    return is_number and names.search(key) is not None and OTHERS.search(key) is None


def _factors(config: PretrainedConfig) -> Iterator[int]:
    """Powers of two by which widths may be divided, the largest first."""
    width, text = width_of(config), config.get_text_config()
    heads = [value for part in with_parts(config) for key, value in vars(part).items() if _is_width(key, value, HEADS)]
    count = getattr(text, "num_attention_heads", None)
    if width is not None and not heads and type(count) is int and count > 0:
        heads = [width // count]
    factor = LARGEST_FACTOR
    while width is not None and factor > 1:
        if width % factor == 0 and width // factor >= LEAST_WIDTH and all(n // factor >= LEAST_HEAD for n in heads):
            yield factor
        factor //= 2


def width_of(config: PretrainedConfig) -> int | None:
    """The width of the residual stream that a config states."""
    width = getattr(config.get_text_config(), "hidden_size", None)
    return width if type(width) is int else None


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.named_parameters(remove_duplicate=False)}


def _blocks(model: nn.Module, path: str) -> list[nn.Module]:
    return list(model.get_submodule(path).children())


def _if_it_fits(config: PretrainedConfig, whole: Probe, path: str) -> PreTrainedModel | None:
    """A narrow probe model on the meta device; None if it doesn't stand for the whole one, or can't run."""
    cls, dtype = type(whole.empty), whole.empty.dtype
    try:
        empty = make_probe_model(cls, config, torch.device("meta"), dtype)
        if not _stands_for(empty, whole, path):
            return None
        probe = make_probe_model(cls, config, torch.device("cpu"), torch.float32, empty)
        with torch.no_grad():
            output = output_of(probe(**example_batch(probe, torch.device("cpu"))))
        return empty if bool(torch.isfinite(output).all()) else None
    except Exception:  # any: the class rejects these widths, and the next are nearer to its own
        return None


def _stands_for(narrow: PreTrainedModel, whole: Probe, path: str) -> bool:
    """Whether two models differ only in their widths, by whole factors in their blocks, and have the same blocks."""
    modules = [{name: type(module) for name, module in model.named_modules()} for model in (narrow, whole.empty)]
    small, large = _shapes(narrow), whole.shapes
    if modules[0] != modules[1] or small.keys() != large.keys():
        return False
    if not all(divisor(small[name], large[name]) for name in large if name.startswith(path + ".")):
        return False
    found = [signature(narrow.config, block, index) for index, block in enumerate(_blocks(narrow, path))]
    return len(set(zip(found, whole.kinds))) == len(set(found)) == len(set(whole.kinds))
