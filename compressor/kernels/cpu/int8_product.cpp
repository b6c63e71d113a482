#include "int8_amx.h"
#include "int8_avx2.h"
#include "int8_avx512.h"

#include <algorithm>

namespace compressor {
namespace {

constexpr int64_t INPUTS_A_THREAD = 256 << 10;  // rounded in 34 microseconds on Zen 4; for fewer, waking a thread costs more than it saves

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

void tile_scalar(const Int8Rows& x, const Packed& w, int64_t m, int64_t tile, float* out) {
  for (int n = 0; n < TILE; n++) {
    float total = 0;
    for (int64_t j = 0; j < w.groups; j++) {
      const uint8_t* b = w.block(tile, j);
      float value = 0;
      for (int64_t d = x.digits - 1; d >= 0; d--) {
        const int64_t row = m * x.digits + d;
        const int8_t* p = x.codes + row * w.padded() + j * w.group;
        int32_t sum = int32_t(b[w.zero_offset + n]) * x.minus_sum[row * w.groups + j];
        for (int64_t k = 0; k < w.group; k++) sum += get_code(b + k / 8 * w.row_bytes, w.bits, n, int(k % 8)) * p[k];
        value = d == x.digits - 1 ? float(sum) : std::fma(value, 256.f, float(sum));
      }
      if (x.digits > 1) value *= x.step[m * w.groups + j];
      total = std::fma(value, load_number(b + w.scale_offset, w.scale_dtype, n), total);
    }
    out[n] = x.digits > 1 ? total : total * x.step[m];
  }
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

void each_row(int64_t threads, int64_t M, int64_t K, const std::function<void(int64_t)>& f) {
  parallel(std::min(threads, M * K / INPUTS_A_THREAD), M, f);
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
  // After `begin`, rows from m on that `together` says go through a tile at once, by `multiply`.
  const auto in_turn = [&](auto&& begin, auto&& together, auto&& multiply) {
    each_tile(threads, parts, [&](const Part& part, int64_t tile) {
      float out[8 * TILE];
      begin(part.w, tile);
      for (int64_t m = 0; m < M;) {
        const int64_t rows = together(m);
        expect_outputs(part.to, part.w, x.first + m, rows, tile);
        multiply(part.w, m, rows, tile, out);
        for (int64_t i = 0; i < rows; i++) finish(part, m + i, tile, out + i * TILE);
        m += rows;
      }
    });
  };
#ifdef COMPRESSOR_X86
  if (level >= AVX512VNNI) {
    const Avx512Passes passes = avx512_passes(x, parts[0].w, M, level == AVX512VNNI);
    return in_turn([&](const Packed& w, int64_t tile) { avx512_begin(passes, w, tile); }, [&](int64_t m) { return passes.rows(m); },
                   [&](const Packed& w, int64_t m, int64_t rows, int64_t tile, float* out) { avx512_tile(passes, w, m, rows, tile, out); });
  }
  if (level >= AVX2) {
    const Avx2Rows panels = avx2_rows(x, parts[0].w, M, level == AVXVNNI);
    return in_turn([](const Packed&, int64_t) {}, [&](int64_t m) { return std::min(avx2_together(x), M - m); },
                   [&](const Packed& w, int64_t m, int64_t rows, int64_t tile, float* out) { avx2_tile(panels, w, m, rows, tile, out); });
  }
#endif
  in_turn([](const Packed&, int64_t) {}, [](int64_t) { return int64_t(1); },
          [&](const Packed& w, int64_t m, int64_t, int64_t tile, float* out) { tile_scalar(x, w, m, tile, out); });
}

}  // namespace compressor
