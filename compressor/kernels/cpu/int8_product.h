// Products of rows of int8 with a packed weight of any width, summed exactly. Three ops bring rows: dynamic_int8.cpp rounds
// them, int8_outlier.cpp too, except for some columns, and weight_only.cpp writes each input with three or four digits.
#pragma once
#include "common.h"

namespace compressor {

// A row of inputs is `digits` rows of codes, the lowest digit first: input = step * sum of code[d] * 256^d in its group.
struct Int8Rows {
  const int8_t* codes;       // (M, digits, padded), zero beyond K
  const int32_t* minus_sum;  // (M, digits, groups): -(sum of a row's codes in the group)
  const float* step;         // (M,) if digits is 1, (M, groups) powers of two otherwise
  int64_t digits;            // 1, 3 or 4
  int64_t first;             // the row of outputs that the first of them makes
};
// A weight that the rows are multiplied by, and where its outputs go. All weights of a call are of one shape except for their
// outputs, and of one width and group, so that the rows serve all of them.
struct Part {
  Packed w;
  Output to;
};
// How many of M rows, `bytes` of codes each, are multiplied at a time. Tiles of AMX read them again for every 64 outputs, from the second-level
// cache if they fit; with weights of 8 bits, which come from memory once more for each share, more rows are faster.
static inline int64_t rows_at_once(int64_t level, int64_t bytes, int64_t bits, int64_t M) {
  const int64_t many = level == AVX512VNNI && bytes <= 16 << 10 ? 2 * ROWS_AT_ONCE : ROWS_AT_ONCE;
  if (level < AMX) return M < many ? M : many;
  const int64_t fit = ((bits < 8 ? 3 : 6) << 19) / bytes, most = fit < 16 ? 16 : fit > 256 ? 256 : fit;
  const int64_t shares = M > most ? (M + most - 1) / most : 1, rows = ((M + shares - 1) / shares + 15) / 16 * 16;
  return M < rows ? M : rows;
}
// What int32 sums hold: |code of an input| <= 128 times a code of the weight, or the zero point, which may be larger.
static inline bool sums_fit(const Packed& w) {
  const int64_t largest = (1 << w.bits) - 1;
  return w.group * 128 * (w.largest_zero > largest ? w.largest_zero : largest) < int64_t(1) << 31;
}

// minus_sum (groups,) of one row of codes (groups * group,)
void minus_sums(int64_t level, const int8_t* codes, int32_t* minus_sum, int64_t groups, int64_t group);

// What Python gives: for each part the address and bytes of its packed weight, address and type of its bias (0 for none), its
// outputs N, and the address of y (M, N).
struct PartGiven {
  int64_t packed, bytes, bias, bias_dtype, out_features, y;
};
// Checks that the weights are as the call says.
int64_t open_parts(std::vector<Part>& parts, int64_t level, const PartGiven* given, int64_t count, int64_t y_dtype, int64_t M, int64_t K,
                   int64_t bits, int64_t group);

// f(m) for each of M rows of K inputs, on few threads if there is little to do.
void each_row(int64_t threads, int64_t M, int64_t K, const std::function<void(int64_t)>& f);
// f(part, tile) for every tile of every part, each once, on any thread.
void each_tile(int64_t threads, const std::vector<Part>& parts, const std::function<void(const Part& part, int64_t tile)>& f);

// finish(part, m, tile, values) gets 64 outputs of row m, scaled, and may change them; each once, on any thread. A group's sums
// become one float, digits joined from the highest by fma, and total = fma(that float, scale, total), in the order of K: every
// level, number of threads and batch gives the same bits.
void int8_products(int64_t level, int64_t threads, const Int8Rows& x, const std::vector<Part>& parts, int64_t M,
                   const std::function<void(const Part& part, int64_t m, int64_t tile, float* values)>& finish);

}  // namespace compressor
