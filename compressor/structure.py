"""Stem, blocks, head and weight groups of a model, found by running it.

What a run of a shallow twin shows (`compressor.tracing`) is put together here with the checkpoint's names. Replaying
stem, blocks and head of a random twin must give its own logits bit for bit; if not, the model is refused before any
work.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from compressor.binding import Bindings, Source, bind
from compressor.checkpoint import Checkpoint, open_checkpoint
from compressor.classes import class_for
from compressor.errors import ModelError
from compressor.model_building import (
    check_buffers,
    check_values,
    empty_on_meta,
    guarded,
    most_modules,
    parse_config,
    refusal,
)
from compressor.protocol import Group, Stage, Weight
from compressor.replay import Batch, Pieces, output_of
from compressor.tracing import (
    Product,
    Traced,
    check_output,
    example_batch,
    make_twin,
    run_whole,
    shallow_config,
    signature,
    trace,
    use_eager_experts,
)
from compressor.trusted_code import FLAG, auto_map, check_kernels, is_model_entry, required_code


@dataclass
class Structure:
    """A checkpoint, its model on the meta device, and what running it showed.

    groups             signature of a block -> its products, grouped by input, in forward order
    tables             what the stem looks rows up in, as plain nn.Embedding does
    used_after_blocks  modules outside the blocks that the twin used only after the last block, or not at all
    dtype              what stays dense
    """

    checkpoint: Checkpoint
    model: PreTrainedModel
    pieces: Pieces
    bindings: Bindings
    groups: dict[tuple[Any, ...], tuple[tuple[Product, ...], ...]]
    head_products: tuple[Product, ...]
    used_after_blocks: set[str]
    tables: tuple[Product, ...]
    dtype: torch.dtype
    _stages: dict[int, list[Stage]] = field(default_factory=dict, repr=False)

    @property
    def architecture(self) -> str:
        return type(self.model).__name__

    @property
    def block_count(self) -> int:
        return len(self.pieces)

    def stages(self, unit: int) -> list[Stage]:
        """Weight groups of a unit: 0 stem (its tables), 1..n blocks, n + 1 head; in forward order."""
        if unit not in self._stages:  # kept, because a layer may stand in for a module later
            self._stages[unit] = self._find_stages(unit)
        return self._stages[unit]

    def _find_stages(self, unit: int) -> list[Stage]:
        if unit == 0:
            return [(group,) for table in self.tables for group in self._weights("", (table,), "embedding")]
        if unit == self.block_count + 1:
            return [(group,) for product in self.head_products for group in self._weights("", (product,), "head")]
        block = self.pieces.blocks[unit - 1]
        prefix = f"{self.pieces.blocks_path}.{unit - 1}."
        stages: list[Stage] = []
        for products in self.groups[signature(self.model.config, block, unit - 1)]:
            groups = tuple(self._weights(prefix, products, None))
            stages.append(groups)
        return stages

    def weights(self) -> Iterator[tuple[int, Weight]]:
        """(unit, weight) for every matrix that can be compressed, in forward order."""
        for unit in range(self.block_count + 2):
            for stage in self.stages(unit):
                for group in stage:
                    for weight in group:
                        yield unit, weight

    @cached_property
    def unit_of(self) -> dict[str, int]:
        """Checkpoint tensor -> unit that stores it."""
        head = {product.parameter for product in self.head_products}
        units = {}
        for tensor, parameter in self.bindings.parameter_of().items():
            if parameter.startswith(self.pieces.blocks_path + "."):
                units[tensor] = 1 + int(parameter[len(self.pieces.blocks_path) + 1 :].split(".")[0])
            elif parameter in head or parameter.rpartition(".")[0] in self.used_after_blocks:
                units[tensor] = self.block_count + 1
            else:
                units[tensor] = 0
        return units

    def sources_of(self, parameter: str) -> tuple[Source, ...]:
        """The tensors that fill a parameter; those of its owner where it is tied."""
        return self.bindings.sources.get(self.bindings.tied.get(parameter, parameter), ())

    def parameters_of(self, unit: int) -> list[str]:
        """Parameter and buffer names that this unit's tensors fill."""
        names = self.bindings.parameter_of()
        return sorted({names[tensor] for tensor, at in self.unit_of.items() if at == unit})

    def _weights(self, prefix: str, products: tuple[Product, ...], role: str | None) -> Iterator[Group]:
        grouped: dict[int | None, list[Weight]] = {}
        for product in products:
            name = prefix + product.parameter
            parameter = self.model.get_parameter(name)
            kind = role or self._role(product, name, prefix)
            bias = self._bias(name)
            sources = self.bindings.sources.get(name)
            if sources is None:  # a tied head has no tensor of its own
                weight = _weight(name.removesuffix(".weight"), name, name, parameter, product, kind, bias)
                grouped.setdefault(None, []).append(weight)
                continue
            if product.fused_experts and any(source.rows is None for source in sources):
                raise ModelError(
                    "its experts are stored fused in one tensor",
                    where=sources[0].tensor,
                    hint="Only checkpoints with one tensor per expert are supported.",
                )
            for source in sources:
                weight = _weight(
                    source.tensor.removesuffix(".weight"), source.tensor, name, parameter, product, kind, bias
                )
                if source.rows is not None:
                    shape = (source.rows[1] - source.rows[0], weight.in_features)
                    weight = replace(weight, shape=shape, expert=source.expert, rows=source.rows)
                grouped.setdefault(source.expert, []).append(weight)
        for expert in sorted(grouped, key=lambda e: -1 if e is None else e):
            yield Group(tuple(grouped[expert]))

    def _bias(self, name: str) -> str | None:
        candidate = name.removesuffix("weight") + "bias"
        sources = self.bindings.sources.get(candidate) if name.endswith("weight") else None
        return sources[0].tensor if sources else None

    def _role(self, product: Product, name: str, prefix: str) -> str:
        if product.fused_experts:
            return "experts"
        if re.fullmatch(r"shortcut_\d+", product.parameter):  # of a block that is a rotated_block
            return "shortcut"
        owner, _, leaf = name.rpartition(".")
        parts = owner.split(".")
        depth = len(prefix.rstrip(".").split("."))
        classes = [type(self.model.get_submodule(".".join(parts[:n]))).__name__ for n in range(depth, len(parts) + 1)]
        if any("attention" in found.lower() for found in classes[1:]):
            return "attention"
        block = self.model.get_submodule(prefix.rstrip("."))
        counts = {p.shape[0] for p in block.parameters() if p.dim() == 3}
        if counts and self.model.get_parameter(name).shape[0] in counts | {1} and "gate" in owner.lower() + leaf:
            return "router"
        return "mlp"

    def to_dict(self) -> dict[str, Any]:
        """What `inspect` shows."""
        units: dict[int, dict[str, Any]] = {}
        for tensor, unit in self.unit_of.items():
            entry = units.setdefault(unit, {"tensors": 0, "bytes": 0})
            entry["tensors"] += 1
            entry["bytes"] += self.checkpoint.tensors[tensor].nbytes
        names = ["stem", *(f"block {i}" for i in range(self.block_count)), "head"]
        return {
            "architecture": self.architecture,
            "dtype": str(self.dtype).removeprefix("torch."),
            "blocks": self.pieces.blocks_path,
            "block_count": self.block_count,
            "tied": dict(self.bindings.tied),
            "dropped": list(self.bindings.dropped),
            "units": [
                {
                    "name": names[unit],
                    **units.get(unit, {"tensors": 0, "bytes": 0}),
                    "groups": [
                        [{"name": w.name, "shape": list(w.shape), "role": w.role, "form": "dense"} for w in group]
                        for stage in self.stages(unit)
                        for group in stage
                    ],
                }
                for unit in range(self.block_count + 2)
            ],
        }


def read_structure(directory: Path, *, dtype: str = "source", trust_remote_code: bool = False) -> Structure:
    """Open a checkpoint and take its model apart; nothing but headers and the twin is in memory afterwards.

    raises ModelError for a checkpoint that can't be read, an unknown architecture, or a model that can't be split
    """
    checkpoint = open_checkpoint(directory, trust_remote_code=trust_remote_code)
    check_values(checkpoint)
    if checkpoint.quantization_config is not None:
        method = checkpoint.quantization_config.get("quant_method", "unknown")
        raise ModelError(
            f"the model is already quantized ({method})",
            where=directory.name,
            hint="Start from the original 16-bit or 32-bit checkpoint.",
        )
    config, cls = _config_and_class(checkpoint, trust_remote_code)
    return structure_of(checkpoint, cls, config, dtype)


def structure_of(
    checkpoint: Checkpoint, cls: type[PreTrainedModel], config: PretrainedConfig, dtype: str = "source"
) -> Structure:
    """The structure of an open checkpoint whose model class is known."""
    name, most = cls.__name__, most_modules(checkpoint)
    empty = guarded(lambda config: empty_on_meta(cls, config, most), checkpoint, config, name, "it can't be built")
    bindings = bind(empty, checkpoint)  # the sizes are those of the checkpoint from here on, so anything may be made
    check_buffers(empty, checkpoint)
    model = guarded(lambda config: skeleton(cls, config), checkpoint, config, name, "it can't be built")
    model_dtype = _run_dtype(dtype, config, checkpoint)
    pieces = Pieces(model, find_blocks(model))

    def traced(config: PretrainedConfig) -> Traced:
        return trace(cls, shallow_config(config, model, pieces), pieces.blocks_path, model_dtype)

    failed = "a small twin of it can't be run in pieces"
    run = partial(_run_whole, model, pieces, model_dtype, checkpoint)
    groups, head, after, tables = guarded(traced, checkpoint, config, name, failed, retry=run)
    return Structure(checkpoint, model, pieces, bindings, groups, head, after, tables, model_dtype)


def config_of(directory: Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a checkpoint, or of the model that an artifact stands for."""
    checkpoint = open_checkpoint(directory)
    check_values(checkpoint)
    if "compressed_weights" in checkpoint.config:
        values = {key: value for key, value in checkpoint.config.items() if key not in ("model_type", "auto_map")}
        kind = checkpoint.config["model_type"].removeprefix("compressed_")
        try:
            return AutoConfig.for_model(kind, **values)
        except Exception as error:  # any: it depends on the class and the value
            raise refusal(error, checkpoint, f"the config class of {kind}", "it can't be made") from error
    return _config_and_class(checkpoint, trust_remote_code)[0]


def _run_whole(
    model: PreTrainedModel, pieces: Pieces, dtype: torch.dtype, checkpoint: Checkpoint, config: PretrainedConfig
) -> None:
    """Run the model of a config that isn't `model`'s own, whole if it is small and else with few blocks."""
    small = (lambda: config, lambda: shallow_config(config, model, pieces))
    run_whole(type(model), (make() for make in small), dtype, checkpoint.nbytes)


def prove_by_replay(structure: Structure) -> None:
    """Replay stem, blocks and head of a random shallow twin on the CPU; its logits must come out bit for bit.

    raises ModelError naming the first block that differs
    """
    cls, pieces, checkpoint = type(structure.model), structure.pieces, structure.checkpoint

    def prove(config: PretrainedConfig) -> None:
        shallow = shallow_config(config, structure.model, pieces)
        twin = make_twin(cls, shallow, torch.device("cpu"), structure.dtype)
        prove_equal(twin, pieces.blocks_path, example_batch(twin, torch.device("cpu")))

    run = partial(_run_whole, structure.model, pieces, structure.dtype, checkpoint)
    failed = "a small twin of it can't be run on the CPU"
    guarded(prove, checkpoint, structure.model.config, cls.__name__, failed, retry=run)


def prove_equal(model: PreTrainedModel, blocks_path: str, batch: Batch) -> None:
    """Compare the model's own output on `batch` with stem -> blocks -> head."""
    pieces = Pieces(model, blocks_path)
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    hooks = []
    for block in pieces.blocks:
        hooks.append(block.register_forward_pre_hook(lambda _m, args: inputs.append(args[0].clone())))
        hooks.append(
            block.register_forward_hook(
                lambda _m, _a, out: outputs.append((out[0] if isinstance(out, tuple) else out).clone())
            )
        )
    try:
        with torch.no_grad():
            expected = output_of(model(**batch))
        check_output(expected)
    except IndexError as error:  # a block called without positional hidden states
        raise ModelError(
            "its blocks don't take the hidden states first", where=blocks_path, hint="This model can't be split."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if len(inputs) != len(pieces):
        raise ModelError(
            f"{len(inputs)} block calls were seen for {len(pieces)} blocks",
            where=blocks_path,
            hint="A model that skips or repeats blocks can't be split.",
        )
    hidden, calls = pieces.stem(batch)
    for index, call in enumerate(calls):
        name = f"{blocks_path}.{index}"
        hint = "This model can't be compressed block by block."
        if not torch.equal(hidden, inputs[index]):
            raise ModelError("the replayed input of this block differs from the model's own", where=name, hint=hint)
        before, hidden = hidden, pieces.block(index, hidden, call)
        if not torch.equal(before, inputs[index]):
            raise ModelError("this block writes into its input, so it can't be run twice", where=name, hint=hint)
        if not torch.equal(hidden, outputs[index]):
            raise ModelError("the replayed output of this block differs from the model's own", where=name, hint=hint)
    if not torch.equal(pieces.head(batch, hidden), expected):
        raise ModelError("the replayed logits differ though every block agrees", where="head")


def find_blocks(model: PreTrainedModel) -> str:
    """Path of the module list whose equal members hold most of the parameters.

    raises ModelError for encoder-decoder models and models without such a list
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(
            "encoder-decoder models have two stacks of blocks",
            where=type(model).__name__,
            hint="Only models with one stack (decoders, encoders, ViTs) are supported.",
        )
    candidates = {}
    for name, module in model.named_modules():
        # a structural layer that stands for some of the blocks has a class of its own, of their class's name
        if isinstance(module, nn.ModuleList) and len(module) and len({type(m).__name__ for m in module}) == 1:
            candidates[name] = sum(p.numel() for p in module.parameters())
    if not candidates:
        raise ModelError(
            "no list of equal blocks was found", where=type(model).__name__, hint="This model can't be split."
        )
    return max(candidates, key=lambda name: (candidates[name], -len(name)))


def skeleton(cls: type[PreTrainedModel], config: PretrainedConfig, *, cached: bool = False) -> PreTrainedModel:
    """The model with parameters on the meta device and real buffers, in eval mode.

    cached  keep the key-value cache and the family's own expert kernels, as a user of the model wants them
    """
    config = copy.deepcopy(config)
    if not cached:
        config.use_cache = False
        use_eager_experts(config)
    with init_empty_weights(include_buffers=False):
        model = cls._from_config(config) if hasattr(cls, "_from_config") else cls(config)
    return model.eval().requires_grad_(False)


def _config_and_class(checkpoint: Checkpoint, trust: bool) -> tuple[PretrainedConfig, type[PreTrainedModel]]:
    """The config and the class of transformers, or of the checkpoint's code where transformers has none of that name.

    trust  code of the checkpoint may run, where it is needed
    """
    where = checkpoint.directory.name
    name = checkpoint.architecture
    if name is None:
        raise ModelError("config.json names no `architectures`", where=where, hint="Add the model's class name.")
    check_kernels(checkpoint.config)
    named = auto_map(checkpoint.config, "config.json")
    cls = getattr(transformers, name, None)
    references = _code_of(checkpoint, name, cls, named)
    if references and not trust:
        raise ModelError(
            f"{name} is code that comes with the checkpoint: {required_code(checkpoint.directory, references)}",
            where=where,
            hint=FLAG,
        )
    if cls is None and not references:
        raise ModelError(
            f"transformers {transformers.__version__} has no architecture {name!r}",
            where=where,
            hint="Update transformers, or check `architectures` in config.json.",
        )
    config = parse_config(checkpoint, trust_remote_code=bool(references))
    for reference in references:
        if reference.endswith("." + name):
            try:
                cls = get_class_from_dynamic_module(reference, checkpoint.directory, local_files_only=True)
            except Exception as error:  # any: it runs the checkpoint's own file
                raise refusal(error, checkpoint, name, "it can't be imported from the checkpoint's code") from error
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise ModelError(f"{name} is not a model class", where=where, hint="Check `architectures` in config.json.")
    return config, class_for(cls, config)


def _code_of(checkpoint: Checkpoint, name: str, cls: Any, named: dict[str, list[str]]) -> list[str]:
    """The references of `auto_map` that have to be run, because transformers lacks the config's class or the model's.

    [] where transformers has both: then its own are used, and the code isn't run
    """
    kind = checkpoint.config.get("model_type")
    if cls is not None and isinstance(kind, str) and kind in CONFIG_MAPPING:
        return []
    config = named.get("AutoConfig", [])
    models = [ref for auto, refs in named.items() if is_model_entry(auto) for ref in refs if ref.endswith("." + name)]
    return list(dict.fromkeys([*config, *models]))


def _run_dtype(asked: str, config: PretrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    if asked != "source":
        return getattr(torch, asked)
    stated = config.dtype
    if isinstance(stated, torch.dtype):
        return stated
    floating = [info.dtype for info in checkpoint.tensors.values() if info.dtype.is_floating_point]
    return max(set(floating), key=floating.count) if floating else torch.float32


def _weight(
    name: str, tensor: str, parameter_name: str, parameter: Tensor, product: Product, role: str, bias: str | None
) -> Weight:
    rows, columns = parameter.shape[-2:]
    shape = (columns, rows) if product.transposed else (rows, columns)
    return Weight(name, tensor, parameter_name, shape, role, product.transposed, bias=bias)


def inspect_model(directory: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    return read_structure(directory, trust_remote_code=trust_remote_code).to_dict()
