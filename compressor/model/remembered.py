"""Remembers what was found by running probe models, so that a model of the same class and config isn't run again.

A process reads the structure of one model several times: for a plan and a run, for each recipe that is compared, and
before and after a step that changes the model. What a probe model shows depends on its class and its config alone.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from transformers import PretrainedConfig

from compressor.model.probe_model import with_parts

MOST = 64  # results that are kept; each may hold an empty model

Found = TypeVar("Found")

_known: OrderedDict[Hashable, Any] = OrderedDict()


def remembered(key: Hashable, find: Callable[[], Found]) -> Found:
    """The result of `find`, which is called once for each key. An error is not remembered.

    key  names the question, and has the class and `config_key` of the model
    """
    if key not in _known:
        found = find()
        _known[key] = found
        if len(_known) > MOST:
            _known.popitem(last=False)
    _known.move_to_end(key)
    return _known[key]  # type: ignore[no-any-return]


def forget() -> None:
    """Forget everything, for example after the code of a model class was replaced."""
    _known.clear()


def config_key(config: PretrainedConfig) -> str:
    """A hash of all values of a config except its path, and of the implementations that it asks for."""
    asked = [
        (getattr(part, "_attn_implementation", None), getattr(part, "_experts_implementation", None))
        for part in with_parts(config)
    ]
    values = json.dumps([_without_path(config.to_dict()), asked], sort_keys=True, default=repr)
    return hashlib.sha256(values.encode()).hexdigest()


def _without_path(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_path(inner) for key, inner in value.items() if key != "_name_or_path"}
    return value
