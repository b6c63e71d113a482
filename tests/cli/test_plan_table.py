"""A plan of many blocks is shown by kinds of weights, without hiding that some blocks differ."""

import io

import pytest
from rich.console import Console

from compressor.cli import render
from compressor.cli.plan_table import one_by_one, rows_by_kind
from compressor.engine.plan_records import PlanRow
from compressor.model.name_kinds import ranges


def row(name, format_name="int4", shape=(64, 128), size=100):
    return PlanRow(name, shape, "mlp", 0, "gptq", "dense", format_name, 400, size)


def shown(rows):
    return [(kind.name, kind.count) for kind in rows_by_kind(rows)]


def test_weights_of_every_block_are_one_row():
    rows = [row(f"model.layers.{i}.mlp.{leaf}") for i in range(32) for leaf in ("up_proj", "down_proj")]
    assert shown(rows) == [("model.layers.*.mlp.up_proj", 32), ("model.layers.*.mlp.down_proj", 32)]
    kinds = rows_by_kind(rows)
    assert [(kind.bytes_before, kind.bytes_after) for kind in kinds] == [(12800, 3200)] * 2
    assert [kind.name for kind in one_by_one(rows)] == [r.name for r in rows]


@pytest.mark.parametrize("differs", [{"format_name": "int8"}, {"shape": (64, 64)}])
def test_blocks_that_differ_are_named_by_their_numbers(differs):
    rows = [row(f"layers.{i}.up", **(differs if i in (0, 3) else {})) for i in range(6)]
    assert shown(rows) == [("layers.0,3.up", 2), ("layers.1-2,4-5.up", 4)]


def test_experts_of_all_blocks_are_one_row():
    rows = [row(f"layers.{i}.experts.{e}.up") for i in range(3) for e in range(4)] + [row("lm_head")]
    assert shown(rows) == [("layers.*.experts.*.up", 12), ("lm_head", 1)]


def test_a_single_block_keeps_its_number():
    assert shown([row("layers.0.up")]) == [("layers.0.up", 1)]


def test_ranges():
    assert ranges({4, 2, 0, 3, 9}) == "0,2-4,9"


@pytest.mark.parametrize("width", [40, 80, 110, 200])
def test_no_width_hides_a_name_or_a_number(width, monkeypatch):
    console = Console(width=width, file=io.StringIO())
    monkeypatch.setattr(render, "out", console)
    name = "model.layers.{}.self_attn.some_long_projection"
    render._show_weights([row(name.format(i)) for i in range(32)], verbose=False)
    lines = [[cell.strip() for cell in line.split("│")] for line in console.file.getvalue().splitlines()]
    cells = [line for line in lines if len(line) > 2]
    assert "".join(line[1] for line in cells) == name.format("*")
    assert "x32" in [line[2] for line in cells]
