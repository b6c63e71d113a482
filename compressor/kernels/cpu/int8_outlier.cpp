// LLM.int8(): y = (x without its outlier columns, rounded to int8) @ W.T + (those columns of x) @ (those of W).T + bias.
// The same steps and roundings as compressor.kernels.ops.int8_split, except that a token's outlier columns are added one after
// the other, with each product and sum rounded, so that its result doesn't depend on the number of tokens.
#include <algorithm>

#include "int8_row.h"
#include "ops.h"

namespace compressor {
namespace {

ALWAYS_INLINE void mark(const float* x, uint8_t* flags, int64_t K, float threshold) {
  for (int64_t k = 0; k < K; k++) flags[k] |= uint8_t(std::fabs(x[k]) >= threshold);
}
void mark_scalar(const float* x, uint8_t* flags, int64_t K, float threshold) { mark(x, flags, K, threshold); }
#ifdef COMPRESSOR_X86
TARGET_AVX2 void mark_avx2(const float* x, uint8_t* flags, int64_t K, float threshold) { mark(x, flags, K, threshold); }
TARGET_AVX512 void mark_avx512(const float* x, uint8_t* flags, int64_t K, float threshold) { mark(x, flags, K, threshold); }
#endif
void mark_at(int64_t level, const float* x, uint8_t* flags, int64_t K, float threshold) {
#ifdef COMPRESSOR_X86
  if (level >= AVX512VNNI) return mark_avx512(x, flags, K, threshold);
  if (level >= AVX2) return mark_avx2(x, flags, K, threshold);
#endif
  mark_scalar(x, flags, K, threshold);
}

// values += x * weights for each outlier of a row, each product and sum rounded; weights (count, 64)
ALWAYS_INLINE void add_columns(float* values, const float* x, const float* weights, int64_t count) {
  for (int64_t c = 0; c < count; c++)
    for (int n = 0; n < TILE; n++) values[n] = values[n] + x[c] * weights[c * TILE + n];
}
void add_columns_scalar(float* v, const float* x, const float* w, int64_t count) { add_columns(v, x, w, count); }
#ifdef COMPRESSOR_X86
TARGET_AVX2 void add_columns_avx2(float* v, const float* x, const float* w, int64_t count) { add_columns(v, x, w, count); }
TARGET_AVX512 void add_columns_avx512(float* v, const float* x, const float* w, int64_t count) { add_columns(v, x, w, count); }
#endif
void add_columns_at(int64_t level, float* values, const float* x, const float* weights, int64_t count) {
#ifdef COMPRESSOR_X86
  if (level >= AVX512VNNI) return add_columns_avx512(values, x, weights, count);
  if (level >= AVX2) return add_columns_avx2(values, x, weights, count);
#endif
  add_columns_scalar(values, x, weights, count);
}

// 64 weights of one column: as stored beside the codes, or the codes times absmax over 127, rounded to x's type.
void column(const Packed& w, const float* absmax, const void* stored, int64_t dtype, int64_t count, int64_t c, int64_t k, int64_t tile, float* out) {
  const int64_t first = tile * TILE, left = std::min<int64_t>(TILE, w.out_features - first);
  const uint8_t* row = w.block(tile, 0) + k / 8 * w.row_bytes + k % 8 / 4 * 256 + k % 4;
  for (int64_t n = 0; n < left; n++) {
    if (stored) { out[n] = load_number(stored, dtype, (first + n) * count + c); continue; }
    const float exact = float(int(row[n * 4]) - 128) * absmax[first + n] / 127;
    out[n] = dtype == FLOAT32 ? exact : dtype == BFLOAT16 ? bfloat16_to_float(float_to_bfloat16(exact)) : half_to_float(float_to_half(exact));
  }
  for (int64_t n = left; n < TILE; n++) out[n] = 0;
}

}  // namespace
}  // namespace compressor

using namespace compressor;

extern "C" int64_t linear_int8_outlier(int64_t level, int64_t threads, const void* x, int64_t x_dtype, const uint8_t* packed, int64_t packed_size,
                                       const float* absmax, const int64_t* columns, int64_t column_count, const void* stored, int64_t stored_dtype,
                                       const void* bias, int64_t bias_dtype, void* y, int64_t M, int64_t N, int64_t K, double threshold) {
  if (!level_is_there(level)) return BAD_LEVEL;
  std::vector<Part> parts;
  const PartGiven given{int64_t(packed), packed_size, int64_t(bias), bias_dtype, N, int64_t(y)};
  if (const int64_t error = open_parts(parts, level, &given, 1, x_dtype, M, K, 8, (K + 7) / 8 * 8)) return error;
  const Packed& w = parts[0].w;
  const int64_t padded = w.padded(), rows = rows_at_once(level, padded, 8, M);
  int8_t* codes = (int8_t*)scratch(1, size_t(rows * padded));
  int32_t* minus_sum = (int32_t*)scratch(2, size_t(rows) * 4);
  float* scale = (float*)scratch(3, size_t(rows) * 4);
  std::vector<int64_t> apart;
  if (columns) {
    apart.assign(columns, columns + column_count);
    for (const int64_t k : apart) if (k < 0 || k >= K) return BAD_SHAPE;
  } else if (threshold > 0) {
    std::vector<uint8_t> flags(size_t(K), 0);
    for (int64_t m = 0; m < M; m++)
      mark_at(level, as_floats(level, x, x_dtype, m * K, (float*)scratch(0, size_t(K) * 4), K), flags.data(), K, float(threshold));
    for (int64_t k = 0; k < K; k++) if (flags[size_t(k)]) apart.push_back(k);
  }
  const int64_t count = int64_t(apart.size());
  float* outliers = (float*)scratch(5, size_t(rows * count) * 4 + 4);  // (rows, count) of x
  for (int64_t m0 = 0; m0 < M; m0 += rows) {
    const int64_t here = std::min(rows, M - m0);
    each_row(threads, here, K, [&](int64_t m) {
      float* row = (float*)scratch(0, size_t(K) * 4);
      to_float(level, x, x_dtype, (m0 + m) * K, row, K);
      bool broken = false;
      for (int64_t c = 0; c < count; c++) {
        const float value = row[apart[size_t(c)]];
        outliers[m * count + c] = value, row[apart[size_t(c)]] = 0, broken |= !std::isfinite(value);
      }
      scale[m] = take_row(level, row, w, codes + m * padded, minus_sum + m);
      if (broken) scale[m] = NAN;
    });
    // Weights of outlier columns are needed for each row of a tile; one thread processes a tile's rows one after the other.
    int8_products(level, threads, Int8Rows{codes, minus_sum, scale, 1, m0}, parts, here, [&](const Part& part, int64_t m, int64_t tile, float* values) {
      float* weights = (float*)scratch(6, size_t(count) * TILE * 4 + 4);
      if (m == 0)
        for (int64_t c = 0; c < count; c++)
          column(w, absmax, stored, stored ? stored_dtype : x_dtype, count, c, apart[size_t(c)], tile, weights + c * TILE);
      add_columns_at(level, values, outliers + m * count, weights, count);
      store_outputs(part.to, w, values, m0 + m, tile);
    });
  }
  return OK;
}
