"""Finds which patches of images a model with token gates kept, for the report's picture.

Any loader may have made the model. A gate is a module that has `token_gate` and `choices`
(`compressor.layers.structural.token_gate`), also if its class comes from a modeling file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.evaluation.sections import ImagePatches, Patches

IMAGES = 6
LONGEST_SIDE = 64  # pixels of the report's copy of an image


def kept_patches(model: Any, images: Sequence[Tensor]) -> Patches | None:
    """The patches that each image kept; None for a model without gates.

    images  (channels, height, width), normalised
    """
    gates = [module for module in model.modules() if getattr(module, "token_gate", {}).get("keep", 1) < 1]
    if not gates:
        return None
    shown: list[ImagePatches] = []
    for image in images[:IMAGES]:
        survived = _survived(model, image, gates)
        shown.append({"pixels": _small(image), "survived": survived})
    return {"gates": len(gates), "images": shown}


def _survived(model: Any, image: Tensor, gates: list[nn.Module]) -> list[list[int]]:
    """The number of gates that each patch passed."""
    for gate in gates:
        gate.choices = []  # type: ignore[assignment]
    try:
        with torch.no_grad():
            model(**{model.main_input_name: image.unsqueeze(0).to(model.dtype)})
        chosen = [gate.choices[0][0] if gate.choices else None for gate in gates]  # type: ignore[index]
    finally:
        for gate in gates:
            gate.choices = None  # type: ignore[assignment]
    image_sides, patch_sides = _sides(model.config.image_size), _sides(model.config.patch_size)
    shape = (image_sides[0] // patch_sides[0], image_sides[1] // patch_sides[1])
    prefix: int = gates[0].token_gate["protect"][0]  # type: ignore[index, assignment]
    passed = torch.zeros(prefix + shape[0] * shape[1], dtype=torch.int64)
    left = torch.arange(len(passed))
    for indices in chosen:
        left = left if indices is None else left[indices]
        passed[left] += 1
    return passed[prefix:].view(shape).tolist()


def _sides(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _small(image: Tensor) -> list[list[int]]:
    """The image in grey, stretched to 0..255."""
    grey = image.float().mean(0)
    factor = LONGEST_SIDE / max(grey.shape)
    if factor < 1:
        grey = F.interpolate(grey[None, None], scale_factor=factor, mode="area")[0, 0]
    low, high = grey.min(), grey.max()
    return ((grey - low) / (high - low).clamp_min(1e-9) * 255).round().int().tolist()
