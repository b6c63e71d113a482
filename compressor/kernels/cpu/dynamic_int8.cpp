// y = (rows of x rounded to int8) @ (4- or 8-bit weight).T. Sums of integers are exact; each output adds its groups in the
// order of K, one fma a group, so every level, number of threads and batch gives the same bits.
// |y - exact| <= (K/group + 3) 2^-24 sum |x_rounded| |w|, before the bias and the rounding to y's type.
#include <algorithm>

#include "int8_product.h"
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
ALWAYS_INLINE void group_sums(const int8_t* codes, int32_t* minus_sum, int64_t groups, int64_t group) {
  for (int64_t j = 0; j < groups; j++) {
    int32_t sum = 0;
    for (int64_t k = 0; k < group; k++) sum += codes[j * group + k];
    minus_sum[j] = -sum;
  }
}
float round_row_scalar(const float* x, int8_t* codes, int64_t K) { return round_row(x, codes, K); }
void group_sums_scalar(const int8_t* codes, int32_t* s, int64_t groups, int64_t group) { group_sums(codes, s, groups, group); }
#ifdef COMPRESSOR_X86
TARGET_AVX2 float round_row_avx2(const float* x, int8_t* codes, int64_t K) { return round_row(x, codes, K); }
TARGET_AVX2 void group_sums_avx2(const int8_t* codes, int32_t* s, int64_t groups, int64_t group) { group_sums(codes, s, groups, group); }
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
TARGET_AVX512 void group_sums_avx512(const int8_t* codes, int32_t* minus_sum, int64_t groups, int64_t group) {
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t j = 0; j < groups; j++, codes += group) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t k = 0; k < group; k += 64) {
      const __mmask64 here = group - k >= 64 ? ~uint64_t(0) : (uint64_t(1) << (group - k)) - 1;
      sum = _mm512_dpbusd_epi32(sum, ones, _mm512_maskz_loadu_epi8(here, codes + k));
    }
    minus_sum[j] = -_mm512_reduce_add_epi32(sum);
  }
}
#endif

// ---- tiles: MT rows of x times 64 outputs ----
void tile_scalar(const Int8Rows& x, int64_t m, int64_t tile, float* out) {
  const Packed& w = *x.w;
  for (int n = 0; n < TILE; n++) {
    float total = 0;
    for (int64_t j = 0; j < w.groups; j++) {
      const uint8_t* b = w.block(tile, j);
      const int8_t* p = x.codes + m * w.padded() + j * w.group;
      int32_t sum = int32_t(b[w.zero_offset + n]) * x.minus_sum[m * w.groups + j];
      for (int64_t k = 0; k < w.group; k += 8, p += 8) {
        const uint8_t* row = b + k / 8 * w.row_bytes + n * 4;
        for (int i = 0; i < 4; i++)
          sum += w.bits == 4 ? (row[i] & 15) * p[i] + (row[i] >> 4) * p[i + 4] : row[i] * p[i] + row[256 + i] * p[i + 4];
      }
      total = std::fma(float(sum), load_number(b + w.scale_offset, w.scale_dtype, n), total);
    }
    out[n] = total * x.scale[m];
  }
}

#ifdef COMPRESSOR_X86
// 8 outputs at a time. Pairs of 4-bit products stay below 2 * 15 * 127 and may be added in 16 bits; those of 8 bits may not.
template <int BITS> TARGET_AVX2 void tile_avx2(const Int8Rows& x, int64_t m, int64_t tile, float* out) {
  const Packed& w = *x.w;
  const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1), none = _mm256_setzero_si256();
  __m256 total[8];
  for (auto& v : total) v = _mm256_setzero_ps();
  for (int64_t j = 0; j < w.groups; j++) {
    const uint8_t* b = w.block(tile, j);
    const int8_t* p = x.codes + m * w.padded() + j * w.group;
    __m256i sum[8];
    for (int c = 0; c < 8; c++)
      sum[c] = _mm256_mullo_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(b + w.zero_offset + c * 8))),
                                  _mm256_set1_epi32(x.minus_sum[m * w.groups + j]));
    for (int64_t k = 0; k < w.group; k += 8, p += 8) {
      const uint8_t* row = b + k / 8 * (TILE * BITS);
      _mm_prefetch((const char*)row + 4096, _MM_HINT_T0);
      int32_t words[2];
      memcpy(words, p, 8);
      for (int c = 0; c < 8; c++) {
        if (BITS == 4) {
          const __m256i both = _mm256_loadu_si256((const __m256i*)(row + c * 32));
          const __m256i first = _mm256_maddubs_epi16(_mm256_and_si256(both, low), _mm256_set1_epi32(words[0]));
          const __m256i second = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(both, 4), low), _mm256_set1_epi32(words[1]));
          sum[c] = _mm256_add_epi32(sum[c], _mm256_madd_epi16(_mm256_add_epi16(first, second), ones));
        } else {
          for (int half = 0; half < 2; half++) {
            const __m256i codes = _mm256_loadu_si256((const __m256i*)(row + half * 256 + c * 32));
            const __m256i wide = _mm256_broadcastq_epi64(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(words[half])));
            const __m256i a = _mm256_madd_epi16(_mm256_unpacklo_epi8(codes, none), wide);  // outputs 0 1 | 4 5, in pairs
            const __m256i d = _mm256_madd_epi16(_mm256_unpackhi_epi8(codes, none), wide);  // outputs 2 3 | 6 7
            sum[c] = _mm256_add_epi32(sum[c], _mm256_hadd_epi32(a, d));
          }
        }
      }
    }
    for (int c = 0; c < 8; c++)
      total[c] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[c]), scales_avx2(b + w.scale_offset, w.scale_dtype, c), total[c]);
  }
  for (int c = 0; c < 8; c++) _mm256_storeu_ps(out + c * 8, _mm256_mul_ps(total[c], _mm256_set1_ps(x.scale[m])));
}

// 16 outputs a register, MT * 4 integer sums in registers; low nibbles, then high ones. The product is written out, since
// gcc 12 copies and spills sums around its intrinsic: 5 % of all at MT = 4. 6 rows at once were slower.
template <int BITS, int MT> TARGET_AVX512 void tile_avx512(const Int8Rows& x, int64_t m0, int64_t tile, float* out) {
  const Packed& w = *x.w;
  const int64_t stride = w.padded();
  const bool first = m0 == 0;  // the tile comes from memory then, and from the cache for later rows
  const __m512i low = _mm512_set1_epi8(15);
  __m512 total[MT][4];
  for (auto& r : total) for (auto& v : r) v = _mm512_setzero_ps();
  const uint8_t* b = w.block(tile, 0);
  for (int64_t j = 0; j < w.groups; j++) {
    __m512i sum[MT][4];
    for (int c = 0; c < 4; c++) {
      const __m512i zero = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(b + w.zero_offset) + c));
      for (int m = 0; m < MT; m++) {  // |minus_sum| <= 127 * 256 < 2^15: one multiply of 16 bits is exact
        const __m512i s = _mm512_set1_epi32(x.minus_sum[(m0 + m) * w.groups + j]);
        sum[m][c] = w.group <= 256 ? _mm512_madd_epi16(zero, s) : _mm512_mullo_epi32(zero, s);
      }
    }
    const int8_t* p = x.codes + m0 * stride + j * w.group;
    const uint8_t* end = b + w.scale_offset;
    for (; b < end; b += TILE * BITS, p += 8) {
      if (first) for (int c = 0; c < BITS; c++) _mm_prefetch((const char*)b + 6144 + c * 64, _MM_HINT_T0);
      for (int half = 0; half < 2; half++) {
        __m512i v[4];
        for (int c = 0; c < 4; c++) {
          const __m512i u = _mm512_loadu_si512(b + c * 64 + (BITS == 8 ? half * 256 : 0));
          v[c] = BITS == 8 ? u : _mm512_and_si512(half ? _mm512_srli_epi16(u, 4) : u, low);
        }
        for (int m = 0; m < MT; m++) {
          int32_t word;
          memcpy(&word, p + m * stride + half * 4, 4);
          const __m512i xm = _mm512_set1_epi32(word);
          for (int c = 0; c < 4; c++) asm("vpdpbusd %2, %1, %0" : "+v"(sum[m][c]) : "v"(v[c]), "v"(xm));
        }
      }
    }
    for (int c = 0; c < 4; c++) {
      const __m512 s = scales_avx512(b, w.scale_dtype, c);
      for (int m = 0; m < MT; m++) total[m][c] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[m][c]), s, total[m][c]);
    }
    b += w.block_bytes - w.scale_offset;
  }
  for (int m = 0; m < MT; m++)
    for (int c = 0; c < 4; c++) _mm512_storeu_ps(out + m * TILE + c * 16, _mm512_mul_ps(total[m][c], _mm512_set1_ps(x.scale[m0 + m])));
}
template <int BITS> TARGET_AVX512 int64_t rows_avx512(const Int8Rows& x, int64_t m, int64_t left, int64_t tile, float* out) {
  if (left >= 4) return tile_avx512<BITS, 4>(x, m, tile, out), 4;
  if (left == 3) return tile_avx512<BITS, 3>(x, m, tile, out), 3;
  if (left == 2) return tile_avx512<BITS, 2>(x, m, tile, out), 2;
  return tile_avx512<BITS, 1>(x, m, tile, out), 1;
}
#endif

}  // namespace

void int8_products(int64_t level, int64_t threads, const Int8Rows& x, int64_t M,
                   const std::function<void(int64_t m, int64_t tile, float* values)>& finish) {
  const Packed& w = *x.w;
  parallel(threads, w.tiles, [&](int64_t tile) {
    float out[4 * TILE];
    for (int64_t m = 0; m < M;) {
      int64_t done = 1;
#ifdef COMPRESSOR_X86
      if (level == AVX512VNNI) done = w.bits == 4 ? rows_avx512<4>(x, m, M - m, tile, out) : rows_avx512<8>(x, m, M - m, tile, out);
      else if (level == AVX2) w.bits == 4 ? tile_avx2<4>(x, m, tile, out) : tile_avx2<8>(x, m, tile, out);
      else
#endif
        tile_scalar(x, m, tile, out);
      for (int64_t i = 0; i < done; i++) finish(m + i, tile, out + i * TILE);
      m += done;
    }
  });
}

static float round_row_at(int64_t level, const float* x, int8_t* codes, int64_t K) {
#ifdef COMPRESSOR_X86
  if (level == AVX512VNNI) return round_row_avx512(x, codes, K);
  if (level == AVX2) return round_row_avx2(x, codes, K);
#endif
  return round_row_scalar(x, codes, K);
}
static void group_sums_at(int64_t level, const int8_t* codes, int32_t* s, int64_t groups, int64_t group) {
#ifdef COMPRESSOR_X86
  if (level == AVX512VNNI) return group_sums_avx512(codes, s, groups, group);
  if (level == AVX2) return group_sums_avx2(codes, s, groups, group);
#endif
  group_sums_scalar(codes, s, groups, group);
}
float take_row(int64_t level, const float* x, const Packed& w, int8_t* codes, int32_t* minus_sum) {
  const float absmax = round_row_at(level, x, codes, w.in_features);
  memset(codes + w.in_features, 0, size_t(w.padded() - w.in_features));
  group_sums_at(level, codes, minus_sum, w.groups, w.group);
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

extern "C" int64_t linear_dynamic_int8(int64_t level, int64_t threads, const void* x, int64_t x_dtype, const uint8_t* packed, int64_t packed_size,
                                       const void* bias, int64_t bias_dtype, void* y, int64_t M, int64_t N, int64_t K,
                                           int64_t bits, int64_t group) {
  if (!level_is_there(level)) return BAD_LEVEL;
  Packed w;
  if (const int64_t error = open_packed(w, packed, packed_size, N, K, bits, group)) return error;
  if (w.bits != 4 && w.bits != 8) return BAD_LAYOUT;
  if (M < 0 || w.group > MOST_IN_A_GROUP) return BAD_SHAPE;
  const int64_t rows = std::min(M, ROWS_AT_ONCE), padded = w.padded();
  float* row = (float*)scratch(0, size_t(K) * 4);
  int8_t* codes = (int8_t*)scratch(1, size_t(rows * padded));
  int32_t* minus_sum = (int32_t*)scratch(2, size_t(rows * w.groups) * 4);
  float* scale = (float*)scratch(3, size_t(rows) * 4);
  for (int64_t m0 = 0; m0 < M; m0 += rows) {
    const int64_t here = std::min(rows, M - m0);
    for (int64_t m = 0; m < here; m++) {
      const float* values = as_floats(level, x, x_dtype, (m0 + m) * K, row, K);
      scale[m] = take_row(level, values, w, codes + m * padded, minus_sum + m * w.groups);
    }
    const Output to{y, x_dtype, level, bias, bias_dtype};
    int8_products(level, threads, Int8Rows{codes, minus_sum, scale, &w}, here,
                  [&](int64_t m, int64_t tile, float* values) { store_outputs(to, w, values, m0 + m, tile); });
  }
  return OK;
}
