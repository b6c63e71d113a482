"""What a shallow twin of a model shows when it runs: which parameters are multiplied, and which read the same input.

The twin is the same class at the same widths with few blocks. It runs on the meta device, or with random weights on the
CPU where an operation depends on values. Every multiplication by a parameter is noted with the identity of its input;
weights that read the same tensor form a group.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from compressor.classes import is_reshaped, reshaping
from compressor.errors import ModelError
from compressor.replay import Batch, LinearCall, LinearCalls, Pieces, output_of

TWIN_TOKENS = 12
TWIN_SEED = 0
SMALL_BYTES = 1 << 26  # what a twin of other sizes may always take


@dataclass(frozen=True)
class Product:
    """One traced multiplication inside a block (names relative to it) or in the head (full names)."""

    parameter: str
    transposed: bool
    fused_experts: bool


Groups = dict[tuple[Any, ...], tuple[tuple[Product, ...], ...]]  # products of each kind of block, by signature
Traced = tuple[Groups, tuple[Product, ...], set[str], tuple[Product, ...]]


def trace(cls: type[PreTrainedModel], config: PretrainedConfig, path: str, dtype: torch.dtype) -> Traced:
    """Run a twin of `config` once and note what it multiplies; `path` is that of the block list.

    returns  products of each kind of block by signature, grouped by input in forward order; those of the head; the
             modules outside the blocks that the stem didn't use; and the tables that the stem looks rows up in
    raises   whatever the model's code raises when it is run in stem, blocks and head
    """
    try:
        return _trace_twin(make_twin(cls, config, torch.device("meta"), dtype), path)
    except (NotImplementedError, RuntimeError, TypeError, IndexError, ValueError, AttributeError):
        pass  # an operation that depends on values, or a model that can't be run so on the CPU either
    return _trace_twin(make_twin(cls, config, torch.device("cpu"), dtype), path)


def run_whole(
    cls: type[PreTrainedModel], configs: Iterable[PretrainedConfig], dtype: torch.dtype, most_bytes: int
) -> None:
    """Run the first of some twins whose random weights are small enough as a whole, as anyone who loads it would.

    raises  ValueError when the weights of each would take more than `most_bytes`, and whatever the model's code raises
    """
    for config in configs:
        needed = sum(p.nbytes for p in make_twin(cls, config, torch.device("meta"), dtype).parameters())
        if needed <= max(most_bytes, SMALL_BYTES):
            twin = make_twin(cls, config, torch.device("cpu"), dtype)
            with torch.no_grad():
                check_output(output_of(twin(**example_batch(twin, torch.device("cpu")))))
            return
    raise ValueError(f"it would take {needed:,} bytes of weights")


def check_output(output: Tensor) -> None:
    """raises ValueError where a model with random weights computes something else than numbers"""
    if not bool(torch.isfinite(output).all()):
        raise ValueError("its output with random weights is NaN or Inf")


def _trace_twin(twin: PreTrainedModel, path: str) -> Traced:
    device = next(twin.parameters()).device
    pieces = Pieces(twin, path)
    batch = example_batch(twin, device)
    used: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda _m, _a, name=name: used.append(name))
        for name, module in twin.named_modules()
        if any(True for _ in module.parameters(recurse=False)) and not name.startswith(path + ".")
    ]
    outside = [name for name, module in twin.named_modules() if any(True for _ in module.parameters(recurse=False))]
    outside = [name for name in outside if not name.startswith(path + ".")]
    try:
        hidden, calls = pieces.stem(batch)
        before = set(used)
        groups: Groups = {}
        for index, call in enumerate(calls):
            block = pieces.blocks[index]
            found: list[LinearCall] = []
            with LinearCalls(dict(block.named_parameters()), found.append):
                hidden = pieces.block(index, hidden, call)
            groups.setdefault(signature(twin.config, block, index), _grouped(found, dict(block.named_parameters())))
        found = []
        watched = {n: p for n, p in twin.named_parameters() if not n.startswith(path + ".")}
        with LinearCalls(watched, found.append):
            pieces.head(batch, hidden)
    finally:
        for handle in handles:
            handle.remove()
    head = [call for call in found if twin.get_parameter(call.parameter).dim() == 2]
    names = {id(p): n for n, p in twin.named_parameters(remove_duplicate=True)}
    products = []
    output = twin.get_output_embeddings()
    for found_call in head:
        name = found_call.parameter
        if output is not None and names[id(output.weight)] == names[id(twin.get_parameter(name))]:
            name = next(n for n, m in twin.named_modules() if m is output) + ".weight"
        product = Product(name, found_call.transposed, False)
        owner = name.rpartition(".")[0]
        if product not in products and owner not in before:
            products.append(product)
    # a subclass may scale, shift or mask what it looks up, which a form that stands in for nn.Embedding wouldn't
    looked_up = [
        name for name in dict.fromkeys(used) if name in before and type(twin.get_submodule(name)) is nn.Embedding
    ]
    tables = tuple(Product(f"{name}.weight", False, False) for name in looked_up)
    return groups, tuple(products), {name for name in outside if name not in before}, tables


def _grouped(calls: list[LinearCall], parameters: dict[str, nn.Parameter]) -> tuple[tuple[Product, ...], ...]:
    """Products by identity of what they read. Experts of one fused parameter form one entry."""
    groups: dict[Any, list[Product]] = {}
    numbers = itertools.count()
    seen: set[str] = set()
    for call in calls:
        if call.parameter in seen:
            continue
        seen.add(call.parameter)
        fused = parameters[call.parameter].dim() == 3
        x = call.input
        key = next(numbers) if fused else (x.untyped_storage()._cdata, x.storage_offset(), x.numel(), x._version)
        groups.setdefault(key, []).append(Product(call.parameter, call.transposed, fused))
    return tuple(tuple(group) for group in groups.values())


def shallow_config(config: PretrainedConfig, model: PreTrainedModel, pieces: Pieces) -> PretrainedConfig:
    """The config with the fewest blocks that still show every kind of block (at least two where there are two).

    These are the first ones, but of a sliced model the last block, often the only one of its widths, may follow on few.
    """
    count = len(pieces)
    kinds = [signature(config, block, index) for index, block in enumerate(pieces.blocks)]
    depth = max(min(2, count), *(kinds.index(kind) + 1 for kind in set(kinds)))
    if depth == count > 2 and is_reshaped(config):
        before = max(kinds.index(kind) + 1 for kind in set(kinds[:-1]))
        shorter = _with_blocks(config, [*range(before), count - 1], count, pieces.blocks_path)
        twin = make_twin(type(model), shorter, torch.device("meta"), model.dtype)
        blocks = Pieces(twin, pieces.blocks_path).blocks
        shown = [signature(shorter, block, index) for index, block in enumerate(blocks)]
        follows = _widths(config, pieces, before - 1)[-1:] == _widths(config, pieces, count - 1)[:1]
        if follows and shown == [*kinds[:before], kinds[-1]]:
            return shorter
    return _with_blocks(config, list(range(depth)), count, pieces.blocks_path)


def _with_blocks(config: PretrainedConfig, chosen: list[int], count: int, path: str) -> PretrainedConfig:
    """The config with these of its blocks alone; only the last of them may be out of its place."""
    shallow = copy.deepcopy(config)
    text = shallow.get_text_config()
    for key, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == count:
            setattr(text, key, [value[index] for index in chosen])
    text.num_hidden_layers = len(chosen)
    if is_reshaped(config) and chosen[-1] != len(chosen) - 1:
        old, new = f"{path}.{chosen[-1]}", f"{path}.{len(chosen) - 1}"
        for entries in reshaping(shallow):
            for name in [name for name in entries if _inside(name, new)]:
                del entries[name]
            moved = {new + name.removeprefix(old): entry for name, entry in entries.items() if _inside(name, old)}
            entries.update(moved)
    return shallow


def _inside(name: str, block: str) -> bool:
    return name == block or name.startswith(block + ".")


def _widths(config: PretrainedConfig, pieces: Pieces, index: int) -> list[int]:
    """The stream's widths in a rotated block; of another block nothing is known."""
    return reshaping(config)[1].get(f"{pieces.blocks_path}.{index}", {}).get("shape", [])


def make_twin(
    cls: type[PreTrainedModel], config: PretrainedConfig, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """The model of `config`: parameters on the meta device, or seeded random ones elsewhere."""
    config = copy.deepcopy(config)
    config.use_cache = False
    use_eager_experts(config)
    if device.type == "meta":
        with device:
            return cls._from_config(config, dtype=dtype).eval().requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(TWIN_SEED)
        return cls._from_config(config, dtype=dtype).eval().requires_grad_(False)


def example_batch(model: PreTrainedModel, device: torch.device, samples: int = 2, tokens: int = TWIN_TOKENS) -> Batch:
    """Seeded random inputs of the kind the model takes: token ids or pixels.

    raises  ModelError for a model that reads something else, or both of them in two towers
    """
    refuse_two_towers(model)
    generator = torch.Generator().manual_seed(TWIN_SEED)
    config = model.config
    if model.main_input_name == "input_ids":
        ids = torch.randint(0, config.get_text_config().vocab_size, (samples, tokens), generator=generator)
        return {"input_ids": ids.to(device)}
    if model.main_input_name == "pixel_values":
        seen = config if hasattr(config, "image_size") else getattr(config, "vision_config", config)
        if not hasattr(seen, "image_size"):
            raise ModelError(
                "its config.json doesn't say which size the images have",
                where=type(model).__name__,
                hint="Only models with `image_size` in their config, or in its `vision_config`, are supported.",
            )
        size = seen.image_size if isinstance(seen.image_size, (tuple, list)) else (seen.image_size,) * 2
        pixels = torch.randn(samples, getattr(seen, "num_channels", 3), *size, generator=generator)
        return {"pixel_values": pixels.to(device=device, dtype=model.dtype)}
    raise ModelError(
        f"its main input is {model.main_input_name!r}",
        where=type(model).__name__,
        hint="Only models that read token ids or pixels are supported.",
    )


def refuse_two_towers(model: PreTrainedModel) -> None:
    """raises ModelError for a model of a text tower and an image tower side by side, as CLIP is"""
    parts = [name for name in ("text_config", "vision_config") if getattr(model.config, name, None) is not None]
    towers = [name for name in ("text_model", "vision_model") if isinstance(getattr(model, name, None), nn.Module)]
    if len(parts) == 2 and len(towers) == 2:
        raise ModelError(
            "reads texts and images in two towers, and only one stack of blocks can be compressed at a time",
            where=type(model).__name__,
            hint="Save the tower that is needed as a model of its own.",
        )


def signature(config: PretrainedConfig, block: nn.Module, index: int) -> tuple[Any, ...]:
    """Blocks of one signature do the same multiplications on the same shapes."""
    kinds = getattr(config.get_text_config(), "layer_types", None)
    shapes = tuple(sorted((name, tuple(p.shape)) for name, p in block.named_parameters()))
    kind = kinds[index] if isinstance(kinds, (list, tuple)) and index < len(kinds) else None
    return (type(block).__name__, kind, shapes)


def use_eager_experts(config: PretrainedConfig) -> None:
    """One expert at a time, so that each expert's own tokens can be seen."""
    for part in {id(config): config, id(config.get_text_config()): config.get_text_config()}.values():
        if hasattr(part, "_experts_implementation"):
            part._experts_implementation = "eager"
