// y = x @ (2-, 3-, 4- or 8-bit weight).T, weight-only. This processor multiplies integers fastest, so the inputs of a group
// are turned into integers: x = v * 2^(e-F), with e the exponent of the group's largest magnitude, |v| < 2^(F+1), and v is
// written in signed digits of 8 bits whose products are summed exactly (int8_product.h). 16-bit inputs have 8 or 11
// significant bits and get three digits, F = 21: exact down to 2^-11 (float16) or 2^-14 (bfloat16) of the largest in the
// group. float32 gets four, F = 29.
// With D digits, w = (code - zero) * scale, before the bias and the rounding to y's type:
//   |y - exact| <= (K/group + 2 D + 2) 2^-24 sum |x| |w| + sum over groups of 2^-(F+1) max|x| sum |w|, max|x| at least 2^-96
// Columns with NaN or Inf are left out of it and added in float32, so that y is that of float32 products.
#include <algorithm>

#include "float_product.h"
#include "ops.h"

namespace compressor {
namespace {

// From so many rows on float32 products are faster without VNNI: measured at 4096 x 4096, 2, 4 and 8 bits.
constexpr int64_t FLOAT_ROWS = 6, HALF_ROWS = 12;
constexpr int LOWEST_EXPONENT = -96;  // 2^(F - e) and 2^(e - F) stay normal floats
constexpr uint32_t INFINITE = 0x7f800000;

int64_t digits_of(int64_t x_dtype) { return x_dtype == FLOAT32 ? 4 : 3; }

// The largest magnitude, as bits: magnitudes of floats order as their bits do, NaN above Inf.
ALWAYS_INLINE uint32_t largest(const float* x, int64_t count) {
  int32_t top = 0;
  for (int64_t k = 0; k < count; k++) {
    int32_t bits;
    memcpy(&bits, x + k, 4);
    bits &= 0x7fffffff;
    top = bits > top ? bits : top;
  }
  return uint32_t(top);
}
ALWAYS_INLINE void write_digits(const float* x, int64_t count, float factor, int64_t digits, int8_t* codes, int64_t stride) {
  for (int64_t k = 0; k < count; k++) {
    int32_t v = int32_t(__builtin_rintf(x[k] * factor));
    for (int64_t d = 0; d < digits; d++) codes[d * stride + k] = int8_t(v), v = (v + 128) >> 8;
  }
}
uint32_t largest_scalar(const float* x, int64_t count) { return largest(x, count); }
void digits_scalar(const float* x, int64_t n, float f, int64_t d, int8_t* codes, int64_t stride) { write_digits(x, n, f, d, codes, stride); }
#ifdef COMPRESSOR_X86
TARGET_AVX2 uint32_t largest_avx2(const float* x, int64_t count) { return largest(x, count); }
TARGET_AVX2 void digits_avx2(const float* x, int64_t n, float f, int64_t d, int8_t* codes, int64_t stride) { write_digits(x, n, f, d, codes, stride); }
TARGET_AVX512 uint32_t largest_avx512(const float* x, int64_t count) {
  __m512i top = _mm512_setzero_si512();
  for (int64_t k = 0; k < count; k += 16) {
    const __mmask16 here = count - k >= 16 ? 0xffff : __mmask16((1u << (count - k)) - 1);
    top = _mm512_max_epi32(top, _mm512_and_si512(_mm512_maskz_loadu_epi32(here, x + k), _mm512_set1_epi32(0x7fffffff)));
  }
  return uint32_t(_mm512_reduce_max_epi32(top));
}
TARGET_AVX512 void digits_avx512(const float* x, int64_t count, float factor, int64_t digits, int8_t* codes, int64_t stride) {
  for (int64_t k = 0; k < count; k += 16) {
    const __mmask16 here = count - k >= 16 ? 0xffff : __mmask16((1u << (count - k)) - 1);
    __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(here, x + k), _mm512_set1_ps(factor)));
    for (int64_t d = 0; d < digits; d++) {
      _mm512_mask_cvtepi32_storeu_epi8(codes + d * stride + k, here, v);
      v = _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(128)), 8);
    }
  }
}
#endif
uint32_t largest_at(int64_t level, const float* x, int64_t count) {
#ifdef COMPRESSOR_X86
  if (level >= AVX512VNNI) return largest_avx512(x, count);
  if (level >= AVX2) return largest_avx2(x, count);
#endif
  return largest_scalar(x, count);
}
void digits_at(int64_t level, const float* x, int64_t count, float factor, int64_t digits, int8_t* codes, int64_t stride) {
#ifdef COMPRESSOR_X86
  if (level >= AVX512VNNI) return digits_avx512(x, count, factor, digits, codes, stride);
  if (level >= AVX2) return digits_avx2(x, count, factor, digits, codes, stride);
#endif
  digits_scalar(x, count, factor, digits, codes, stride);
}
float power_of_two(int exponent) { return from_bits(uint32_t(exponent + 127) << 23); }

struct Apart { int64_t k; float value; };  // an input of a row that is NaN or Inf

// A row (K,) of finite inputs to codes (digits, padded), minus_sum (digits, groups) and step (groups,).
void take_digits(int64_t level, const float* x, const Packed& w, int64_t digits, int8_t* codes, int32_t* minus_sum, float* step) {
  const int64_t padded = w.padded();
  for (int64_t d = 0; d < digits; d++) memset(codes + d * padded + w.in_features, 0, size_t(padded - w.in_features));
  for (int64_t j = 0; j < w.groups; j++) {
    const int64_t k = j * w.group, count = std::min(w.group, w.in_features - k);
    const int e = std::max(int(largest_at(level, x + k, count) >> 23) - 127, LOWEST_EXPONENT), shift = int(digits) * 8 - 3 - e;
    digits_at(level, x + k, count, power_of_two(shift), digits, codes + k, padded);
    step[j] = power_of_two(-shift);
  }
  for (int64_t d = 0; d < digits; d++) minus_sums(level, codes + d * padded, minus_sum + d * w.groups, w.groups, w.group);
}

}  // namespace
}  // namespace compressor

using namespace compressor;

extern "C" int64_t linear_weight_only_parts(int64_t level, int64_t threads, const void* x, int64_t x_dtype, const int64_t* given, int64_t count,
                                      int64_t M, int64_t K, int64_t bits, int64_t group) {
  if (!level_is_there(level)) return BAD_LEVEL;
  std::vector<Part> parts;
  if (const int64_t error = open_parts(parts, level, (const PartGiven*)given, count, x_dtype, M, K, bits, group)) return error;
  if (parts.empty()) return OK;
  if (level < AVXVNNI && M >= (x_dtype == FLOAT32 ? FLOAT_ROWS : HALF_ROWS)) {
    float_products(level, threads, x, x_dtype, parts, M,
                   [&](const Part& part, int64_t m, int64_t tile, float* values) { store_outputs(part.to, part.w, values, m, tile); });
    return OK;
  }
  const Packed& first = parts[0].w;
  const int64_t digits = digits_of(x_dtype), padded = first.padded(), rows = rows_at_once(level, padded * digits, bits, M);
  int8_t* codes = (int8_t*)scratch(1, size_t(rows * digits * padded));
  int32_t* minus_sum = (int32_t*)scratch(2, size_t(rows * digits * first.groups) * 4);
  float* step = (float*)scratch(3, size_t(rows * first.groups) * 4);
  std::vector<std::vector<Apart>> apart(static_cast<size_t>(rows));  // of each row
  for (int64_t m0 = 0; m0 < M; m0 += rows) {
    const int64_t here = std::min(rows, M - m0);
    each_row(threads, here, K * digits, [&](int64_t m) {
      float* row = (float*)scratch(0, size_t(K) * 4);
      const float* values = as_floats(level, x, x_dtype, (m0 + m) * K, row, K);
      std::vector<Apart>& others = apart[size_t(m)];
      others.clear();
      if (largest_at(level, values, K) >= INFINITE) {
        if (values != row) memcpy(row, values, size_t(K) * 4);
        for (int64_t k = 0; k < K; k++)
          if (!std::isfinite(row[k])) others.push_back({k, row[k]}), row[k] = 0;
        values = row;
      }
      take_digits(level, values, first, digits, codes + m * digits * padded, minus_sum + m * digits * first.groups, step + m * first.groups);
    });
    int8_products(level, threads, Int8Rows{codes, minus_sum, step, digits, m0}, parts, here, [&](const Part& part, int64_t m, int64_t tile, float* values) {
      const Packed& w = part.w;
      for (const Apart& a : apart[size_t(m)]) {
        const uint8_t* b = w.block(tile, a.k / w.group);
        const int64_t k = a.k % w.group;
        for (int n = 0; n < TILE; n++)
          values[n] += a.value * (float(get_code(b + k / 8 * w.row_bytes, w.bits, n, int(k % 8))) - float(b[w.zero_offset + n])) *
                       load_number(b + w.scale_offset, w.scale_dtype, n);
      }
      store_outputs(part.to, w, values, m0 + m, tile);
    });
  }
  return OK;
}

extern "C" int64_t linear_weight_only(int64_t level, int64_t threads, const void* x, int64_t x_dtype, const uint8_t* packed, int64_t packed_size,
                          const void* bias, int64_t bias_dtype, void* y, int64_t M, int64_t N, int64_t K, int64_t bits, int64_t group) {
  const PartGiven given{int64_t(packed), packed_size, int64_t(bias), bias_dtype, N, int64_t(y)};
  return linear_weight_only_parts(level, threads, x, x_dtype, (const int64_t*)&given, 1, M, K, bits, group);
}
