"""Makes a probe model: a small model of the same class with random weights, on which structure is found."""

from __future__ import annotations

import copy
from typing import Any

import psutil
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from compressor.errors import ModelError, PreflightError
from compressor.model.block_runner import Batch, Pieces
from compressor.model.load_dtypes import hold_as_loaded
from compressor.model.meta_init import quick_on_meta
from compressor.model.module_names import block_number, is_inside, with_prefix
from compressor.model.reshaped_class import is_reshaped, reshaping
from compressor.model.tying import declared_ties

PROBE_TOKENS = 12
PROBE_SEED = 0
PROBE_VOCABULARY = 256  # of a probe model with few tokens; all rows of an embedding or output head work alike

Kind = tuple[Any, ...]  # `signature` of a block


def shallow_config(config: PretrainedConfig, model: PreTrainedModel, pieces: Pieces) -> PretrainedConfig:
    """The config with the smallest number of blocks that has every kind of block (at least two if the model has two).

    These are the first blocks. Of a sliced model, the last block, often the only one of its widths, may be added. A
    class whose blocks share parameters may refuse a model in which nothing is shared (Zamba), so the first block that
    repeats a parameter is one of them.
    """
    count = len(pieces)
    kinds = [signature(config, block, index) for index, block in enumerate(pieces.blocks)]
    depth = max(
        min(2, count), _first_repeat(model, pieces.blocks_path) + 1, *(kinds.index(kind) + 1 for kind in set(kinds))
    )
    if depth == count > 2 and is_reshaped(config):
        before = max(kinds.index(kind) + 1 for kind in set(kinds[:-1]))
        shorter = _with_blocks(config, [*range(before), count - 1], count, pieces.blocks_path)
        probe = make_probe_model(type(model), shorter, torch.device("meta"), model.dtype)
        blocks = Pieces(probe, pieces.blocks_path).blocks
        shown = [signature(shorter, block, index) for index, block in enumerate(blocks)]
        follows = _widths(config, pieces, before - 1)[-1:] == _widths(config, pieces, count - 1)[:1]
        if follows and shown == [*kinds[:before], kinds[-1]]:
            return shorter
    return _with_blocks(config, list(range(depth)), count, pieces.blocks_path)


def _first_repeat(model: PreTrainedModel, path: str) -> int:
    """The number of the first block that is tied to a parameter of another one; 0 if there is none."""
    pairs = [(block_number(name, path), block_number(source, path)) for name, source in declared_ties(model).items()]
    return min((max(one, other) for one, other in pairs if one is not None and other is not None), default=0)


def _with_blocks(config: PretrainedConfig, chosen: list[int], count: int, path: str) -> PretrainedConfig:
    """The config with only these of its blocks. Only the last of them may change its number."""
    shallow = copy.deepcopy(config)
    text = shallow.get_text_config()
    for key, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == count:
            setattr(text, key, [value[index] for index in chosen])
    passes = getattr(text, "num_hidden_layers", count)
    text.num_hidden_layers = (
        len(chosen) + passes - count
    )  # a model that runs blocks more than once keeps the additional runs
    if is_reshaped(config) and chosen[-1] != len(chosen) - 1:
        old, new = f"{path}.{chosen[-1]}", f"{path}.{len(chosen) - 1}"
        for entries in reshaping(shallow):
            for name in [name for name in entries if is_inside(name, new)]:
                del entries[name]
            moved = {with_prefix(name, old, new): entry for name, entry in entries.items() if is_inside(name, old)}
            entries.update(moved)
    return shallow


def _widths(config: PretrainedConfig, pieces: Pieces, index: int) -> list[int]:
    """The stream's widths in a rotated block; [] for another block."""
    return reshaping(config)[1].get(f"{pieces.blocks_path}.{index}", {}).get("shape", [])


def make_probe_model(
    cls: type[PreTrainedModel],
    config: PretrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    empty: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """The model of `config`, with parameters on the meta device, or seeded random ones on another device.

    empty   that model on the meta device, if it is known
    raises  PreflightError if they don't fit into memory
    """
    config = run_in_pieces(config)
    if device.type == "meta":
        with device, quick_on_meta():
            probe = cls._from_config(config, dtype=dtype)
    else:
        _check_room(cls, config, dtype, empty)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(PROBE_SEED)
            probe = cls._from_config(config, dtype=dtype)
    hold_as_loaded(probe, dtype)
    return probe.eval().requires_grad_(False)


def _check_room(
    cls: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype, empty: PreTrainedModel | None
) -> None:
    """raises PreflightError for parameters that don't fit into memory, before the system kills the process"""
    if empty is None:
        try:
            with torch.device("meta"), quick_on_meta():
                empty = cls._from_config(config, dtype=dtype)
        except Exception:  # a class that reads values while it is made; an error shows when it is made
            return
    needed, there = sum(p.nbytes for p in empty.parameters()), psutil.virtual_memory().available
    if needed > there:
        raise PreflightError(
            f"a probe model with a few of its blocks needs {needed:,} bytes of memory, {there:,} are available",
            where=cls.__name__,
            hint="Free memory on this machine, or use one with more.",
            data={"needed": needed, "available": there},
        )


def example_batch(model: PreTrainedModel, device: torch.device, samples: int = 2, tokens: int = PROBE_TOKENS) -> Batch:
    """Seeded random inputs of the kind that the model reads: token ids or pixels.

    raises  ModelError for a model that reads other inputs, or both of them in two towers
    """
    refuse_two_towers(model)
    generator = torch.Generator().manual_seed(PROBE_SEED)
    config = model.config
    if model.main_input_name == "input_ids":
        ids = torch.randint(0, config.get_text_config().vocab_size, (samples, tokens), generator=generator)
        return {"input_ids": ids.to(device)}
    if model.main_input_name == "pixel_values":
        seen = config if hasattr(config, "image_size") else getattr(config, "vision_config", config)
        if not hasattr(seen, "image_size"):
            raise ModelError(
                "its config.json has no size of the images",
                where=type(model).__name__,
                hint="Add `image_size` to config.json, or to its `vision_config`.",
                data={"reason": "no-image-size"},
            )
        size = seen.image_size if isinstance(seen.image_size, (tuple, list)) else (seen.image_size,) * 2
        pixels = torch.randn(samples, getattr(seen, "num_channels", 3), *size, generator=generator)
        return {"pixel_values": pixels.to(device=device, dtype=model.dtype)}
    raise ModelError(
        f"its main input is {model.main_input_name!r}, not token ids or pixels",
        where=type(model).__name__,
        hint="Choose a model that reads token ids (input_ids) or pixels (pixel_values).",
        data={"input": model.main_input_name},
    )


def refuse_two_towers(model: PreTrainedModel) -> None:
    """raises ModelError for a model with a text tower and an image tower, such as CLIP"""
    parts = [name for name in ("text_config", "vision_config") if getattr(model.config, name, None) is not None]
    towers = [name for name in ("text_model", "vision_model") if isinstance(getattr(model, name, None), nn.Module)]
    if len(parts) == 2 and len(towers) == 2:
        raise ModelError(
            "reads texts and images in two towers, and only one stack of blocks can be compressed at a time",
            where=type(model).__name__,
            hint="Save one tower as a model of its own, for example model.text_model.save_pretrained(DIR).",
            data={"reason": "two-towers"},
        )


def shorten_vocabulary(config: PretrainedConfig) -> None:
    """Give a config at most PROBE_VOCABULARY tokens, in place."""
    text = config.get_text_config()
    if getattr(text, "vocab_size", 0) > PROBE_VOCABULARY:
        text.vocab_size = PROBE_VOCABULARY
        if (getattr(text, "pad_token_id", None) or 0) >= PROBE_VOCABULARY:
            text.pad_token_id = None


def signature(config: PretrainedConfig, block: nn.Module, index: int) -> Kind:
    """Blocks of the same signature do the same matmuls on the same shapes."""
    kinds = getattr(config.get_text_config(), "layer_types", None)
    shapes = tuple(sorted((name, tuple(p.shape)) for name, p in block.named_parameters()))
    kind = kinds[index] if isinstance(kinds, (list, tuple)) and index < len(kinds) else None
    return (type(block).__name__, kind, shapes)


def run_in_pieces(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of the config for a model whose blocks run one by one, and more than once on the same input.

    It has no cache, also not in a config inside it (the language model of a model of images and text), since each run
    of a block would append to the cache. Experts run one at a time, so that the tokens of each expert can be observed.
    """
    config = copy.deepcopy(config)
    for part in with_parts(config):
        part.use_cache = False
    use_eager_experts(config)
    return config


def with_parts(config: PretrainedConfig) -> list[PretrainedConfig]:
    """The config and every config inside it."""
    inner = [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
    return [config, *(part for value in inner for part in with_parts(value))]


def use_eager_experts(config: PretrainedConfig) -> None:
    """Run one expert at a time, so that the tokens of each expert can be observed."""
    for part in with_parts(config):
        if hasattr(part, "_experts_implementation"):
            part._experts_implementation = "eager"
