// y = x @ (2-, 3-, 4- or 8-bit weight).T with x as it is, in float32. With c = 2^(bits-1), for each output and group:
//   p = sum of x * (code - c), one fma each in the order of K;  p -= (zero - c) * sum of x, one fma;  y += p * scale, one fma
// so every level, number of threads and batch gives the same bits.
// |y - exact| <= (group + K/group + 4) 2^-24 sum |x| (|code - c| + |zero - c|) scale, before the bias and the rounding.
#include <algorithm>

#include "common.h"
#include "ops.h"

namespace compressor {
namespace {

struct Rows {
  const float* x;     // (M, stride), zero beyond K
  const float* sums;  // (M, groups): the sum of a row's group, see group_sum
  int64_t stride;
  const Packed* w;
};

// Eight sums of every eighth input, then their sum in pairs: one order that all levels can follow.
ALWAYS_INLINE float group_sum(const float* x, int64_t group) {
  float s[8] = {};
  for (int64_t k = 0; k < group; k += 8)
    for (int i = 0; i < 8; i++) s[i] += x[k + i];
  return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

void tile_scalar(const Rows& x, int64_t m, int64_t tile, float* out) {
  const Packed& w = *x.w;
  const float middle = float(1 << (w.bits - 1));
  for (int n = 0; n < TILE; n++) {
    float total = 0;
    for (int64_t j = 0; j < w.groups; j++) {
      const uint8_t* b = w.block(tile, j);
      const float* p = x.x + m * x.stride + j * w.group;
      float part = 0;
      for (int64_t k = 0; k < w.group; k++)
        part = std::fma(p[k], float(get_code(b + k / 8 * w.row_bytes, w.bits, n, int(k % 8))) - middle, part);
      part = std::fma(middle - float(b[w.zero_offset + n]), x.sums[m * w.groups + j], part);
      total = std::fma(part, load_number(b + w.scale_offset, w.scale_dtype, n), total);
    }
    out[n] = total;
  }
}

#ifdef COMPRESSOR_X86
// ---- 8 outputs a register ----
// Codes of outputs c*8 .. c*8+7 in a row of 8 columns, kept so that `code_of<BITS>(v, i)` gives column i as whole numbers.
struct Eight { __m256i low, high; };
template <int BITS> TARGET_AVX2 ALWAYS_INLINE Eight load_eight(const uint8_t* row, int c) {
  if (BITS == 4) return {_mm256_loadu_si256((const __m256i*)row + c), _mm256_setzero_si256()};
  if (BITS == 8) return {_mm256_loadu_si256((const __m256i*)row + c), _mm256_loadu_si256((const __m256i*)(row + 256) + c)};
  return {_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)row + c)),
          BITS == 3 ? _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(row + 128 + c * 8))) : _mm256_setzero_si256()};
}
template <int BITS> TARGET_AVX2 ALWAYS_INLINE __m256i code_of(const Eight& v, int i) {
  if (BITS == 4) return _mm256_and_si256(_mm256_srli_epi32(v.low, i % 4 * 8 + i / 4 * 4), _mm256_set1_epi32(15));
  if (BITS == 8) return _mm256_and_si256(_mm256_srli_epi32(i < 4 ? v.low : v.high, i % 4 * 8), _mm256_set1_epi32(255));
  const __m256i low = _mm256_and_si256(_mm256_srli_epi32(v.low, 2 * i), _mm256_set1_epi32(3));
  if (BITS == 2) return low;
  return _mm256_or_si256(low, _mm256_slli_epi32(_mm256_and_si256(_mm256_srli_epi32(v.high, i), _mm256_set1_epi32(1)), 2));
}
template <int BITS> TARGET_AVX2 void tile_avx2(const Rows& x, int64_t m, int64_t tile, float* out) {
  const Packed& w = *x.w;
  const __m256 middle = _mm256_set1_ps(float(1 << (BITS - 1)));
  __m256 total[8];
  for (auto& v : total) v = _mm256_setzero_ps();
  for (int64_t j = 0; j < w.groups; j++) {
    const uint8_t* b = w.block(tile, j);
    const float* p = x.x + m * x.stride + j * w.group;
    __m256 part[8];
    for (auto& v : part) v = _mm256_setzero_ps();
    for (int64_t k = 0; k < w.group; k += 8, p += 8) {
      const uint8_t* row = b + k / 8 * (TILE * BITS);
      _mm_prefetch((const char*)row + 4096, _MM_HINT_T0);
      for (int c = 0; c < 8; c++) {
        const Eight codes = load_eight<BITS>(row, c);
        for (int i = 0; i < 8; i++)
          part[c] = _mm256_fmadd_ps(_mm256_set1_ps(p[i]), _mm256_sub_ps(_mm256_cvtepi32_ps(code_of<BITS>(codes, i)), middle), part[c]);
      }
    }
    const __m256 sum = _mm256_set1_ps(x.sums[m * w.groups + j]);
    for (int c = 0; c < 8; c++) {
      const __m256 zero = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(b + w.zero_offset + c * 8))));
      part[c] = _mm256_fmadd_ps(_mm256_sub_ps(middle, zero), sum, part[c]);
      total[c] = _mm256_fmadd_ps(part[c], scales_avx2(b + w.scale_offset, w.scale_dtype, c), total[c]);
    }
  }
  for (int c = 0; c < 8; c++) _mm256_storeu_ps(out + c * 8, total[c]);
}
TARGET_AVX2 void group_sums_avx2(const float* x, float* sums, int64_t groups, int64_t group) {
  for (int64_t j = 0; j < groups; j++) sums[j] = group_sum(x + j * group, group);
}

// ---- 16 outputs a register ----
struct Sixteen { __m512i low, high; };
template <int BITS> TARGET_AVX512 ALWAYS_INLINE Sixteen load_sixteen(const uint8_t* row, int c) {
  if (BITS == 4) return {_mm512_loadu_si512((const __m512i*)row + c), _mm512_setzero_si512()};
  if (BITS == 8) return {_mm512_loadu_si512((const __m512i*)row + c), _mm512_loadu_si512((const __m512i*)(row + 256) + c)};
  return {_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)row + c)),
          BITS == 3 ? _mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(row + 128) + c)), 2) : _mm512_setzero_si512()};
}
// code - c of column i. A permute reads the low 4 bits of each lane alone, so a table of code - c that repeats every
// 2^bits entries needs no mask.
template <int BITS> TARGET_AVX512 ALWAYS_INLINE __m512 centred(const Sixteen& v, int i, __m512 table) {
  if (BITS == 8) {  // 2^23 + code, exact
    const __m512i magic = _mm512_set1_epi32(0x4b000000), shifted = _mm512_srli_epi32(i < 4 ? v.low : v.high, i % 4 * 8);
    return _mm512_sub_ps(_mm512_castsi512_ps(_mm512_ternarylogic_epi32(shifted, _mm512_set1_epi32(255), magic, 0xea)), _mm512_set1_ps(8388736.f));
  }
  if (BITS == 4) return _mm512_permutexvar_ps(_mm512_srli_epi32(v.low, i % 4 * 8 + i / 4 * 4), table);
  const __m512i low = _mm512_srli_epi32(v.low, 2 * i);
  if (BITS == 2) return _mm512_permutexvar_ps(low, table);
  return _mm512_permutexvar_ps(_mm512_ternarylogic_epi32(_mm512_set1_epi32(3), low, _mm512_srli_epi32(v.high, i), 0xca), table);
}
template <int BITS> TARGET_AVX512 ALWAYS_INLINE __m512 table_of() {
  alignas(64) float entries[16];
  for (int i = 0; i < 16; i++) entries[i] = float((i & ((1 << BITS) - 1)) - (1 << (BITS - 1)));
  return _mm512_load_ps(entries);
}
template <int BITS> TARGET_AVX512 ALWAYS_INLINE __m512 shift_of(const Packed& w, const uint8_t* b, int c) {  // c - zero
  const __m512 zero = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(b + w.zero_offset) + c)));
  return _mm512_sub_ps(_mm512_set1_ps(float(1 << (BITS - 1))), zero);
}
// Few rows: codes become floats in registers, once for MT rows.
template <int BITS, int MT> TARGET_AVX512 void tile_avx512(const Rows& x, int64_t m0, int64_t tile, float* out) {
  const Packed& w = *x.w;
  const __m512 table = table_of<BITS == 8 ? 4 : BITS>();
  __m512 total[MT][4];
  for (auto& r : total) for (auto& v : r) v = _mm512_setzero_ps();
  const uint8_t* b = w.block(tile, 0);
  for (int64_t j = 0; j < w.groups; j++) {
    __m512 part[MT][4];
    for (auto& r : part) for (auto& v : r) v = _mm512_setzero_ps();
    const float* p = x.x + m0 * x.stride + j * w.group;
    const uint8_t* block = b;
    for (const uint8_t* end = b + w.scale_offset; b < end; b += TILE * BITS, p += 8) {
      if (m0 == 0) for (int c = 0; c < BITS; c++) _mm_prefetch((const char*)b + 6144 + c * 64, _MM_HINT_T0);
      Sixteen codes[4];  // all four before any product: the sums wait on each other least when they take turns
      for (int c = 0; c < 4; c++) codes[c] = load_sixteen<BITS>(b, c);
      for (int i = 0; i < 8; i++)
        for (int c = 0; c < 4; c++) {
          const __m512 v = centred<BITS>(codes[c], i, table);
          for (int m = 0; m < MT; m++) part[m][c] = _mm512_fmadd_ps(_mm512_set1_ps(p[m * x.stride + i]), v, part[m][c]);
        }
    }
    for (int c = 0; c < 4; c++) {
      const __m512 scale = scales_avx512(b, w.scale_dtype, c), shift = shift_of<BITS>(w, block, c);
      for (int m = 0; m < MT; m++) {
        part[m][c] = _mm512_fmadd_ps(shift, _mm512_set1_ps(x.sums[(m0 + m) * w.groups + j]), part[m][c]);
        total[m][c] = _mm512_fmadd_ps(part[m][c], scale, total[m][c]);
      }
    }
    b = block + w.block_bytes;
  }
  for (int m = 0; m < MT; m++)
    for (int c = 0; c < 4; c++) _mm512_storeu_ps(out + m * TILE + c * 16, total[m][c]);
}
// Many rows: a block of at most CHUNK columns becomes floats in the first-level cache, and all rows run over it.
constexpr int64_t CHUNK = 64;
template <int BITS> TARGET_AVX512 void expand(const Packed& w, const uint8_t* rows, int64_t columns, float* out) {
  const __m512 table = table_of<BITS == 8 ? 4 : BITS>();
  for (int64_t k = 0; k < columns; k += 8, rows += w.row_bytes)
    for (int c = 0; c < 4; c++) {
      const Sixteen codes = load_sixteen<BITS>(rows, c);
      for (int i = 0; i < 8; i++) _mm512_store_ps(out + (k + i) * TILE + c * 16, centred<BITS>(codes, i, table));
    }
}
template <int MT> TARGET_AVX512 void add_products(const float* x, int64_t stride, const float* weights, int64_t columns, float* part) {
  __m512 sum[MT][4];
  for (int m = 0; m < MT; m++)
    for (int c = 0; c < 4; c++) sum[m][c] = _mm512_loadu_ps(part + m * TILE + c * 16);
  for (int64_t k = 0; k < columns; k++, weights += TILE) {
    __m512 v[4];
    for (int c = 0; c < 4; c++) v[c] = _mm512_load_ps(weights + c * 16);
    for (int m = 0; m < MT; m++) {
      const __m512 xm = _mm512_set1_ps(x[m * stride + k]);
      for (int c = 0; c < 4; c++) sum[m][c] = _mm512_fmadd_ps(xm, v[c], sum[m][c]);
    }
  }
  for (int m = 0; m < MT; m++)
    for (int c = 0; c < 4; c++) _mm512_storeu_ps(part + m * TILE + c * 16, sum[m][c]);
}
template <int BITS> TARGET_AVX512 void tile_many(const Rows& x, int64_t M, int64_t tile, float* total, float* part) {
  const Packed& w = *x.w;
  alignas(64) float weights[CHUNK * TILE];
  memset(total, 0, size_t(M) * TILE * 4);
  for (int64_t j = 0; j < w.groups; j++) {
    const uint8_t* b = w.block(tile, j);
    memset(part, 0, size_t(M) * TILE * 4);
    for (int64_t k = 0; k < w.group; k += CHUNK) {
      const int64_t columns = std::min(CHUNK, w.group - k);
      expand<BITS>(w, b + k / 8 * w.row_bytes, columns, weights);
      const float* p = x.x + j * w.group + k;
      int64_t m = 0;
      for (; m + 6 <= M; m += 6) add_products<6>(p + m * x.stride, x.stride, weights, columns, part + m * TILE);
      for (; m + 2 <= M; m += 2) add_products<2>(p + m * x.stride, x.stride, weights, columns, part + m * TILE);
      for (; m < M; m++) add_products<1>(p + m * x.stride, x.stride, weights, columns, part + m * TILE);
    }
    for (int c = 0; c < 4; c++) {
      const __m512 scale = scales_avx512(b + w.scale_offset, w.scale_dtype, c), shift = shift_of<BITS>(w, b, c);
      for (int64_t m = 0; m < M; m++) {
        float* at = total + m * TILE + c * 16;
        const __m512 p = _mm512_fmadd_ps(shift, _mm512_set1_ps(x.sums[m * w.groups + j]), _mm512_loadu_ps(part + m * TILE + c * 16));
        _mm512_storeu_ps(at, _mm512_fmadd_ps(p, scale, _mm512_loadu_ps(at)));
      }
    }
  }
}
template <int BITS> void rows_avx512(const Rows& x, int64_t M, int64_t tile, float* total, float* part) {
  if (M >= 8) return tile_many<BITS>(x, M, tile, total, part);
  int64_t m = 0;
  for (; M - m >= 4; m += 4) tile_avx512<BITS, 4>(x, m, tile, total + m * TILE);
  if (M - m == 3) tile_avx512<BITS, 3>(x, m, tile, total + m * TILE);
  if (M - m == 2) tile_avx512<BITS, 2>(x, m, tile, total + m * TILE);
  if (M - m == 1) tile_avx512<BITS, 1>(x, m, tile, total + m * TILE);
}
#endif

void rows_at(int64_t level, const Rows& x, int64_t M, int64_t tile, float* total, float* part) {
  const int64_t bits = x.w->bits;
#ifdef COMPRESSOR_X86
  if (level == AVX512VNNI) return (bits == 2 ? rows_avx512<2> : bits == 3 ? rows_avx512<3> : bits == 4 ? rows_avx512<4> : rows_avx512<8>)(x, M, tile, total, part);
  if (level == AVX2) {
    const auto one = bits == 2 ? tile_avx2<2> : bits == 3 ? tile_avx2<3> : bits == 4 ? tile_avx2<4> : tile_avx2<8>;
    for (int64_t m = 0; m < M; m++) one(x, m, tile, total + m * TILE);
    return;
  }
#endif
  (void)bits, (void)level, (void)part;
  for (int64_t m = 0; m < M; m++) tile_scalar(x, m, tile, total + m * TILE);
}

}  // namespace
}  // namespace compressor

using namespace compressor;

extern "C" int64_t linear_weight_only(int64_t level, int64_t threads, const void* x, int64_t x_dtype, const uint8_t* packed, int64_t packed_size,
                                      const void* bias, int64_t bias_dtype, void* y, int64_t M, int64_t N, int64_t K,
                                           int64_t bits, int64_t group) {
  if (!level_is_there(level)) return BAD_LEVEL;
  Packed w;
  if (const int64_t error = open_packed(w, packed, packed_size, N, K, bits, group)) return error;
  if (M < 0) return BAD_SHAPE;
  const int64_t rows = std::min(M, ROWS_AT_ONCE);
  const bool as_it_is = x_dtype == FLOAT32 && w.padded() == K;
  float* copy = as_it_is ? nullptr : (float*)scratch(0, size_t(rows * w.padded()) * 4);
  float* sums = (float*)scratch(1, size_t(rows * w.groups) * 4);
  const Output to{y, x_dtype, level, bias, bias_dtype};
  for (int64_t m0 = 0; m0 < M; m0 += rows) {
    const int64_t here = std::min(rows, M - m0);
    for (int64_t m = 0; m < here && copy; m++) {
      to_float(level, x, x_dtype, (m0 + m) * K, copy + m * w.padded(), K);
      memset(copy + m * w.padded() + K, 0, size_t(w.padded() - K) * 4);
    }
    const Rows in{copy ? copy : (const float*)x + m0 * K, sums, w.padded(), &w};
    for (int64_t m = 0; m < here; m++) {
#ifdef COMPRESSOR_X86
      if (level > SCALAR) { group_sums_avx2(in.x + m * in.stride, sums + m * w.groups, w.groups, w.group); continue; }
#endif
      for (int64_t j = 0; j < w.groups; j++) sums[m * w.groups + j] = group_sum(in.x + m * in.stride + j * w.group, w.group);
    }
    parallel(threads, w.tiles, [&](int64_t tile) {
      float* total = (float*)scratch(4, size_t(here) * TILE * 8);
      rows_at(level, in, here, tile, total, total + here * TILE);
      for (int64_t m = 0; m < here; m++) store_outputs(to, w, total + m * TILE, m0 + m, tile);
    });
  }
  return OK;
}
