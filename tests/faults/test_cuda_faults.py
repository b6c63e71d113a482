"""Faults planted into the CUDA kernels, text put in the place of other text: their own cases have to notice each."""

from __future__ import annotations

import faulthandler
import os
import re
import shutil
import signal
from pathlib import Path

import compiled
import cuda_on_cpu
import pytest

from compressor.kernels.cuda import nvrtc, plans
from cuda_ext.cases import KERNELS, arrays

pytestmark = [
    pytest.mark.slow,
    pytest.mark.faults,
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
]

WAIT = "    cp_async_wait<STAGES - 2>();\n"
READY = "    // after this every thread's copies of the tile are there, and every thread is done with the tile before\n"
READY_STAGE = READY.replace("tile", "stage")
SYNC = "    __syncthreads();\n"
BEGIN = "    if (!DECODE && left_in_group == args.tiles_per_group) begin_group();\n"
REFILL = "    if (tile + STAGES - 1 < last) fetch(tile + STAGES - 1);\n"
REFILL_STAGE = "    if (stage + STAGES - 1 < stages) fetch(stage + STAGES - 1);\n"
REFILL_PRODUCT = "    if (tile + STAGES - 1 < tiles) fetch(tile + STAGES - 1);\n"
REFILL_RESPONSES = "    if (more) fetch(tile + STAGES - 1);\n"
NEXT_CHUNK = "    if (chunk + 1 < chunks) fetch(chunk + 1);\n"
UNSLICED_BIAS = "(args.bias && !args.sums ? Element<type>::to_float(args.bias[{}]) : 0.f)"
ADDED_TWICE = "args.bias ? __fadd_rn({0}, load_as_float(args.bias, n, args.type)) : {0}"
CLAMP = "  code = code < args.low ? args.low : code;  // NaN stays\n  code = code > args.high ? args.high : code;\n"
ZERO = "  if (args.zero) code = __fadd_rn(code, zero);\n"


def only(condition: str, line: str) -> str:
    """The line of code, where the condition holds."""
    return f"    if ({condition}) {line.lstrip()}"


def rounded(value: str) -> str:
    """A number of a 16-bit element type."""
    return f"Element<type>::to_float(Element<type>::from_float({value}))"


def half(value: str) -> str:
    return f"f16_to_float(float_to_f16({value}))"


# source -> what it is, the text that is there, the text that is put in its place
FAULTS = {
    "w_a16": [
        ("tiled: a wait for copies is missing", WAIT, only("STAGES != 4", WAIT)),
        (
            "tiled: no barrier between the wait and the use",
            WAIT + READY + SYNC,
            only("STAGES == 4", SYNC) + WAIT + only("STAGES != 4", SYNC),
        ),
        (
            "tiled: codes of the neighbouring lane",
            "piece(stage_words, step, warp, lane);",
            "piece(stage_words, step, warp, lane ^ 1);",
        ),
        ("tiled: row M of x is read", "inside = m0 + row < args.M &&", "inside = m0 + row < args.M + 1 &&"),
        (
            "tiled: x isn't turned when read",
            "ldmatrix_x4(a, stage_x + place_of(row, chunk, row & 7));",
            "ldmatrix_x4(a, stage_x + place_of(row, chunk, 0));",
        ),
        (
            "tiled: scale of the group before",
            "scale_of(args, group, n_result",
            "scale_of(args, group - (group > 0), n_result",
        ),
        (
            "tiled: a stage is filled again before the barrier",
            WAIT + READY + SYNC + REFILL,
            only("STAGES == 4", REFILL) + WAIT + SYNC + only("STAGES != 4", REFILL),
        ),
        (
            "tiled: row M of y is written",
            "if (m < args.M && n < args.N) store",
            "if (m < args.M + 1 && n < args.N) store",
        ),
        (
            "tiled: zero point of the neighbouring output",
            "args, group, n_operand + 8 * h);",
            "args, group, (n_operand + 8 * h) ^ 1);",
        ),
        (
            "tiled: the last tile of K is dropped",
            "last = end < args.tiles ? end : args.tiles;",
            "last = (end < args.tiles ? end : args.tiles) - (STAGES == 4);",
        ),
        (
            "tiled: bias is added twice",
            "store<type>(args, m, n, total[p][h][i]);",
            f"store<type>(args, m, n, total[p][h][i] + {UNSLICED_BIAS.format('n')});",
        ),
        (
            "tiled: totals are kept in 16 bits",
            "total[p][h][i] += part[p][h][i] * scale[h][i % 2];",
            f"total[p][h][i] = {rounded('total[p][h][i] + part[p][h][i] * scale[h][i % 2]')};",
        ),
        ("decode: a wait for copies is missing", WAIT, only("STAGES != 6", WAIT)),
        (
            "decode: no barrier between the wait and the use",
            WAIT + READY + SYNC,
            only("STAGES == 6", SYNC) + WAIT + only("STAGES != 6", SYNC),
        ),
        (
            "decode: codes of the neighbouring lane",
            "piece(stage_words, pair * 2 + step, warp, lane);",
            "piece(stage_words, pair * 2 + step, warp, lane ^ 1);",
        ),
        ("decode: row M of x is read", "inside = row < args.M &&", "inside = row < args.M + 1 &&"),
        (
            "decode: x isn't turned when read",
            "ldmatrix_x4(b[h], stage_x + place_of(row, chunk, row & 7));",
            "ldmatrix_x4(b[h], stage_x + place_of(row, chunk, 0));",
        ),
        (
            "decode: scale of the group before",
            "scale_of(args, group, n + 8",
            "scale_of(args, group - (group > 0), n + 8",
        ),
        (
            "decode: a stage is filled again before the barrier",
            WAIT + READY + SYNC + REFILL,
            only("STAGES == 6", REFILL) + WAIT + SYNC + only("STAGES != 6", REFILL),
        ),
        (
            "decode: row M of y is written",
            "if (m < args.M && out < args.N) store",
            "if (m < args.M + 1 && out < args.N) store",
        ),
        (
            "decode: zero point of the neighbouring output",
            "zero_of<bits, type>(args, group, n + 8 * h);",
            "zero_of<bits, type>(args, group, (n + 8 * h) ^ 1);",
        ),
        (
            "decode: the last tile of K is dropped",
            "last = end < args.tiles ? end : args.tiles;",
            "last = (end < args.tiles ? end : args.tiles) - (STAGES == 6);",
        ),
        (
            "decode: bias is added twice",
            "store<type>(args, m, out, total[h][i]);",
            f"store<type>(args, m, out, total[h][i] + {UNSLICED_BIAS.format('out')});",
        ),
        (
            "decode: totals are kept in 16 bits",
            "total[h][i] += part[h][i] * scale[i / 2];",
            f"total[h][i] = {rounded('total[h][i] + part[h][i] * scale[i / 2]')};",
        ),
        ("slices: the last one is dropped", "slice < args.slices;", "slice < args.slices - 1;"),
        ("slices: bias is added twice", "(sum + bias);\n}", "(sum + 2 * bias);\n}"),
        ("slices: one output too many", "if (place >= count) return;", "if (place >= count + 1) return;"),
        ("8 bits: the two words are exchanged", "word[half] = tile", "word[half ^ 1] = tile"),
        ("2 bits: both pieces are the first", " >> (piece % 2 * 8)) {}", ") {}"),
        (
            "3 bits: the third bit of the neighbouring lane",
            "warp * 32 + lane] >> (piece * 4)",
            "warp * 32 + (lane ^ 1)] >> (piece * 4)",
        ),
        ("3 bits: the third bit of the first piece for all", " >> (piece * 4)) {}", ") {}"),
        (
            "8 bits: the zero point is 128 for every other bfloat16",
            "| pair >> 16) - z;",
            "| pair >> 16) - (0x1p23f + 128);",
        ),
        ("without zero points, 8 for all widths", "u32 z = 1 << (bits - 1);", "u32 z = 8;"),
        (
            "8 bits: the second half of a tile isn't copied",
            "first < WORDS; first",
            "first < WORDS - 4 * THREADS * (WORDS > 512); first",
        ),
    ],
    "w_a8": [
        ("tiled: a wait for copies is missing", WAIT, only("DECODE", WAIT)),
        (
            "tiled: no barrier between the wait and the use",
            WAIT + BEGIN + READY_STAGE + SYNC,
            only("!DECODE", SYNC) + WAIT + BEGIN + only("DECODE", SYNC),
        ),
        ("tiled: codes of the neighbouring lane", "warp_n % 2 * 2 + h, lane);", "warp_n % 2 * 2 + h, lane ^ 1);"),
        ("tiled: row M of x is read", "inside = m0 + row < args.M;", "inside = m0 + row < args.M + 1;"),
        (
            "tiled: x isn't turned when read",
            "ldmatrix_x4(a, stage_x + place_of(row, chunk, turn_of(row)));",
            "ldmatrix_x4(a, stage_x + place_of(row, chunk, 0));",
        ),
        ("tiled: scale of the group before", "scale_of(args, group, n0", "scale_of(args, group - (group > 0), n0"),
        (
            "tiled: a stage is filled again before the barrier",
            WAIT + BEGIN + READY_STAGE + SYNC + REFILL_STAGE,
            only("!DECODE", REFILL_STAGE) + WAIT + BEGIN + SYNC + only("DECODE", REFILL_STAGE),
        ),
        (
            "tiled: row M of y is written",
            "if (m < args.M && n < args.N) store",
            "if (m < args.M + 1 && n < args.N) store",
        ),
        (
            "tiled: zero point of the neighbouring output",
            "(args, group, n0 + thread);\n    } else",
            "(args, group, (n0 + thread) ^ 1);\n    } else",
        ),
        ("tiled: the last tile of K is dropped", "last = args.tiles,", "last = args.tiles - !DECODE,"),
        ("tiled: bias is added twice", "bias = bias_of(args, n);", "bias = 2.f * bias_of(args, n);"),
        (
            "tiled: totals are kept in 16 bits",
            "total[p][q][i] = __fmaf_rn(sum, scale[i % 2], total[p][q][i]);",
            f"total[p][q][i] = {half('__fmaf_rn(sum, scale[i % 2], total[p][q][i])')};",
        ),
        ("tiled: one place for the scales of two groups", "half = group % 2;", "half = 0;"),
        ("tiled: sum of the neighbouring row's codes", "m0 + thread - OUTPUTS);", "m0 + ((thread - OUTPUTS) ^ 1));"),
        (
            "tiled: scale of the neighbouring row",
            "x_scale_of(args, m0 + first_row + j * 8);",
            "x_scale_of(args, m0 + ((first_row + j * 8) ^ 1));",
        ),
        ("decode: a wait for copies is missing", WAIT, only("!DECODE", WAIT)),
        (
            "decode: no barrier between the wait and the use",
            WAIT + BEGIN + READY_STAGE + SYNC,
            only("DECODE", SYNC) + WAIT + BEGIN + only("!DECODE", SYNC),
        ),
        (
            "decode: codes of the neighbouring lane",
            "slot * TILE_WORDS, warp, lane);",
            "slot * TILE_WORDS, warp, lane ^ 1);",
        ),
        ("decode: row M of x is read", "inside = row < args.M &&", "inside = row < args.M + 1 &&"),
        (
            "decode: x isn't turned when read",
            "slot * TILE_X + place_of(row, chunk, turn_of(row)));",
            "slot * TILE_X + place_of(row, chunk, 0));",
        ),
        (
            "decode: scale of the group before",
            "scale_of(args, group, n + 8",
            "scale_of(args, group - (group > 0), n + 8",
        ),
        (
            "decode: a stage is filled again before the barrier",
            WAIT + BEGIN + READY_STAGE + SYNC + REFILL_STAGE,
            only("DECODE", REFILL_STAGE) + WAIT + BEGIN + SYNC + only("!DECODE", REFILL_STAGE),
        ),
        (
            "decode: row M of y is written",
            "if (m < args.M && out < args.N) store",
            "if (m < args.M + 1 && out < args.N) store",
        ),
        (
            "decode: zero point of the neighbouring output",
            "Number>(args, group, n + 8 * i);",
            "Number>(args, group, (n + 8 * i) ^ 1);",
        ),
        ("decode: the last tile of K is dropped", "last = args.tiles,", "last = args.tiles - DECODE,"),
        ("decode: bias is added twice", "bias = bias_of(args, out);", "bias = 2.f * bias_of(args, out);"),
        (
            "decode: totals are kept in 16 bits",
            "total[h][i] = __fmaf_rn(sum, scale[i / 2], total[h][i]);",
            f"total[h][i] = {half('__fmaf_rn(sum, scale[i / 2], total[h][i])')};",
        ),
        (
            "decode: sum of the neighbouring row's codes",
            "group, h * 8 + lane % 4 * 2 + i);",
            "group, (h * 8 + lane % 4 * 2 + i) ^ 1);",
        ),
        ("decode: scale of the neighbouring row", "x_scale_of(args, m), bias", "x_scale_of(args, m ^ 1), bias"),
    ],
    "quantize_rows": [
        ("elements after a row are read", "k < args.K", "k < args.K + 8"),
        (
            "the last elements don't count for the largest magnitude",
            "k < args.K; k += THREADS",
            "k < args.K - 8; k += THREADS",
        ),
        (
            "no barrier before the warps' largest magnitudes are read",
            "  __syncthreads();\n  top = warp_max(tops",
            "  top = warp_max(tops",
        ),
        (
            "codes are cut off instead of rounded",
            "round_code(v[i], row);\n        sum",
            "(i32)__fmul_rn(v[i], row.inverse);\n        sum",
        ),
        ("columns beyond K aren't written", "if (k < args.padded) {", "if (k < args.K) {"),
        ("half of the sums of codes are lost", "bit < 8; bit", "bit < 4; bit"),
        ("sums aren't cleared", "  if (args.sum)\n    for", "  if (false)\n    for"),
        ("row M of the scales is written", "args.scale[m] =", "args.scale[m + 1] ="),
    ],
    "int8_outlier": [
        ("an outlier that isn't finite isn't noticed", "all >= 0x7f800000u ? all : top", "top"),
        ("an outlier column isn't left out of the int8 product", "if (!(outliers >> i & 1)) code[i]", "code[i]"),
        ("flags of the columns 32 further or before", "return mask[k / 32]", "return mask[(k ^ 32) / 32]"),
        (
            "weights of outlier columns aren't rounded to x's type",
            "return round_to(exact, args.type);",
            "return exact;",
        ),
        ("only the first outlier of 32 columns is added", "bits; bits &= bits - 1)", "bits; bits = 0)"),
        (
            "flags: row M of x is read",
            "? first + args.rows_per_slice : args.M;",
            "? first + args.rows_per_slice : args.M + 1;",
        ),
        ("flags: the last row of a slice isn't scanned", "m = first; m < end;", "m = first; m < end - 1;"),
        (
            "rows: no barrier before the mask is used",
            "  __syncthreads();\n  u32 top = 0, all = 0;\n  for (int k",
            "  u32 top = 0, all = 0;\n  for (int k",
        ),
        (
            "rows: outliers count for the largest magnitude",
            "take_magnitudes(top, all, v, bits_of(mask, k));",
            "take_magnitudes(top, all, v, 0);",
        ),
        ("one row: codes are overwritten before all threads have used them", "    if (first) __syncthreads();\n", ""),
        (
            "one row: no barrier before codes are used",
            "    __syncthreads();\n    for (; k < args.K",
            "    for (; k < args.K",
        ),
        (
            "one row: the last 16 columns are dropped",
            "k < args.K && k < first + CHUNK",
            "k < args.K - 16 && k < first + CHUNK",
        ),
        ("one row: rows of W after the last are read", "readable = n < args.N ? n : args.N - 1;", "readable = n;"),
        ("one row: half of a sum is lost", "bit > 0; bit /= 2) sum[i]", "bit > 1; bit /= 2) sum[i]"),
        (
            "one row: no barrier before sums are read",
            "  __syncthreads();\n  if (thread >= OUTPUTS)",
            "  if (thread >= OUTPUTS)",
        ),
        (
            "one row: outliers are added with one rounding instead of two",
            "value = __fadd_rn(value, __fmul_rn(x, w));",
            "value = __fmaf_rn(x, w, value);",
        ),
        ("one row: output N is written", "if (n < args.N) store", "if (n < args.N + 1) store"),
        (
            "one row: bias is added twice",
            "store(args, 0, n, value);",
            f"store(args, 0, n, {ADDED_TWICE.format('value')});",
        ),
        (
            "one row: no barrier before the mask of given columns is read",
            "    __syncthreads();\n  }\n  u32 top",
            "  }\n  u32 top",
        ),
        (
            "product: the last tile of K is dropped",
            "tiles = args.padded / TILE_K;",
            "tiles = args.padded / TILE_K - 1;",
        ),
        ("product: row N of W is read", "in_w = n0 + row < args.N &&", "in_w = n0 + row < args.N + 1 &&"),
        (
            "product: a stage is filled again before the barrier",
            WAIT + READY + SYNC + REFILL_PRODUCT,
            REFILL_PRODUCT + WAIT + SYNC,
        ),
        ("product: no barrier between the wait and the use", WAIT + READY + SYNC, SYNC + WAIT),
        ("product: a wait for copies is missing", WAIT, ""),
        (
            "product: x isn't turned when read",
            "ldmatrix_x4(a[p], shared_x + stage + place_of(row, chunk, turn_of(row)));",
            "ldmatrix_x4(a[p], shared_x + stage + place_of(row, chunk, 0));",
        ),
        ("product: W isn't turned when read", "place_of(out, side, turn_of(out))", "place_of(out, side, 0)"),
        (
            "product: scale of the neighbouring output",
            "my_absmax, q * 8 + lane % 4 * 2 + i % 2);",
            "my_absmax, (q * 8 + lane % 4 * 2 + i % 2) ^ 1);",
        ),
        (
            "product: outliers are added with one rounding instead of two",
            "target = __fadd_rn(target, __fmul_rn(x[j / 2][j % 2], w));",
            "target = __fmaf_rn(x[j / 2][j % 2], w, target);",
        ),
        (
            "product: row M of y is written",
            "if (m < args.M && n < args.N) store",
            "if (m < args.M + 1 && n < args.N) store",
        ),
        (
            "product: bias is added twice",
            "store(args, m, n, value[p][q][i]);",
            f"store(args, m, n, {ADDED_TWICE.format('value[p][q][i]')});",
        ),
    ],
    "dense_sparse": [
        ("responses: a wait for copies is missing", WAIT, ""),
        ("responses: no barrier between the wait and the use", WAIT + READY + SYNC, SYNC + WAIT),
        ("responses: the neighbouring atom", "row = warp * 16 + lane % 16,", "row = warp * 16 + (lane % 16 ^ 1),"),
        ("responses: row M of x is read", "inside = m0 + row < args.M &&", "inside = m0 + row < args.M + 1 &&"),
        (
            "responses: x isn't turned when read",
            "ldmatrix_x4(right[h], stage_x + place_of(row, chunk, row & 7));",
            "ldmatrix_x4(right[h], stage_x + place_of(row, chunk, 0));",
        ),
        (
            "responses: step of the atom before",
            "args.atom_step[u64(b) * args.m + atom]",
            "args.atom_step[u64(b) * args.m + atom - (atom > 0)]",
        ),
        (
            "responses: a stage is filled again before the barrier",
            WAIT + READY + SYNC + REFILL_RESPONSES,
            REFILL_RESPONSES + WAIT + SYNC,
        ),
        ("responses: a row too many of z is written", "row >= rows_of_z) continue;", "row >= rows_of_z + 1) continue;"),
        ("responses: z is kept in 16 bits", "= sum[h][i] * step;", f"= {rounded('sum[h][i]')} * step;"),
        (
            "responses: the last tile of columns is dropped",
            "(args.w + TILE_W - 1) / TILE_W;",
            "(args.w + TILE_W - 1) / TILE_W - 1;",
        ),
        ("combine: a wait for copies is missing", "    cp_async_wait<0>();\n", ""),
        (
            "combine: no barrier between the wait and the use",
            "    cp_async_wait<0>();\n" + SYNC,
            SYNC + "    cp_async_wait<0>();\n",
        ),
        ("combine: entries of the neighbouring output", "* args.k * 32 + lane;", "* args.k * 32 + (lane ^ 1);"),
        (
            "combine: the last entry is dropped",
            "count = blocks * args.k;",
            "count = blocks * args.k - (chunk + 1 == chunks);",
        ),
        ("combine: z of the first block of a stage for all of them", "base += floats, next", "next"),
        (
            "combine: no barrier before the parts are added",
            "    __syncthreads();\n    if (part) return;",
            "    if (part) return;",
        ),
        ("combine: the last part is dropped", "p < SPLIT; p++", "p < SPLIT - 1; p++"),
        (
            "combine: a stage is filled again before the barrier",
            "    cp_async_wait<0>();\n" + SYNC + NEXT_CHUNK,
            NEXT_CHUNK + "    cp_async_wait<0>();\n" + SYNC,
        ),
        ("combine: row M of y is written", "if (row < args.M) args.y", "if (row < args.M + 1) args.y"),
        (
            "combine: sums are kept in 16 bits",
            "sum[r] = __fmaf_rn(row[r], value, sum[r]);",
            f"sum[r] = {rounded('__fmaf_rn(row[r], value, sum[r])')};",
        ),
        ("combine: step of the output before", "args.step[n]", "args.step[n - (n > 0)]"),
        (
            "combine: bias is added twice",
            "args.bias ? Element<type>::to_float(args.bias[n])",
            "args.bias ? 2.f * Element<type>::to_float(args.bias[n])",
        ),
    ],
    "gptq_solve": [
        (
            "factors are overwritten before all are done with them",
            "    __syncthreads();  // all are done with the factors of the panel before\n",
            "",
        ),
        (
            "no barrier between the load of factors and their use",
            "    __syncthreads();\n\n    for (int i = 0; i < known",
            "    for (int i = 0; i < known",
        ),
        ("group of the column before", "args.group_of[j];", "args.group_of[i ? j - 1 : j];"),
        ("a column misses the error of its neighbour", "p = q + 1; p < PANEL", "p = q + 2; p < PANEL"),
        (
            "product and difference are rounded once",
            "__fsub_rn(value, __fmul_rn(factor, error))",
            "__fmaf_rn(-factor, error, value)",
        ),
        ("a product with the pivot's inverse", "__fdiv_rn(off, pivot)", "__fmul_rn(off, __fdiv_rn(1.f, pivot))"),
        (
            "ties are rounded away from zero",
            "float code = round_half_even(__fdiv_rn(value, scale));",
            "const float ratio = __fdiv_rn(value, scale), more = ratio < 0 ? -0x1p-18f : 0x1p-18f;\n"
            "  float code = round_half_even(__fadd_rn(ratio, more));",
        ),
        ("a row too many is read", "value[q] = is_there &&", "value[q] = row < args.rows + 1 &&"),
        (
            "a row too many is written",
            "if (is_there) {\n        args.codes",
            "if (row < args.rows + 1) {\n        args.codes",
        ),
        ("the zero point is added after the clamp", ZERO + CLAMP, CLAMP + ZERO),
        ("the last column isn't updated", "is_there && j < args.end)", "is_there && j < args.end - 1)"),
        ("the first error is dropped", "int i = 0; i < known", "int i = 1; i < known"),
        ("U is read by columns", "u64(from) * args.end + to;", "u64(to) * args.end + from;"),
    ],
    "hadamard": [
        (
            "no barrier before warps read each other's elements",
            "  __syncthreads();\n  float* const turned",
            "  float* const turned",
        ),
        ("no barrier before a thread reads its own back", "  __syncthreads();\n  // what", "  // what"),
        (
            "wrong lane in the exchange of warps",
            "butterfly_of_lanes(v, lane, bit);",
            "butterfly_of_lanes(v, lane, bit ^ 1);",
        ),
        ("wrong sign in the second half of a butterfly", "  b = a - b;", "  b = b - a;"),
        (
            "elements after the last row are read",
            "if (index < args.count) {\n      Run",
            "if (index < args.count + RUN) {\n      Run",
        ),
        ("elements after the last row are written", "if (index < args.count) Run", "if (index < args.count + RUN) Run"),
        (
            "sums are kept in 16 bits",
            "i < RUN; i++) v[c][i] *= args.scale;",
            f"i < RUN; i++) v[c][i] = {half('v[c][i]')} * args.scale;",
        ),
        (
            "one element isn't scaled",
            "i < RUN; i++) v[c][i] *= args.scale;",
            "i < RUN; i++) v[c][i] *= c == CHUNKS - 1 && i == RUN - 1 ? 1.f : args.scale;",
        ),
        ("runs: the matrix of a run is transposed", "signs.row[i] >> j & 1;", "signs.row[j] >> i & 1;"),
        (
            "runs: elements after the last row are read",
            "if (index < args.count) {\n        load_quad",
            "if (index < args.count + M) {\n        load_quad",
        ),
        (
            "runs: elements after the last row are written",
            "if (index < args.count) store_quad",
            "if (index < args.count + M) store_quad",
        ),
        (
            "runs: sums are kept in 16 bits",
            "v[c][q][i] *= args.scale;",
            f"v[c][q][i] = {half('v[c][q][i]')} * args.scale;",
        ),
        (
            "runs: one run of several isn't multiplied",
            "    multiply_run<M>(v[c]);",
            "    if (c + 1 < CHUNKS || CHUNKS == 1) multiply_run<M>(v[c]);",
        ),
        ("runs: wrong signs on the diagonal", "PAIRS && j % 2 ? -value : value;", "PAIRS && j % 2 ? value : -value;"),
    ],
}

# the kernels that are compiled for a fault, by how its name begins; the cases are those that launch no other
COMPILED = {
    "tiled": "tiled<4|add_slices",
    "decode": "decode<4|add_slices",
    "slices": "decode<4|add_slices",
    "2 bits": "<2|add_slices",
    "3 bits": "<3|add_slices",
    "8 bits": "<8|add_slices",
    "without": "<2|<8|add_slices",
    "runs": "rows_of_runs",
}


def kernels_for(source: str, name: str) -> tuple[str, ...]:
    begins = re.match(r"[\w ]*", name)
    pattern = next((found for start, found in COMPILED.items() if begins and begins[0].startswith(start)), "")
    return tuple(kernel for kernel in plans.KERNELS[source] if re.search(pattern, kernel))


def faulty_library(source: str, text: str, kernels: tuple[str, ...]) -> Path:
    objects = [cuda_on_cpu.driver_object(), cuda_on_cpu.source_object(source, text, kernels, "-O0")]
    return compiled.linked("faulty.so", objects, cuda_on_cpu.SHARED)


def run_cases(library: Path, source: str, there: tuple[str, ...]) -> int:
    """Runs every case that the kernels of the library can run, until one is wrong; how many there were."""
    kernels = cuda_on_cpu.emulated_kernels(
        library, lambda of, names: cuda_on_cpu.code_of(of, tuple(name for name in names if name in there))
    )
    count = 0
    for seed in range(2):
        for case in KERNELS[source].CASES:
            kernels.seed(seed)
            try:
                KERNELS[source].run(kernels, case, arrays.GuardedMemory(), seed)
                count += 1
            except KeyError:  # a kernel that isn't compiled here
                continue
    return count


def outcome_in_a_child(folder: Path, library: Path, source: str, there: tuple[str, ...]) -> tuple[int, str]:
    """The exit code of a process that runs the cases, and what it wrote. It may crash, that is the point."""
    written = folder / "written"
    child = os.fork()
    if child == 0:
        code = 3
        try:
            with written.open("w") as file:
                os.dup2(file.fileno(), 2)
                faulthandler.disable()  # a crash is no news
                signal.alarm(60)
                try:
                    code = 0 if run_cases(library, source, there) else 2
                except AssertionError as error:
                    file.write(str(error))
                    code = 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), written.read_text(errors="replace")


@pytest.mark.parametrize(
    ("source", "name", "old", "new"),
    [pytest.param(source, *fault, id=f"{source}: {fault[0]}") for source in FAULTS for fault in FAULTS[source]],
)
def test_a_planted_fault_is_noticed(tmp_path, source, name, old, new):
    text, kernels = nvrtc.source_text(source), kernels_for(source, name)
    assert old in text, f"the place of {name!r} has changed"
    code, said = outcome_in_a_child(tmp_path, faulty_library(source, text.replace(old, new), kernels), source, kernels)
    is_wrong = code == 1 and re.search("outputs are wrong|were overwritten", said) is not None
    assert is_wrong or code in (-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS), f"ended with {code}: {said}"


@pytest.mark.parametrize("source", KERNELS)
def test_no_fault_is_noticed_where_none_is_planted(tmp_path, source):
    library = faulty_library(source, nvrtc.source_text(source), plans.KERNELS[source])
    assert outcome_in_a_child(tmp_path, library, source, plans.KERNELS[source]) == (0, "")


def test_every_source_has_faults_and_their_kernels():
    assert FAULTS.keys() == KERNELS.keys()
    assert all(kernels_for(source, fault[0]) for source in FAULTS for fault in FAULTS[source])
