"""A streamed model: it computes what the model in memory computes, and holds one block at a time."""

from __future__ import annotations

import pytest
import tiny
import torch

from compressor.evaluation.model_loading import load_parts
from compressor.model.block_runner import output_of, without_cache
from compressor.model.probe_model import example_batch
from compressor.model.spill import SpillFolder, kept


def in_memory(model):
    return {name.rpartition(".")[0] for name, value in model.named_parameters() if not value.is_meta}


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt", "mixtral", "bert", "vit"])
def test_a_streamed_model_gives_the_same_bits_with_one_block_in_memory(family, tmp_path):
    streamed, model = load_parts(tiny.save(family, tmp_path / "m"), False), tiny.build(family)
    seen = []
    for index, block in enumerate(streamed.model.get_submodule(streamed.blocks_path)):
        path = f"{streamed.blocks_path}.{index}."
        block.register_forward_hook(
            lambda _m, _a, _o, path=path: seen.append((path, in_memory(streamed.model))), prepend=True
        )
    batch = example_batch(model, torch.device("cpu"))
    with torch.no_grad(), without_cache(model, streamed.model):
        assert torch.equal(output_of(streamed.model(**batch)), output_of(model(**batch)))
    assert in_memory(streamed.model) == set()
    assert len(seen) == 2 and all(name.startswith(path) for path, names in seen for name in names)
    assert all(names for _, names in seen)


def test_what_is_kept_or_held_is_filled_once(tmp_path):
    streamed = load_parts(tiny.save("llama", tmp_path / "m"), False)
    filled = []
    streamed.placed.append(filled.append)
    batch = example_batch(streamed.model, torch.device("cpu"))
    with torch.no_grad(), without_cache(streamed.model), streamed.keeping():
        for _ in range(2):
            streamed.model(**batch)
    assert len(filled) == len(set(filled)) and in_memory(streamed.model) == set()
    with streamed.holding("model.layers.1"):
        assert all(name.startswith("model.layers.1") for name in in_memory(streamed.model))
    assert in_memory(streamed.model) == set()


def test_a_blank_module_reads_zeros_and_only_in_its_first_forwards(tmp_path):
    streamed, filled, read = load_parts(tiny.save("llama", tmp_path / "m"), False), [], []
    streamed.placed.append(filled.append)
    embedding, ids = streamed.model.get_input_embeddings(), torch.arange(5)
    with torch.no_grad(), streamed.blanking({"model.embed_tokens": 1}):
        read += [embedding(ids), embedding(ids)]
    with torch.no_grad():
        read.append(embedding(ids))
    assert read[0].shape == read[1].shape and not read[0].any()
    assert read[1].any() and torch.equal(read[1], read[2])
    assert filled == ["model.embed_tokens"] * 2 and in_memory(streamed.model) == set()


def test_a_module_that_fails_is_emptied_all_the_same(tmp_path):
    streamed = load_parts(tiny.save("llama", tmp_path / "m"), False)
    with torch.no_grad(), pytest.raises(AttributeError):
        streamed.model.model.layers[0](None)
    assert in_memory(streamed.model) == set()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
def test_a_spilled_tensor_is_read_back_and_its_file_goes_with_it(dtype, tmp_path):
    (tmp_path / "7.spilled").write_bytes(b"left by an earlier run")
    folder, value = SpillFolder(tmp_path), torch.arange(24).view(2, 3, 4).to(dtype)
    held = folder.keep(value)
    mapped = kept(held)
    assert torch.equal(mapped, value) and len(list(tmp_path.iterdir())) == 1
    mapped += 1  # a private copy
    assert torch.equal(kept(held), value)
    del held
    assert torch.equal(mapped, value + 1) and list(tmp_path.iterdir()) == []
