"""The CUDA kernels on the CPU, under the emulation header: right on odd shapes, and planted faults are noticed."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import check_gpu
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # cuda_ext is a folder beside the package, not a part of it

from cuda_ext import build, cases  # noqa: E402
from cuda_ext.cases import CASES, Case  # noqa: E402

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")

FAULTS = {
    1: "a wait for copies is missing",
    2: "no barrier between the wait and the use",
    3: "codes of the neighbouring lane",
    4: "row M of x is read",
    5: "x isn't turned when read",
    6: "scale of the group before",
    7: "a stage is filled again before the barrier",
    8: "row M of y is written",
    9: "zero point of the neighbouring output",
    10: "the last tile of K is dropped",
    11: "bias is added twice",
    12: "totals are kept in 16 bits",
}
# numbers of -DMUTANT in w_a16.cu
W4_MUTANTS = {number: f"tiled: {fault}" for number, fault in FAULTS.items()}
W4_MUTANTS |= {20 + number: f"decode: {fault}" for number, fault in FAULTS.items()}
W4_MUTANTS |= {
    40: "slices: the last one is dropped",
    41: "slices: bias is added twice",
    42: "slices: one output too many",
}
# in hadamard.cu
HADAMARD_MUTANTS = {
    1: "no barrier before warps read each other's elements",
    2: "no barrier before a thread reads its own back",
    3: "wrong lane in the exchange of warps",
    4: "wrong sign in the second half of a butterfly",
    5: "elements after the last row are read",
    6: "elements after the last row are written",
    7: "sums are kept in 16 bits",
    8: "one element isn't scaled",
}
MUTANTS = {"w_a16": W4_MUTANTS, "hadamard": HADAMARD_MUTANTS}
PLANTED = [pytest.param(source, n, id=f"{source}: {name}") for source in MUTANTS for n, name in MUTANTS[source].items()]
# A child process: the library, then every case until one is wrong. It may crash, that is the point.
CHILD = """
import ctypes, sys
sys.path.append(sys.argv[1])
from cuda_ext import cases
library = ctypes.CDLL(sys.argv[2])
library.compressor_emulate_fault(int(sys.argv[4]))
for seed in range(2):
    for case in cases.ALL_CASES[sys.argv[3]]:
        library.compressor_emulate_seed(seed)
        cases.run(library, case, cases.GuardedMemory(), seed)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    return ctypes.CDLL(str(build.build_emulated(tmp_path_factory.mktemp("emulated") / "kernels.so")))


@pytest.mark.parametrize("case", [case for group in cases.ALL_CASES.values() for case in group], ids=str)
def test_a_kernel_is_within_the_bound_of_float64_on_odd_shapes(library, case):
    library.compressor_emulate_seed(0)
    cases.run(library, case, cases.GuardedMemory(), seed=0)


@pytest.mark.parametrize("case", [CASES[2], CASES[9], CASES[11], cases.HADAMARD_CASES[6]], ids=str)
def test_the_order_of_threads_does_not_change_a_bit(library, case):
    operands_seed = 5
    results = []
    for interleaving in range(8):
        library.compressor_emulate_seed(interleaving)
        results.append(cases.run(library, case, cases.GuardedMemory(), operands_seed))
    assert all((result == results[0]).all() for result in results)


def test_every_code_and_zero_point_is_decoded_exactly(library):
    """x of one 1 per row, scale 1: y is the code less its zero point, and exact in both types."""
    np = cases.np
    n, k = 64, 64
    codes = (np.arange(n)[:, None] * 7 + np.arange(k)[None] * 3) % 16
    zero_point = (np.arange(n, dtype=np.uint8) % 16)[None]
    for kind, m in [(kind, m) for kind in (cases.FLOAT16, cases.BFLOAT16) for m in (8, 16, 32, 64)]:
        memory = cases.GuardedMemory()
        given = [
            memory.place(cases.to_bits(np.eye(k)[-m:], kind)),
            memory.place(cases.pack_mma1(codes.astype(np.uint8))),
            memory.place(cases.to_bits(np.ones((1, n)), cases.FLOAT32)),
            memory.place(zero_point),
        ]
        y = memory.place(np.full((m, n), 0x7FFF, np.uint16))
        addresses = [p.address for p in given]
        assert cases.launcher(library)(*addresses, None, y.address, None, 0, m, n, k, 64, kind, 2, None) == 0
        assert (cases.to_float64(y.read(), kind) == codes.T[-m:] - zero_point.astype(float)).all()


def test_nan_and_infinity_stay_in_their_rows(library):
    np = cases.np
    case = Case(5, 8, 128)
    operands = cases.make_operands(case, seed=0)
    operands.x[1, 3], operands.x[3, 70] = 0x7E00, 0x7C00  # NaN, +Inf
    memory = cases.GuardedMemory()
    given = [memory.place(a) for a in (operands.x, operands.packed, operands.scale)]
    y = memory.place(np.full((5, 8), 0x7FFF, np.uint16))
    addresses = [p.address for p in given]
    assert cases.launcher(library)(*addresses, None, None, y.address, None, 0, 5, 8, 128, 64, 0, 0, None) == 0
    result = cases.to_float64(y.read(), cases.FLOAT16)
    assert np.isnan(result[1]).all()
    assert not np.isfinite(result[3]).any()
    assert np.isfinite(result[[0, 2, 4]]).all()


# what differs from a good call: M, N, K, group_size, x_type, scale_type
BAD = {
    "negative M": dict(M=-1),
    "negative N": dict(N=-8),
    "K of 0": dict(K=0),
    "K not a multiple of 8": dict(K=68),
    "group size not a multiple of 64": dict(group_size=96),
    "group size below 64": dict(group_size=32),
    "group size of 0": dict(group_size=0),
    "group size of -2": dict(group_size=-2),
    "x of float32": dict(x_type=2),
    "unknown type of x": dict(x_type=-1),
    "unknown type of scales": dict(scale_type=3),
}


def call(library: ctypes.CDLL, addresses: list[int | None], **changes: int) -> int:
    good = dict(M=1, N=8, K=64, group_size=64, x_type=0, scale_type=0)
    return cases.launcher(library)(*addresses, None, 0, *(good | changes).values(), None)


@pytest.fixture(scope="module")
def addresses():
    """Operands of a call with M 1, N 8, K 64, and a poisoned y."""
    np = cases.np
    operands = cases.make_operands(Case(1, 8, 64), seed=0)
    given = [cases.GuardedArray(a) for a in (operands.x, operands.packed, operands.scale)]
    y = cases.GuardedArray(np.full((1, 8), 0x7FFF, np.uint16))
    yield [*(g.address for g in given), None, None, y.address]
    assert (y.read() == 0x7FFF).all(), "a refused call wrote its output"


@pytest.mark.parametrize("name", BAD)
def test_bad_shapes_and_types_return_minus_one(library, addresses, name):
    assert call(library, addresses, **BAD[name]) == -1


@pytest.mark.parametrize("operand", [0, 1, 2, 5])
def test_missing_operands_return_minus_one(library, addresses, operand):
    assert call(library, [a if i != operand else None for i, a in enumerate(addresses)]) == -1


@pytest.mark.parametrize("operand", [0, 1])
def test_misaligned_operands_return_minus_one(library, addresses, operand):
    assert call(library, [a and a + 2 * (i == operand) for i, a in enumerate(addresses)]) == -1


@pytest.mark.parametrize("empty", ["M", "N"])
def test_an_empty_output_touches_nothing(library, empty):
    assert call(library, [None] * 6, **{empty: 0}) == 0


def test_every_mutant_has_its_place_in_the_source():
    assert {path.stem for path in build.SOURCES} == set(MUTANTS) == set(cases.ALL_CASES)
    for path in build.SOURCES:
        planted = {int(n) for n in re.findall(r"MUTANT [=!]= (\d+)", path.read_text())}
        assert planted == set(MUTANTS[path.stem])


# rows, n, scale, type
@pytest.mark.parametrize(
    "bad", [(-1, 8, 1, 2), (1, 4, 1, 2), (1, 24, 1, 2), (1, 65536, 1, 2), (1, 0, 1, 2), (1, 8, 1, 3)]
)
def test_bad_hadamard_shapes_return_minus_one(library, bad):
    x = cases.GuardedArray(cases.np.zeros(8, cases.np.float32))
    assert cases.hadamard_launcher(library)(x.address, x.address, *bad, None) == -1


def test_bad_hadamard_addresses_return_minus_one(library):
    x = cases.GuardedArray(cases.np.zeros(8, cases.np.float32)).address
    launch = cases.hadamard_launcher(library)
    assert [launch(*a, 1, 8, 1, 2, None) for a in ((None, x), (x, None), (x + 4, x), (x, x + 4))] == [-1] * 4
    assert launch(None, None, 0, 8, 1, 2, None) == 0


def test_a_workspace_that_is_too_small_returns_minus_one(library):
    np = cases.np
    operands = cases.make_operands(Case(1, 8, 1024), seed=0)
    given = [cases.GuardedArray(a) for a in (operands.x, operands.packed, operands.scale)]
    y, workspace = cases.GuardedArray(np.zeros((1, 8), np.uint16)), cases.GuardedArray(np.zeros(16, np.float32))
    addresses = [*(g.address for g in given), None, None, y.address]
    assert cases.workspace_bytes(library, 1, 8, 1024) == 64
    assert cases.workspace_bytes(library, 1, 8, 4) == -1
    sizes = (1, 8, 1024, 64, 0, 0, None)
    assert cases.launcher(library)(*addresses, workspace.address, 63, *sizes) == -1
    assert cases.launcher(library)(*addresses, None, 64, *sizes) == -1
    assert cases.launcher(library)(*addresses, workspace.address, 64, *sizes) == 0


def test_the_rows_of_a_call_do_not_see_each_other(library):
    """The same row alone and among others: the same bits, as long as the same kernel takes both."""
    np = cases.np
    operands = cases.make_operands(Case(8, 66, 1032), seed=3)
    results = []
    for rows in (slice(0, 8), slice(2, 3)):
        given = [cases.GuardedArray(a) for a in (operands.x[rows], operands.packed, operands.scale)]
        m = len(operands.x[rows])
        y, sums = cases.GuardedArray(np.zeros((m, 66), np.uint16)), cases.GuardedArray(np.zeros(2 * 66 * m, np.float32))
        addresses = [*(g.address for g in given), None, None, y.address, sums.address]
        assert cases.launcher(library)(*addresses, 8 * 66 * m, m, 66, 1032, 64, 0, 0, None) == 0
        results.append(y.read())
    assert (results[0][2] == results[1][0]).all()


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """For each source a library that takes the number of its fault at run time."""
    folder = tmp_path_factory.mktemp("faulty")
    sources = {source: ROOT / "cuda_ext" / f"{source}.cu" for source in MUTANTS}
    return {s: build.build_emulated(folder / f"{s}.so", [path], "emulate::fault") for s, path in sources.items()}


def run_all_cases(library: Path, source: str, mutant: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHILD, str(ROOT), str(library), source, str(mutant)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("source", "mutant"), PLANTED)
def test_a_planted_fault_is_noticed(faulty, source, mutant):
    done = run_all_cases(faulty[source], source, mutant)
    caught = done.returncode < 0 or "outputs are wrong" in done.stderr or "were overwritten" in done.stderr
    assert caught, f"ended with {done.returncode}: {done.stderr}"


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("source", MUTANTS)
def test_no_fault_is_noticed_where_none_is_planted(faulty, source):
    done = run_all_cases(faulty[source], source, mutant=0)
    assert done.returncode == 0, done.stderr


# A kernel that breaks one rule of the machine, and what the emulation says.
RULES = {
    "a barrier or a collective": "if (threadIdx.x != 7) __syncthreads();",
    "lanes of one warp meet in different operations": "if (lane % 2) __syncwarp(); else __shfl_xor_sync(~0u, 1, 1);",
    "a misaligned cp.async": "cp_async16(shared + 1, out, true);",
    "a misaligned row of ldmatrix": "u32 r[4]; ldmatrix_x4(r, shared + 1);",
    "a shuffle of a part of a warp": "__shfl_xor_sync(0xffffu, 1, 1);",
    "more than 48 KiB": "SHARED(u32, big, 12289); big[0] = 1;",
}
PROBE = """
#include "device.h"
__global__ void probe(u32* out) {{
  SHARED(u32, shared, 64);
  const int lane = threadIdx.x % 32;
  {body}
}}
extern "C" int run(void* out) {{ return LAUNCH(probe, dim3(1), dim3(32), nullptr, (u32*)out); }}
"""


def run_probe(folder: Path, body: str, program: str) -> subprocess.CompletedProcess[str]:
    (folder / "probe.cu").write_text(PROBE.format(body=body))
    flags = [*build.EMULATION_FLAGS, "-Wno-unused-variable", "-I", str(ROOT / "cuda_ext")]
    subprocess.run(["g++", *flags, "-x", "c++", "probe.cu", "-o", "probe.so"], check=True, cwd=folder)
    command = [sys.executable, "-c", f"import ctypes\nlibrary = ctypes.CDLL('./probe.so')\n{program}"]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, timeout=60)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("message", RULES)
def test_the_emulation_ends_a_kernel_that_breaks_a_rule(tmp_path, message):
    done = run_probe(tmp_path, RULES[message], "library.run(ctypes.create_string_buffer(256))")
    assert done.returncode < 0
    assert f"emulate: {message}" in done.stderr


@needs_compiler
def test_emulated_shuffles_and_conversions_are_those_of_the_machine(tmp_path):
    """Each lane's results of four shuffles, and every half and bfloat16 there and back, against numpy."""
    body = """
      out[lane] = __shfl_sync(~0u, lane * 10, (lane + 5) % 32);
      out[32 + lane] = __shfl_xor_sync(~0u, lane, 3);
      out[64 + lane] = __shfl_up_sync(~0u, lane, 2);
      out[96 + lane] = __shfl_down_sync(~0u, lane, 30);
      out[128 + lane] = shared[lane];
      for (u32 bits = lane; bits < 65536; bits += 32) {
        ((float*)out)[1024 + bits] = f16_to_float(u16(bits));
        out[66560 + bits] = float_to_f16(__uint_as_float(bits << 16 | bits));
        out[132096 + bits] = float_to_bf16(__uint_as_float(bits << 16 | bits));
      }
    """
    program = """
import numpy as np
out = np.zeros(197632, np.uint32)
assert library.run(ctypes.c_void_p(out.ctypes.data)) == 0
lane, bits = np.arange(32), np.arange(65536, dtype=np.uint32)
assert (out[:32] == (lane + 5) % 32 * 10).all()
assert (out[32:64] == lane ^ 3).all()
assert (out[64:96] == np.where(lane < 2, lane, lane - 2)).all()
assert (out[96:128] == np.where(lane + 30 > 31, lane, lane + 30)).all()
assert (out[128:160] == 0xffffffff).all()
halves = bits.astype(np.uint16).view(np.float16).astype(np.float32)
assert np.array_equal(out[1024:66560].view(np.float32), halves, equal_nan=True)
floats = (bits << 16 | bits).view(np.float32)
with np.errstate(over="ignore"):
    want = floats.astype(np.float16)
assert np.array_equal(out[66560:132096].astype(np.uint16).view(np.float16), want, equal_nan=True)
bf = (out[132096:] << 16).view(np.float32)
exact = floats.astype(np.float64)
finite = np.isfinite(floats) & np.isfinite(bf)
off, unit = np.abs(bf - exact)[finite], np.abs(exact)[finite] * 2.0**-8 + 2.0**-134
assert (off <= unit).all() and (np.isnan(bf) == np.isnan(floats)).all()
"""
    done = run_probe(tmp_path, body, program)
    assert done.returncode == 0, done.stderr


def test_a_spilling_kernel_is_refused_by_name():
    report = """ptxas info    : Compiling entry function '_Z1aPf' for 'sm_90a'
ptxas info    : Function properties for _Z1aPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 16384 bytes smem
ptxas info    : Compiling entry function '_Z1bPf' for 'sm_80'
ptxas info    : Function properties for _Z1bPf
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""
    usages = build.parse_ptxas(report)
    assert [(u.registers, u.shared_bytes, u.spill_store_bytes) for u in usages] == [(64, 16384, 0), (255, 0, 12)]
    with pytest.raises(build.BuildError, match="_Z1bPf on sm_80: 8 bytes of stack"):
        build.refuse_spills(usages)


@needs_nvcc
@pytest.mark.slow
def test_nvcc_compiles_every_kernel_for_three_targets_without_spills(tmp_path):
    library, usages = build.build_cuda(tmp_path)
    assert library.exists() and library.with_suffix(".json").exists()
    assert {u.target for u in usages} == {"sm_80", "sm_90a", "sm_100"}


def test_check_gpu_places_operands_and_reports_each_case(library):
    """Its memory on the CPU, with the emulated library: what it would say of a GPU that is right."""
    few = (CASES[1], cases.HADAMARD_CASES[2])
    found = check_gpu.check(library, check_gpu.DeviceMemory("cpu"), few, seeds=2)
    assert [f["case"] for f in found] == [str(few[0])] * 2 + [str(few[1])] * 2
    assert not any(f["problem"] for f in found)


def test_check_gpu_notices_bytes_written_around_an_array():
    array = check_gpu.DeviceMemory("cpu").place(cases.np.zeros(3, cases.np.uint16))
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
