"""Images are read as uint8 of a shape that the file's headers state; everything else ends in a sentence."""

from __future__ import annotations

import io
import json
import random
import zipfile

import numpy
import pytest
import torch
from data_settings import ask
from raising import raises

from compressor.data import files
from compressor.data.images import check_images, normalised, read_images
from compressor.data.samples import check_data, load_samples
from compressor.errors import ModelError, RecipeError

IMAGES = numpy.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=numpy.uint8)
LABELS = numpy.arange(6) % 3


def npz(**arrays):
    sink = io.BytesIO()
    numpy.savez(sink, **arrays)
    return sink.getvalue()


def claimed(shape, body=b"\0" * 16):
    """An .npz whose image header claims a shape, on a body of few bytes."""
    sink, header = io.BytesIO(), io.BytesIO()
    numpy.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("images.npy", header.getvalue() + body)
    return sink.getvalue()


WHOLE = npz(images=IMAGES, labels=LABELS)


@pytest.mark.parametrize(
    ("content", "place", "data"),
    [
        (b"", "", {"reason": "not-read"}),
        (b"PK\x03\x04", "", {"reason": "not-read"}),
        (WHOLE[:200], "", {"reason": "not-read"}),
        (WHOLE[:-30], "", {"reason": "not-read"}),
        (npz(), "", {"reason": "no-images", "names": []}),
        (npz(pixels=IMAGES), "", {"reason": "no-images", "names": ["pixels"]}),
        (npz(images=IMAGES / 255), "", {"array": "images", "dtype": "float64"}),
        (npz(images=IMAGES.astype(numpy.uint16)), "", {"array": "images", "dtype": "uint16"}),
        (npz(images=IMAGES.astype(numpy.int8)), "", {"array": "images", "dtype": "int8"}),
        (npz(images=IMAGES > 9), "", {"array": "images", "dtype": "bool"}),
        (npz(images=IMAGES[:0]), "", {"array": "images", "shape": [0, 4, 4, 3]}),
        (npz(images=IMAGES[0, 0]), "", {"array": "images", "shape": [4, 3]}),
        (npz(images=IMAGES[None]), "", {"array": "images", "shape": [1, 6, 4, 4, 3]}),
        (npz(images=numpy.array([b"a", None], dtype=object)), "", {"reason": "objects", "array": "images"}),
        (npz(images=IMAGES, labels=LABELS[:5]), "", {"array": "labels", "shape": [5], "images": 6}),
        (npz(images=IMAGES, labels=LABELS[:, None]), "", {"array": "labels", "shape": [6, 1], "images": 6}),
        (npz(images=IMAGES, labels=LABELS + 0.5), ", row 1", {"reason": "no-whole-label", "label": "0.5"}),
        (npz(images=IMAGES, labels=LABELS * numpy.nan), ", row 1", {"reason": "no-whole-label", "label": "nan"}),
        (npz(images=IMAGES, labels=LABELS - 1), ", row 1", {"reason": "label-out-of-range", "label": -1}),
        (npz(images=IMAGES, labels=LABELS == 1), "", {"array": "labels", "dtype": "bool"}),
        (npz(images=IMAGES, labels=numpy.array(list("abcdef"))), "", {"array": "labels", "dtype": "<U1"}),
        (npz(images=IMAGES, labels=LABELS.astype(object)), "", {"reason": "objects", "array": "labels"}),
        (claimed((2, 4, 4)), "", {"reason": "wrong-size", "array": "images", "bytes": 16, "claimed": 32}),
        (
            claimed((10**6, 10**6, 10**6)),
            "",
            {"reason": "wrong-size", "array": "images", "bytes": 16, "claimed": 1000000000000000000},
        ),
        (claimed((-1, 4, 4)), "", {"reason": "wrong-size", "array": "images", "bytes": 16, "claimed": -16}),
    ],
)
def test_malformed_images_end_in_a_sentence(content, place, data, tmp_path):
    (tmp_path / "i.npz").write_bytes(content)
    with raises(RecipeError, where=f"i.npz{place}", **data) as caught:
        load_samples(ask(str(tmp_path / "i.npz"), samples=2), tmp_path, seed=0, vocabulary=None)
    assert caught.value.hint
    if not place:
        with pytest.raises(RecipeError):
            check_data(ask(str(tmp_path / "i.npz")), reads_pixels=True)


def test_labels_may_be_whole_floats_or_absent(tmp_path):
    for name, arrays, labels in (("a", {"labels": LABELS.astype(float)}, LABELS.tolist()), ("b", {}, None)):
        (tmp_path / f"{name}.NPZ").write_bytes(npz(images=IMAGES, **arrays))
        assert read_images(str(tmp_path / f"{name}.NPZ"))[1] == labels
        samples = load_samples(ask(str(tmp_path / f"{name}.NPZ"), samples=6), tmp_path, seed=0, vocabulary=None)
        assert (samples.labels is None) == (labels is None) and samples.inputs[0].shape == (3, 4, 4)


def test_what_headers_claim_is_bounded_by_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "memory_share", lambda: 5000)
    sink = io.BytesIO()
    numpy.savez_compressed(sink, images=numpy.zeros((100, 10, 10), numpy.uint8))
    (tmp_path / "i.npz").write_bytes(sink.getvalue())
    for use in (read_images, check_images):
        with raises(RecipeError, where="i.npz", size=10128, limit=5000):
            use(str(tmp_path / "i.npz"))


def test_changed_bytes_are_read_or_refused(tmp_path):
    draw = random.Random(0)
    for _ in range(200):
        changed = bytearray(WHOLE)
        for _ in range(draw.randrange(1, 5)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        (tmp_path / "i.npz").write_bytes(changed[: draw.randrange(len(changed))] if draw.random() < 0.3 else changed)
        for use in (read_images, check_images):
            try:
                use(str(tmp_path / "i.npz"))
            except RecipeError as error:
                assert str(error)


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({}, lambda x: x / 255),
        ({"do_rescale": False}, lambda x: x),
        ({"rescale_factor": 1 / 255}, lambda x: x / 255),
        ({"rescale_factor": 0.5}, lambda x: x * 0.5),
        (
            {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5]},
            lambda x: (x / 255 - torch.tensor([0.5, 0.4, 0.3])) / 0.5,
        ),
        ({"image_mean": 0.5, "image_std": 0.25}, lambda x: (x / 255 - 0.5) / 0.25),
        ({"image_mean": [0.5], "do_normalize": False}, lambda x: x / 255),
    ],
)
def test_pixels_are_scaled_and_normalised_as_the_processor_says(stated, expected, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    images = torch.from_numpy(IMAGES)
    torch.testing.assert_close(normalised(images, tmp_path).permute(0, 2, 3, 1), expected(images.float()))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"image_mean": "0.5"}', '{"image_mean": [0.5, 0.5]}', '{"image_std": [0]}', '{"image_std": [NaN]}',
     '{"rescale_factor": null}', '{"image_mean": [[0.5]]}', '{"image_mean": true}'],
)  # fmt: skip
def test_a_processor_that_cannot_be_used_is_the_models_fault(text, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(text)
    with raises(ModelError, where="preprocessor_config.json"):
        normalised(torch.from_numpy(IMAGES), tmp_path)
