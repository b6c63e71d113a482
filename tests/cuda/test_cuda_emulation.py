"""The CUDA kernels on the CPU, under the emulation header: right on odd shapes, in any order of threads."""

from __future__ import annotations

import shutil
import subprocess
import sys

import compiled
import cuda_on_cpu
import pytest

from cuda_ext.cases import KERNELS, arrays

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
# Cases of kernels whose threads meet in several ways; the others are slow tests.
ORDERED = [("w_a16", 2), ("w_a16", 9), ("w_a16", 11), ("w_a8", 7), ("w_a8", 9), ("hadamard", 6), ("quantize_rows", 2)]
ORDERED += [("int8_outlier", 6), ("int8_outlier", 8), ("dense_sparse", 4), ("gptq_solve", 2)]
EVERY = [
    pytest.param(kernel, number, marks=[] if (kernel, number) in ORDERED else [pytest.mark.slow])
    for kernel in KERNELS
    for number in range(len(KERNELS[kernel].CASES))
]


@pytest.mark.parametrize(("kernel", "case"), [(k, c) for k in KERNELS for c in KERNELS[k].CASES], ids=str)
def test_a_kernel_is_within_the_bound_of_float64_on_odd_shapes(emulated, kernel, case):
    emulated.seed(0)
    KERNELS[kernel].run(emulated, case, arrays.GuardedMemory(), seed=0)


@pytest.mark.parametrize(("kernel", "number"), EVERY)
def test_the_order_of_threads_does_not_change_a_bit(emulated, kernel, number):
    operands_seed = 5
    results = []
    for interleaving in range(8):
        emulated.seed(interleaving)
        results.append(
            KERNELS[kernel].run(emulated, KERNELS[kernel].CASES[number], arrays.GuardedMemory(), operands_seed)
        )
    assert all(result.tobytes() == results[0].tobytes() for result in results)  # NaN too


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
static __global__ void probe(u32* out) {{
  SHARED(u32, shared, 64);
  const int lane = threadIdx.x % 32;
  {body}
}}
static const emulate::Kernel kernel("probe", [](const void* given) {{ probe(*(u32* const*)given); }}, sizeof(u32*));
extern "C" void run(void* out) {{ emulate::launch(kernel, dim3(1), dim3(32), &out); }}
"""


def run_probe(body: str, program: str) -> subprocess.CompletedProcess[str]:
    flags = [*cuda_on_cpu.FLAGS, "-Wno-unused-variable"]
    probe = compiled.object_of("probe", PROBE.format(body=body), flags, [cuda_on_cpu.CUDA_EXT])
    library = compiled.linked("probe.so", [probe], cuda_on_cpu.SHARED)
    command = [sys.executable, "-c", f"import ctypes\nlibrary = ctypes.CDLL({str(library)!r})\n{program}"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("message", RULES)
def test_the_emulation_ends_a_kernel_that_breaks_a_rule(message):
    done = run_probe(RULES[message], "library.run(ctypes.create_string_buffer(256))")
    assert done.returncode < 0
    assert f"emulate: {message}" in done.stderr


@needs_compiler
def test_emulated_shuffles_and_conversions_are_those_of_the_machine():
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
library.run(ctypes.c_void_p(out.ctypes.data))
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
    done = run_probe(body, program)
    assert done.returncode == 0, done.stderr
