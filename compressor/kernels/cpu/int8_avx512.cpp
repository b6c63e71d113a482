#include "int8_avx512.h"

#include <algorithm>

#ifdef COMPRESSOR_X86
namespace compressor {
namespace {

constexpr int64_t TWO_FIT = 400 << 10;  // bytes of a tile of which two stay in a second-level cache of 1 MiB, beside the inputs
// Bytes between what is multiplied and what is asked for, measured on Zen 4 at 4096 x 4096. Where memory is the limit one request into the
// first-level cache is best; where arithmetic takes as long, one far ahead into the second and another, shortly before, into the first.
constexpr int64_t AHEAD = 6144, FAR_AHEAD = 12288, SHORTLY_AHEAD = 2048;
constexpr int64_t WIDE_FAR_AHEAD = 9216, WIDE_SHORTLY_AHEAD = 3072;  // of 8 bits, which one row reads as fast as memory gives them
constexpr int64_t PIECE = 264 << 10;  // bytes of a tile of one group that many rows go through at a time, if it has more

// What a pass asks for while it multiplies: of its own tile, so many bytes ahead, into the first- or second-level cache, 0 for nothing; of the
// next tile, from `next` on, `pace` / `divisor` of what each 8 columns take.
struct Fetch {
  int64_t first_level, second_level;
  const uint8_t* next;
  int64_t pace, divisor;
};

alignas(64) constexpr uint8_t FOUR_TIMES[64] = {0, 0, 0, 0, 1, 1, 1, 1, 2,  2,  2,  2,  3,  3,  3,  3,  4,  4,  4,  4,  5,  5,
                                                 5, 5, 6, 6, 6, 6, 7, 7, 7,  7,  8,  8,  8,  8,  9,  9,  9,  9,  10, 10, 10, 10,
                                                 11, 11, 11, 11, 12, 12, 12, 12, 13, 13, 13, 13, 14, 14, 14, 14, 15, 15, 15, 15};

// The columns [from, to) of a tile of one group. Sums (M, 64) of those before are in memory, and go there unless these are the last.
struct Columns {
  int64_t from, to;
  int32_t* sums;
};

template <int LEVEL> ALWAYS_INLINE void ask(const uint8_t* at, int64_t lines) {
  for (int64_t i = 0; i < lines; i++) _mm_prefetch((const char*)at + i * 64, LEVEL == 1 ? _MM_HINT_T0 : _MM_HINT_T1);
}

// ROWS * DIGITS * 4 integer sums in registers; columns 0 to 3 of a row of 8, then 4 to 7.
// A product with zero points is sum of (code - zero) x. LIFT adds largest_zero - zero to each code, which leaves one zero point for all: the
// sums begin with that of their row, not with a product for each output: in groups of 64 one of 16 products.
template <int BITS, int ROWS, int DIGITS, bool LIFT, bool PART = false>
TARGET_AVX512 void tile(const Int8Rows& x, const Packed& w, int64_t m0, int64_t tile, const Fetch& fetch, const Columns& columns, float* out) {
  constexpr int COUNT = ROWS * DIGITS;
  const int64_t stride = w.padded(), near = fetch.first_level, far = fetch.second_level, pace = fetch.pace, divisor = fetch.divisor;
  const bool streams = near || far;
  const __m512i four_times = _mm512_loadu_si512(FOUR_TIMES);
  __m512 total[ROWS][4];
  for (auto& r : total) for (auto& v : r) v = _mm512_setzero_ps();
  const uint8_t *b = w.block(tile, 0), *next = fetch.next;
  int64_t due = 0;
  const int8_t* p = x.codes + m0 * DIGITS * stride;  // in the end a row of codes is as long as all groups
  const int32_t* minus_sum = x.minus_sum + m0 * DIGITS * w.groups;
  for (int64_t j = 0; j < w.groups; j++, minus_sum++) {
    __m512i sum[COUNT][4], lift[4];
    if (LIFT) {
      UNROLL for (int c = 0; c < 4; c++) {
        const __m128i up = _mm_sub_epi8(_mm_set1_epi8(char(w.largest_zero)), _mm_loadu_si128((const __m128i*)(b + w.zero_offset) + c));
        lift[c] = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(up), four_times);
      }
      UNROLL for (int i = 0; i < COUNT; i++) {
        const __m512i s = _mm512_set1_epi32(minus_sum[i * w.groups] * int32_t(w.largest_zero));
        UNROLL for (int c = 0; c < 4; c++) sum[i][c] = s;
      }
    } else UNROLL for (int c = 0; c < 4; c++) {
      const __m512i zero = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(b + w.zero_offset) + c));
      UNROLL for (int i = 0; i < COUNT; i++) {  // |minus_sum| <= 128 * 255 < 2^15: one multiply of 16 bits is exact
        const __m512i s = _mm512_set1_epi32(minus_sum[i * w.groups]);
        sum[i][c] = w.group < 256 ? _mm512_madd_epi16(zero, s) : _mm512_mullo_epi32(zero, s);
      }
    }
    const uint8_t* end = b + w.scale_offset;
    if (PART) {
      end = b + columns.to * (TILE * BITS / 8), b += columns.from * (TILE * BITS / 8), p += columns.from;
      if (columns.from) UNROLL for (int i = 0; i < COUNT; i++)
        UNROLL for (int c = 0; c < 4; c++) sum[i][c] = _mm512_loadu_si512(columns.sums + (m0 + i) * TILE + c * 16);
    }
    for (; b < end; b += TILE * BITS, p += 8) {
      if (streams) {
        if (near) ask<1>(b + near, BITS);
        if (far) ask<2>(b + far, BITS);
      } else {  // a `for` here took 1 % longer
        if ((due += pace) > 0) do ask<2>(next, 1), next += 64; while ((due -= divisor) > 0);
      }
      UNROLL for (int half = 0; half < 2; half++) {
        __m512i v[4];
        UNROLL for (int c = 0; c < 4; c++) {
          v[c] = codes_avx512<BITS>(b, c, half);
          if (LIFT) v[c] = _mm512_add_epi8(v[c], lift[c]);
        }
        UNROLL for (int i = 0; i < COUNT; i++) {
          int32_t word;
          memcpy(&word, p + i * stride + half * 4, 4);
          const __m512i xi = _mm512_set1_epi32(word);
          UNROLL for (int c = 0; c < 4; c++) add_dot(sum[i][c], v[c], xi);
        }
      }
    }
    if (PART && columns.to < w.group) {
      UNROLL for (int i = 0; i < COUNT; i++) UNROLL for (int c = 0; c < 4; c++) _mm512_storeu_si512(columns.sums + (m0 + i) * TILE + c * 16, sum[i][c]);
      return;
    }
    UNROLL for (int c = 0; c < 4; c++) {
      const __m512 s = scales_avx512(b, w.scale_dtype, c);
      UNROLL for (int m = 0; m < ROWS; m++) {
        __m512 value = _mm512_cvtepi32_ps(sum[m * DIGITS + DIGITS - 1][c]);
        UNROLL for (int d = DIGITS - 2; d >= 0; d--) value = _mm512_fmadd_ps(value, _mm512_set1_ps(256), _mm512_cvtepi32_ps(sum[m * DIGITS + d][c]));
        if (DIGITS > 1) value = _mm512_mul_ps(value, _mm512_set1_ps(x.step[(m0 + m) * w.groups + j]));
        total[m][c] = _mm512_fmadd_ps(value, s, total[m][c]);
      }
    }
    if (streams) ask<2>(b + (far ? far : near), (w.block_bytes - w.scale_offset) / 64);
    b += w.block_bytes - w.scale_offset;
  }
  UNROLL for (int m = 0; m < ROWS; m++)
    UNROLL for (int c = 0; c < 4; c++)
      _mm512_storeu_ps(out + m * TILE + c * 16, DIGITS > 1 ? total[m][c] : _mm512_mul_ps(total[m][c], _mm512_set1_ps(x.step[m0 + m])));
}

constexpr int64_t most_rows(int64_t bits) { return bits == 8 ? 6 : 5; }  // their sums leave registers for codes and what they are lifted by

template <int BITS> void run(const Avx512Passes& from, const Packed& w, int64_t m, int64_t rows, int64_t at, const Columns& columns, float* out) {
  constexpr bool MAY = BITS < 8, PARTS = BITS == 8;
  using Tile = void (*)(const Int8Rows&, const Packed&, int64_t, int64_t, const Fetch&, const Columns&, float*);
  static constexpr Tile one[2][6] = {{tile<BITS, 1, 1, false>, tile<BITS, 2, 1, false>, tile<BITS, 3, 1, false>, tile<BITS, 4, 1, false>,
                                      tile<BITS, 5, 1, false>, MAY ? nullptr : tile<BITS, MAY ? 5 : 6, 1, false>},
                                     {tile<BITS, 1, 1, MAY>, tile<BITS, 2, 1, MAY>, tile<BITS, 3, 1, MAY>, tile<BITS, 4, 1, MAY>, tile<BITS, 5, 1, MAY>, nullptr}};
  static constexpr Tile three[] = {tile<BITS, 1, 3, false>, tile<BITS, 1, 3, MAY>}, four[] = {tile<BITS, 1, 4, false>, tile<BITS, 1, 4, MAY>};
  static constexpr Tile part[] = {tile<BITS, 1, 1, false, PARTS>, tile<BITS, 2, 1, false, PARTS>, tile<BITS, 3, 1, false, PARTS>,
                                  tile<BITS, 4, 1, false, PARTS>, tile<BITS, 5, 1, false, PARTS>, MAY ? nullptr : tile<BITS, MAY ? 5 : 6, 1, false, PARTS>};
  const bool lift = MAY && w.largest_zero < 256 - (1 << BITS);  // code + largest_zero has 8 bits
  const int64_t whole = w.groups * w.block_bytes, bytes = from.pieces > 1 ? (columns.to - columns.from) * (TILE * BITS / 8) : whole;
  const int64_t first = from.rows(0), counts = rows * from.x.digits;
  const bool alone = from.M == first || bytes > TWO_FIT, busy = counts * 4 >= BITS * 3, wide = BITS == 8 && counts == 1;
  Fetch fetch{0, 0, nullptr, 0, 1};
  if (m == 0) {
    fetch.first_level = !from.near ? 0 : !alone ? AHEAD : busy ? SHORTLY_AHEAD : wide ? WIDE_SHORTLY_AHEAD : AHEAD;
    fetch.second_level = !from.near ? AHEAD : !alone ? 0 : busy ? FAR_AHEAD : wide ? WIDE_FAR_AHEAD : 0;
  } else if (!alone) {
    const uint8_t* next = columns.to < w.group ? w.block(at, 0) + columns.to * (TILE * BITS / 8) : w.block(at + 1, 0);
    fetch.next = next + bytes / 64 * (m - first) / (from.M - first) * 64;
    fetch.pace = w.block_bytes * 8 / w.group * rows, fetch.divisor = 64 * (from.M - first);
  }
  const Tile f = from.pieces > 1 ? part[rows - 1] : from.x.digits == 1 ? one[lift][rows - 1] : (from.x.digits == 3 ? three : four)[lift];
  f(from.x, w, m, at, fetch, columns, out);
}

void pass(const Avx512Passes& passes, const Packed& w, int64_t m, int64_t rows, int64_t tile, int64_t piece, float* out) {
  const int64_t eights = w.group / 8, size = (eights + passes.pieces - 1) / passes.pieces * 8;
  const Columns columns{piece * size, std::min((piece + 1) * size, w.group), passes.pieces > 1 ? (int32_t*)scratch(4, size_t(passes.M * TILE) * 4) : nullptr};
  const auto f = w.bits == 2 ? run<2> : w.bits == 3 ? run<3> : w.bits == 4 ? run<4> : run<8>;
  f(passes, w, m, rows, tile, columns, out);
}

}  // namespace

Avx512Passes avx512_passes(const Int8Rows& x, const Packed& w, int64_t M, bool near) {
  if (x.digits > 1) return {x, M, 1, 0, 1, near};
  const int64_t most = most_rows(w.bits), fours = M / 4 > 1 ? M / 4 : 1;
  const int64_t count = M <= fours * most ? fours : (M + 3) / 4;
  const int64_t pieces = w.bits == 8 && w.groups == 1 && count > 1 ? (w.block_bytes + PIECE - 1) / PIECE : 1;
  return {x, M, M / count, M % count, pieces, near};
}

void avx512_begin(const Avx512Passes& passes, const Packed& w, int64_t tile) {
  for (int64_t piece = 0; piece + 1 < passes.pieces; piece++)
    for (int64_t m = 0; m < passes.M; m += passes.rows(m)) pass(passes, w, m, passes.rows(m), tile, piece, nullptr);
}
void avx512_tile(const Avx512Passes& passes, const Packed& w, int64_t m, int64_t rows, int64_t tile, float* out) {
  pass(passes, w, m, rows, tile, passes.pieces - 1, out);
}

}  // namespace compressor
#endif
