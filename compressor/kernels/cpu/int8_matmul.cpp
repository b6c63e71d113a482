// c = a @ b.T of int8 in exact int32. Sums of integers don't depend on their order, so all levels and threads agree.
#include <algorithm>

#include "common.h"
#include "ops.h"

using namespace compressor;

namespace {

constexpr int64_t MOST_COLUMNS = 65536;  // (a + 128) * b <= 255 * 128, and 255 * 128 * 65536 < 2^31

// What a level's kernel reads of rows of a: padded to whole registers, `stride` bytes apart.
struct Rows {
  const char* at;
  int64_t stride;
};

void tile_scalar(const int8_t* a, const int8_t* b, int32_t* c, int64_t rows, int64_t outputs, int64_t N, int64_t K) {
  for (int64_t m = 0; m < rows; m++)
    for (int64_t n = 0; n < outputs; n++) {
      int32_t sum = 0;
      for (int64_t k = 0; k < K; k++) sum += int32_t(a[m * K + k]) * b[n * K + k];
      c[m * N + n] = sum;
    }
}

#ifdef COMPRESSOR_X86
TARGET_AVX2 ALWAYS_INLINE int32_t sum_of_lanes(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
// ROWS rows of a, as int16, times two of b. The products of a pair are at most 2 * 2^14: pmaddwd holds them.
template <int ROWS>
TARGET_AVX2 void block_avx2(const Rows& a, int64_t m, const int8_t* const* b, int64_t K, int32_t (*sums)[2]) {
  __m256i sum[ROWS][2];
  for (auto& row : sum) row[0] = row[1] = _mm256_setzero_si256();
  for (int64_t k = 0; k < K; k += 16) {
    __m256i v[2];
    for (int n = 0; n < 2; n++) {
      int8_t tail[16] = {};
      const int8_t* from = b[n] + k;
      if (K - k < 16) memcpy(tail, from, size_t(K - k)), from = tail;
      v[n] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)from));
    }
    for (int i = 0; i < ROWS; i++) {
      const __m256i row = _mm256_loadu_si256((const __m256i*)(a.at + (m + i) * a.stride + k * 2));
      for (int n = 0; n < 2; n++) sum[i][n] = _mm256_add_epi32(sum[i][n], _mm256_madd_epi16(row, v[n]));
    }
  }
  for (int i = 0; i < ROWS; i++)
    for (int n = 0; n < 2; n++) sums[i][n] = sum_of_lanes(sum[i][n]);
}
TARGET_AVX2 void tile_avx2(const Rows& a, const int8_t* b, int32_t* c, int64_t rows, int64_t outputs, int64_t N, int64_t K) {
  for (int64_t m = 0; m < rows;) {
    const int64_t here = rows - m >= 4 ? 4 : 1;
    for (int64_t n = 0; n < outputs; n += 2) {
      const int64_t count = std::min<int64_t>(2, outputs - n);
      const int8_t* two[] = {b + n * K, b + (n + count - 1) * K};
      int32_t sums[4][2];
      (here == 4 ? block_avx2<4> : block_avx2<1>)(a, m, two, K, sums);
      for (int64_t i = 0; i < here; i++)
        for (int64_t j = 0; j < count; j++) c[(m + i) * N + n + j] = sums[i][j];
    }
    m += here;
  }
}
// ROWS rows of a + 128, unsigned as vpdpbusd needs one operand, times four of b; 128 * sum(b) is subtracted at the end.
template <int ROWS>
TARGET_AVX512 void block_avx512(const Rows& a, int64_t m, const int8_t* const* b, int64_t K, int32_t (*sums)[4]) {
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i sum[ROWS][4], of_b[4];
  for (auto& v : of_b) v = _mm512_setzero_si512();
  for (auto& row : sum) for (auto& v : row) v = _mm512_setzero_si512();
  for (int64_t k = 0; k < K; k += 64) {
    const __mmask64 here = K - k >= 64 ? ~uint64_t(0) : (uint64_t(1) << (K - k)) - 1;
    __m512i v[4];
    for (int n = 0; n < 4; n++) v[n] = _mm512_maskz_loadu_epi8(here, b[n] + k), add_dot(of_b[n], ones, v[n]);
    for (int i = 0; i < ROWS; i++) {
      const __m512i row = _mm512_loadu_si512(a.at + (m + i) * a.stride + k);
      for (int n = 0; n < 4; n++) add_dot(sum[i][n], row, v[n]);
    }
  }
  for (int n = 0; n < 4; n++) {
    const uint32_t shift = 128 * uint32_t(_mm512_reduce_add_epi32(of_b[n]));
    for (int i = 0; i < ROWS; i++) sums[i][n] = int32_t(uint32_t(_mm512_reduce_add_epi32(sum[i][n])) - shift);
  }
}
TARGET_AVX512 void tile_avx512(const Rows& a, const int8_t* b, int32_t* c, int64_t rows, int64_t outputs, int64_t N, int64_t K) {
  for (int64_t m = 0; m < rows;) {
    const int64_t here = rows - m >= 4 ? 4 : 1;
    for (int64_t n = 0; n < outputs; n += 4) {
      const int64_t count = std::min<int64_t>(4, outputs - n);
      const int8_t* four[4];
      for (int64_t j = 0; j < 4; j++) four[j] = b + (n + std::min(j, count - 1)) * K;
      int32_t sums[4][4];
      (here == 4 ? block_avx512<4> : block_avx512<1>)(a, m, four, K, sums);
      for (int64_t i = 0; i < here; i++)
        for (int64_t j = 0; j < count; j++) c[(m + i) * N + n + j] = sums[i][j];
    }
    m += here;
  }
}
// Rows of a as the kernel of the level reads them, zeros of a behind each.
Rows widen_rows(int64_t level, const int8_t* a, int64_t rows, int64_t K) {
  if (level >= AVX512VNNI) {
    const int64_t stride = (K + 63) / 64 * 64;
    uint8_t* out = (uint8_t*)scratch(0, size_t(rows * stride));
    for (int64_t m = 0; m < rows; m++) {
      for (int64_t k = 0; k < K; k++) out[m * stride + k] = uint8_t(a[m * K + k] ^ 0x80);
      memset(out + m * stride + K, 0x80, size_t(stride - K));
    }
    return Rows{(const char*)out, stride};
  }
  const int64_t padded = (K + 15) / 16 * 16;
  int16_t* out = (int16_t*)scratch(0, size_t(rows * padded) * 2);
  for (int64_t m = 0; m < rows; m++) {
    for (int64_t k = 0; k < K; k++) out[m * padded + k] = a[m * K + k];
    memset(out + m * padded + K, 0, size_t(padded - K) * 2);
  }
  return Rows{(const char*)out, padded * 2};
}
#endif

}  // namespace

extern "C" int64_t int8_matmul(int64_t level, int64_t threads, const int8_t* a, const int8_t* b, int32_t* c, int64_t M, int64_t N,
                               int64_t K) {
  if (!level_is_there(level)) return BAD_LEVEL;
  if (M < 0 || N < 0 || K < 0 || K > MOST_COLUMNS) return BAD_SHAPE;
  for (int64_t m = 0; m < M; m += ROWS_AT_ONCE) {
    const int64_t rows = std::min(ROWS_AT_ONCE, M - m);
#ifdef COMPRESSOR_X86
    const Rows wide = level == SCALAR ? Rows{} : widen_rows(level, a + m * K, rows, K);
#endif
    parallel(threads, (N + TILE - 1) / TILE, [&](int64_t tile) {
      const int64_t n = tile * TILE, outputs = std::min<int64_t>(TILE, N - n);
#ifdef COMPRESSOR_X86
      if (level >= AVX512VNNI) return tile_avx512(wide, b + n * K, c + m * N + n, rows, outputs, N, K);
      if (level >= AVX2) return tile_avx2(wide, b + n * K, c + m * N + n, rows, outputs, N, K);
#endif
      tile_scalar(a + m * K, b + n * K, c + m * N + n, rows, outputs, N, K);
    });
  }
  return OK;
}
