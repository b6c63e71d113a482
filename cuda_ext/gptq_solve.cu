// GPTQ: rounds columns begin to stop - 1 of a block one by one, and adds their errors to every later column of the block,
// to end - 1. Each element gets the operations of compressor/kernels/ops/gptq_columns.py in the same order, each rounded
// to float32: product and difference are separate, true division, half to even. So the codes are those of torch on a CPU,
// bit for bit. (Not those of torch on a GPU, which divides by multiplying with the inverse.)
//
//   q = clamp(round(w[j] / s) + z)      e[j] = (w[j] - (q - z) * s) / U[j, j]      w[p] -= U[j, p] * e[j] for p > j
//
// Rows of the weight are independent: a thread has one row, and processes the columns in panels of PANEL. A panel is in
// registers. It gets the errors of all earlier columns, oldest first, then its own. So a column is read and written once,
// and U is read once per block of threads, the rows of one panel at a time, through shared memory.
#include "device.h"

namespace gptq_solve {

constexpr int PANEL = 8, MAX_COLUMNS = 128;
// 4096 rows make 64 blocks of 64; fewer threads would spread further, but each block reads U
constexpr int THREADS = 64;

struct Arguments {
  float* work;          // (end, rows)
  float* errors;        // (end, rows), begin to stop - 1 written
  float* codes;         // (end, rows), the same
  const float* upper;   // (end, end)
  const float* scale;   // (groups, rows)
  const float* zero;    // (groups, rows), or null: symmetric
  const int* group_of;  // (end)
  int rows, groups, begin, stop, end;
  float low, high;
  int nothing;  // 0: leaves no gap in what a launch is given
};

struct Rounded {
  float code, error;
};

DEVICE Rounded round_one(const Arguments& args, float value, float scale, float zero, float pivot) {
  float code = round_half_even(__fdiv_rn(value, scale));
  if (args.zero) code = __fadd_rn(code, zero);
  code = code < args.low ? args.low : code;  // NaN stays
  code = code > args.high ? args.high : code;
  const float level = args.zero ? __fsub_rn(code, zero) : code;
  const float off = __fsub_rn(value, __fmul_rn(level, scale));
  return {code, __fdiv_rn(off, pivot)};
}

DEVICE float take_error(float value, float factor, float error) {
  return __fsub_rn(value, __fmul_rn(factor, error));
}

__global__ void __launch_bounds__(THREADS) columns(Arguments args) {
  SHARED(float, errors, MAX_COLUMNS * THREADS);
  SHARED(float, factors, MAX_COLUMNS * PANEL);  // U of the columns rounded so far and in this panel, for this panel
  const int thread = threadIdx.x, row = blockIdx.x * THREADS + thread;
  const bool is_there = row < args.rows;

  for (int c = args.begin; c < args.end; c += PANEL) {
    const int known = (c < args.stop ? c : args.stop) - args.begin;  // errors from before this panel
    const int needed = (c + PANEL < args.stop ? c + PANEL : args.stop) - args.begin;
    __syncthreads();  // all are done with the factors of the panel before
    for (int i = thread; i < needed * PANEL; i += THREADS) {
      const int from = args.begin + i / PANEL, to = c + i % PANEL;
      const u64 place = u64(from) * args.end + to;
      factors[i] = to < args.end ? args.upper[place] : 0.f;
    }
    float value[PANEL];
#pragma unroll
    for (int q = 0; q < PANEL; q++)
      value[q] = is_there && c + q < args.end ? args.work[u64(c + q) * args.rows + row] : 0.f;
    __syncthreads();

    for (int i = 0; i < known; i++) {
      const float error = errors[i * THREADS + thread];
#pragma unroll
      for (int q = 0; q < PANEL; q++) value[q] = take_error(value[q], factors[i * PANEL + q], error);
    }

#pragma unroll
    for (int q = 0; q < PANEL; q++) {
      const int j = c + q, i = j - args.begin;
      const u64 place = u64(j) * args.rows + row;
      if (j >= args.stop) {
        if (is_there && j < args.end) args.work[place] = value[q];
        continue;
      }
      const int group = args.group_of[j];
      const bool known_group = group >= 0 && group < args.groups;  // the codes are NaN if not
      const u64 of_group = u64(known_group ? group : 0) * args.rows + row;
      float scale = 1, zero = 0;
      if (is_there) {
        scale = known_group ? args.scale[of_group] : __uint_as_float(0x7fffffffu);
        if (args.zero) zero = args.zero[of_group];
      }
      const Rounded rounded = round_one(args, value[q], scale, zero, factors[i * PANEL + q]);
      if (is_there) {
        args.codes[place] = rounded.code;
        args.errors[place] = rounded.error;
      }
      errors[i * THREADS + thread] = rounded.error;
#pragma unroll
      for (int p = q + 1; p < PANEL; p++) value[p] = take_error(value[p], factors[i * PANEL + p], rounded.error);
    }
  }
}

}  // namespace gptq_solve
