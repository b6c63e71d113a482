"""Reads images and labels of an .npz file, and normalizes them by the model's preprocessor_config.json.

A file may declare any size and any dtype. So its headers are read first, and only allowed arrays are unpacked.
"""

from __future__ import annotations

import io
import math
import zipfile
from pathlib import Path
from typing import Any

from compressor.data.files import check_size, find_file, read_regular, reading
from compressor.data.rows import whole_labels
from compressor.errors import ModelError, RecipeError
from compressor.lazy import torch
from compressor.process.utf8 import parse_json

PROCESSOR = "preprocessor_config.json"
FORMAT = (
    "Save it with numpy.savez: `images` as uint8 of shape (n, height, width) or (n, height, width, channels), "
    "and `labels` as whole numbers of shape (n,)."
)


def read_images(source: str) -> tuple[torch.Tensor, list[int] | None, bytes]:
    """(images (n, height, width, channels) uint8, a class number for each or None, content of the file).

    raises  RecipeError for a file with other arrays, or one that is too large for the memory
    """
    path = find_file(source)
    content = read_regular(path)
    with reading(path.name):
        arrays = _arrays(io.BytesIO(content), path.name, only_headers=False)
    labels = arrays.get("labels")
    images = torch.from_numpy(arrays["images"])
    images = images.unsqueeze(-1) if images.dim() == 3 else images
    return images, None if labels is None else whole_labels(labels.tolist(), path.name), content


def check_images(source: str) -> None:
    """Check the headers of the file without reading the images. raises as `read_images` does"""
    path = find_file(source)
    with reading(path.name), path.open("rb") as file:
        _arrays(file, path.name, only_headers=True)


def normalised(images: torch.Tensor, model_directory: Path) -> torch.Tensor:
    """Pixels (n, channels, height, width) float32 of images (n, height, width, channels) uint8.

    Without preprocessor_config.json they are scaled to 0 ... 1. raises ModelError for one that can't be used
    """
    stated = _processor(model_directory)
    pixels = images.permute(0, 3, 1, 2).float()
    if stated.get("do_rescale", True):
        factor = _numbers(stated, "rescale_factor", 1) if "rescale_factor" in stated else torch.tensor(1 / 255)
        pixels = pixels / 255 if abs(255 * float(factor) - 1) < 1e-6 else pixels * factor
    if stated.get("do_normalize", True):
        channels = pixels.shape[1]
        pixels = pixels - _numbers(stated, "image_mean", channels) if "image_mean" in stated else pixels
        pixels = pixels / _numbers(stated, "image_std", channels) if "image_std" in stated else pixels
    return pixels


def _arrays(file: Any, name: str, *, only_headers: bool) -> dict[str, Any]:
    """`images` and, if the file has them, `labels`, both checked. With only_headers: only the checks."""
    import numpy

    shapes: dict[str, tuple[int, ...]] = {}
    with zipfile.ZipFile(file) as archive:
        members = {info.filename[:-4]: info for info in archive.infolist() if info.filename.endswith(".npy")}
        for key in ("images", "labels"):
            if key not in members:
                continue
            check_size(members[key].file_size, name)
            with archive.open(members[key]) as member:
                shapes[key], dtype, body = _header(member)
            size = math.prod(shapes[key]) * dtype.itemsize
            if dtype.hasobject or size + body != members[key].file_size:
                found = "Python objects" if dtype.hasobject else f"{members[key].file_size - body} of {size} bytes"
                sizes = {} if dtype.hasobject else {"bytes": members[key].file_size - body, "claimed": size}
                values = {"reason": "objects" if dtype.hasobject else "wrong-size", "array": key, **sizes}
                raise RecipeError(f"`{key}` holds {found}", where=name, hint=FORMAT, data=values)
            if key == "images" and dtype != numpy.uint8:
                raise RecipeError(
                    f"`images` has the dtype {dtype}; uint8 is needed",
                    where=name,
                    hint="Save the pixels from 0 to 255 as uint8; they are normalized by preprocessor_config.json.",
                    data={"array": key, "dtype": str(dtype)},
                )
            if key == "labels" and dtype.kind not in "iuf":
                raise RecipeError(
                    f"`labels` has the dtype {dtype}; whole numbers are needed",
                    where=name,
                    hint=FORMAT,
                    data={"array": key, "dtype": str(dtype)},
                )
        shape = shapes.get("images")
        if shape is None:
            raise RecipeError(
                f"has no `images` (it contains {', '.join(members) or 'nothing'})",
                where=name,
                hint=FORMAT,
                data={"reason": "no-images", "names": list(members)},
            )
        if len(shape) not in (3, 4) or 0 in shape:
            raise RecipeError(
                f"`images` has the shape {shape}",
                where=name,
                hint=FORMAT,
                data={"array": "images", "shape": list(shape)},
            )
        if "labels" in shapes and shapes["labels"] != shape[:1]:
            raise RecipeError(
                f"`labels` has the shape {shapes['labels']} for {shape[0]} images",
                where=name,
                hint=FORMAT,
                data={"array": "labels", "shape": list(shapes["labels"]), "images": shape[0]},
            )
        if only_headers:
            return {}
        arrays: dict[str, Any] = {}
        for key in shapes:
            with archive.open(members[key]) as member:
                arrays[key] = numpy.lib.format.read_array(member, allow_pickle=False)
    return arrays


def _header(member: Any) -> tuple[tuple[int, ...], Any, int]:
    """(shape, dtype, bytes of the header) of an .npy stream."""
    from numpy.lib import format as npy

    version = npy.read_magic(member)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"version {version} of the .npy format")
    shape, _, dtype = npy.read_array_header_1_0(member) if version == (1, 0) else npy.read_array_header_2_0(member)
    return shape, dtype, member.tell()


def _processor(model_directory: Path) -> dict[str, Any]:
    file = model_directory / PROCESSOR
    if not file.exists():
        return {}
    try:
        stated = parse_json(read_regular(file))
    except (ValueError, RecursionError, RecipeError) as error:
        raise ModelError(
            f"can't be read ({error})",
            where=PROCESSOR,
            hint="Download the model's preprocessor_config.json again.",
            data={"reason": "not-read", "cause": str(error)},
        ) from error
    if not isinstance(stated, dict):
        raise ModelError(
            "is not a JSON object",
            where=PROCESSOR,
            hint="Download the model's preprocessor_config.json again.",
            data={"reason": "no-object"},
        )
    return stated


def _numbers(stated: dict[str, Any], key: str, channels: int) -> torch.Tensor:
    """One finite number for all channels, or one for each, as (1, channels or 1, 1, 1). raises ModelError"""
    value = stated[key]
    values = value if isinstance(value, list) else [value]
    are_numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values)
    if not are_numbers or len(values) not in (1, channels) or (key == "image_std" and 0 in values):
        raise ModelError(
            f"{key} is {value!r:.80}, for images of {channels} channels",
            where=PROCESSOR,
            hint=f"Set {key} to one number, or to a list of {channels} numbers.",
            data={"key": key, "value": f"{value!r:.80}", "channels": channels},
        )
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)
