// Products of rows of int8 with a packed weight of any width, summed exactly. Three ops bring rows: dynamic_int8.cpp rounds
// them, int8_outlier.cpp too, but for some columns, and weight_only.cpp writes each input with three or four digits.
#pragma once
#include "common.h"

namespace compressor {

// A row of inputs is `digits` rows of codes, the lowest digit first: input = step * sum of code[d] * 256^d in its group.
struct Int8Rows {
  const int8_t* codes;       // (M, digits, padded), zero beyond K
  const int32_t* minus_sum;  // (M, digits, groups): -(sum of a row's codes in the group)
  const float* step;         // (M,) if digits is 1, (M, groups) powers of two otherwise
  const Packed* w;
  int64_t digits;            // 1, 3 or 4
};
// What int32 sums hold: |code| <= 128 times codes of the weight.
static inline bool sums_fit(const Packed& w) { return w.group * 128 * ((1 << w.bits) - 1) < int64_t(1) << 31; }

// minus_sum (groups,) of one row of codes (groups * group,)
void minus_sums(int64_t level, const int8_t* codes, int32_t* minus_sum, int64_t groups, int64_t group);

// finish(m, tile, values) gets 64 outputs of row m, scaled, and may change them; each pair once, on any thread. A group's sums
// become one float, digits joined from the highest by fma, and total = fma(that float, scale, total), in the order of K: every
// level, number of threads and batch gives the same bits.
void int8_products(int64_t level, int64_t threads, const Int8Rows& x, int64_t M,
                   const std::function<void(int64_t m, int64_t tile, float* values)>& finish);

}  // namespace compressor
