"""Finds the embeddings, blocks, output head and weight groups of a model by running it.

It combines the trace of a shallow probe model (`tracing`) with the names of the checkpoint. `replay_proof` proves that
the model can be run in these parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from compressor.errors import Because, ModelError
from compressor.model.block_runner import Pieces
from compressor.model.checkpoint import Checkpoint, check_finite
from compressor.model.config_values import check_values
from compressor.model.empty_model import bound_model
from compressor.model.fused_experts import Slice, expert_slices
from compressor.model.model_building import guarded
from compressor.model.model_class import config_and_class, refuse_two_stacks
from compressor.model.narrow_probe import Probes, narrow_config, width_of
from compressor.model.overview import Overview, PartOverview, WeightView
from compressor.model.prequantized import refuse_stated
from compressor.model.probe_model import Kind, shallow_config, signature
from compressor.model.quantized_source import open_source
from compressor.model.remembered import remembered
from compressor.model.tracing import Product, Traced, run_whole, trace
from compressor.model.weight_names import Bindings, Source, only_transposes
from compressor.model.weights import Group, Stage, Weight
from compressor.storage.safetensors_file import read_slices


@dataclass
class Structure:
    """A checkpoint, its model on the meta device, and the results of running it.

    kinds       of its blocks (`probe_model.signature`)
    probes      its probe models
    traced      the results of a run of a shallow one
    dtype       the model's; single parameters may have another (`bindings.dtypes`)
    left_dense  parameter of a matmul -> why it can't be compressed, for the stages that were computed so far
    """

    checkpoint: Checkpoint
    model: PreTrainedModel
    pieces: Pieces
    bindings: Bindings
    kinds: tuple[Kind, ...]
    probes: Probes
    traced: Traced
    dtype: torch.dtype
    left_dense: dict[str, str] = field(default_factory=dict, repr=False)
    _stages: dict[int, list[Stage]] = field(default_factory=dict, repr=False)
    _expert_slices: dict[str, tuple[Slice, ...]] = field(default_factory=dict, repr=False)

    @property
    def architecture(self) -> str:
        return type(self.model).__name__

    @property
    def block_count(self) -> int:
        return len(self.pieces)

    def read(self, tensor: str) -> Tensor:
        """A tensor of the checkpoint, in the dtype that transformers gives it. raises ModelError for NaN or Inf"""
        value = self.checkpoint.read(tensor)
        if value.is_floating_point():
            check_finite(tensor, value)
        return value.to(self.bindings.dtype_of(tensor))

    def read_slices(self, tensor: str) -> Iterator[Tensor]:
        """The same, one slice along the first dimension after the other."""
        for number, value in enumerate(read_slices(self.checkpoint.tensors[tensor])):
            if value.is_floating_point():
                check_finite(f"{tensor}[{number}]", value)
            yield value.to(self.bindings.dtype_of(tensor))

    def stages(self, part: int) -> list[Stage]:
        """Weight groups of a part in forward order. Parts: 0 embeddings, 1..n blocks, n + 1 output head."""
        if part not in self._stages:  # kept, because a layer may replace a module later
            self._stages[part] = self._find_stages(part)
        return self._stages[part]

    def _find_stages(self, part: int) -> list[Stage]:
        if part == 0:
            return [
                (group,)
                for embedding in self.traced.embeddings
                for group in self._weights("", (embedding,), "embedding")
            ]
        if part == self.block_count + 1:
            return [(group,) for product in self.traced.head for group in self._weights("", (product,), "head")]
        prefix = f"{self.pieces.blocks_path}.{part - 1}."
        stages: list[Stage] = []
        for products in self.traced.groups[self.kinds[part - 1]]:
            groups = tuple(self._weights(prefix, products, None))
            stages.append(groups)
        return stages

    def weights(self) -> Iterator[tuple[int, Weight]]:
        """(part, weight) for every matrix that can be compressed, in forward order."""
        for part in range(self.block_count + 2):
            for stage in self.stages(part):
                for group in stage:
                    for weight in group:
                        yield part, weight

    @cached_property
    def whole(self) -> list[tuple[int, Weight, Because]]:
        """(part, weight, why) for tensors that contain several matrices, such as all experts of a block, and can't be
        divided.
        """
        found = []
        for index, kind in enumerate(self.kinds):
            prefix = f"{self.pieces.blocks_path}.{index}."
            reasons = dict(self.traced.whole[kind])
            for product in (product for group in self.traced.groups[kind] for product in group):
                name = prefix + product.parameter
                if self._lie_in_one_tensor(name, product) and not self._slices(prefix, name, product):
                    message = (
                        "the checkpoint stores all experts of a block in one tensor, in another order than the model"
                    )
                    reasons[product.parameter] = Because(message, reason="experts-in-one-tensor")
            for parameter, why in reasons.items():
                for source in self.bindings.sources.get(prefix + parameter, ()):
                    shape = tuple(self.checkpoint.tensors[source.tensor].shape)
                    name = source.tensor.removesuffix(".weight")
                    found.append((index + 1, Weight(name, source.tensor, prefix + parameter, shape, "experts"), why))
        return found

    def is_read_elsewhere(self, weight: Weight) -> bool:
        """Whether other code than its module's own reads this weight (`compressor.model.replaceable.watch_reads`)."""
        prefix = self.pieces.blocks_path + "."
        if not weight.parameter.startswith(prefix):
            return weight.parameter in self.traced.read[None]
        number, _, name = weight.parameter.removeprefix(prefix).partition(".")
        return name in self.traced.read[self.kinds[int(number)]] or f"{prefix}*.{name}" in self.traced.read[None]

    @cached_property
    def part_by_tensor(self) -> dict[str, int]:
        """Checkpoint tensor -> number of the part that stores it."""
        return {tensor: self.part_of(name) for tensor, name in self.bindings.parameters_by_tensor.items()}

    def part_of(self, parameter: str) -> int:
        """Number of the part that has a parameter, or a module."""
        if parameter.startswith(self.pieces.blocks_path + "."):
            return 1 + int(parameter[len(self.pieces.blocks_path) + 1 :].split(".")[0])
        is_after = parameter in self._head_parameters or parameter.rpartition(".")[0] in self.traced.after
        return self.block_count + 1 if is_after else 0

    @cached_property
    def _head_parameters(self) -> set[str]:
        return {product.parameter for product in self.traced.head}

    @cached_property
    def _shared_in_blocks(self) -> dict[str, str]:
        """Parameter of a block -> another parameter of a block that is the same tensor. Each would have its own codes
        and inputs, and the blocks of one kind may use different ones of them (Zamba 2).
        """
        prefix = self.pieces.blocks_path + "."
        pairs = [(one, other) for one, other in self.bindings.tied.items() if one.startswith(prefix)]
        pairs = [(one, other) for one, other in pairs if other.startswith(prefix)]
        return {other: one for one, other in reversed(pairs)} | dict(pairs)

    def sources_of(self, parameter: str) -> tuple[Source, ...]:
        """The tensors that fill a parameter; those of its owner if it is tied."""
        return self.bindings.sources.get(self.bindings.tied.get(parameter, parameter), ())

    def parameters_of(self, part: int) -> list[str]:
        """Names of the parameters and buffers that the tensors of this part fill."""
        parts = self.part_by_tensor
        return sorted(name for name, sources in self.bindings.sources.items() if parts[sources[0].tensor] == part)

    def _weights(self, prefix: str, products: tuple[Product, ...], role: str | None) -> Iterator[Group]:
        grouped: dict[int | None, list[Weight]] = {}
        for product in products:
            name = prefix + product.parameter
            if name in self.bindings.joined and not product.fused_experts:
                self.left_dense[name] = self.bindings.joined[name]
                continue
            if name in self._shared_in_blocks:
                self.left_dense[name] = f"shares its tensor with {self._shared_in_blocks[name]}"
                continue
            parameter = self.model.get_parameter(name)
            kind = role or self._role(product, name, prefix)
            bias = self._bias(name)
            sources = self.bindings.sources.get(name)
            if sources is None:  # a tied output head has no tensor of its own
                weight = _weight(name.removesuffix(".weight"), name, name, parameter, product, kind, bias)
                grouped.setdefault(None, []).append(weight)
                continue
            if self._lie_in_one_tensor(name, product):
                for piece in self._slices(prefix, name, product):  # without any, `whole` has it
                    weight = _weight(piece.name, sources[0].tensor, name, parameter, product, kind, None)
                    shape = (piece.rows[1] - piece.rows[0], weight.in_features)
                    weight = replace(weight, shape=shape, expert=piece.expert, rows=piece.rows)
                    grouped.setdefault(piece.expert, []).append(weight)
                continue
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

    def _lie_in_one_tensor(self, parameter: str, product: Product) -> bool:
        """Whether one tensor of the checkpoint contains all experts of a parameter."""
        sources = self.bindings.sources.get(parameter, ())
        return product.fused_experts and any(source.rows is None for source in sources)

    def _slices(self, prefix: str, parameter: str, product: Product) -> tuple[Slice, ...]:
        """The weights in a tensor of all experts; nothing if a rule of transformers reorders it while it is loaded."""
        if parameter in self.bindings.rules and not only_transposes(self.bindings.rules[parameter]):
            return ()
        if parameter not in self._expert_slices:
            tensor, block = self.bindings.sources[parameter][0].tensor, prefix.removesuffix(".")
            found = expert_slices(tensor, parameter, block, product.transposed, self.model, self.checkpoint)
            self._expert_slices[parameter] = found
        return self._expert_slices[parameter]

    def _bias(self, name: str) -> str | None:
        candidate = name.removesuffix("weight") + "bias"
        sources = self.bindings.sources.get(candidate) if name.endswith("weight") else None
        return sources[0].tensor if sources else None

    def _role(self, product: Product, name: str, prefix: str) -> str:
        if product.fused_experts:
            return "experts"
        if product.export_formats:
            return "router"
        if re.fullmatch(r"shortcut_\d+", product.parameter):  # in a rotated_block
            return "shortcut"
        parts = name.rpartition(".")[0].split(".")
        depth = len(prefix.rstrip(".").split("."))
        classes = [type(self.model.get_submodule(".".join(parts[:n]))).__name__ for n in range(depth, len(parts) + 1)]
        if any("attention" in found.lower() for found in classes[1:]):
            return "attention"
        return "mlp"

    def overview(self) -> Overview:
        """JSON values for `compress-model inspect`."""
        names = ["embeddings", *(f"block {i}" for i in range(self.block_count)), "output head"]
        held: dict[int, list[int]] = {}  # bytes of the tensors of each part
        for tensor, part in self.part_by_tensor.items():
            held.setdefault(part, []).append(self.checkpoint.tensors[tensor].nbytes)
        return Overview(
            architecture=self.architecture,
            dtype=str(self.dtype).removeprefix("torch."),
            blocks=self.pieces.blocks_path,
            block_count=self.block_count,
            quantized=None if self.checkpoint.quantized is None else self.checkpoint.quantized.notice,
            tied=dict(self.bindings.tied),
            parts=tuple(
                PartOverview(names[part], len(held.get(part, ())), sum(held.get(part, ())), self._groups_shown(part))
                for part in range(self.block_count + 2)
            ),
        )

    def _groups_shown(self, part: int) -> tuple[tuple[WeightView, ...], ...]:
        groups = [
            *(group for stage in self.stages(part) for group in stage),
            *(Group((weight,)) for at, weight, _ in self.whole if at == part),
        ]
        return tuple(tuple(WeightView(w.name, list(w.shape), w.role) for w in group) for group in groups)


def read_structure(directory: Path, *, dtype: str = "source", trust_remote_code: bool = False) -> Structure:
    """Open a checkpoint and find its structure. Afterwards only headers and the probe model are in memory. The weights
    of a quantized checkpoint are dense here (`quantized_source`).

    raises  ModelError for a checkpoint that can't be read, an unknown architecture, or a model that can't be divided
    """
    checkpoint = open_source(directory, trust_remote_code=trust_remote_code)
    if checkpoint.is_compressed_artifact:
        raise ModelError(
            "the model is an artifact of compress-model",
            where=directory.name,
            hint="Pass --model with the checkpoint that it was made from (`source` in its manifest).",
            data={"reason": "is-artifact"},
        )
    check_values(checkpoint)
    refuse_stated(checkpoint)
    config, cls = config_and_class(checkpoint, trust_remote_code)
    structure = structure_of(checkpoint, cls, config, dtype)
    if structure.model.can_generate():
        _check_generation(checkpoint)
    return structure


def _check_generation(checkpoint: Checkpoint) -> None:
    """raises ModelError for generation settings that can't be read; stock transformers would use its defaults"""
    name = transformers.utils.GENERATION_CONFIG_NAME
    if not (checkpoint.directory / name).is_file():
        return
    try:
        transformers.GenerationConfig.from_pretrained(checkpoint.directory, local_files_only=True)
    except Exception as error:  # any: it depends on the value
        raise ModelError(
            f"can't be read ({type(error).__name__}: {' '.join(str(error).split())[:200]})",
            where=name,
            hint="Correct the file, download it again, or remove it.",
            data={"reason": "unreadable", "cause": f"{type(error).__name__}: {error}"},
        ) from error


def structure_of(
    checkpoint: Checkpoint,
    cls: type[PreTrainedModel],
    config: PretrainedConfig,
    dtype: str = "source",
    like: Structure | None = None,
) -> Structure:
    """The structure of an open checkpoint whose model class is known.

    like  that of a model whose shallow probe model has the same blocks at other widths: no probe model runs
    """
    checkpoint, model, bindings, model_dtype = bound_model(checkpoint, cls, config, dtype)
    pieces = Pieces(model, find_blocks(model))
    probes = Probes(model, pieces, model_dtype)

    kinds = tuple(signature(model.config, block, index) for index, block in enumerate(pieces.blocks))

    def traced(_config: PretrainedConfig) -> Traced:
        return remembered(("trace", probes.key), partial(trace, probes))

    if like is None:
        failed = "a probe model of it can't be run part by part"
        shown = guarded(traced, checkpoint, config, cls.__name__, failed, retry=partial(run_small, probes))
    else:
        shown = like.traced.at(dict(zip(kinds, like.probes.whole.kinds, strict=True)))
    pieces.answers = [shown.answers[kind] for kind in kinds]
    return Structure(checkpoint, model, pieces, bindings, kinds, probes, shown, model_dtype)


def run_small(probes: Probes, config: PretrainedConfig) -> None:
    """Run the model of another config than the probes' own: the whole model if it is small, else one with few blocks,
    or with few blocks and small widths.
    """
    run_whole(type(probes.model), _smaller_configs(probes, config), probes.dtype)


def _smaller_configs(probes: Probes, config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    yield config
    model = probes.model
    shallow = shallow_config(config, model, probes.pieces)
    yield shallow
    own = probes.narrowest
    factor = (width_of(model.config) or 1) // (own.width or 1)
    if not own.is_whole and (narrow := narrow_config(type(model), shallow, factor)) is not None:
        yield narrow


def find_blocks(model: PreTrainedModel) -> str:
    """Path of the module list whose members have most of the parameters. They may be of several classes.

    In a model with several towers it is one of the stack that transformers calls the decoder, which reads the text,
    also where the vision tower is larger.

    raises ModelError for encoder-decoder models and models without such a list
    """
    refuse_two_stacks(model.config, type(model))
    inside = set(model.get_decoder().modules())
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    chosen = {name: module for name, module in lists.items() if module in inside} or lists
    candidates = {name: sum(p.numel() for p in module.parameters()) for name, module in chosen.items()}
    if not candidates:
        raise ModelError(
            "it has no list of blocks (nn.ModuleList)",
            where=type(model).__name__,
            hint="Choose a decoder, an encoder or a ViT of transformers.",
        )
    return max(candidates, key=lambda name: (candidates[name], -len(name)))


def _weight(
    name: str, tensor: str, parameter_name: str, parameter: Tensor, product: Product, role: str, bias: str | None
) -> Weight:
    rows, columns = parameter.shape[-2:]
    shape = (columns, rows) if product.transposed else (rows, columns)
    return Weight(name, tensor, parameter_name, shape, role, product.transposed, bias=bias)
