"""scripts/check_gpu on a machine without a GPU: what it says, and its parts that need none."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import check_gpu
import gpu_against_torch
import numpy as np
import pytest
import torch

from compressor.kernels.gptq_solve import round_columns
from cuda_ext.cases import hadamard, w_a16

ROOT = Path(__file__).parent.parent


def test_check_gpu_places_operands_and_reports_each_case(emulated):
    """Its memory on the CPU, with the emulated library: what it would say of a GPU that is right."""
    few = {"w_a16": (w_a16.CASES[1],), "hadamard": (hadamard.CASES[2],)}
    found = check_gpu.check(emulated, check_gpu.DeviceMemory("cpu"), few, seeds=2)
    expected = [(kernel, str(case)) for kernel, of_kernel in few.items() for case in of_kernel for _ in range(2)]
    assert [(f["kernel"], f["case"]) for f in found] == expected
    assert not any(f["problem"] for f in found)


def test_the_products_that_are_timed_are_those_of_torch(emulated):
    """16 float32 sums and products apart and one rounding to float16: a few of its units."""
    factors = gpu_against_torch.Factors(out=40, blocks=2, width=32, atoms=12, k=3)
    calls = gpu_against_torch.product_calls(emulated, 5, factors, "cpu", copies=2)
    (expected,) = [call() for call in calls.by_torch]
    for call in calls.ours:
        calls.y.fill_(torch.nan)
        call()
        assert torch.allclose(calls.y.float(), expected.float(), rtol=2.0**-10, atol=1e-5)


def test_the_columns_that_are_timed_are_those_of_torch(emulated):
    torch.manual_seed(0)
    part = gpu_against_torch.solver_columns(70, "cpu")
    gpu_against_torch.solver_call(emulated, part, "cpu")()
    codes = part.codes.clone()
    round_columns(part, 0, gpu_against_torch.SUB_BLOCK)
    assert torch.equal(codes, part.codes)


def test_the_timings_have_a_row_for_each_size(emulated, monkeypatch):
    monkeypatch.setattr(gpu_against_torch, "SOLVER_ROWS", (3, 5))
    rows = gpu_against_torch.time_solver(emulated, lambda calls, graphed: [call() for call in calls] and 1.0, "cpu")
    assert [row["rows"] for row in rows] == [3, 5]
    assert all(row["seconds"] == row["torch_call_seconds"] == 1.0 for row in rows)


def test_check_gpu_notices_bytes_written_around_an_array():
    array = check_gpu.DeviceMemory("cpu").place(np.zeros(3, np.uint16))
    ctypes.memset(array.address + 6, 0, 1)
    with pytest.raises(AssertionError, match="bytes after"):
        array.read()


def test_check_gpu_judges_the_goals_of_its_device_alone():
    rows = [{"M": m, "N": 8192, "K": 8192, "seconds": 14e-6} for m in (1, 64)]
    assert [g["holds"] for g in check_gpu.judge(rows, "NVIDIA H200")] == [False, True]
    assert [g["holds"] for g in check_gpu.judge(rows, "NVIDIA H100 80GB HBM3")] == [True]
    assert check_gpu.judge(rows, "NVIDIA A10") == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_check_gpu_without_a_gpu_says_so_and_ends_with_6(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["check_gpu", "--json", str(tmp_path / "gpu.json")])
    assert check_gpu.main() == 6
    assert "error[missing-dependency]: " in capsys.readouterr().err
    assert not (tmp_path / "gpu.json").exists()


def test_check_gpu_names_a_missing_nvcc_before_it_installs_anything(tmp_path):
    for tool in ("bash", "dirname"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    command = [str(tmp_path / "bash"), str(ROOT / "scripts" / "check_gpu")]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert (done.returncode, "nvcc is not there" in done.stderr) == (6, True)
