#include "int8_amx.h"

#include <algorithm>

#ifdef COMPRESSOR_AMX
namespace compressor {
namespace {

// Chunks of 64 columns that are multiplied before the next ones, 4 KiB of codes each. Few of narrow groups, since their sums lie in the
// first-level cache too, (16, 64) for each group.
constexpr int64_t NARROW_CHUNKS = 2, WIDE_CHUNKS = 4, IN_PLACE_CHUNKS = 8;
constexpr int64_t FETCHED = 8192;             // bytes of a weight that are asked for before they are read
constexpr int LANES = TILE_ROWS * TILE_ROWS;  // sums in a tile

int64_t chunks_of(const Packed& w) { return (w.group + TILE_COLUMNS - 1) / TILE_COLUMNS; }
// Codes of 8 bits are read where they are, in groups of whole chunks.
bool in_place(const Packed& w) { return w.bits == 8 && w.group % TILE_COLUMNS == 0; }

// Whole groups first .. last - 1, or of one wide group the chunks from .. to - 1.
struct Range {
  int64_t first, last, from, to;
  int64_t chunks() const { return (last - first) * (to - from); }
};
template <class F> void each_range(const Packed& w, F f) {
  const int64_t chunks = chunks_of(w);
  const int64_t groups = std::max<int64_t>(1, NARROW_CHUNKS / chunks), most = in_place(w) ? IN_PLACE_CHUNKS : WIDE_CHUNKS;
  for (int64_t j = 0; j < w.groups; j += groups)
    for (int64_t chunk = 0; chunk < chunks; chunk += most) f(Range{j, std::min(w.groups, j + groups), chunk, std::min(chunks, chunk + most)});
}

// ---- codes of a weight, unpacked ----
// `rows` rows of 8 columns of a block to (4, WIDE_CHUNKS, 16, 64): what they stand for, code - zero, or the codes of 8 bits.
template <int BITS> TARGET_AVX512 void unpack(const uint8_t* from, int64_t rows, const uint8_t* zeros, uint8_t* panel) {
  __m512i zero[4];
  UNROLL for (int c = 0; c < 4; c++)
    zero[c] = BITS == 8 ? _mm512_setzero_si512()
                        : _mm512_mullo_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)zeros + c)), _mm512_set1_epi32(0x01010101));
  for (int64_t r = 0; r < rows; r++, from += TILE * BITS, panel += 2 * TILE_COLUMNS) {
    UNROLL for (int c = 0; c < 4; c++)
      UNROLL for (int half = 0; half < 2; half++)
        _mm512_storeu_si512(panel + c * WIDE_CHUNKS * TILE_BYTES + half * 64, _mm512_sub_epi8(codes_avx512<BITS>(from, c, half), zero[c]));
  }
}

// ---- products ----
template <int BITS, int C, int A, int B> ALWAYS_INLINE void dot() {
  if (BITS == 8) tile_dot_unsigned<C, A, B>();
  else tile_dot_signed<C, A, B>();
}
// One group's sums of 16 rows of codes and outputs 16 c on, added to total.
template <int BITS, int DIGITS>
TARGET_AVX512 ALWAYS_INLINE void add_group(const AmxRows& x, const Packed& w, const uint8_t* block, const int32_t* sums, int64_t row, int c, __m512* total) {
  const __m512 scale = scales_avx512(block + w.scale_offset, w.scale_dtype, c);
  const __m512i zero = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(block + w.zero_offset) + c));
  UNROLL for (int i = 0; i < TILE_ROWS / DIGITS; i++) {
    __m512 value;
    UNROLL for (int d = DIGITS - 1; d >= 0; d--) {
      __m512i sum = _mm512_loadu_si512(sums + (i * DIGITS + d) * TILE_ROWS);
      if (BITS == 8) sum = _mm512_add_epi32(sum, _mm512_mullo_epi32(zero, _mm512_set1_epi32(x.minus_sum[row * TILE_ROWS + i * DIGITS + d])));
      value = d == DIGITS - 1 ? _mm512_cvtepi32_ps(sum) : _mm512_fmadd_ps(value, _mm512_set1_ps(256), _mm512_cvtepi32_ps(sum));
    }
    if (DIGITS > 1) value = _mm512_mul_ps(value, _mm512_set1_ps(x.step[row * (TILE_ROWS / DIGITS) + i]));
    total[i] = _mm512_fmadd_ps(value, scale, total[i]);
  }
}

template <int BITS, int DIGITS> struct Tiles {
  static constexpr int ROWS = TILE_ROWS / DIGITS;
  const AmxRows& x;
  const Packed& w;
  const int64_t tile;
  uint8_t* const panel;  // (4, WIDE_CHUNKS, 16, 64)
  int32_t* const sums;   // (max(blocks, 2 NARROW_CHUNKS), 4, 16, 16)
  float* const out;      // (blocks * ROWS, 64)

  // The codes of a range: of its chunk i and outputs 16 c on at + i * chunk + c * column, rows of 64 bytes `stride` apart; a group
  // more is `group` further. 8 bits are read where they are, but for groups of broken chunks.
  struct Codes {
    const uint8_t* at;
    int64_t chunk, group, column, stride;
  };
  TARGET_AVX512 Codes codes(const Range& r) const {
    const uint8_t* block = w.block(tile, r.first);
    if (BITS == 8 && in_place(w)) return Codes{block + r.from * TILE_BYTES * 4, TILE_BYTES * 4, w.block_bytes, 64, 256};
    uint8_t* to = panel;
    for (int64_t j = r.first; j < r.last; j++, block += w.block_bytes)
      for (int64_t chunk = r.from; chunk < r.to; chunk++, to += TILE_BYTES)
        unpack<BITS>(block + chunk * (TILE_COLUMNS / 8) * w.row_bytes, std::min<int64_t>(TILE_COLUMNS, w.group - chunk * TILE_COLUMNS) / 8,
                     block + w.zero_offset, to);
    return Codes{panel, TILE_BYTES, TILE_BYTES * x.chunks, WIDE_CHUNKS * TILE_BYTES, 64};
  }
  // Products of a group's chunks and 64 outputs side by side, added to the sums at `to`, (4, 16, 16), or to none.
  TARGET_AVX512 ALWAYS_INLINE void multiply(const int8_t* a, const uint8_t* b, int64_t chunks, const Codes& codes, bool fresh, int32_t* to) const {
    if (fresh) tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    else tile_load<0>(to, 64), tile_load<1>(to + LANES, 64), tile_load<2>(to + 2 * LANES, 64), tile_load<3>(to + 3 * LANES, 64);
    for (int64_t chunk = 0; chunk < chunks; chunk++, a += TILE_BYTES, b += codes.chunk) {
      tile_load<4>(a, TILE_COLUMNS);
      tile_load<5>(b, codes.stride), dot<BITS, 0, 4, 5>();
      tile_load<6>(b + codes.column, codes.stride), dot<BITS, 1, 4, 6>();
      tile_load<7>(b + 2 * codes.column, codes.stride), dot<BITS, 2, 4, 7>();
      tile_load<5>(b + 3 * codes.column, codes.stride), dot<BITS, 3, 4, 5>();
    }
    tile_store<0>(to, 64), tile_store<1>(to + LANES, 64), tile_store<2>(to + 2 * LANES, 64), tile_store<3>(to + 3 * LANES, 64);
  }
  // Sums of whole groups, (groups, 4, 16, 16), to the totals of outputs 16 c on.
  TARGET_AVX512 ALWAYS_INLINE void add(const Range& r, int64_t block, int c, const int32_t* from) const {
    float* to = out + block * ROWS * TILE + c * 16;
    __m512 total[ROWS];
    UNROLL for (int i = 0; i < ROWS; i++) total[i] = _mm512_loadu_ps(to + i * TILE);
    const uint8_t* at = w.block(tile, r.first);
    for (int64_t j = r.first; j < r.last; j++, at += w.block_bytes)
      add_group<BITS, DIGITS>(x, w, at, from + ((j - r.first) * 4 + c) * LANES, block * w.groups + j, c, total);
    UNROLL for (int i = 0; i < ROWS; i++) _mm512_storeu_ps(to + i * TILE, total[i]);
  }
  // The sums of a block are added while the next one's are made: tiles and registers then work at the same time.
  TARGET_AVX512 void multiply(const Range& r, const Codes& codes, const int8_t* a) const {
    const int64_t chunks = r.to - r.from, groups = r.last - r.first;
    const bool first = r.from == 0, done = r.to == x.chunks;
    // What will be unpacked is fetched meanwhile. What is read in place comes sooner without: to ask for it costs more than it saves.
    const int64_t bytes = groups * (done ? w.block_bytes : chunks * (TILE_COLUMNS / 8) * w.row_bytes);
    const int64_t lines = in_place(w) ? 0 : (bytes / 64 + 4 * x.blocks - 1) / (4 * x.blocks);
    const char* fetch = (const char*)w.block(tile, r.first) + r.from * (TILE_COLUMNS / 8) * w.row_bytes + std::max(bytes, FETCHED);
    int32_t* before = nullptr;
    for (int64_t block = 0; block < x.blocks; block++) {
      int32_t* to = sums + (first && done ? block % 2 * NARROW_CHUNKS : block) * 4 * LANES;
      for (int c = 0; c < 4; c++) {
        for (int64_t line = 0; line < lines; line++, fetch += 64) _mm_prefetch(fetch, _MM_HINT_T1);
        for (int64_t j = groups * c / 4; j < groups * (c + 1) / 4; j++, a += chunks * TILE_BYTES)
          multiply(a, codes.at + j * codes.group, chunks, codes, first, to + j * 4 * LANES);
        if (before) add(r, block - 1, c, before);
      }
      if (done) before = to;
    }
    if (before) for (int c = 0; c < 4; c++) add(r, x.blocks - 1, c, before);
  }
  TARGET_AVX512 void run() const {
    memset(out, 0, size_t(x.blocks * ROWS * TILE) * 4);
    tiles_begin();
    const int8_t* a = x.codes;
    each_range(w, [&](const Range& r) {
      const Codes found = codes(r);
      multiply(r, found, a);
      a += x.blocks * r.chunks() * TILE_BYTES;
    });
    tiles_end();
  }
};

template <int BITS, int DIGITS> void run(const AmxRows& x, const Packed& w, int64_t tile, uint8_t* panel, int32_t* sums, float* out) {
  Tiles<BITS, DIGITS>{x, w, tile, panel, sums, out}.run();
}
template <int BITS> void run(const AmxRows& x, const Packed& w, int64_t tile, uint8_t* panel, int32_t* sums, float* out) {
  (x.digits == 1 ? run<BITS, 1> : x.digits == 3 ? run<BITS, 3> : run<BITS, 4>)(x, w, tile, panel, sums, out);
}

}  // namespace

bool amx_pays(const Int8Rows& x, const Packed& w, int64_t M) {
  const bool fits = w.bits == 8 || w.largest_zero <= 128;  // code - zero has 8 bits
  return fits && M * x.digits > 8 && w.group >= 32;
}

AmxRows amx_rows(const Int8Rows& x, const Packed& w, int64_t M) {
  const int64_t rows = TILE_ROWS / x.digits, padded = w.padded(), G = w.groups;
  AmxRows to{nullptr, nullptr, nullptr, x.digits, (M + rows - 1) / rows, chunks_of(w)};
  const int64_t groups = to.blocks * G, codes = groups * to.chunks * TILE_BYTES, bytes = codes + groups * (TILE_ROWS + rows) * 4;
  int8_t* at = (int8_t*)scratch(4, size_t(bytes));
  int32_t* sum = (int32_t*)(at + codes);
  float* step = (float*)(sum + groups * TILE_ROWS);
  memset(at, 0, size_t(bytes));
  to.codes = at, to.minus_sum = sum, to.step = step;
  each_range(w, [&](const Range& r) {
    for (int64_t block = 0; block < to.blocks; block++)
      for (int64_t j = r.first; j < r.last; j++)
        for (int64_t chunk = r.from; chunk < r.to; chunk++, at += TILE_BYTES) {
          const int64_t k = chunk * TILE_COLUMNS, count = std::min<int64_t>(TILE_COLUMNS, w.group - k);
          for (int64_t i = 0, from = block * rows * x.digits; i < rows * x.digits && from < M * x.digits; i++, from++)
            memcpy(at + i * TILE_COLUMNS, x.codes + from * padded + j * w.group + k, size_t(count));
        }
  });
  for (int64_t m = 0; m < M; m++)
    for (int64_t j = 0; j < G; j++) {
      const int64_t row = m / rows * G + j, i = m % rows;
      for (int64_t d = 0; d < x.digits; d++) sum[row * TILE_ROWS + i * x.digits + d] = x.minus_sum[(m * x.digits + d) * G + j];
      if (x.digits > 1) step[row * rows + i] = x.step[m * G + j];
    }
  return to;
}

float* amx_tile(const AmxRows& x, const Packed& w, int64_t tile) {
  const int64_t panel = WIDE_CHUNKS * 4 * TILE_BYTES, sums = std::max(x.blocks, 2 * NARROW_CHUNKS) * 4 * TILE_BYTES;
  const int64_t out = x.blocks * (TILE_ROWS / x.digits) * TILE * 4;
  uint8_t* memory = (uint8_t*)scratch(7, size_t(panel + sums + out));
  float* to = (float*)(memory + panel + sums);
  if (w.group % TILE_COLUMNS) memset(memory, 0, size_t(panel));  // what isn't unpacked is multiplied by 0, and never another call's
  const auto f = w.bits == 2 ? run<2> : w.bits == 3 ? run<3> : w.bits == 4 ? run<4> : run<8>;
  f(x, w, tile, memory, (int32_t*)(memory + panel), to);
  return to;
}

}  // namespace compressor
#endif
