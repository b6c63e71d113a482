#include "int8_amx.h"
#include "int8_avx2.h"

#include <algorithm>

namespace compressor {
namespace {

ALWAYS_INLINE void sums_of(const int8_t* codes, int32_t* minus_sum, int64_t groups, int64_t group) {
  for (int64_t j = 0; j < groups; j++) {
    int32_t sum = 0;
    for (int64_t k = 0; k < group; k++) sum += codes[j * group + k];
    minus_sum[j] = -sum;
  }
}
void sums_scalar(const int8_t* codes, int32_t* s, int64_t groups, int64_t group) { sums_of(codes, s, groups, group); }
#ifdef COMPRESSOR_X86
TARGET_AVX2 void sums_avx2(const int8_t* codes, int32_t* s, int64_t groups, int64_t group) { sums_of(codes, s, groups, group); }
TARGET_AVX512 void sums_avx512(const int8_t* codes, int32_t* minus_sum, int64_t groups, int64_t group) {
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

#ifdef COMPRESSOR_AMX
TARGET_AVX512 void times_step(float* out, float step) {
  for (int n = 0; n < TILE; n++) out[n] *= step;
}
#endif

// What a tile's kernel reads of a row m of inputs in group j.
struct Row {
  const int8_t* codes;
  const int32_t* minus_sum;
  Row(const Int8Rows& x, const Packed& w, int64_t m, int64_t j)
      : codes(x.codes + m * x.digits * w.padded() + j * w.group), minus_sum(x.minus_sum + m * x.digits * w.groups + j) {}
};

void tile_scalar(const Int8Rows& x, const Packed& w, int64_t m, int64_t tile, float* out) {
  for (int n = 0; n < TILE; n++) {
    float total = 0;
    for (int64_t j = 0; j < w.groups; j++) {
      const uint8_t* b = w.block(tile, j);
      const Row row(x, w, m, j);
      float value = 0;
      for (int64_t d = x.digits - 1; d >= 0; d--) {
        const int8_t* p = row.codes + d * w.padded();
        int32_t sum = int32_t(b[w.zero_offset + n]) * row.minus_sum[d * w.groups];
        for (int64_t k = 0; k < w.group; k++) sum += get_code(b + k / 8 * w.row_bytes, w.bits, n, int(k % 8)) * p[k];
        value = d == x.digits - 1 ? float(sum) : std::fma(value, 256.f, float(sum));
      }
      if (x.digits > 1) value *= x.step[m * w.groups + j];
      total = std::fma(value, load_number(b + w.scale_offset, w.scale_dtype, n), total);
    }
    out[n] = x.digits > 1 ? total : total * x.step[m];
  }
}

#ifdef COMPRESSOR_X86
// ---- 16 outputs a register ----
constexpr int64_t TWO_FIT = 400 << 10;  // bytes of a tile of which two stay in a second-level cache of 1 MiB, beside the inputs
// ROWS * DIGITS * 4 integer sums in registers; columns 0 to 3 of a row of 8, then 4 to 7. 24 sums at once were slower.
// The first rows stream the tile from memory; `share` of `shares` later ones fetch their part of the next tile meanwhile. What is asked for
// far ahead goes into the first-level cache if `near`: faster on Zen 4, an eighth slower on processors with AMX.
template <int BITS, int ROWS, int DIGITS>
TARGET_AVX512 void tile_avx512(const Int8Rows& x, const Packed& w, int64_t m0, int64_t tile, int64_t share, int64_t shares, bool near, float* out) {
  constexpr int COUNT = ROWS * DIGITS;
  const int64_t stride = w.padded(), next = w.groups * w.block_bytes;
  __m512 total[ROWS][4];
  for (auto& r : total) for (auto& v : r) v = _mm512_setzero_ps();
  const uint8_t* b = w.block(tile, 0);
  for (int64_t j = 0; j < w.groups; j++) {
    const Row row(x, w, m0, j);
    __m512i sum[COUNT][4];
    UNROLL for (int c = 0; c < 4; c++) {
      const __m512i zero = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(b + w.zero_offset) + c));
      UNROLL for (int i = 0; i < COUNT; i++) {  // |minus_sum| <= 128 * 255 < 2^15: one multiply of 16 bits is exact
        const __m512i s = _mm512_set1_epi32(row.minus_sum[i * w.groups]);
        sum[i][c] = w.group < 256 ? _mm512_madd_epi16(zero, s) : _mm512_mullo_epi32(zero, s);
      }
    }
    const int8_t* p = row.codes;
    const uint8_t* end = b + w.scale_offset;
    const bool first = share < 0, fetch = j >= w.groups * share / shares && j < w.groups * (share + 1) / shares && !first;
    for (; b < end; b += TILE * BITS, p += 8) {
      if (first && near) for (int c = 0; c < BITS; c++) _mm_prefetch((const char*)b + 6144 + c * 64, _MM_HINT_T0);
      if (first && !near) for (int c = 0; c < BITS; c++) _mm_prefetch((const char*)b + 6144 + c * 64, _MM_HINT_T1);
      if (fetch) for (int c = 0; c < BITS; c++) _mm_prefetch((const char*)b + next + c * 64, _MM_HINT_T1);
      UNROLL for (int half = 0; half < 2; half++) {
        __m512i v[4];
        UNROLL for (int c = 0; c < 4; c++) v[c] = codes_avx512<BITS>(b, c, half);
        UNROLL for (int i = 0; i < COUNT; i++) {
          int32_t word;
          memcpy(&word, p + i * stride + half * 4, 4);
          const __m512i xi = _mm512_set1_epi32(word);
          UNROLL for (int c = 0; c < 4; c++) add_dot(sum[i][c], v[c], xi);
        }
      }
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
    if (first) for (int64_t at = w.scale_offset; at < w.block_bytes; at += 64) _mm_prefetch((const char*)b + 6144 + at - w.scale_offset, _MM_HINT_T1);
    b += w.block_bytes - w.scale_offset;
  }
  UNROLL for (int m = 0; m < ROWS; m++)
    UNROLL for (int c = 0; c < 4; c++)
      _mm512_storeu_ps(out + m * TILE + c * 16, DIGITS > 1 ? total[m][c] : _mm512_mul_ps(total[m][c], _mm512_set1_ps(x.step[m0 + m])));
}
#endif

// The kernel of a level and width: writes 64 outputs of rows m on, and says of how many.
using Kernel = int64_t (*)(const Int8Rows& x, const Packed& w, int64_t m, int64_t M, int64_t tile, float* out);
int64_t scalar(const Int8Rows& x, const Packed& w, int64_t m, int64_t, int64_t tile, float* out) { return tile_scalar(x, w, m, tile, out), 1; }
#ifdef COMPRESSOR_X86
template <int BITS, bool NEAR> int64_t avx512(const Int8Rows& x, const Packed& w, int64_t m, int64_t M, int64_t tile, float* out) {
  const int64_t rows = x.digits == 1 ? std::min<int64_t>(4, M - m) : 1, step = x.digits == 1 ? 4 : 1;
  const int64_t shares = std::max<int64_t>((M + step - 1) / step - 1, 1);
  const bool fits = w.groups * w.block_bytes <= TWO_FIT;
  const int64_t share = m == 0 ? -1 : fits ? m / step - 1 : shares;
  using Tile = void (*)(const Int8Rows&, const Packed&, int64_t, int64_t, int64_t, int64_t, bool, float*);
  const Tile one[] = {tile_avx512<BITS, 1, 1>, tile_avx512<BITS, 2, 1>, tile_avx512<BITS, 3, 1>, tile_avx512<BITS, 4, 1>};
  const Tile run = x.digits == 1 ? one[rows - 1] : x.digits == 3 ? tile_avx512<BITS, 1, 3> : tile_avx512<BITS, 1, 4>;
  run(x, w, m, tile, share, shares, NEAR, out);
  return rows;
}
#endif
Kernel kernel_of(int64_t level, int64_t bits) {
#ifdef COMPRESSOR_X86
  if (level == AMX) return bits == 2 ? avx512<2, false> : bits == 3 ? avx512<3, false> : bits == 4 ? avx512<4, false> : avx512<8, false>;
  if (level == AVX512VNNI) return bits == 2 ? avx512<2, true> : bits == 3 ? avx512<3, true> : bits == 4 ? avx512<4, true> : avx512<8, true>;
#endif
  (void)level, (void)bits;
  return scalar;
}

}  // namespace

void minus_sums(int64_t level, const int8_t* codes, int32_t* minus_sum, int64_t groups, int64_t group) {
#ifdef COMPRESSOR_X86
  if (level >= AVX512VNNI) return sums_avx512(codes, minus_sum, groups, group);
  if (level >= AVX2) return sums_avx2(codes, minus_sum, groups, group);
#endif
  sums_scalar(codes, minus_sum, groups, group);
}

int64_t open_parts(std::vector<Part>& parts, int64_t level, const PartGiven* given, int64_t count, int64_t y_dtype, int64_t M, int64_t K,
                   int64_t bits, int64_t group) {
  if (M < 0 || count < 0) return BAD_SHAPE;
  for (int64_t i = 0; i < count; i++) {
    const PartGiven& g = given[i];
    Part part;
    if (const int64_t error = open_packed(part.w, reinterpret_cast<const uint8_t*>(g.packed), g.bytes, g.out_features, K, bits, group)) return error;
    if (!sums_fit(part.w)) return BAD_SHAPE;
    part.to = Output{reinterpret_cast<void*>(g.y), y_dtype, level, reinterpret_cast<const void*>(g.bias), g.bias_dtype};
    parts.push_back(part);
  }
  return OK;
}

void each_tile(int64_t threads, const std::vector<Part>& parts, const std::function<void(const Part& part, int64_t tile)>& f) {
  int64_t tiles = 0;
  for (const Part& part : parts) tiles += part.w.tiles;
  parallel(threads, tiles, [&](int64_t tile) {
    size_t p = 0;
    for (; tile >= parts[p].w.tiles; p++) tile -= parts[p].w.tiles;
    f(parts[p], tile);
  });
}

void int8_products(int64_t level, int64_t threads, const Int8Rows& x, const std::vector<Part>& parts, int64_t M,
                   const std::function<void(const Part& part, int64_t m, int64_t tile, float* values)>& finish) {
  if (parts.empty()) return;
#ifdef COMPRESSOR_AMX
  if (level == AMX && amx_pays(x, parts[0].w, M)) {
    const AmxRows rows = amx_rows(x, parts[0].w, M);
    return each_tile(threads, parts, [&](const Part& part, int64_t tile) {
      float* out = amx_tile(rows, part.w, tile);
      for (int64_t m = 0; m < M; m++, out += TILE) {
        if (x.digits == 1) times_step(out, x.step[m]);
        finish(part, m, tile, out);
      }
    });
  }
#endif
  const auto in_turn = [&](auto&& multiply) {
    each_tile(threads, parts, [&](const Part& part, int64_t tile) {
      float out[8 * TILE];
      for (int64_t m = 0; m < M;) {
        const int64_t done = multiply(part.w, m, tile, out);
        for (int64_t i = 0; i < done; i++) finish(part, m + i, tile, out + i * TILE);
        m += done;
      }
    });
  };
#ifdef COMPRESSOR_X86
  if (level == AVX2 || level == AVXVNNI) {
    const Avx2Rows rows = avx2_rows(x, parts[0].w, M, level == AVXVNNI);
    return in_turn([&](const Packed& w, int64_t m, int64_t tile, float* out) { return avx2_tile(rows, w, m, M, tile, out); });
  }
#endif
  const Kernel kernel = kernel_of(level, parts[0].w.bits);
  in_turn([&](const Packed& w, int64_t m, int64_t tile, float* out) { return kernel(x, w, m, M, tile, out); });
}

}  // namespace compressor
