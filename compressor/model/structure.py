"""Stem, blocks, head and weight groups of a model, found by running it.

What a run of a shallow twin shows (`tracing`) is put together here with the checkpoint's names. Replaying
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
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from compressor.errors import Because, ModelError
from compressor.model.attention import choose_plain
from compressor.model.block_runner import Batch, Pieces, hidden_of, output_of
from compressor.model.checkpoint import Checkpoint, check_finite, open_checkpoint
from compressor.model.load_dtypes import hold, load_dtype
from compressor.model.model_building import (
    check_buffers,
    check_values,
    empty_on_meta,
    guarded,
    most_modules,
    parse_config,
    refusal,
)
from compressor.model.prequantized import refuse_stated
from compressor.model.reshaped_class import class_for
from compressor.model.tracing import (
    Product,
    Traced,
    check_output,
    checked,
    example_batch,
    make_twin,
    run_in_pieces,
    run_whole,
    shallow_config,
    signature,
    trace,
)
from compressor.model.trusted_code import FLAG, auto_map, check_kernels, file_of, is_model_entry, required_code
from compressor.model.tying import part
from compressor.model.weight_names import Bindings, Source, bind
from compressor.model.weights import Group, Stage, Weight


@dataclass
class Structure:
    """A checkpoint, its model on the meta device, and what running it showed.

    traced      what a run of its shallow twin showed
    dtype       the model's; single parameters may be held in another (`bindings.dtypes`)
    left_dense  parameter that is multiplied -> why it can't be compressed, as far as stages were asked for
    """

    checkpoint: Checkpoint
    model: PreTrainedModel
    pieces: Pieces
    bindings: Bindings
    traced: Traced
    dtype: torch.dtype
    left_dense: dict[str, str] = field(default_factory=dict, repr=False)
    _stages: dict[int, list[Stage]] = field(default_factory=dict, repr=False)

    @property
    def architecture(self) -> str:
        return type(self.model).__name__

    @property
    def block_count(self) -> int:
        return len(self.pieces)

    def read(self, tensor: str) -> Tensor:
        """A tensor of the checkpoint, in the dtype that transformers holds it in. raises ModelError for NaN or Inf"""
        value = self.checkpoint.read(tensor)
        if value.is_floating_point():
            check_finite(tensor, value)
        return value.to(self.bindings.dtype_of(tensor))

    def stages(self, unit: int) -> list[Stage]:
        """Weight groups of a unit: 0 stem (its tables), 1..n blocks, n + 1 head; in forward order."""
        if unit not in self._stages:  # kept, because a layer may stand in for a module later
            self._stages[unit] = self._find_stages(unit)
        return self._stages[unit]

    def _find_stages(self, unit: int) -> list[Stage]:
        if unit == 0:
            return [(group,) for table in self.traced.tables for group in self._weights("", (table,), "embedding")]
        if unit == self.block_count + 1:
            return [(group,) for product in self.traced.head for group in self._weights("", (product,), "head")]
        block = self.pieces.blocks[unit - 1]
        prefix = f"{self.pieces.blocks_path}.{unit - 1}."
        stages: list[Stage] = []
        for products in self.traced.groups[signature(self.model.config, block, unit - 1)]:
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
    def whole(self) -> list[tuple[int, Weight, Because]]:
        """(unit, weight, why) for tensors that hold several matrices, such as all experts of a block, and that can't
        be stored in parts.
        """
        found = []
        for index, block in enumerate(self.pieces.blocks):
            kind, prefix = signature(self.model.config, block, index), f"{self.pieces.blocks_path}.{index}."
            reasons = dict(self.traced.whole[kind])
            for product in (product for group in self.traced.groups[kind] for product in group):
                sources = self.bindings.sources.get(prefix + product.parameter, ())
                if product.fused_experts and any(source.rows is None for source in sources):
                    told = "the checkpoint holds all experts of a block in one tensor"
                    reasons[product.parameter] = Because(told, reason="experts-in-one-tensor")
            for parameter, why in reasons.items():
                for source in self.bindings.sources.get(prefix + parameter, ()):
                    shape = tuple(self.checkpoint.tensors[source.tensor].shape)
                    name = source.tensor.removesuffix(".weight")
                    found.append((index + 1, Weight(name, source.tensor, prefix + parameter, shape, "experts"), why))
        return found

    def is_read_elsewhere(self, weight: Weight) -> bool:
        """Whether code reads this weight that isn't its module's own (`compressor.model.replaceable.watch_reads`)."""
        prefix = self.pieces.blocks_path + "."
        if not weight.parameter.startswith(prefix):
            return weight.parameter in self.traced.read[None]
        number, _, name = weight.parameter.removeprefix(prefix).partition(".")
        block = self.pieces.blocks[int(number)]
        kind = signature(self.model.config, block, int(number))
        return name in self.traced.read[kind] or f"{prefix}*.{name}" in self.traced.read[None]

    @cached_property
    def unit_of(self) -> dict[str, int]:
        """Checkpoint tensor -> unit that stores it."""
        head = {product.parameter for product in self.traced.head}
        units = {}
        for tensor, parameter in self.bindings.parameters_by_tensor.items():
            if parameter.startswith(self.pieces.blocks_path + "."):
                units[tensor] = 1 + int(parameter[len(self.pieces.blocks_path) + 1 :].split(".")[0])
            elif parameter in head or parameter.rpartition(".")[0] in self.traced.after:
                units[tensor] = self.block_count + 1
            else:
                units[tensor] = 0
        return units

    def sources_of(self, parameter: str) -> tuple[Source, ...]:
        """The tensors that fill a parameter; those of its owner where it is tied."""
        return self.bindings.sources.get(self.bindings.tied.get(parameter, parameter), ())

    def parameters_of(self, unit: int) -> list[str]:
        """Parameter and buffer names that this unit's tensors fill."""
        units = self.unit_of
        return sorted(name for name, sources in self.bindings.sources.items() if units[sources[0].tensor] == unit)

    def _weights(self, prefix: str, products: tuple[Product, ...], role: str | None) -> Iterator[Group]:
        grouped: dict[int | None, list[Weight]] = {}
        for product in products:
            name = prefix + product.parameter
            if name in self.bindings.joined and not product.fused_experts:
                self.left_dense[name] = self.bindings.joined[name]
                continue
            parameter = self.model.get_parameter(name)
            kind = role or self._role(product, name, prefix)
            bias = self._bias(name)
            sources = self.bindings.sources.get(name)
            if sources is None:  # a tied head has no tensor of its own
                weight = _weight(name.removesuffix(".weight"), name, name, parameter, product, kind, bias)
                grouped.setdefault(None, []).append(weight)
                continue
            if product.fused_experts and any(source.rows is None for source in sources):
                continue  # `whole` has it
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
        if product.routes:
            return "router"
        if re.fullmatch(r"shortcut_\d+", product.parameter):  # of a block that is a rotated_block
            return "shortcut"
        parts = name.rpartition(".")[0].split(".")
        depth = len(prefix.rstrip(".").split("."))
        classes = [type(self.model.get_submodule(".".join(parts[:n]))).__name__ for n in range(depth, len(parts) + 1)]
        if any("attention" in found.lower() for found in classes[1:]):
            return "attention"
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
            "unused": [
                {"name": unused.tensor, "reason": unused.reason, "bytes": self.checkpoint.tensors[unused.tensor].nbytes}
                for unused in self.bindings.unused
            ],
            "units": [
                {
                    "name": names[unit],
                    **units.get(unit, {"tensors": 0, "bytes": 0}),
                    "groups": [
                        [{"name": w.name, "shape": list(w.shape), "role": w.role, "form": "dense"} for w in group]
                        for group in [
                            *(group for stage in self.stages(unit) for group in stage),
                            *(Group((weight,)) for at, weight, _ in self.whole if at == unit),
                        ]
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
    if checkpoint.is_compressed_artifact:
        raise ModelError(
            "is an artifact of this tool already",
            where=directory.name,
            hint="Start from the checkpoint it was made from.",
            data={"reason": "is-artifact"},
        )
    check_values(checkpoint)
    refuse_stated(checkpoint)
    config, cls = _config_and_class(checkpoint, trust_remote_code)
    structure = structure_of(checkpoint, cls, config, dtype)
    if structure.model.can_generate():
        _check_generation(checkpoint)
    return structure


def _check_generation(checkpoint: Checkpoint) -> None:
    """raises ModelError for settings of generation that can't be read; stock transformers would make up others"""
    name = transformers.utils.GENERATION_CONFIG_NAME
    if not (checkpoint.directory / name).is_file():
        return
    try:
        transformers.GenerationConfig.from_pretrained(checkpoint.directory, local_files_only=True)
    except Exception as error:  # any: it depends on the value
        raise ModelError(
            f"can't be read ({type(error).__name__}: {' '.join(str(error).split())[:200]})",
            where=name,
            hint="Correct it, download it again, or take it away.",
            data={"reason": "unreadable", "cause": f"{type(error).__name__}: {error}"},
        ) from error


def structure_of(
    checkpoint: Checkpoint, cls: type[PreTrainedModel], config: PretrainedConfig, dtype: str = "source"
) -> Structure:
    """The structure of an open checkpoint whose model class is known."""
    checkpoint, model, bindings, model_dtype = bound_model(checkpoint, cls, config, dtype)
    pieces = Pieces(model, find_blocks(model))

    def traced(config: PretrainedConfig) -> Traced:
        return trace(cls, shallow_config(config, model, pieces), pieces.blocks_path, model_dtype)

    failed = "a small twin of it can't be run in pieces"
    run = partial(_run_whole, model, pieces, model_dtype, checkpoint)
    shown = guarded(traced, checkpoint, config, cls.__name__, failed, retry=run)
    pieces.answers = [shown.answers[signature(model.config, block, n)] for n, block in enumerate(pieces.blocks)]
    return Structure(checkpoint, model, pieces, bindings, shown, model_dtype)


def bound_model(
    checkpoint: Checkpoint, cls: type[PreTrainedModel], config: PretrainedConfig, dtype: str = "source"
) -> tuple[Checkpoint, PreTrainedModel, Bindings, torch.dtype]:
    """A checkpoint's model on the meta device, each parameter in the dtype it is held in, and what fills it.

    returns  the checkpoint as it is read (a shared tensor under its owner's name, ties as they are); model; bindings;
             the model's dtype
    """
    model_dtype = load_dtype(dtype, config, checkpoint)
    name, most, failed = cls.__name__, most_modules(checkpoint), "it can't be built"
    empty = guarded(lambda config: empty_on_meta(cls, config, most, model_dtype), checkpoint, config, name, failed)
    # the sizes are those of the checkpoint from here on, so anything may be made
    bindings = bind(empty, checkpoint, model_dtype)
    check_buffers(empty, checkpoint)
    model = guarded(lambda config: skeleton(cls, config, model_dtype), checkpoint, config, name, failed)
    if bindings.owned:  # from here on, and in the artifact, under the name that most checkpoints give it
        tensors = {bindings.owned.get(name, name): info for name, info in checkpoint.tensors.items()}
        checkpoint = replace(checkpoint, tensors=tensors)
        bindings = bind(empty, checkpoint, model_dtype)
    if bindings.apart:
        part(model, bindings.apart)
        model.config.tie_word_embeddings = False  # what it stands for, also when it is read again
        checkpoint = replace(checkpoint, config={**checkpoint.config, "tie_word_embeddings": False})
    hold(model, bindings.dtypes)
    return checkpoint, model, bindings, model_dtype


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


def class_of(checkpoint: Checkpoint, trust_remote_code: bool = False) -> type[PreTrainedModel]:
    """The class that transformers loads a checkpoint with, in whatever form its weights are.

    raises ModelError for an unknown architecture, and for encoder-decoder models
    """
    check_values(checkpoint)
    config, cls = _config_and_class(checkpoint, trust_remote_code)
    _refuse_two_stacks(config, cls)
    return cls


def _refuse_two_stacks(config: PretrainedConfig, cls: type[PreTrainedModel]) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            "encoder-decoder models have two stacks of blocks",
            where=cls.__name__,
            hint="Only models with one stack (decoders, encoders, ViTs) are supported.",
            data={"reason": "two-stacks"},
        )


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
    """Compare the model's own output on `batch` with stem -> blocks -> head, each block run twice.

    raises  ModelError naming the first block that can't be run by itself, and what is in the way
    """
    pieces = Pieces(model, blocks_path)
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    given: list[list[Any]] = []  # what else each block was called with

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append((args[0] if args else kwargs["hidden_states"]).clone())
        given.append([leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in _beside(args, kwargs)])

    hooks = []
    for block in pieces.blocks:
        hooks.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.append(block.register_forward_hook(lambda _m, _a, out: outputs.append(hidden_of(out).clone())))
    try:
        with torch.no_grad(), checked(model):
            expected = output_of(model(**batch))
        check_output(expected)
    except (IndexError, KeyError) as error:  # a block called without hidden states
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
            data={"calls": len(inputs), "blocks": len(pieces)},
        )
    hidden, calls = pieces.stem(batch)
    hint = "This model can't be compressed block by block."
    for index, call in enumerate(calls):
        name = f"{blocks_path}.{index}"
        if not torch.equal(hidden, inputs[index]):
            raise ModelError("the replayed input of this block differs from the model's own", where=name, hint=hint)
        is_told_more = not _same_leaves(given[index], _beside((hidden, *call.args), call.kwargs))
        before, hidden = hidden, pieces.block(index, hidden, call)
        if not torch.equal(before, inputs[index]):
            raise ModelError(
                "this block writes into its input, so it can't be run twice",
                where=name,
                hint=hint,
                data={"reason": "writes-into-input"},
            )
        if not torch.equal(hidden, outputs[index]):
            raise ModelError(
                "earlier blocks hand this one more than hidden states, which can't be replayed"
                if is_told_more
                else "the replayed output of this block differs from the model's own",
                where=name,
                hint=hint,
                data={"reason": "told-more" if is_told_more else "output-differs"},
            )
        if not torch.equal(pieces.block(index, before, call), hidden):
            raise ModelError(
                "this block changes what it is called with (a cache, say), so a second run of it gives something else",
                where=name,
                hint=hint,
            )
    if not torch.equal(pieces.head(batch, hidden), expected):
        raise ModelError("the replayed logits differ though every block agrees", where="head", hint=hint)


def _beside(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """What a block is called with beside the hidden states, flattened."""
    return tree_leaves((args[1:], {name: kwargs[name] for name in sorted(kwargs) if name != "hidden_states"}))


def _same_leaves(before: list[Any], after: list[Any]) -> bool:
    """Whether two calls hold the same tensors; whatever else they hold says nothing."""
    if len(before) != len(after):
        return False
    pairs = [(a, b) for a, b in zip(before, after) if isinstance(a, Tensor) or isinstance(b, Tensor)]
    return all(isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b) for a, b in pairs)


def find_blocks(model: PreTrainedModel) -> str:
    """Path of the module list whose members hold most of the parameters; they may be of several classes.

    raises ModelError for encoder-decoder models and models without such a list
    """
    _refuse_two_stacks(model.config, type(model))
    candidates = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    if not candidates:
        raise ModelError("it has no list of blocks", where=type(model).__name__, hint="This model can't be split.")
    return max(candidates, key=lambda name: (candidates[name], -len(name)))


def skeleton(
    cls: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype, *, cached: bool = False
) -> PreTrainedModel:
    """The model made with `dtype`, parameters on the meta device and buffers real, in eval mode.

    cached  keep the key-value cache and the family's own expert kernels, as a user of the model wants them
    """
    config = copy.deepcopy(config) if cached else run_in_pieces(config)
    with init_empty_weights(include_buffers=False):
        model = cls._from_config(config, dtype=dtype)
    _compute_buffers(model)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _compute_buffers(model: PreTrainedModel) -> None:
    """Compute what the class computes once more, in float32: so from_pretrained does, which makes the model empty.

    The constructor computes it in the model's dtype, and a 16-bit table of positions is another one.
    """
    models = {path: module for path, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    for path, module in model.named_modules():
        if any(buffer is not None for buffer in module._buffers.values()):
            owner = path
            while owner not in models:
                owner = owner.rpartition(".")[0]
            models[owner]._init_weights(module)


def _config_and_class(checkpoint: Checkpoint, trust: bool) -> tuple[PretrainedConfig, type[PreTrainedModel]]:
    """The config and the class of transformers, or of the checkpoint's code where transformers has none of that name.

    trust  code of the checkpoint may run, where it is needed
    """
    where = checkpoint.directory.name
    name = checkpoint.architecture
    if name is None:
        raise ModelError(
            "config.json names no `architectures`",
            where=where,
            hint="Add the model's class name.",
            data={"reason": "no-architecture"},
        )
    check_kernels(checkpoint.config)
    named = auto_map(checkpoint.config, "config.json")
    cls = getattr(transformers, name, None)
    references = _code_of(checkpoint, name, cls, named)
    if references and not trust:
        raise ModelError(
            f"{name} is code that comes with the checkpoint: {required_code(checkpoint.directory, references)}",
            where=where,
            hint=FLAG,
            data={
                "reason": "own-code",
                "architecture": name,
                "files": sorted({file_of(reference) for reference in references}),
            },
        )
    if cls is None and not references:
        raise ModelError(
            f"transformers {transformers.__version__} has no architecture {name!r}",
            where=where,
            hint="Update transformers, or check `architectures` in config.json.",
            data={"reason": "unknown-architecture", "architecture": name, "transformers": transformers.__version__},
        )
    config = parse_config(checkpoint, trust_remote_code=bool(references))
    choose_plain(config, checkpoint.config)
    for reference in references:
        if reference.endswith("." + name):
            try:
                cls = get_class_from_dynamic_module(reference, checkpoint.directory, local_files_only=True)
            except Exception as error:  # any: it runs the checkpoint's own file
                raise refusal(error, checkpoint, name, "it can't be imported from the checkpoint's code") from error
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise ModelError(
            f"{name} is not a model class",
            where=where,
            hint="Check `architectures` in config.json.",
            data={"reason": "no-model-class", "name": name},
        )
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


def _weight(
    name: str, tensor: str, parameter_name: str, parameter: Tensor, product: Product, role: str, bias: str | None
) -> Weight:
    rows, columns = parameter.shape[-2:]
    shape = (columns, rows) if product.transposed else (rows, columns)
    return Weight(name, tensor, parameter_name, shape, role, product.transposed, bias=bias)


def inspect_model(directory: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    return read_structure(directory, trust_remote_code=trust_remote_code).to_dict()
