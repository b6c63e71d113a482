"""The CPU library built apart, without Python: with sanitizers, and with planted faults that have to be noticed."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import compiled
import pytest

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
SOURCES = ROOT / "compressor" / "kernels" / "cpu"
UNITS = ("common", "int8_product", "int8_amx", "int8_avx2", "int8_avx512", "dynamic_int8", "weight_only", "gptq_solve")
UNITS += ("float_product", "dense_product", "int8_outlier", "int8_matmul", "hadamard", "dense_sparse", "table_lookup")
UNITS += ("scale_search", "second_moments", "block_functions", "threads")
LONG = ("int8_avx2", "int8_avx512", "int8_amx", "dense_product", "kernels_check_ops")  # templates of many sizes
CHECKS = ("kernels_check", "kernels_check_ops", "kernels_check_threads")
FEATURES = Path("/proc/cpuinfo").read_text()
FLAGS = ["-std=c++17", "-ffp-contract=off", "-w", "-pthread"]
FLAGS += ["-mfma"] if "fma" in FEATURES else []  # fmaf is one instruction then: the same bits, without a call for each
# the bodies for what isn't here run all the same, by other instructions
MISSING = [feature for feature in ("avx_vnni", "avx512_vnni", "amx_int8") if feature not in FEATURES]
EMULATED = [SUPPORT / "dot_of_bytes.h", *(SUPPORT / f"{feature}_emulated.h" for feature in MISSING)]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
]
# name, unit or unit/header, what is there, what is put in its place
MUTANTS = [
    ("nibbles swapped", "int8_avx512/common.h", "half ? _mm512_srli_epi16(both, 4) : both", "both"),
    (
        "sum of inputs dropped",
        "int8_product",
        "int32_t sum = int32_t(b[w.zero_offset + n]) * x.minus_sum",
        "int32_t sum = 0 * x.minus_sum",
    ),
    ("wrong columns of 8 bits", "int8_avx2", "= from[0], even[1] = from[2]", "= from[0], even[1] = from[1]"),
    ("inputs of 8 bits without a sign", "int8_avx2", "odd[1] = from[3]", "odd[1] = uint8_t(from[3])"),
    ("rows of another panel", "int8_avx2", "count = std::min(rows, M - m)", "count = std::min<int64_t>(5, M - m)"),
    (
        "sums of 16 bits too long",
        "int8_avx2",
        "k + 32 <= w.group; k += 32) add_columns<VNNI, BITS, COUNT, AT_ONCE, 4>",
        "k + 320 <= w.group; k += 320) add_columns<VNNI, BITS, COUNT, AT_ONCE, 40>",
    ),
    ("second half of a row twice", "int8_avx2", "first + c, half % 2)", "first + c, 1)"),
    ("last columns of a group left out", "int8_avx2", "for (; k < w.group; k += 8) add", "if (false) add"),
    ("bytes of the first row", "int8_avx2", "codes + i * padded + k, 4)", "codes + k, 4)"),
    ("panel of the first group", "int8_avx2", "j++, p += w.group * BYTES", "j++"),
    (
        "high bit of 3 dropped",
        "int8_avx512/common.h",
        "low, high, _mm512_set1_epi8(4)",
        "low, high, _mm512_set1_epi8(0)",
    ),
    ("high bit of the wrong output", "int8_avx2/common.h", "c / 2 * 2 + half);", "c / 4 * 2 + half);"),
    ("digit of a lower place", "int8_avx512", "_mm512_set1_ps(256)", "_mm512_set1_ps(128)"),
    ("codes not lifted", "int8_avx512", "if (LIFT) v[c] = _mm512_add_epi8(v[c], lift[c]);", ""),
    ("lifted beyond 8 bits", "int8_avx512", "w.largest_zero < 256 - (1 << BITS)", "true"),
    ("lifted by the zero point of the next", "int8_avx512", " 5, 5, 6, 6, 6, 6,", " 5, 5, 6, 6, 6, 7,"),
    ("passes of one size", "int8_avx512", "M / count, M % count, pieces", "M / count, 0, pieces"),
    ("sums of a piece begun again", "int8_avx512", "if (columns.from) UNROLL", "if (false) UNROLL"),
    ("a piece of columns left out", "int8_avx512", "piece + 1 < passes.pieces", "piece + 1 < 0"),
    ("sums of the first group", "int8_avx512", "j < w.groups; j++, minus_sum++)", "j < w.groups; j++)"),
    ("scale of the group before", "int8_avx2", "scales_avx2(b + w.", "scales_avx2(b - (j > 0) * w.block_bytes + w."),
    ("sums of the next product", "int8_amx", "odd == (LAG == 2) ? LANES", "odd != (LAG == 2) ? LANES"),
    ("steps of the next rows", "int8_amx", "row_before = c ? row : row - groups", "row_before = row"),
    ("scales of the next outputs", "int8_amx", "c_before = (c + 3) % 4", "c_before = c"),
    ("totals of the block before", "int8_amx", "(ROWS - 1) * TILE + 16, load", "16, load"),
    ("groups left over taken as four", "int8_amx", "if (j + groups > w.groups) groups = 1;", ""),
    ("one block of a pair twice", "int8_amx", "rows(block + 1, j, from)", "rows(block, j, from)"),
    ("last block without a pair", "int8_amx", "if (x.blocks % 2) wide_range", "if (false) wide_range"),
    (
        "zero point of 8 bits dropped",
        "int8_amx",
        "_mm512_mullo_epi32(zero, _mm512_set1_epi32(x.minus_sum[row",
        "_mm512_mullo_epi32(zero, _mm512_set1_epi32(0 * x.minus_sum[row",
    ),
    ("zero point of 9 bits", "int8_amx", "w.largest_zero <= 128", "true"),
    ("sums of a wide group begun again", "int8_amx", "if (from == 0) tile_zero", "if (true) tile_zero"),
    ("columns of another output", "int8_amx", "tile_load<7>(b + 2 * codes.column", "tile_load<7>(b + 3 * codes.column"),
    ("rows of another block", "int8_amx", "at + m / rows * G", "at + m / TILE_ROWS * G"),
    ("broken chunk read whole", "int8_amx", "memcpy(chunk, row, size_t(left))", "memcpy(chunk, row, TILE_COLUMNS)"),
    ("rows beyond the last", "int8_amx", "(M + rows - 1) / rows, chunks_of(w)", "M / rows, chunks_of(w)"),
    ("tail of a row off by one", "dynamic_int8", "__mmask16((1u << (K - k)) - 1)", "__mmask16((1u << (K - k)) - 2)"),
    (
        "stale inputs beyond K",
        "dynamic_int8",
        "memset(codes + w.in_features, 0, size_t(w.padded() - w.in_features));",
        ";",
    ),
    ("no carry to the next digit", "weight_only", "_mm512_set1_epi32(128)", "_mm512_set1_epi32(0)"),
    ("stale digits beyond K", "weight_only", "d < digits; d++) memset(codes", "d < 0; d++) memset(codes"),
    (
        "sum of a chunk put down, not added",
        "float_product",
        "ps(to, _mm256_add_ps(_mm256_loadu_ps(to), sum",
        "ps(to, (sum",
    ),
    ("lanes of the next outputs", "float_product", "c / 2 * count * LANES + c % 2 * 8", "c / 2 * count * LANES"),
    ("stale inputs beyond K in floats", "float_product", "(padded - K) * PANEL_ROWS) * 4", "0) * 4"),
    ("rows beyond the last", "float_product", "if (m + r < M) of[r]", "if (true) of[r]"),
    ("bias of the output after", "common", "to.bias_dtype, first, memory", "to.bias_dtype, first + 1, memory"),
    ("NaN becomes Inf", "common", "_mm256_or_si256(high, quiet)", "high"),
    ("half rounded up", "common", "_mm256_and_si256(high, one)", "one"),
    (
        "outlier of the last column dropped",
        "int8_outlier",
        "void add_columns_avx512(float* v, const float* x, const float* w, int64_t count) {",
        "void add_columns_avx512(float* v, const float* x, const float* w, int64_t count) { count--;",
    ),
    ("one output too many", "common", "min<int64_t>(TILE, w.", "min<int64_t>(TILE, 1 + w."),
    ("tail of b not copied", "int8_matmul", "if (K - k < 16) memcpy", "if (K - k < 0) memcpy"),
    ("sum of b kept", "int8_matmul", "= 128 * uint32_t(", "= 0 * uint32_t("),
    (
        "row of a beyond the last",
        "int8_matmul",
        "rows - m >= 4 ? 4 : 1;\n    for (int64_t n = 0; n < outputs; n += 2",
        "4;\n    for (int64_t n = 0; n < outputs; n += 2",
    ),
    ("wrong lane in a register", "hadamard", "Lanes{(L ^ H)...}", "Lanes{(L ^ 1)...}"),
    ("difference the wrong way", "hadamard", "v[j + apart] = low - high", "v[j + apart] = high - low"),
    ("rows of the base in another order", "hadamard", "entry * x[b];", "entry * x[m - 1 - b];"),
    (
        "lanes added in another order",
        "dense_sparse",
        "add_ps(four[0], four[2]), _mm_add_ps(four[1],",
        "add_ps(four[0], four[1]), _mm_add_ps(four[2],",
    ),
    ("output beyond the last", "dense_sparse", "std::min(n + i, count - 1)", "n + i"),
    ("index not checked", "dense_sparse", "* blocks * k) >= atoms;", "* blocks * k) > 65535;"),
    ("index of few rows not checked", "dense_sparse", "is_few && is_bad(first, here)", "false"),
    ("scale of another atom", "dense_sparse", "f.dense_scale[at / f.width + i]", "f.dense_scale[at / f.width]"),
    ("scale of another output", "dense_sparse", "f.value_scale[first + n]", "f.value_scale[n]"),
    ("z of the block before", "dense_sparse", "z += f.atoms * WIDE;", "z += (f.atoms - 1) * WIDE;"),
    ("columns after whole registers left out", "dense_product", "add_rest(b, to);", ""),
    ("columns of a row twice", "dense_product", "to = b.to - (b.to - b.from) % LANES;", "to = b.to;"),
    ("sums of a chunk begun again", "dense_product", "sum[r][m] = b.from ? _mm512", "sum[r][m] = b.from < 0 ? _mm512"),
    ("totals of another row", "dense_product", "_mm_movehl_ps(four[1], four[0])", "_mm_movehl_ps(four[0], four[1])"),
    (
        "output beyond the last of a dense product",
        "dense_product",
        "min<int64_t>(OUTPUTS, N - n)",
        "min<int64_t>(OUTPUTS, N)",
    ),
    ("rows of the first lot", "dense_product", "(m0 + b * ROWS + m) * N", "(b * ROWS + m) * N"),
    ("entry after the last", "table_lookup", "floor > before ? before : floor", "floor"),
    ("line from the other end", "table_lookup", "0.5f ? 0.f : 1.f", "0.5f ? 0.f : 0.f"),
    ("pairs in another order", "table_lookup", "set_m128(two[2], two[0])", "set_m128(two[1], two[0])"),
    ("power of the wrong half", "table_lookup", "(power - 1) >> 1", "(power - 1) / 2"),
    ("slope from the other end", "table_lookup", "end + t.right_slope", "first + t.right_slope"),
    ("updates of a narrow panel left out", "gptq_solve", "-= error[v] * t.upper[i * t.end + c + q]", "-= 0 * error[v]"),
    ("updates within a panel left out", "gptq_solve", "p = q + 1; p < width", "p = q + 2; p < width"),
    ("zero point not subtracted", "gptq_solve", "rounded - zero[l] : rounded", "rounded : rounded"),
    ("pivot of the panel's first column", "gptq_solve", "t.upper[j * t.end + j]", "t.upper[c * t.end + c]"),
    ("lane beyond the last row", "gptq_solve", "(LANES, t.rows - first)", "(LANES, t.rows - first + 1)"),
    ("last row without a lane", "gptq_solve", "(LANES, t.rows - first)", "(LANES, t.rows - first - (first > 0))"),
    ("half of a code rounded up", "gptq_solve", "rintf(value[l] / scale[l])", "floorf(value[l] / scale[l] + 0.5f)"),
    ("one over the scale", "gptq_solve", "value[l] / scale[l]", "value[l] * (1 / scale[l])"),
    ("group after the last", "gptq_solve", "group_of[j] >= groups", "group_of[j] > groups"),
    ("code of the other side of zero", "scale_search", "highest - grid.zero", "highest + grid.zero"),
    ("half of a code rounded down", "scale_search", "code = (code + TO_INTEGER) - TO_INTEGER;", "code = code - 0.5f;"),
    (
        "clamped to one code more",
        "scale_search",
        "highest = float((1 << (t.bits - 1)) - 1)",
        "highest = float(1 << (t.bits - 1))",
    ),
    ("another exponent", "scale_search", "0.4f * (log * z", "0.5f * (log * z"),
    ("errors in units of their scale", "scale_search", "(h ? ratio * ratio : power(ratio))", "1"),
    ("importance of the first group", "scale_search", "t.importance + j * t.size", "t.importance"),
    ("importance left out", "scale_search", "total += e * e * h;", "total += e * e;"),
    ("finer search around the extremes", "scale_search", "centre = best_factor,", "centre = 1,"),
    ("smaller scale of equal errors", "scale_search", "error < best_error ||", "error <= best_error ||"),
    ("group without negative weights mirrored", "scale_search", "2 * std::max(-low, high)", "2 * -low"),
    ("subnormal scale rounded to nearest", "scale_search", "std::ceil(scale / STEP)", "__builtin_rintf(scale / STEP)"),
    ("largest scale overflows", "scale_search", "if (scale > most) scale", "if (false) scale"),
    ("stale weights beyond the group", "scale_search", "std::fill(memory + size, memory + padded, 0.f);", ""),
    ("last vector of a group left out", "scale_search", "k < padded; k += WIDTH", "k + WIDTH < padded; k += WIDTH"),
    ("odd token left out", "second_moments", "for (int64_t c = 0; c < width; c++) to[c] = even[c];", ""),
    ("token of the next row", "second_moments", "even[c] | uint32_t(odd[c]) << 16", "odd[c] | uint32_t(odd[c]) << 16"),
    (
        "tokens of the first lot",
        "second_moments",
        "(panel * pairs + p) * PANEL + i % PANEL",
        "panel * pairs * PANEL + i % PANEL",
    ),
    ("tile of another row", "second_moments", "J >= sides - I; I++", "J >= sides; I++"),
    ("tiles left of the diagonal", "second_moments", "I * SIDE + i < right", "I * SIDE + i + PANEL < right"),
    ("entries below the diagonal", "second_moments", "j = std::max(i, J * SIDE)", "j = J * SIDE"),
    ("not a number is kept", "second_moments", "keep == 0 ? added : ", ""),
    ("rows in one piece", "second_moments", "matrix[i * stride + j]", "matrix[i * columns + j]"),
    ("product not rounded before the gain", "block_functions", "if (t.rounds) N::round(v);", ""),
    ("eps left out", "block_functions", "float(t.columns) + t.eps", "float(t.columns)"),
    ("gain without its offset", "block_functions", "v *= t.offset + weight", "v *= weight"),
    ("last sums of a row twice", "block_functions", "first + k, std::min<int64_t>(W", "first, std::min<int64_t>(W"),
    ("sums of other lanes", "block_functions", "lanes[l] += lanes[l + half]", "lanes[l] += lanes[half]"),
    ("last numbers of a row not stored", "block_functions", "if (count < W) memcpy(end", "if (false) memcpy(end"),
    ("number after the last", "block_functions", "if (count < W) memset", "if (false) memset"),
    ("half of a bfloat16 rounded up", "block_functions", "(bits >> 16 & 1)", "1"),
    ("silu not rounded", "block_functions", "N::round(gate);", ""),
    (
        "power of the other half",
        "block_functions",
        "high = (power - (power >> 1) + 127)",
        "high = ((power >> 1) + 127)",
    ),
    ("power too large", "block_functions", "t > 89.f ? Vector{} + 89.f : t", "t"),
    ("other half without its sign", "block_functions", "i ? x[0] : -x[1]", "i ? x[0] : x[1]"),
    ("angles of the first sequence", "block_functions", "sequence * t.sequence_stride + token", "token"),
    (
        "cosines of the first half",
        "block_functions",
        "load(cos[i], t.cos, place + i * half",
        "load(cos[i], t.cos, place",
    ),
    ("heads after tokens", "block_functions", "((sequence * t.heads + h) * t.tokens + token)", "(m * t.heads + h)"),
    ("first task of a run left out", "threads", "int64_t i = begin; i < end", "int64_t i = begin + 1; i < end"),
    ("last task left out", "threads", "begin < count;", "begin < count - 1;"),
    ("run of another thread again", "threads", "exchange_weak(begin, end)", "exchange_weak(begin, begin + 1)"),
    ("exception of a task lost", "threads", "if (shared.error) std::rethrow_exception(shared.error);", ""),
    ("error of the team lost", "threads", "if (error) throw", "if (false) throw"),
    ("team that comes late asked again", "threads", "if (begin < alone_until.load())", "if (false)"),
]

# unit -> arguments of the check program that run the checks of its operations, of which one has to notice a fault; the
# widths of weights come one after another where faults show late and at each width
OPERATIONS = {
    "common": (("conversions",), ("linear4", "0134")),
    "int8_product": (("linear48", "01"),),
    "int8_avx2": (("linear", "012"),),
    "int8_avx512": (("linear4", "03"), ("linear8", "03"), ("linear23", "03")),
    "int8_amx": (("linear4", "04"), ("linear8", "04"), ("linear23", "04")),
    "dynamic_int8": (("linear4", "0134"),),
    "weight_only": (("linear", "0134"),),
    "float_product": (("linear", "0134"),),
    "int8_outlier": (("linear8",),),
    "int8_matmul": (("integers",),),
    "hadamard": (("transforms",),),
    "dense_sparse": (("factors",),),
    "table_lookup": (("tables",), ("roots",)),
    "dense_product": (("products",),),
    "gptq_solve": (("columns",),),
    "scale_search": (("scales",),),
    "second_moments": (("moments",),),
    "block_functions": (("norms",), ("gates",), ("rotations",)),
    "threads": (("threads",),),
}
HEADERS = {path.name: path.read_text() for path in SOURCES.glob("*.h")} if SOURCES.is_dir() else {}
# faults that reach beyond memory: a sanitizer has to say so, for without it they would be noticed by chance
BEYOND = {
    "passes of one size",
    "groups left over taken as four",
    "rows beyond the last",
    "bias of the output after",
    "one output too many",
    "tail of b not copied",
    "row of a beyond the last",
    "output beyond the last",
    "columns of a row twice",
    "output beyond the last of a dense product",
    "entry after the last",
    "lane beyond the last row",
    "group after the last",
    "number after the last",
}


def object_of(source: Path, *flags: str, changed: tuple[str, str] | None = None, parse_once: bool = True) -> Path:
    """The object of a source; `changed` is a file, it or a header beside it, and the text that it has instead."""
    text, headers = source.read_text(), {}
    if changed is not None:
        file, instead = changed
        text, headers = (instead, {}) if file == source.name else (text, {**HEADERS, file: instead})
    folders = [source.parent, SOURCES]
    return compiled.object_of(
        source.stem, text, [*FLAGS, *flags], folders, headers, EMULATED, system_headers() if parse_once else ()
    )


@cache
def system_headers() -> list[str]:
    """Those of all units: they are most of the time that compiling one takes."""
    units = ((SOURCES / f"{unit}.cpp").read_text() for unit in UNITS)
    return compiled.system_headers([*units, *HEADERS.values()])


def checked_object(source: Path) -> Path:
    """The object of a source with sanitizers, not optimized where that takes longer than it saves."""
    return object_of(source, "-O0" if source.stem in LONG else "-O1", "-g1", *SANITIZERS)


def quick_object(unit: str, changed: tuple[str, str] | None = None, *flags: str) -> Path:
    """The object of a unit without sanitizers and optimization, which takes a tenth of the time of the other one.

    Intrinsics of one unit need some optimization.
    """
    return object_of(SOURCES / f"{unit}.cpp", "-O1" if unit == "dense_sparse" else "-O0", *flags, changed=changed)


@pytest.fixture(scope="module")
def built():
    """Objects with sanitizers by name: the library's and those of the program that calls it."""
    sources = [SOURCES / f"{unit}.cpp" for unit in UNITS] + [SUPPORT / f"{check}.cpp" for check in CHECKS]
    if os.environ.get("PYTEST_XDIST_WORKER", "gw0")[-1] in "13579":
        sources.reverse()  # so that two workers compile one half each, and don't wait for each other at every one
    return {source.stem: checked_object(source) for source in sources}


def linked(folder: Path, objects: list[Path]) -> Path:
    """The check program with these objects."""
    program = folder / "check"
    subprocess.run(["g++", "-pthread", *SANITIZERS, *map(str, objects), "-o", str(program)], check=True)
    return program


def run(program: Path, *operations: str) -> subprocess.CompletedProcess[str]:
    """What the check program says of these operations."""
    return subprocess.run([str(program), *operations], capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.parametrize(
    ("operations", "calls"),
    [("linear2", 400), ("linear3", 400), ("linear4", 400), ("linear8", 400), ("operations", 4000)],
)
def test_sanitizers_find_nothing_and_levels_agree(operations, calls, built, tmp_path):
    """calls: how many at least; they depend on the levels of the processor"""
    done = run(linked(tmp_path, list(built.values())), operations)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[0]) > calls


def test_threads_do_not_race(tmp_path):
    flags = ["-O1", "-g1", "-fsanitize=thread", "-DALONE"]
    sources = [SOURCES / "threads.cpp", SUPPORT / "kernels_check_threads.cpp"]
    program = tmp_path / "check"
    objects = [str(object_of(source, *flags, parse_once=False)) for source in sources]
    subprocess.run(["g++", "-pthread", "-fsanitize=thread", *objects, "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.faults
@pytest.mark.parametrize("name, unit, old, new", MUTANTS, ids=[mutant[0] for mutant in MUTANTS])
def test_a_planted_fault_is_noticed(name, unit, old, new, built, tmp_path):
    unit, _, header = unit.partition("/")
    file = header or f"{unit}.cpp"
    text = (SOURCES / file).read_text()
    assert text.count(old) >= 1, f"the place of {name!r} has changed"
    changed = (file, text.replace(old, new))
    faulty = quick_object(unit, changed, *(["-fsanitize=address"] if name in BEYOND else []))
    program = linked(tmp_path, list({**built, unit: faulty}.values()))
    checks = (run(program, *arguments) for arguments in OPERATIONS[unit])
    assert any("AddressSanitizer" in done.stderr if name in BEYOND else done.returncode != 0 for done in checks)


def test_units_that_are_compiled_as_those_with_faults_pass_without_one(built, tmp_path):
    """Else the checks would notice what isn't a fault."""
    program = linked(tmp_path, [quick_object(unit) for unit in UNITS] + [built[check] for check in CHECKS])
    asked = {arguments for of_unit in OPERATIONS.values() for arguments in of_unit if arguments[0][:6] != "linear"}
    codes = {arguments: run(program, *arguments).returncode for arguments in asked}
    codes["linear"] = run(program, "linear").returncode
    assert set(codes.values()) == {0}, codes
