"""The CPU library built apart, without Python: with sanitizers, and with planted faults that have to be noticed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "compressor" / "kernels" / "cpu"
UNITS = ("common", "dynamic_int8", "weight_only", "int8_outlier")
FLAGS = ["-std=c++17", "-ffp-contract=off", "-w", "-pthread"]
SANITIZERS = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
]
# name, file, what is there, what is put in its place
MUTANTS = [
    ("nibbles swapped", "dynamic_int8", "half ? _mm512_srli_epi16(u, 4) : u", "half ? u : _mm512_srli_epi16(u, 4)"),
    ("sum of inputs dropped", "dynamic_int8", "int32_t sum = int32_t(b[w.zero_offset + n]) * x", "int32_t sum = 0 * x"),
    ("wrong half of 8 bits", "dynamic_int8", "_mm256_unpackhi_epi8(codes, none)", "_mm256_unpacklo_epi8(codes, none)"),
    ("tail of a row off by one", "dynamic_int8", "__mmask16((1u << (K - k)) - 1)", "__mmask16((1u << (K - k)) - 2)"),
    (
        "stale inputs beyond K",
        "dynamic_int8",
        "memset(codes + w.in_features, 0, size_t(w.padded() - w.in_features));",
        ";",
    ),
    ("zero point dropped", "weight_only", "std::fma(middle - float(b[w.zero_offset + n])", "std::fma(0"),
    (
        "scale of the group before",
        "weight_only",
        "scales_avx512(b + w.",
        "scales_avx512(b - (j > 0) * w.block_bytes + w.",
    ),
    ("high bit of 3 dropped", "weight_only", "_mm256_srli_epi32(v.high, i)", "_mm256_srli_epi32(v.high, 31)"),
    ("one output too many", "common", "min<int64_t>(TILE, w.", "min<int64_t>(TILE, 1 + w."),
    ("tile of another thread", "common", "tasks * (me + 1) / threads", "tasks * (me + 1) / threads - (me == 0)"),
]


def compile_unit(source: Path, target: Path, *flags: str) -> None:
    command = ["g++", *FLAGS, *flags, "-I", str(SOURCES), "-c", str(source), "-o", str(target)]
    subprocess.run(command, check=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Objects with sanitizers, and the program that calls them."""
    folder = tmp_path_factory.mktemp("native")
    for source in [SOURCES / f"{unit}.cpp" for unit in UNITS] + [ROOT / "tests" / "kernels_check.cpp"]:
        compile_unit(source, folder / f"{source.stem}.o", "-O1", *SANITIZERS)
    return folder


def run(folder: Path, objects: list[Path]) -> subprocess.CompletedProcess[str]:
    program = folder / "check"
    subprocess.run(["g++", "-pthread", *SANITIZERS, *map(str, objects), "-o", str(program)], check=True)
    return subprocess.run([str(program)], capture_output=True, text=True, check=False, timeout=120)


def test_sanitizers_find_nothing_and_levels_agree(built):
    done = run(built, [built / f"{unit}.o" for unit in (*UNITS, "kernels_check")])
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[0]) > 400


@pytest.mark.parametrize("name, unit, old, new", MUTANTS, ids=[mutant[0] for mutant in MUTANTS])
def test_a_planted_fault_is_noticed(name, unit, old, new, built, tmp_path):
    text = (SOURCES / f"{unit}.cpp").read_text()
    assert text.count(old) >= 1, f"the place of {name!r} has changed"
    source = tmp_path / f"{unit}.cpp"
    source.write_text(text.replace(old, new))
    compile_unit(source, tmp_path / f"{unit}.o", "-O1", *SANITIZERS)
    others = [built / f"{other}.o" for other in (*UNITS, "kernels_check") if other != unit]
    assert run(tmp_path, [tmp_path / f"{unit}.o", *others]).returncode != 0
