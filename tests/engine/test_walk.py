"""The walk: what is in memory at each part, where the batches are by then, and what is left when it is broken off."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers as hf
from raising import raises

from compressor.engine.block_io import PartSource, free_all
from compressor.engine.calibration_batch import CalibrationBatch
from compressor.engine.walk import Holder, walk
from compressor.errors import Interrupted
from compressor.model.structure import read_structure

CPU = torch.device("cpu")
IDS = torch.arange(12).view(1, 12)


@pytest.fixture
def structure(tmp_path):
    return read_structure(tiny.save("llama", tmp_path / "model"))


def holder(structure, **options):
    options = {"source": lambda unit: PartSource(structure), "is_interrupted": lambda: False, **options}
    return Holder(structure, CPU, **options)


def in_memory(structure):
    """Parts of which every parameter is there."""
    parts = range(structure.block_count + 2)
    get = structure.model.get_parameter
    return [unit for unit in parts if not any(get(name).is_meta for name in structure.parameters_of(unit))]


@pytest.mark.parametrize("keeps_blocks", [False, True])
def test_parts_come_in_order_and_blocks_are_freed_behind_it_unless_they_stay(keeps_blocks, structure):
    there = [in_memory(structure) for _ in walk(structure, [], holder(structure, keeps_blocks=keeps_blocks))]
    assert there == ([[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]] if keeps_blocks else [[0], [0, 1], [0, 2], [0, 3]])
    free_all(structure)
    assert in_memory(structure) == []


def test_the_batches_come_to_the_head_as_in_the_model_itself(structure):
    batch = CalibrationBatch.before_embeddings({"input_ids": IDS})
    for part in walk(structure, [batch], holder(structure)):
        if part.is_output_head:
            logits = part.output(batch)
    dense = hf.AutoModelForCausalLM.from_pretrained(structure.checkpoint.directory)
    with torch.no_grad():
        assert logits.equal(dense(input_ids=IDS).logits)


def test_what_the_work_takes_on_itself_is_not_taken_on_again(structure):
    batch = CalibrationBatch.before_embeddings({"input_ids": IDS})
    for part in walk(structure, [batch], holder(structure)):
        if part.number == 1:
            entered = batch.hidden
            part.advance(lambda: None)
        if part.number == 2:
            assert batch.hidden is entered


def test_a_part_with_nothing_to_do_is_not_loaded(structure):
    source = {2: PartSource(structure)}.get
    assert [in_memory(structure) for _ in walk(structure, [], holder(structure, source=source))] == [[], [], [2], []]


def test_it_stops_before_a_part_when_asked(structure):
    asked = iter([False, False, True])
    seen = []
    with raises(Interrupted, where=None) as failure:
        for part in walk(structure, [], holder(structure, is_interrupted=lambda: next(asked), stopped="stopped there")):
            seen.append(part.number)
    assert seen == [0, 1] and failure.value.what == "stopped there"


def test_modules_get_their_places_back_when_it_is_broken_off(structure):
    weight = structure.stages(1)[0][0].weights[0]
    path = weight.parameter.removesuffix(".weight")
    original = structure.model.get_submodule(path)
    parts = walk(structure, [], holder(structure))
    for part in parts:
        if part.number == 1:
            part.installed.place(weight, torch.nn.Identity())
            assert structure.model.get_submodule(path) is not original
            break
    parts.close()
    assert structure.model.get_submodule(path) is original and in_memory(structure) == [0]
