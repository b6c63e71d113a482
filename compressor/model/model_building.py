"""Builds configs and models so that any failure becomes an error that names the wrong key of config.json.

config.json comes from anywhere, and transformers checks only part of it: a wrong value may end in any exception, in a
loop over 10^12 layers or in a buffer of a terabyte. So counts and sizes are checked before anything is made from them
(`config_values`), the class is made on the meta device first, where parameters cost nothing, and after a failure the
wrong key is searched for (`wrong_key`).
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from compressor.errors import CompressError, DependencyError, ModelError
from compressor.model.checkpoint import Checkpoint
from compressor.model.config_values import HINT, key_of, leaves, shown_value, value_at, where_of, wrong_value
from compressor.model.meta_init import quick_on_meta
from compressor.model.wrong_key import wrong_keys
from compressor.process.resources import ran_out

BUFFER_BYTES = 1 << 30  # limit for the buffers that a class makes itself: position ids, masks, rotary frequencies
MODULES_PER_TENSOR = 16  # wrappers, activations and dropout included

Made = TypeVar("Made")


def parse_config(checkpoint: Checkpoint, trust_remote_code: bool) -> PretrainedConfig:
    """The config as transformers reads it. raises ModelError naming a key that can't be read"""
    kind = checkpoint.config["model_type"]
    remote = trust_remote_code and "AutoConfig" in (checkpoint.config.get("auto_map") or ())
    if kind not in CONFIG_MAPPING and not remote:
        raise ModelError(
            f"model_type is {kind!r}, which the installed transformers doesn't know",
            where=where_of(checkpoint),
            hint="Run pip install -U transformers, or correct `model_type` in config.json.",
            data={"reason": "unknown-model-type", "model_type": kind},
        )

    try:
        config = AutoConfig.from_pretrained(
            checkpoint.directory, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # any: it depends on the class and the value
        if remote:
            raise refusal(error, checkpoint, "its config class", "it can't be made from config.json") from error
        cls = CONFIG_MAPPING[kind]
        read = lambda values: _from_json(cls, values)  # noqa: E731
        raise refusal(error, checkpoint, cls.__name__, "it can't be made", cls, read) from error
    if checkpoint.quantized is not None and hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def guarded(
    work: Callable[[PretrainedConfig], Made],
    checkpoint: Checkpoint,
    config: PretrainedConfig,
    subject: str,
    failed: str,
    *,
    retry: Callable[[PretrainedConfig], object] | None = None,
) -> Made:
    """The result of `work(config)`, or an error that names the key of config.json whose value makes it fail.

    subject, failed  what did not work, such as "LlamaForCausalLM" and "it can't be built"
    retry            does what any loader of the model does. If it works, the config is not the cause, and no key is
                     searched for. Else it is tried with other values. Default: `work`
    raises           ModelError; DependencyError if a package is missing and no key of config.json needs it; PassError
                     if memory ran out
    """
    try:
        return work(config)
    except CompressError:
        raise
    except Exception as error:  # any: the model's own code fails in its own ways
        if (lack := ran_out(error)) is not None:  # no key of config.json is the cause
            raise lack from error
        if retry is not None and _works(retry, config):
            raise ModelError(
                f"{failed} ({_message_of(error)})",
                where=subject,
                hint="Choose another model; if transformers runs this one, report this message with its config.json.",
                data={"reason": "not-in-blocks", "cause": _message_of(error)},
            ) from error
        cls, again = type(config), retry or work
        raise refusal(error, checkpoint, subject, failed, cls, lambda values: again(_from_json(cls, values))) from error


def refusal(
    error: Exception,
    checkpoint: Checkpoint,
    subject: str,
    failed: str,
    cls: type[PretrainedConfig] | None = None,
    attempt: Callable[[dict[str, Any]], object] | None = None,
) -> CompressError:
    """The error of a failure: it names the key whose change alone corrects it, else the exception.

    cls      the config class, whose defaults are tried
    attempt  does the same with other values of config.json
    """
    where, message = where_of(checkpoint), _message_of(error)
    values = checkpoint.config
    aliases = dict(getattr(cls, "attribute_map", {}))
    if isinstance(error, StrictDataclassFieldValidationError):
        field = re.search(r"field '(\w+)'", str(error))
        if field and (key := key_of(field.group(1), values, aliases)) is not None:
            expected = re.search(r"expected (.+?), got", str(error))
            needed = f"{expected.group(1)} is needed" if expected else message
            return wrong_value(key, values[key], where, needed)
    causes = [] if attempt is None or cls is None else wrong_keys(error, values, attempt, _defaults(cls), aliases)
    if causes:
        shown = ", ".join(f"{'.'.join(path)} is {shown_value(value_at(values, path))}" for path in causes)
        wrong = shown if len(causes) == 1 else f"one of these is wrong: {shown}"
        return ModelError(
            f"{wrong}; {subject}: {failed} ({message})",
            where=where,
            hint=HINT,
            data={
                "reason": "wrong-value",
                "keys": [".".join(path) for path in causes],
                "subject": subject,
                "cause": message,
            },
        )
    if isinstance(error, ImportError):
        return DependencyError(
            f"{failed} ({message})",
            where=subject,
            hint="Install the package that the message names with pip.",
            data={"cause": message},
        )
    return ModelError(
        f"{failed} ({message})",
        where=subject,
        hint="Load it with transformers alone; if that works, report this message with the model's config.json.",
        data={"reason": "fails", "cause": message},
    )


def empty_on_meta(
    cls: type[PreTrainedModel], config: PretrainedConfig, most_modules: int, dtype: torch.dtype
) -> PreTrainedModel:
    """The model made with `dtype`, all of it on the meta device, so that it needs no memory at any size.

    raises  ValueError if it would have more than `most_modules` modules, and whatever the class raises
    """
    with torch.device("meta"), quick_on_meta(), init.meta_device_safe_creation_ops(), _at_most(most_modules):
        return cls._from_config(copy.deepcopy(config), dtype=dtype)


def check_buffers(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """raises ModelError if the buffers of a class need more memory than those of any real model"""
    buffers = sorted(model.named_buffers(), key=lambda item: -item[1].nbytes)
    total = sum(buffer.nbytes for _, buffer in buffers)
    if total <= max(BUFFER_BYTES, checkpoint.nbytes):
        return
    name, largest = buffers[0]
    keys = [
        ".".join(path)
        for path, value in leaves(checkpoint.config)
        if type(value) is int and value > 1 and value in largest.shape
    ]
    raise ModelError(
        f"needs {total:,} bytes of buffers for {checkpoint.nbytes:,} bytes of weights; {name} alone has shape "
        f"{tuple(largest.shape)}" + (f", after {' or '.join(keys)}" if keys else ""),
        where=where_of(checkpoint),
        hint=HINT,
        data={
            "reason": "large-buffers",
            "bytes": total,
            "weight_bytes": checkpoint.nbytes,
            "name": name,
            "shape": list(largest.shape),
            "keys": keys,
        },
    )


def most_modules(checkpoint: Checkpoint) -> int:
    """An upper limit for the number of modules that a class makes for that many tensors."""
    return 1000 + MODULES_PER_TENSOR * len(checkpoint.tensors)


@contextmanager
def _at_most(count: int) -> Iterator[None]:
    """Count the submodules that are made, so that a loop over a wrong number of layers ends."""
    seen = 0

    def count_one(_parent: nn.Module, _name: str, _child: nn.Module | None) -> None:
        nonlocal seen
        seen += 1
        if seen > count:
            raise ValueError(f"it would have more than {count:,} modules, far more than the checkpoint has tensors for")

    handle = register_module_module_registration_hook(count_one)
    try:
        yield
    finally:
        handle.remove()


def _from_json(cls: type[PretrainedConfig], values: dict[str, Any]) -> PretrainedConfig:
    """The config from the values of a config.json, as `from_pretrained` makes it."""
    return cls.from_dict(cls._decode_special_floats(copy.deepcopy(values)))


def _defaults(cls: type[PretrainedConfig]) -> dict[str, Any]:
    try:
        return json.loads(cls().to_json_string(use_diff=False))
    except Exception:  # a class that can't be made without arguments has none
        return {}


def _works(work: Callable[[PretrainedConfig], object], config: PretrainedConfig) -> bool:
    try:
        work(config)
    except Exception:  # any: that it fails is the answer
        return False
    return True


def _message_of(error: Exception) -> str:
    """The exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:240]}" if text else type(error).__name__
