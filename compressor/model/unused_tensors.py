"""Classifies the tensors of a checkpoint that fill no parameter of the model.

A class names some of them (`_keys_to_ignore_on_load_unexpected`: layers that predict further tokens, which other
programs run). The others are unknown. All are copied to the artifact byte for byte, except tensors that the model
computes itself and tensors that it has twice.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PretrainedConfig, PreTrainedModel

from compressor.model.families import FURTHER_BLOCKS_KEYS
from compressor.storage.safetensors_file import TensorInfo

# Buffers that transformers computes and that older releases saved: (name, number of dimensions, None for any).
COMPUTED: tuple[tuple[re.Pattern[str], int | None], ...] = (
    (re.compile(r"(^|\.)(original_)?inv_freq$"), 1),
    (re.compile(r"(^|\.)position_ids$"), 2),
    (re.compile(r"(^|\.)(attn|attention)\.bias$"), 4),  # a causal mask (1, 1, positions, positions)
    (re.compile(r"(^|\.)(attn|attention)\.masked_bias$"), 0),
)
Reason = Literal["ignored", "unknown", "computed", "copy"]
WHY_UNUSED: dict[str, str] = {
    "ignored": "the class leaves it out on purpose",
    "unknown": "the class doesn't know it",
    "computed": "the model computes it itself",
    "copy": "it equals the tensor that it is tied to",
}


@dataclass(frozen=True)
class Unused:
    """tensor    its name in the checkpoint
    reported  what transformers reports as unexpected for it
    reason    ignored: the class names it; unknown; computed: by the model; copy: of the parameter that it is tied to
    of        the parameter of which it is a copy
    """

    tensor: str
    reported: tuple[str, ...]
    reason: Reason
    of: str | None = None

    @property
    def is_carried(self) -> bool:
        return self.reason in ("ignored", "unknown")


def unused_tensor(name: str, info: TensorInfo, reported: tuple[str, ...], model: PreTrainedModel) -> Unused:
    """The record of a tensor that fills no parameter, with the reason."""
    if any(pattern.search(name) and dims in (None, len(info.shape)) for pattern, dims in COMPUTED):
        return Unused(name, reported, "computed")
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    is_known = any(re.search(pattern, key) for pattern in ignored for key in reported)
    return Unused(name, reported, "ignored" if is_known else "unknown")


def without_announcements(values: dict[str, Any], config: PretrainedConfig) -> dict[str, Any]:
    """config.json without the keys of layers that predict further tokens. `config` gives their defaults."""
    nested = "text_config" if isinstance(values.get("text_config"), dict) else None
    sections = {None: values} | ({nested: values[nested]} if nested else {})
    changed = {name: {key: 0 for key in FURTHER_BLOCKS_KEYS if section.get(key)} for name, section in sections.items()}
    if getattr(config.get_text_config(), "num_mtp_layers", None) and "num_mtp_layers" not in changed[nested]:
        changed[nested]["num_mtp_layers"] = 0
    result = {**values, **changed[None]}
    return {**result, nested: {**values[nested], **changed[nested]}} if nested else result
