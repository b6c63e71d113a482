"""Guarded building: whatever a config, a class or a small twin raises is a refusal that names the key of config.json.

config.json is somebody else's file, and transformers checks only part of it: a wrong value may end in any exception,
in a loop over 10^12 layers or in a buffer of a terabyte. So counts and sizes are checked before anything is made from
them, the class is made on the meta device first, where parameters cost nothing, and when something fails the key is
looked for by putting other values in the place of each one until it works.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, get_args

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from compressor.errors import CompressError, DependencyError, ModelError
from compressor.model.checkpoint import Checkpoint
from compressor.process.resources import ran_out

DTYPES = ("float16", "bfloat16", "float32", "float64")  # what transformers can make a model in
# Above these no model has a size or a count of anything: the largest known have 10^7 positions and 1536 experts.
LARGEST_SIZE, LARGEST_COUNT = 10**8, 10**6
SIZES = re.compile(r"size|dim|embd|inner|position|ctx|window|length|rank|channel|hidden")
FREE = re.compile(r"theta|token|_ids?$|seed|scal|factor|base|freq|version|eps")  # integers that nothing is made of
BUFFER_BYTES = 1 << 30  # buffers that a class makes itself: position ids, masks, rotary tables; at most this much
MODULES_PER_TENSOR = 16  # wrappers, activations and dropout included
SEARCH_SECONDS = 5.0  # of processor time, for looking for the key; only a failure costs it
SMALL_NUMBERS = (1, 2, 4, 8)  # tried where the default doesn't help, or isn't known
HINT = "Correct it, or download config.json again."

Path = tuple[str, ...]  # of a key in config.json
Made = TypeVar("Made")


def where_of(checkpoint: Checkpoint) -> str:
    """How a message calls the config.json of a checkpoint."""
    return f"{checkpoint.directory.name}/config.json"


def check_values(checkpoint: Checkpoint) -> None:
    """Check the keys of config.json that are read before a config class is known, and every count and size.

    raises  ModelError naming the key and its value
    """
    values, where = checkpoint.config, where_of(checkpoint)
    names = values.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise _wrong("architectures", names, where, "a list of class names is needed")
    kind = values.get("model_type")
    if not isinstance(kind, str):
        if "model_type" not in values:
            raise ModelError(
                "has no `model_type`",
                where=where,
                hint="Add the type of the model, such as llama.",
                data={"reason": "no-model-type"},
            )
        raise _wrong("model_type", kind, where, "the name of a model type is needed")
    for key in ("dtype", "torch_dtype"):
        stated = values.get(key)
        if stated is not None and stated not in DTYPES:
            raise _wrong(key, stated, where, f"one of {', '.join(DTYPES)} is needed")
    quantized = values.get("quantization_config")
    if quantized is not None and not isinstance(quantized, dict):
        raise _wrong("quantization_config", quantized, where, "a map is needed")
    whole, block_keys = _known_keys(kind)
    tensors = len(checkpoint.tensors)
    for path, value in _leaves(values):
        key = path[-1]
        if type(value) is not int or FREE.search(key) or (len(path) == 1 and key not in whole):
            continue
        if key in block_keys and len(path) == 1 and not 1 <= value <= tensors:
            why = "at least 1 is needed" if value < 1 else f"the checkpoint holds {tensors} tensors, too few for that"
            raise _wrong(key, value, where, why)
        most = LARGEST_SIZE if SIZES.search(key) and key not in block_keys else LARGEST_COUNT
        if value > most:
            raise _wrong(".".join(path), value, where, f"no model has more than {most:,}")


def parse_config(checkpoint: Checkpoint, trust_remote_code: bool) -> PretrainedConfig:
    """The config as transformers reads it. raises ModelError naming the key that can't be read"""
    kind = checkpoint.config["model_type"]
    remote = trust_remote_code and "AutoConfig" in (checkpoint.config.get("auto_map") or ())
    if kind not in CONFIG_MAPPING and not remote:
        raise ModelError(
            f"model_type is {kind!r}, which this transformers doesn't know; it can't read its config.json",
            where=where_of(checkpoint),
            hint="Update transformers, or check `model_type`.",
            data={"reason": "unknown-model-type", "model_type": kind},
        )

    try:
        return AutoConfig.from_pretrained(
            checkpoint.directory, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # any: it depends on the class and the value
        if remote:
            raise refusal(error, checkpoint, "its config class", "it can't be made from config.json") from error
        cls = CONFIG_MAPPING[kind]
        read = lambda values: _from_json(cls, values)  # noqa: E731
        raise refusal(error, checkpoint, cls.__name__, "it can't be made", cls, read) from error


def guarded(
    work: Callable[[PretrainedConfig], Made],
    checkpoint: Checkpoint,
    config: PretrainedConfig,
    subject: str,
    failed: str,
    *,
    retry: Callable[[PretrainedConfig], object] | None = None,
) -> Made:
    """The result of `work(config)`, or a refusal that names the key of config.json whose value makes it fail.

    subject, failed  what did not work, such as "LlamaForCausalLM" and "it can't be built"
    retry            does what any loader of the model does. If that works the config isn't to blame, and no key is
                     looked for; else it is what is tried with other values. `work` unless given
    raises           ModelError; DependencyError where a package is missing and no key of config.json asks for it;
                     PassError where memory ran out
    """
    try:
        return work(config)
    except CompressError:
        raise
    except Exception as error:  # any: the model's own code fails in its own ways
        if (lack := ran_out(error)) is not None:  # no key of config.json is to blame
            raise lack from error
        if retry is not None and _works(retry, config):
            raise ModelError(
                f"{failed} ({_said(error)})",
                where=subject,
                hint="This model can't be compressed block by block.",
                data={"reason": "not-in-blocks", "cause": _said(error)},
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
    """What to say of a failure: the key whose change alone mends it, else what was raised.

    cls      the config class, whose defaults are tried
    attempt  does the same with other values of config.json
    """
    where, said = where_of(checkpoint), _said(error)
    values = checkpoint.config
    aliases = dict(getattr(cls, "attribute_map", {}))
    if isinstance(error, StrictDataclassFieldValidationError):
        field = re.search(r"field '(\w+)'", str(error))
        if field and (key := _key_of(field.group(1), values, aliases)) is not None:
            expected = re.search(r"expected (.+?), got", str(error))
            needed = f"{expected.group(1)} is needed" if expected else said
            return _wrong(key, values[key], where, needed)
    causes = [] if attempt is None or cls is None else _causes(error, values, attempt, _defaults(cls), aliases)
    if causes:
        shown = ", ".join(f"{'.'.join(path)} is {_shown(_at(values, path))}" for path in causes)
        wrong = shown if len(causes) == 1 else f"one of these is wrong: {shown}"
        return ModelError(
            f"{wrong}; {subject}: {failed} ({said})",
            where=where,
            hint=HINT,
            data={
                "reason": "wrong-value",
                "keys": [".".join(path) for path in causes],
                "subject": subject,
                "cause": said,
            },
        )
    if isinstance(error, ImportError):
        return DependencyError(f"{failed} ({said})", where=subject, hint="Install what it names.", data={"cause": said})
    return ModelError(
        f"{failed} ({said})",
        where=subject,
        hint="Loading it with transformers alone shows the whole error.",
        data={"reason": "fails", "cause": said},
    )


def empty_on_meta(
    cls: type[PreTrainedModel], config: PretrainedConfig, most_modules: int, dtype: torch.dtype
) -> PreTrainedModel:
    """The model made with `dtype`, all of it on the meta device; it costs no memory whatever the sizes are.

    raises  ValueError when it would have more than `most_modules` modules, and whatever the class raises
    """
    with torch.device("meta"), init.meta_device_safe_creation_ops(), _at_most(most_modules):
        return cls._from_config(copy.deepcopy(config), dtype=dtype)


def check_buffers(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """raises ModelError when a class would fill more memory with tables of its own than any real model does"""
    buffers = sorted(model.named_buffers(), key=lambda item: -item[1].nbytes)
    total = sum(buffer.nbytes for _, buffer in buffers)
    if total <= max(BUFFER_BYTES, checkpoint.nbytes):
        return
    name, largest = buffers[0]
    keys = [
        ".".join(path)
        for path, value in _leaves(checkpoint.config)
        if type(value) is int and value > 1 and value in largest.shape
    ]
    raise ModelError(
        f"asks for {total:,} bytes of buffers beside {checkpoint.nbytes:,} bytes of weights; {name} alone has shape "
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
    """More modules than a class makes for that many tensors."""
    return 1000 + MODULES_PER_TENSOR * len(checkpoint.tensors)


@contextmanager
def _at_most(count: int) -> Iterator[None]:
    """Count the modules put into others, so that a loop over a wrong number of layers ends."""
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


def _known_keys(kind: str) -> tuple[set[str], set[str]]:
    """Keys that the config class of a model type reads as whole numbers, and those of them that count its blocks."""
    blocks = {"num_hidden_layers"}
    if kind not in CONFIG_MAPPING:
        return blocks | {"num_labels"}, blocks
    cls = CONFIG_MAPPING[kind]
    aliases = dict(getattr(cls, "attribute_map", {}))
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    whole = {field.name for field in fields if field.type is int or int in get_args(field.type)}
    whole |= {alias for alias, target in aliases.items() if target in whole}
    blocks.add(aliases.get("num_hidden_layers", "num_hidden_layers"))
    return whole | blocks | {"num_labels"}, blocks


def _from_json(cls: type[PretrainedConfig], values: dict[str, Any]) -> PretrainedConfig:
    """A config from the values of a config.json, as `from_pretrained` makes it."""
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


def _causes(
    error: Exception,
    values: dict[str, Any],
    attempt: Callable[[dict[str, Any]], object],
    defaults: Mapping[str, Any],
    aliases: Mapping[str, str],
) -> list[Path]:
    """Up to three keys such that changing one of them alone makes `attempt` succeed.

    The likelier ones are tried first, and the others only if none of these is it: keys that the failing lines read
    (the innermost first), keys whose value isn't a positive number or has the type that the message names, and those
    with any value but the default.
    """
    ends = time.process_time() + SEARCH_SECONDS
    named, said = _named(error, aliases), str(error)
    known = {key: rank for rank, key in enumerate(named)}
    paths = {
        path: value
        for path, value in _leaves(values)
        if path[0] not in ("model_type", "architectures", "auto_map") and value != _at(defaults, path)
    }
    by_line = sorted((path for path in paths if path[-1] in known), key=lambda path: known[path[-1]])
    odd = [path for path, value in paths.items() if not _is_positive(value) or f"'{type(value).__name__}'" in said]
    for group in (by_line, [path for path in odd if path not in by_line], [*paths]):
        for others in (_defaults_of, _small_numbers):
            found: list[Path] = []
            for path in group:
                if any(inner[: len(path)] == path for inner in found):
                    continue  # a map is wrong for what it holds
                for other in others(defaults, path):
                    if time.process_time() > ends or len(found) == 3:
                        return found
                    try:
                        attempt(_changed(values, path, other))
                    except Exception:  # this change didn't mend it
                        continue
                    found.append(path)
                    break
            if found:
                return found
    return []


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and value > 0


def _defaults_of(defaults: Mapping[str, Any], path: Path) -> list[Any]:
    """What the class has for a key, and nothing at all."""
    default = _at(defaults, path)
    return [None] if default is None else [default, None]


def _small_numbers(defaults: Mapping[str, Any], path: Path) -> tuple[int, ...]:
    default = _at(defaults, path)
    return SMALL_NUMBERS if default is None or type(default) in (int, float) else ()


def _changed(values: dict[str, Any], path: Path, other: Any) -> dict[str, Any]:
    """config.json with another value for one key; None leaves the key out."""
    changed = copy.deepcopy(values)
    node = changed
    for part in path[:-1]:
        node = node[part]
    if other is None:
        del node[path[-1]]
    else:
        node[path[-1]] = other
    return changed


def _named(error: Exception, aliases: Mapping[str, str]) -> list[str]:
    """Attributes that the failing lines read, the innermost first, as keys of config.json."""
    found: list[str] = []
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        words = re.findall(r"(?:\.|\[\"|\['|get\(\")([A-Za-z_]\w*)", frame.line or "")
        found += [aliases.get(word, word) for word in words]
    found += [aliases.get(word, word) for word in re.findall(r"[A-Za-z_]\w+", str(error))]
    return list(dict.fromkeys(found))


def _leaves(values: Mapping[str, Any], prefix: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every key with its value, those of maps inside maps too; a map comes after what it holds."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*prefix, key))
        yield (*prefix, key), value


def _at(values: Mapping[str, Any], path: Path) -> Any:
    node: Any = values
    for part in path:
        if not isinstance(node, Mapping) or part not in node:
            return None
        node = node[part]
    return node


def _key_of(field: str, values: Mapping[str, Any], aliases: Mapping[str, str]) -> str | None:
    """The key of config.json that sets a field."""
    names = [field, *(alias for alias, target in aliases.items() if target == field)]
    return next((name for name in names if name in values), None)


def _wrong(key: str, value: Any, where: str, needed: str) -> ModelError:
    told = {"reason": "wrong-value", "keys": [key], "value": _shown(value), "needed": needed}
    return ModelError(f"{key} is {_shown(value)}; {needed}", where=where, hint=HINT, data=told)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."


def _said(error: Exception) -> str:
    """The exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:240]}" if text else type(error).__name__
