// Rows of inputs rounded to int8 and their products with a packed 4- or 8-bit weight: dynamic_int8.cpp computes them, and
// int8_outlier.cpp adds columns in floating point.
#pragma once
#include "common.h"

namespace compressor {

struct Int8Rows {
  const int8_t* codes;       // (M, padded), zero beyond K
  const int32_t* minus_sum;  // (M, groups): -(sum of a row's codes in the group)
  const float* scale;        // (M,): absmax / 127
  const Packed* w;
};
constexpr int64_t INT8_ROWS = 128;  // at once: their codes stay in the second-level cache beside a tile

// One row (K,) to codes; returns its absmax. codes = round(x * ((1 / absmax) * 127)), half to even, in [-127, 127], with the
// roundings of int8_split.round_rows. absmax below 2^-120 (the factor would overflow) counts as 0 with codes 0; a row with
// NaN or Inf has absmax NaN and codes 0.
float round_row_at(int64_t level, const float* x, int8_t* codes, int64_t K);
void group_sums_at(int64_t level, const int8_t* codes, int32_t* minus_sum, int64_t groups, int64_t group);

// finish(m, tile, values) gets 64 outputs of row m, scaled, and may change them; each pair once, on any thread.
void int8_products(int64_t level, int64_t threads, const Int8Rows& x, int64_t M,
                   const std::function<void(int64_t m, int64_t tile, float* values)>& finish);

struct Output {
  void* y;
  int64_t dtype, level;
  const void* bias;
  int64_t bias_dtype;
};
// 64 outputs of row m: the bias added in float32, rounded once to y's type.
void store_outputs(const Output& to, const Packed& w, float* values, int64_t m, int64_t tile);

}  // namespace compressor
