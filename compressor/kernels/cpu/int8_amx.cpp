#include "int8_amx.h"

#include <algorithm>

#ifdef COMPRESSOR_AMX
namespace compressor {
namespace {

// Groups of up to so many chunks of 64 columns are narrow: their sums leave the tiles often, and become floats in registers.
constexpr int64_t NARROW = 7;
// Chunks whose codes are unpacked, or read where they are, before all rows are multiplied by them: 16 KiB of 64 outputs, which stay in the
// first-level cache. Of narrow groups, four groups of one chunk, two of two or one; of wide ones all of 4096 columns if there is one block of rows.
constexpr int64_t CHUNKS = 4, CHUNKS_OF_ONE = 64;
constexpr int64_t FETCHED = 8192;             // bytes of a weight that are asked for before they are read
constexpr int LANES = TILE_ROWS * TILE_ROWS;  // sums in a tile

int64_t chunks_of(const Packed& w) { return (w.group + TILE_COLUMNS - 1) / TILE_COLUMNS; }
bool narrow(const Packed& w) { return chunks_of(w) <= NARROW; }
// Narrow groups that are multiplied at once, and chunks.
int64_t groups_of(const Packed& w) { return chunks_of(w) == 1 ? CHUNKS : chunks_of(w) == 2 ? CHUNKS / 2 : 1; }
int64_t at_once(const AmxRows& x, const Packed& w) {
  return narrow(w) ? groups_of(w) * x.chunks : std::min(x.blocks > 1 ? CHUNKS : CHUNKS_OF_ONE, x.chunks);
}
// Codes of 8 bits are read where they are, in groups of whole chunks.
bool in_place(const Packed& w) { return w.bits == 8 && w.group % TILE_COLUMNS == 0; }

// ---- codes of a weight, unpacked ----
// `rows` rows of 8 columns of a block to (4, chunks, 16, 64), `column` bytes from 16 outputs to the next: what they stand for, code - zero, or
// the codes of 8 bits.
template <int BITS> TARGET_AVX512 void unpack(const uint8_t* from, int64_t rows, const uint8_t* zeros, uint8_t* panel, int64_t column) {
  __m512i zero[4];
  UNROLL for (int c = 0; c < 4; c++)
    zero[c] = BITS == 8 ? _mm512_setzero_si512()
                        : _mm512_mullo_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)zeros + c)), _mm512_set1_epi32(0x01010101));
  for (int64_t r = 0; r < rows; r++, from += TILE * BITS, panel += 2 * TILE_COLUMNS) {
    UNROLL for (int c = 0; c < 4; c++)
      UNROLL for (int half = 0; half < 2; half++)
        _mm512_storeu_si512(panel + c * column + half * 64, _mm512_sub_epi8(codes_avx512<BITS>(from, c, half), zero[c]));
  }
}

// ---- products ----
// CODES: of 8 bits, multiplied as they are, and their zero point taken off the sums. Otherwise what is multiplied has its zero point taken off.
template <bool CODES, int C, int A, int B> ALWAYS_INLINE void dot() {
  if (CODES) tile_dot_unsigned<C, A, B>();
  else tile_dot_signed<C, A, B>();
}
// One group's sums of 16 rows of codes and 16 outputs, added to total.
template <bool CODES, int DIGITS>
TARGET_AVX512 ALWAYS_INLINE void add_group(const AmxRows& x, __m512 scale, const uint8_t* zeros, const int32_t* sums, int64_t row, __m512* total) {
  const __m512i zero = CODES ? _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)zeros)) : _mm512_setzero_si512();
  UNROLL for (int i = 0; i < TILE_ROWS / DIGITS; i++) {
    __m512 value;
    UNROLL for (int d = DIGITS - 1; d >= 0; d--) {
      __m512i sum = _mm512_loadu_si512(sums + (i * DIGITS + d) * TILE_ROWS);
      if (CODES) sum = _mm512_add_epi32(sum, _mm512_mullo_epi32(zero, _mm512_set1_epi32(x.minus_sum[row * TILE_ROWS + i * DIGITS + d])));
      value = d == DIGITS - 1 ? _mm512_cvtepi32_ps(sum) : _mm512_fmadd_ps(value, _mm512_set1_ps(256), _mm512_cvtepi32_ps(sum));
    }
    if (DIGITS > 1) value = _mm512_mul_ps(value, _mm512_set1_ps(x.step[row * (TILE_ROWS / DIGITS) + i]));
    total[i] = _mm512_fmadd_ps(value, scale, total[i]);
  }
}
template <int ROWS> TARGET_AVX512 ALWAYS_INLINE void load_totals(const float* from, __m512* total) {
  UNROLL for (int i = 0; i < ROWS; i++) total[i] = _mm512_loadu_ps(from + i * TILE);
}
template <int ROWS> TARGET_AVX512 ALWAYS_INLINE void store_totals(float* to, const __m512* total) {
  UNROLL for (int i = 0; i < ROWS; i++) _mm512_storeu_ps(to + i * TILE, total[i]);
}

template <bool CODES, int DIGITS> struct Tiles {
  static constexpr int ROWS = TILE_ROWS / DIGITS;
  const AmxRows& x;
  const Packed& w;
  const int64_t tile;
  uint8_t* const panel;  // (4, at_once, 16, 64)
  int32_t* const sums;   // (blocks, 4, 16, 16) of wide groups, (2, 16, 16) of narrow ones
  float* const scales;   // (CHUNKS, 64)
  float* const out;      // (blocks * ROWS, 64)

  // Codes of some chunks: of chunk i and outputs 16 c on at + i * chunk + c * column, rows of 64 bytes `stride` apart. Of 8 bits they are read
  // where they are, except for groups of broken chunks; there a group more is not `chunks` chunks further, but `group`.
  struct Codes {
    const uint8_t* at;
    int64_t chunk, group, column, stride;
  };
  TARGET_AVX512 Codes take(int64_t first, int64_t last, int64_t from, int64_t until) const {  // chunks of whole groups, or of one
    const uint8_t* block = w.block(tile, first);
    if (CODES && in_place(w)) return Codes{block + from * TILE_BYTES * 4, TILE_BYTES * 4, w.block_bytes, 64, 256};
    const int64_t column = at_once(x, w) * TILE_BYTES;
    uint8_t* at = panel;
    const auto bring = w.bits == 2 ? unpack<2> : w.bits == 3 ? unpack<3> : w.bits == 4 ? unpack<4> : unpack<8>;
    for (int64_t j = first; j < last; j++, block += w.block_bytes)
      for (int64_t chunk = from; chunk < until; chunk++, at += TILE_BYTES)
        bring(block + chunk * (TILE_COLUMNS / 8) * w.row_bytes, std::min<int64_t>(TILE_COLUMNS, w.group - chunk * TILE_COLUMNS) / 8,
              block + w.zero_offset, at, column);
    return Codes{panel, TILE_BYTES, TILE_BYTES * x.chunks, column, 64};
  }
  const int8_t* rows(int64_t block, int64_t group, int64_t chunk) const {
    return x.codes + ((block * w.groups + group) * x.chunks + chunk) * TILE_BYTES;
  }
  // `lines` of what is read next are asked for, a few at a time.
  struct Fetch {
    const char* at;
    int64_t lines;
    void some() { for (int64_t i = 0; i < lines; i++, at += 64) _mm_prefetch(at, _MM_HINT_T1); }
  };
  Fetch next(int64_t group, int64_t from, int64_t bytes, int64_t times) const {
    const char* at = (const char*)w.block(tile, group) + from * (TILE_COLUMNS / 8) * w.row_bytes;
    return Fetch{at + std::max(bytes, FETCHED), (bytes / 64 + times - 1) / times};
  }

  // ---- narrow groups: while one's products are made, the sums of the one before leave their tile, and earlier ones become floats ----
  template <int C> TARGET_AVX512 static ALWAYS_INLINE void multiply(const int8_t* a, const uint8_t* b, int64_t chunks, int64_t chunk, int64_t stride) {
    tile_zero<C>();
    for (int64_t i = 0; i < chunks; i++)
      tile_load<4 + 2 * C>(a + i * TILE_BYTES, TILE_COLUMNS), tile_load<5 + 2 * C>(b + i * chunk, stride), dot<CODES, C, 4 + 2 * C, 5 + 2 * C>();
  }
  // The sums of group g of a range and outputs 16 c on; row is the range's first group in its block of rows.
  TARGET_AVX512 ALWAYS_INLINE void add(const int32_t* from, int g, int c, int64_t row, const uint8_t* zeros, __m512* total) const {
    add_group<CODES, DIGITS>(x, _mm512_loadu_ps(scales + g * TILE + c * 16), zeros + g * w.block_bytes + c * 16, from, row + g, total);
  }
  // GROUPS groups from `first` on, of WIDTH chunks, 0: any number. Blocks of rows, 16 outputs and groups come one after the other, and the sums
  // of each product LAG products later, so that the first LAG products of a block and outputs meet the last sums of those before.
  template <int GROUPS, int WIDTH> TARGET_AVX512 void narrow_range(int64_t first, const Codes& codes, Fetch fetch) const {
    constexpr int LAG = GROUPS > 1 ? 2 : 1;
    const int64_t chunks = WIDTH ? WIDTH : x.chunks, chunk = CODES ? codes.chunk : TILE_BYTES, stride = CODES ? codes.stride : 64;
    const int64_t group = CODES ? codes.group : chunks * TILE_BYTES, column = codes.column, groups = w.groups;
    int32_t* const sum = sums;  // copies stay in registers, whatever a tile stores
    const uint8_t* const zeros = w.block(tile, first) + w.zero_offset;
    const int8_t* a = rows(0, first, 0);
    float* to = out;
    __m512 total[ROWS];
    load_totals<ROWS>(to, total);
    int64_t row = first;
    for (int64_t block = 0; block < x.blocks; block++, a += groups * chunks * TILE_BYTES, row += groups) {
      for (int c = 0; c < 4; c++) {
        const uint8_t* b = codes.at + c * column;
        const bool begun = block || c;
        const int c_before = (c + 3) % 4;
        const int64_t row_before = c ? row : row - groups;
        UNROLL for (int g = 0; g < GROUPS; g++) {
          const bool odd = (GROUPS > 1 ? g : c) % 2;
          if (odd) multiply<1>(a + g * chunks * TILE_BYTES, b + g * group, chunks, chunk, stride), tile_store<0>(sum, 64);
          else multiply<0>(a + g * chunks * TILE_BYTES, b + g * group, chunks, chunk, stride);
          if (!odd && (g || begun)) tile_store<1>(sum + LANES, 64);
          const int32_t* from = sum + (odd == (LAG == 2) ? LANES : 0);
          if (g >= LAG) add(from, g - LAG, c, row, zeros, total);
          else if (begun) add(from, GROUPS - LAG + g, c_before, row_before, zeros, total);
          if (g == LAG - 1 && begun) store_totals<ROWS>(to, total), to += c ? 16 : (ROWS - 1) * TILE + 16, load_totals<ROWS>(to, total);
          fetch.some();
        }
      }
    }
    tile_store<1>(sum + LANES, 64);
    UNROLL for (int g = GROUPS - LAG; g < GROUPS; g++) add(sum + (GROUPS == 1 || g % 2 ? LANES : 0), g, 3, row - groups, zeros, total);
    store_totals<ROWS>(to, total);
  }
  TARGET_AVX512 void narrow_groups() const {
    int64_t groups = groups_of(w);
    for (int64_t j = 0; j < w.groups; j += groups) {
      if (j + groups > w.groups) groups = 1;
      const Codes codes = take(j, j + groups, 0, x.chunks);
      for (int64_t g = 0; g < groups; g++)
        for (int c = 0; c < 4; c++)
          _mm512_storeu_ps(scales + g * TILE + c * 16, scales_avx512(w.block(tile, j + g) + w.scale_offset, w.scale_dtype, c));
      const Fetch fetch = next(j, 0, groups * w.block_bytes, 4 * x.blocks * groups);
      if (groups == 4) narrow_range<4, 1>(j, codes, fetch);
      else if (groups == 2) narrow_range<2, 2>(j, codes, fetch);
      else narrow_range<1, 0>(j, codes, fetch);
    }
  }

  // ---- wide groups: the sums of two blocks of rows and 32 outputs, or of one (R) and 64, stay in four tiles ----
  template <int R>
  TARGET_AVX512 ALWAYS_INLINE void wide_range(int64_t block, int c, int64_t j, int64_t from, int64_t until, const Codes& codes, Fetch& fetch) const {
    int32_t* to = sums + (block * 4 + c) * LANES;
    constexpr int64_t second = (R == 2 ? 4 : 1) * LANES, third = (R == 2 ? 1 : 2) * LANES, fourth = (R == 2 ? 5 : 3) * LANES;
    if (from == 0) tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    else tile_load<0>(to, 64), tile_load<1>(to + second, 64), tile_load<2>(to + third, 64), tile_load<3>(to + fourth, 64);
    const int8_t *a = rows(block, j, from), *a2 = R == 2 ? rows(block + 1, j, from) : a;
    const uint8_t* b = codes.at + c * codes.column;
    for (int64_t chunk = from; chunk < until; chunk++, a += TILE_BYTES, a2 += TILE_BYTES, b += codes.chunk) {
      tile_load<4>(a, TILE_COLUMNS), tile_load<5>(b, codes.stride), dot<CODES, 0, 4, 5>();
      if (R == 2) {
        tile_load<6>(a2, TILE_COLUMNS), dot<CODES, 1, 6, 5>();
        tile_load<7>(b + codes.column, codes.stride), dot<CODES, 2, 4, 7>(), dot<CODES, 3, 6, 7>();
      } else {
        tile_load<6>(b + codes.column, codes.stride), dot<CODES, 1, 4, 6>();
        tile_load<7>(b + 2 * codes.column, codes.stride), dot<CODES, 2, 4, 7>();
        tile_load<5>(b + 3 * codes.column, codes.stride), dot<CODES, 3, 4, 5>();
      }
      fetch.some();
    }
    tile_store<0>(to, 64), tile_store<1>(to + second, 64), tile_store<2>(to + third, 64), tile_store<3>(to + fourth, 64);
  }
  TARGET_AVX512 void wide_groups() const {
    const int64_t chunks = at_once(x, w);
    for (int64_t j = 0; j < w.groups; j++) {
      for (int64_t from = 0; from < x.chunks; from += chunks) {
        const int64_t until = std::min(x.chunks, from + chunks), pairs = x.blocks / 2;
        const Codes codes = take(j, j + 1, from, until);
        const int64_t bytes = (until - from) * (TILE_COLUMNS / 8) * w.row_bytes;
        Fetch fetch = next(j, from, bytes, (2 * pairs + x.blocks % 2) * (until - from));
        if (in_place(w) && x.blocks == 1) fetch.lines = 0;  // comes sooner without: to ask for it costs more than it saves
        for (int64_t pair = 0; pair < pairs; pair++)
          for (int c = 0; c < 4; c += 2) wide_range<2>(pair * 2, c, j, from, until, codes, fetch);
        if (x.blocks % 2) wide_range<1>(pairs * 2, 0, j, from, until, codes, fetch);
      }
      const uint8_t* at = w.block(tile, j);
      for (int64_t block = 0; block < x.blocks; block++)
        for (int c = 0; c < 4; c++) {
          float* to = out + block * ROWS * TILE + c * 16;
          __m512 total[ROWS];
          load_totals<ROWS>(to, total);
          add_group<CODES, DIGITS>(x, scales_avx512(at + w.scale_offset, w.scale_dtype, c), at + w.zero_offset + c * 16, sums + (block * 4 + c) * LANES,
                                  block * w.groups + j, total);
          store_totals<ROWS>(to, total);
        }
    }
  }
  TARGET_AVX512 void run() const {
    memset(out, 0, size_t(x.blocks * ROWS * TILE) * 4);
    tiles_begin();
    narrow(w) ? narrow_groups() : wide_groups();
    tiles_end();
  }
};

template <bool CODES, int DIGITS> void run(const AmxRows& x, const Packed& w, int64_t tile, uint8_t* panel, int32_t* sums, float* scales, float* out) {
  Tiles<CODES, DIGITS>{x, w, tile, panel, sums, scales, out}.run();
}

}  // namespace

bool amx_pays(const Int8Rows& x, const Packed& w, int64_t M) {
  const bool fits = w.bits == 8 || w.largest_zero <= 128;  // code - zero has 8 bits
  return fits && M * x.digits > 4 && w.group >= 32;
}

AmxRows amx_rows(const Int8Rows& x, const Packed& w, int64_t M) {
  const int64_t rows = TILE_ROWS / x.digits, padded = w.padded(), G = w.groups;
  AmxRows to{nullptr, nullptr, nullptr, x.digits, (M + rows - 1) / rows, chunks_of(w)};
  const int64_t groups = to.blocks * G, codes = groups * to.chunks * TILE_BYTES, bytes = codes + groups * (TILE_ROWS + rows) * 4;
  int8_t* at = (int8_t*)scratch(4, size_t(bytes));
  int32_t* sum = (int32_t*)(at + codes);
  float* step = (float*)(sum + groups * TILE_ROWS);
  if (M % rows || TILE_ROWS % x.digits || w.group % TILE_COLUMNS) memset(at, 0, size_t(codes));
  to.codes = at, to.minus_sum = sum, to.step = step;
  for (int64_t m = 0; m < M; m++)
    for (int64_t d = 0; d < x.digits; d++) {
      const int8_t* row = x.codes + (m * x.digits + d) * padded;
      int8_t* chunk = at + m / rows * G * to.chunks * TILE_BYTES + (m % rows * x.digits + d) * TILE_COLUMNS;
      for (int64_t j = 0; j < G; j++) {
        int64_t left = w.group;
        for (; left >= TILE_COLUMNS; left -= TILE_COLUMNS, row += TILE_COLUMNS, chunk += TILE_BYTES) memcpy(chunk, row, TILE_COLUMNS);
        if (left) memcpy(chunk, row, size_t(left)), row += left, chunk += TILE_BYTES;
      }
    }
  if (w.bits < 8 && x.digits == 1) return to;  // neither sums nor steps are read
  memset(sum, 0, size_t(groups * (TILE_ROWS + rows)) * 4);
  for (int64_t m = 0; m < M; m++)
    for (int64_t j = 0; j < G; j++) {
      const int64_t row = m / rows * G + j, i = m % rows;
      for (int64_t d = 0; d < x.digits; d++) sum[row * TILE_ROWS + i * x.digits + d] = x.minus_sum[(m * x.digits + d) * G + j];
      if (x.digits > 1) step[row * rows + i] = x.step[m * G + j];
    }
  return to;
}

float* amx_tile(const AmxRows& x, const Packed& w, int64_t tile) {
  const int64_t panel = at_once(x, w) * 4 * TILE_BYTES, sums = (narrow(w) ? 2 : x.blocks * 4) * TILE_BYTES, scales = CHUNKS * TILE * 4;
  const int64_t out = x.blocks * (TILE_ROWS / x.digits) * TILE * 4;
  uint8_t* memory = (uint8_t*)scratch(7, size_t(panel + sums + scales + out));
  float* to = (float*)(memory + panel + sums + scales);
  if (w.group % TILE_COLUMNS) memset(memory, 0, size_t(panel));  // what isn't unpacked is multiplied by 0, and never another call's
  const auto f = w.bits == 8 ? (x.digits == 1 ? run<true, 1> : x.digits == 3 ? run<true, 3> : run<true, 4>)
                             : (x.digits == 1 ? run<false, 1> : x.digits == 3 ? run<false, 3> : run<false, 4>);
  f(x, w, tile, memory, (int32_t*)(memory + panel), (float*)(memory + panel + sums), to);
  return to;
}

}  // namespace compressor
#endif
