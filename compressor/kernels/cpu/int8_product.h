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
constexpr int64_t MOST_IN_A_GROUP = 65536;  // 255 * 127 * 65536 < 2^31

// One row (K,) to codes (padded) and minus the sums of its groups; returns absmax / 127.
// codes = round(x * ((1 / absmax) * 127)), half to even, in [-127, 127], with the roundings of int8_split.round_rows. absmax
// below 2^-120 (the factor would overflow) counts as 0 with codes 0; a row with NaN or Inf has absmax NaN and codes 0.
float take_row(int64_t level, const float* x, const Packed& w, int8_t* codes, int32_t* minus_sum);

// finish(m, tile, values) gets 64 outputs of row m, scaled, and may change them; each pair once, on any thread.
void int8_products(int64_t level, int64_t threads, const Int8Rows& x, int64_t M,
                   const std::function<void(int64_t m, int64_t tile, float* values)>& finish);

}  // namespace compressor
