#include "int8_avx2.h"

#include <algorithm>

#ifdef COMPRESSOR_X86
namespace compressor {
namespace {

TARGET_AVX2 ALWAYS_INLINE __m256i four_everywhere(const void* at) { return _mm256_castps_si256(_mm256_broadcast_ss((const float*)at)); }

// sum += groups of 4 bytes of codes times those of x
TARGET_AVX2 ALWAYS_INLINE void add_dot_vnni(__m256i& sum, __m256i codes, __m256i x) {
#ifdef AVXVNNI_EMULATED
  sum = dot_of_bytes(sum, codes, x);
#elif defined(COMPRESSOR_AVXVNNI)
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(codes), "x"(x));
#else
  (void)sum, (void)codes, (void)x;
#endif
}

// STEPS rows of 8 columns of AT_ONCE registers of outputs, times COUNT rows of codes. Without VNNI, products of codes below 16 are added in
// 16 bits, four rows of 8 columns at most: 4 * 4 * 15 * 128 < 2^15; those of 8 bits take 16 bits a factor.
template <bool VNNI, int BITS, int COUNT, int AT_ONCE, int STEPS>
TARGET_AVX2 ALWAYS_INLINE void add_columns(const uint8_t* codes, int first, const int8_t* p, bool fetch, __m256i (&sum)[COUNT][AT_ONCE]) {
  constexpr bool WORDS = BITS == 8 && !VNNI, PAIRS = BITS < 8 && !VNNI;
  const __m256i even = _mm256_set1_epi16(255);
  __m256i pairs[COUNT][AT_ONCE];
  UNROLL for (int half = 0; half < 2 * STEPS; half++) {
    const uint8_t* row = codes + half / 2 * (TILE * BITS);
    if (half % 2 == 0 && fetch) for (int c = 0; c < BITS; c++) _mm_prefetch((const char*)row + 6144 + c * 64, _MM_HINT_T0);
    UNROLL for (int part = 0; part < (WORDS ? 2 : 1); part++) {
      __m256i v[AT_ONCE];
      UNROLL for (int c = 0; c < AT_ONCE; c++) {
        v[c] = codes_avx2<BITS>(row, first + c, half % 2);
        if (WORDS) v[c] = part ? _mm256_srli_epi16(v[c], 8) : _mm256_and_si256(v[c], even);
      }
      UNROLL for (int i = 0; i < COUNT; i++, p += 4) {
        const __m256i x = four_everywhere(p);
        UNROLL for (int c = 0; c < AT_ONCE; c++) {
          if (VNNI) add_dot_vnni(sum[i][c], v[c], x);
          if (WORDS) sum[i][c] = _mm256_add_epi32(sum[i][c], _mm256_madd_epi16(v[c], x));
          if (PAIRS) pairs[i][c] = half == 0 ? _mm256_maddubs_epi16(v[c], x) : _mm256_add_epi16(pairs[i][c], _mm256_maddubs_epi16(v[c], x));
          asm("" : "+x"(PAIRS ? pairs[i][c] : sum[i][c]));  // or gcc adds in another order, and spills
        }
      }
    }
  }
  if (PAIRS) UNROLL for (int i = 0; i < COUNT; i++)
    UNROLL for (int c = 0; c < AT_ONCE; c++) sum[i][c] = _mm256_add_epi32(sum[i][c], _mm256_madd_epi16(pairs[i][c], _mm256_set1_epi16(1)));
}

template <bool VNNI, int BITS, int ROWS, int DIGITS>
TARGET_AVX2 void tile(const Int8Rows& x, const int8_t* p, const Packed& w, int64_t m0, int64_t tile, float* out) {
  constexpr int COUNT = ROWS * DIGITS, AT_ONCE = COUNT > 2 ? 2 : 8 / COUNT, BYTES = BITS == 8 && !VNNI ? 2 * COUNT : COUNT;
  __m256 total[ROWS][8];
  for (auto& r : total) for (auto& v : r) v = _mm256_setzero_ps();
  for (int64_t j = 0; j < w.groups; j++, p += w.group * BYTES) {
    const uint8_t* b = w.block(tile, j);
    const int32_t* minus_sum = x.minus_sum + m0 * DIGITS * w.groups + j;
    for (int first = 0; first < 8; first += AT_ONCE) {
      const bool fetch = m0 == 0 && first == 0;  // later rows and outputs find the tile in the cache
      __m256i sum[COUNT][AT_ONCE];
      UNROLL for (int c = 0; c < AT_ONCE; c++) {
        const __m256i zero = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(b + w.zero_offset + (first + c) * 8)));
        UNROLL for (int i = 0; i < COUNT; i++) {  // |minus_sum| <= 128 * 255 < 2^15: one multiply of 16 bits is exact
          const __m256i s = _mm256_set1_epi32(minus_sum[i * w.groups]);
          sum[i][c] = w.group < 256 ? _mm256_madd_epi16(zero, s) : _mm256_mullo_epi32(zero, s);
        }
      }
      int64_t k = 0;
      for (; k + 32 <= w.group; k += 32) add_columns<VNNI, BITS, COUNT, AT_ONCE, 4>(b + k / 8 * (TILE * BITS), first, p + k * BYTES, fetch, sum);
      for (; k < w.group; k += 8) add_columns<VNNI, BITS, COUNT, AT_ONCE, 1>(b + k / 8 * (TILE * BITS), first, p + k * BYTES, fetch, sum);
      UNROLL for (int c = 0; c < AT_ONCE; c++) {
        const __m256 scale = scales_avx2(b + w.scale_offset, w.scale_dtype, first + c);
        UNROLL for (int m = 0; m < ROWS; m++) {
          __m256 value = _mm256_cvtepi32_ps(sum[m * DIGITS + DIGITS - 1][c]);
          UNROLL for (int d = DIGITS - 2; d >= 0; d--) value = _mm256_fmadd_ps(value, _mm256_set1_ps(256), _mm256_cvtepi32_ps(sum[m * DIGITS + d][c]));
          if (DIGITS > 1) value = _mm256_mul_ps(value, _mm256_set1_ps(x.step[(m0 + m) * w.groups + j]));
          total[m][first + c] = _mm256_fmadd_ps(value, scale, total[m][first + c]);
        }
      }
    }
  }
  for (int m = 0; m < ROWS; m++)
    for (int c = 0; c < 8; c++)
      _mm256_storeu_ps(out + m * TILE + c * 8, DIGITS > 1 ? total[m][c] : _mm256_mul_ps(total[m][c], _mm256_set1_ps(x.step[m0 + m])));
}

bool takes_words(const Packed& w, bool vnni) { return w.bits == 8 && !vnni; }
template <bool VNNI, int BITS> void run(const Avx2Rows& from, const int8_t* p, const Packed& w, int64_t m, int64_t rows, int64_t at, float* out) {
  using Tile = void (*)(const Int8Rows&, const int8_t*, const Packed&, int64_t, int64_t, float*);
  static const Tile one[] = {tile<VNNI, BITS, 1, 1>, tile<VNNI, BITS, 2, 1>, tile<VNNI, BITS, 3, 1>,
                             tile<VNNI, BITS, 4, 1>, tile<VNNI, BITS, 5, 1>, tile<VNNI, BITS, 6, 1>};
  static const Tile three[] = {tile<VNNI, BITS, 1, 3>, tile<VNNI, BITS, 2, 3>};
  const Tile f = from.x.digits == 1 ? one[rows - 1] : from.x.digits == 3 ? three[rows - 1] : tile<VNNI, BITS, 1, 4>;
  f(from.x, p, w, m, at, out);
}

TARGET_AVX2 void take_bytes(const int8_t* codes, int64_t count, int64_t padded, int8_t* to) {
  for (int64_t i = 0; i < count; i++)
    for (int64_t k = 0; k < padded; k += 4) memcpy(to + k * count + i * 4, codes + i * padded + k, 4);
}
TARGET_AVX2 void take_words(const int8_t* codes, int64_t count, int64_t padded, int16_t* to) {
  for (int64_t i = 0; i < count; i++)
    for (int64_t k = 0; k < padded; k += 4) {
      const int8_t* from = codes + i * padded + k;
      int16_t *even = to + k * count + i * 2, *odd = even + count * 2;
      even[0] = from[0], even[1] = from[2], odd[0] = from[1], odd[1] = from[3];
    }
}

}  // namespace

Avx2Rows avx2_rows(const Int8Rows& x, const Packed& w, int64_t M, bool vnni) {
  const int64_t padded = w.padded(), rows = avx2_together(x);
  const bool words = takes_words(w, vnni);
  if (!words && M * x.digits == 1) return {x.codes, x, vnni};
  int8_t* panels = (int8_t*)scratch(4, size_t(M * x.digits * padded * (words ? 2 : 1)));
  for (int64_t m = 0; m < M; m += rows) {
    const int64_t count = std::min(rows, M - m) * x.digits, at = m * x.digits * padded;
    if (words) take_words(x.codes + at, count, padded, (int16_t*)panels + at);
    else take_bytes(x.codes + at, count, padded, panels + at);
  }
  return {panels, x, vnni};
}

void avx2_tile(const Avx2Rows& from, const Packed& w, int64_t m, int64_t rows, int64_t tile, float* out) {
  const auto with = [&](auto two, auto three, auto four, auto eight) { return w.bits == 2 ? two : w.bits == 3 ? three : w.bits == 4 ? four : eight; };
  const auto f = from.vnni ? with(run<true, 2>, run<true, 3>, run<true, 4>, run<true, 8>) : with(run<false, 2>, run<false, 3>, run<false, 4>, run<false, 8>);
  f(from, from.panels + m * from.x.digits * w.padded() * (takes_words(w, from.vnni) ? 2 : 1), w, m, rows, tile, out);
}

}  // namespace compressor
#endif
