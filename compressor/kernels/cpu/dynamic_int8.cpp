// y = (rows of x rounded to int8) @ (2-, 3-, 4- or 8-bit weight).T. Sums of integers are exact; each output adds its groups in the
// order of K, one fma a group, so every level, number of threads and batch gives the same bits.
// |y - exact| <= (K/group + 3) 2^-24 sum |x_rounded| |w|, before the bias and the rounding to y's type.
#include <algorithm>

#include "int8_row.h"
#include "ops.h"

namespace compressor {
namespace {

// ---- rounding a row ----
constexpr float SMALLEST_ABSMAX = 7.52316385e-37f;  // 2^-120

ALWAYS_INLINE float round_row(const float* x, int8_t* codes, int64_t K) {
  int32_t top = 0;  // magnitudes of floats order as their bits do, NaN above Inf
  for (int64_t k = 0; k < K; k++) {
    int32_t bits;
    memcpy(&bits, x + k, 4);
    bits &= 0x7fffffff;
    top = bits > top ? bits : top;
  }
  float absmax = from_bits(uint32_t(top));
  const bool finite = top < 0x7f800000;
  if (!finite || absmax < SMALLEST_ABSMAX) {
    memset(codes, 0, size_t(K));
    return finite ? 0.f : NAN;
  }
  const float inverse = 1 / absmax * 127;
  for (int64_t k = 0; k < K; k++) {  // adding 1.5 * 2^23 rounds to a whole number that lies in the low bits
    const float f = x[k] * inverse + 12582912.f;
    int32_t bits;
    memcpy(&bits, &f, 4);
    codes[k] = int8_t(bits);
  }
  return absmax;
}
float round_row_scalar(const float* x, int8_t* codes, int64_t K) { return round_row(x, codes, K); }
#ifdef COMPRESSOR_X86
TARGET_AVX2 float round_row_avx2(const float* x, int8_t* codes, int64_t K) { return round_row(x, codes, K); }
TARGET_AVX512 float round_row_avx512(const float* x, int8_t* codes, int64_t K) {
  __m512i top = _mm512_setzero_si512();
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  int64_t k = 0;
  for (; k + 16 <= K; k += 16) top = _mm512_max_epi32(top, _mm512_and_si512(_mm512_loadu_si512(x + k), magnitude));
  const __mmask16 tail = __mmask16((1u << (K - k)) - 1);
  top = _mm512_max_epi32(top, _mm512_and_si512(_mm512_maskz_loadu_epi32(tail, x + k), magnitude));
  const int32_t bits = _mm512_reduce_max_epi32(top);
  const float absmax = from_bits(uint32_t(bits));
  const bool finite = bits < 0x7f800000;
  if (!finite || absmax < SMALLEST_ABSMAX) {
    memset(codes, 0, size_t(K));
    return finite ? 0.f : NAN;
  }
  const __m512 inverse = _mm512_set1_ps(1 / absmax * 127);
  for (k = 0; k + 16 <= K; k += 16)  // converting rounds half to even
    _mm_storeu_si128((__m128i*)(codes + k), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + k), inverse))));
  _mm512_mask_cvtepi32_storeu_epi8(codes + k, tail, _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(tail, x + k), inverse)));
  return absmax;
}
#endif

}  // namespace

static float round_row_at(int64_t level, const float* x, int8_t* codes, int64_t K) {
#ifdef COMPRESSOR_X86
  if (level >= AVX512VNNI) return round_row_avx512(x, codes, K);
  if (level >= AVX2) return round_row_avx2(x, codes, K);
#endif
  return round_row_scalar(x, codes, K);
}
float take_row(int64_t level, const float* x, const Packed& w, int8_t* codes, int32_t* minus_sum) {
  const float absmax = round_row_at(level, x, codes, w.in_features);
  memset(codes + w.in_features, 0, size_t(w.padded() - w.in_features));
  minus_sums(level, codes, minus_sum, w.groups, w.group);
  return absmax / 127;
}

}  // namespace compressor

using namespace compressor;

extern "C" int64_t quantize_rows(int64_t level, const void* x, int64_t x_dtype, int8_t* codes, float* absmax, int64_t M, int64_t K) {
  if (!level_is_there(level)) return BAD_LEVEL;
  if (M < 0 || K < 0) return BAD_SHAPE;
  float* row = (float*)scratch(0, size_t(K) * 4);
  for (int64_t m = 0; m < M; m++) {
    absmax[m] = round_row_at(level, as_floats(level, x, x_dtype, m * K, row, K), codes + m * K, K);
  }
  return OK;
}

extern "C" int64_t linear_dynamic_int8_parts(int64_t level, int64_t threads, const void* x, int64_t x_dtype, const int64_t* given, int64_t count,
                                       int64_t M, int64_t K, int64_t bits, int64_t group) {
  if (!level_is_there(level)) return BAD_LEVEL;
  std::vector<Part> parts;
  if (const int64_t error = open_parts(parts, level, (const PartGiven*)given, count, x_dtype, M, K, bits, group)) return error;
  if (parts.empty()) return OK;
  const Packed& w = parts[0].w;
  const int64_t padded = w.padded(), rows = rows_at_once(level, padded, bits, M);
  int8_t* codes = (int8_t*)scratch(1, size_t(rows * padded));
  int32_t* minus_sum = (int32_t*)scratch(2, size_t(rows * w.groups) * 4);
  float* scale = (float*)scratch(3, size_t(rows) * 4);
  for (int64_t m0 = 0; m0 < M; m0 += rows) {
    const int64_t here = std::min(rows, M - m0);
    each_row(threads, here, K, [&](int64_t m) {
      const float* values = as_floats(level, x, x_dtype, (m0 + m) * K, (float*)scratch(0, size_t(K) * 4), K);
      scale[m] = take_row(level, values, w, codes + m * padded, minus_sum + m * w.groups);
    });
    int8_products(level, threads, Int8Rows{codes, minus_sum, scale, 1, m0}, parts, here, [&](const Part& part, int64_t m, int64_t tile, float* values) {
      store_outputs(part.to, part.w, values, m0 + m, tile);
    });
  }
  return OK;
}

extern "C" int64_t linear_dynamic_int8(int64_t level, int64_t threads, const void* x, int64_t x_dtype, const uint8_t* packed, int64_t packed_size,
                          const void* bias, int64_t bias_dtype, void* y, int64_t M, int64_t N, int64_t K, int64_t bits, int64_t group) {
  const PartGiven given{int64_t(packed), packed_size, int64_t(bias), bias_dtype, N, int64_t(y)};
  return linear_dynamic_int8_parts(level, threads, x, x_dtype, (const int64_t*)&given, 1, M, K, bits, group);
}
