"""Finds the class, of transformers or of a checkpoint's own code, that loads a checkpoint, and its config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from compressor.errors import ModelError
from compressor.model.attention import choose_plain
from compressor.model.checkpoint import Checkpoint, open_checkpoint
from compressor.model.config_values import check_values
from compressor.model.model_building import parse_config, refusal
from compressor.model.reshaped_class import class_for
from compressor.model.trusted_code import FLAG, auto_map, check_kernels, file_of, is_model_entry, required_code


def config_of(directory: Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a checkpoint, or of the model in an artifact."""
    checkpoint = open_checkpoint(directory)
    check_values(checkpoint)
    if "compressed_weights" in checkpoint.config:
        values = {key: value for key, value in checkpoint.config.items() if key not in ("model_type", "auto_map")}
        kind = checkpoint.config["model_type"].removeprefix("compressed_")
        try:
            return AutoConfig.for_model(kind, **values)
        except Exception as error:  # any: it depends on the class and the value
            raise refusal(error, checkpoint, f"the config class of {kind}", "it can't be made") from error
    return config_and_class(checkpoint, trust_remote_code)[0]


def class_of(checkpoint: Checkpoint, trust_remote_code: bool = False) -> type[PreTrainedModel]:
    """The class with which transformers loads a checkpoint, for any format of its weights.

    raises  ModelError for an unknown architecture, and for encoder-decoder models
    """
    check_values(checkpoint)
    config, cls = config_and_class(checkpoint, trust_remote_code)
    refuse_two_stacks(config, cls)
    return cls


def refuse_two_stacks(config: PretrainedConfig, cls: type[PreTrainedModel]) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            "encoder-decoder models have two stacks of blocks",
            where=cls.__name__,
            hint="Choose a model with one stack of blocks: a decoder, an encoder or a ViT.",
            data={"reason": "two-stacks"},
        )


def config_and_class(checkpoint: Checkpoint, trust: bool) -> tuple[PretrainedConfig, type[PreTrainedModel]]:
    """The config and the class of transformers, or those of the checkpoint's code if transformers lacks the name.

    trust  code of the checkpoint may run if it is needed
    """
    where = checkpoint.directory.name
    name = checkpoint.architecture
    if name is None:
        raise ModelError(
            "config.json names no `architectures`",
            where=where,
            hint='Add the class of the model, for example "architectures": ["LlamaForCausalLM"].',
            data={"reason": "no-architecture"},
        )
    check_kernels(checkpoint.config)
    named = auto_map(checkpoint.config, "config.json")
    cls = getattr(transformers, name, None)
    references = _code_of(checkpoint, name, cls, named)
    if references and not trust:
        raise ModelError(
            f"{name} is code bundled with the checkpoint: {required_code(checkpoint.directory, references)}",
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
            hint="Run pip install -U transformers, or correct `architectures` in config.json.",
            data={"reason": "unknown-architecture", "architecture": name, "transformers": transformers.__version__},
        )
    config = parse_config(checkpoint, trust_remote_code=bool(references))
    choose_plain(config, checkpoint.config)
    for reference in references:
        if reference.endswith("." + name):
            try:
                cls = get_class_from_dynamic_module(reference, checkpoint.directory, local_files_only=True)
            except Exception as error:  # any: the checkpoint's own file runs
                raise refusal(error, checkpoint, name, "it can't be imported from the checkpoint's code") from error
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise ModelError(
            f"{name} is not a model class",
            where=where,
            hint="Write the model's class into `architectures` in config.json, or download that file again.",
            data={"reason": "no-model-class", "name": name},
        )
    return config, class_for(cls, config)


def _code_of(checkpoint: Checkpoint, name: str, cls: Any, named: dict[str, list[str]]) -> list[str]:
    """The references of `auto_map` that must run because transformers lacks the class of the config or of the model.

    [] if transformers has both: then its own classes are used, and the code doesn't run
    """
    kind = checkpoint.config.get("model_type")
    if cls is not None and isinstance(kind, str) and kind in CONFIG_MAPPING:
        return []
    config = named.get("AutoConfig", [])
    models = [ref for auto, refs in named.items() if is_model_entry(auto) for ref in refs if ref.endswith("." + name)]
    return list(dict.fromkeys([*config, *models]))
