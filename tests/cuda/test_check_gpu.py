"""scripts/check_gpu on a machine without a GPU: what it says, and its parts that need none."""

from __future__ import annotations

import ctypes
import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import check_gpu
import cuda_on_cpu
import gpu_against_torch
import gpu_binding
import gpu_int8
import numpy as np
import pytest
import torch

from compressor.errors import KernelError
from compressor.kernels.ops.gptq_columns import round_columns
from cuda_ext.cases import hadamard, w_a16

ROOT = Path(__file__).parents[2]


def test_check_gpu_places_operands_and_reports_each_case(emulated):
    """Its memory on the CPU, with the emulated kernels: what it would say of a GPU that is right."""
    few = {"w_a16": (w_a16.CASES[1],), "hadamard": (hadamard.CASES[2],)}
    found = check_gpu.check(emulated, check_gpu.DeviceMemory("cpu"), few, seeds=2)
    expected = [(kernel, str(case)) for kernel, of_kernel in few.items() for case in of_kernel for _ in range(2)]
    assert [(f["kernel"], f["case"]) for f in found] == expected
    assert not any(f["problem"] for f in found)


def test_check_gpu_checks_the_kernels_as_torch_operations(emulated, monkeypatch):
    """On the CPU, with the emulated kernels and fewer rows."""
    monkeypatch.setattr(gpu_binding, "ROWS", (0, 3, 17))
    cuda_on_cpu.use(monkeypatch, emulated)
    found = gpu_binding.checks(torch.device("cpu"))
    assert len(found) == (8 + 6 + 2 + 2) * 3 + 8 + 2
    assert not any(check["problem"] for check in found)


def test_check_gpu_notices_operations_that_are_wrong(emulated, monkeypatch):
    monkeypatch.setattr(gpu_binding, "ROWS", (3,))
    kernels = emulated

    def without_bias(*arguments):
        return kernels.functions["compressor_w_a16"](*arguments[:4], 0, *arguments[5:])

    def without_zero_points(*arguments):
        return kernels.functions["compressor_w_a8"](*arguments[:5], 0, *arguments[6:])

    def columns_for_scales(*arguments):
        return kernels.functions["compressor_gptq_solve"](*arguments[:4], arguments[0], *arguments[5:])

    def without_factor_bias(*arguments):
        return kernels.functions["compressor_dense_sparse"](*arguments[:5], 0, *arguments[6:])

    broken = {**kernels.functions, "compressor_w_a16": without_bias, "compressor_hadamard": lambda *a: 2}
    broken["compressor_w_a8"] = without_zero_points
    broken["compressor_dense_sparse"] = without_factor_bias
    broken["compressor_gptq_solve"] = columns_for_scales
    cuda_on_cpu.use(monkeypatch, dataclasses.replace(kernels, functions=broken))
    found = gpu_binding.checks(torch.device("cpu"))
    by_kind = {kind: [c["problem"] for c in found if c["case"].startswith(kind)] for kind in ("hadamard", "gptq_solve")}
    products = [c["problem"] for c in found if not c["case"].startswith(tuple(by_kind))]
    assert len(products) == 14 + 2 + 2 and all("outputs are wrong" in problem for problem in products)
    assert len(by_kind["hadamard"]) == 8 and all(p.startswith("KernelError: hadamard") for p in by_kind["hadamard"])
    assert by_kind["gptq_solve"] == ["updates, errors, codes are not those of torch on the CPU"] * 2


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


def test_the_goals_of_rounded_inputs_are_those_of_prefill_and_of_one_row():
    times = {"torch_bfloat16_seconds": 3e-5, "bitsandbytes_call_seconds": 1e-4, "call_seconds": 2e-5}
    shape = {"N": 8192, "K": 8192, "seconds": 2e-5, "tera_operations_per_second": 1300.0} | times
    rows = [shape | {"kernel": kernel, "M": m} for kernel in ("w4_a8", "int8_outlier") for m in (1, 4096)]
    found = gpu_int8.judge_int8(rows, "NVIDIA H200")
    assert [(g["measured"], g["holds"]) for g in found] == [(1300, True), (pytest.approx(1.5), True), (5, False)]
    assert gpu_int8.judge_int8(rows, "NVIDIA A10") == []


def test_the_timed_calls_of_rounded_inputs_are_right_calls(emulated, monkeypatch):
    """Their arguments, with the emulated kernels: a launcher that refuses them would raise."""
    monkeypatch.setattr(gpu_int8, "stream", lambda: 0)
    monkeypatch.setattr(gpu_int8, "copies_of", lambda weight_bytes: 2)
    x = torch.randn(2, 192).half()
    calls = gpu_int8.w4_a8_calls(emulated, x, 8) + gpu_int8.outlier_calls(emulated, x, 8)
    assert len(calls) == 4
    for call in calls:
        call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_check_gpu_without_a_gpu_says_so_and_ends_with_6(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["check_gpu", "--json", str(tmp_path / "gpu.json")])
    assert check_gpu.main() == 6
    assert "error[missing-dependency]: " in capsys.readouterr().err
    assert not (tmp_path / "gpu.json").exists()


def test_check_gpu_names_a_missing_driver_before_it_installs_anything(tmp_path):
    for tool in ("bash", "dirname"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    command = [str(tmp_path / "bash"), str(ROOT / "scripts" / "check_gpu")]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert (done.returncode, "nvidia-smi is not there" in done.stderr) == (6, True)


def test_check_gpu_ends_with_4_where_the_self_test_fails_and_with_6_without_kernels(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check_gpu"])
    monkeypatch.setattr(check_gpu, "require_gpu", lambda: torch.device("cuda", 0))
    for reason, code in (("self-test", 4), ("no-kernels", 6)):

        def fails(device, reason=reason):
            raise KernelError("they are wrong", data={"reason": reason})

        monkeypatch.setattr(check_gpu.devices, "kernels_of", fails)
        assert check_gpu.main() == code
        assert "error[kernel]: they are wrong" in capsys.readouterr().err


def test_the_goals_of_transforms_depend_on_their_size():
    rows = [{"n": n, "of_copy": 1.1} for n in (4096, 8192, 32768, 65536)]
    found = check_gpu.judge_hadamard(rows, "NVIDIA H100 80GB HBM3")
    assert [(g["most"], g["holds"]) for g in found] == [(1.05, False), (1.05, False), (1.15, True)]
    assert check_gpu.judge_hadamard(rows, "NVIDIA A10") == []


def test_the_products_of_torch_are_made_and_counted():
    made = []

    def seconds(calls, graphed):
        made.extend(call() for call in calls)
        return 2.0

    assert gpu_against_torch.product_rates(seconds, "cpu", size=32) == {"torch bfloat16": 32**3, "torch int8": 32**3}
    assert [y.dtype for y in made] == [torch.bfloat16, torch.int32] and all(y.shape == (32, 32) for y in made)
