#include "float_product.h"

#include <algorithm>

namespace compressor {
namespace {

constexpr int64_t PANEL_ROWS = 6, LANES = 16;    // of a tile: its sums fill 12 of AVX2's 16 registers
constexpr int64_t CHUNK = 128;                   // of k: of the weights 64 outputs are 32 KiB
constexpr int64_t BLOCK_ROWS = 64 * PANEL_ROWS;  // of x at once: a chunk of them and their outputs stay in the second-level cache

template <int R> void tile_scalar(const float* a, const float* b, int64_t count, float* c, int64_t stride) {
  for (int r = 0; r < R; r++)
    for (int l = 0; l < LANES; l++) {
      float sum = 0;
      for (int64_t k = 0; k < count; k++) sum = std::fma(a[k * PANEL_ROWS + r], b[k * LANES + l], sum);
      c[r * stride + l] += sum;
    }
}

#ifdef COMPRESSOR_X86
template <int R> TARGET_AVX2 void tile_avx2(const float* a, const float* b, int64_t count, float* c, int64_t stride) {
  __m256 sum[R][2];
  UNROLL for (int r = 0; r < R; r++) sum[r][0] = sum[r][1] = _mm256_setzero_ps();
  for (int r = 0; r < R; r++) _mm_prefetch((const char*)(c + r * stride), _MM_HINT_T0);
  for (int64_t k = 0; k < count; k++, a += PANEL_ROWS, b += 16) {
    const __m256 low = _mm256_loadu_ps(b), high = _mm256_loadu_ps(b + 8);
    UNROLL for (int r = 0; r < R; r++) {
      const __m256 x = _mm256_broadcast_ss(a + r);
      sum[r][0] = _mm256_fmadd_ps(x, low, sum[r][0]);
      sum[r][1] = _mm256_fmadd_ps(x, high, sum[r][1]);
    }
  }
  UNROLL for (int r = 0; r < R; r++) {
    float* to = c + r * stride;
    _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), sum[r][0]));
    _mm256_storeu_ps(to + 8, _mm256_add_ps(_mm256_loadu_ps(to + 8), sum[r][1]));
  }
}
#endif

// c (rows, LANES) += the sum over k < count of a[k][r] b[k][lane]: a (count, PANEL_ROWS), b (count, LANES), rows of c `stride` apart.
using FloatTile = void (*)(const float* a, const float* b, int64_t count, float* c, int64_t stride);
FloatTile tile_of(int64_t level, int64_t rows) {
#ifdef COMPRESSOR_X86
  static const FloatTile avx2[] = {tile_avx2<1>, tile_avx2<2>, tile_avx2<3>, tile_avx2<4>, tile_avx2<5>, tile_avx2<6>};
  if (level >= AVX2) return avx2[rows - 1];
#endif
  (void)level;
  static const FloatTile scalar[] = {tile_scalar<1>, tile_scalar<2>, tile_scalar<3>, tile_scalar<4>, tile_scalar<5>, tile_scalar<6>};
  return scalar[rows - 1];
}

// Columns [k, k + count) of group j for the 64 outputs of a tile, as floats b (TILE / LANES, count, LANES).
void dequantize_scalar(const Packed& w, int64_t tile, int64_t j, int64_t k, int64_t count, float* b) {
  const uint8_t* block = w.block(tile, j);
  for (int n = 0; n < TILE; n++) {
    const float scale = load_number(block + w.scale_offset, w.scale_dtype, n), zero = block[w.zero_offset + n];
    for (int64_t i = 0; i < count; i++) {
      const float code = get_code(block + (k + i) / 8 * w.row_bytes, w.bits, n, int((k + i) % 8));
      b[(n / LANES * count + i) * LANES + n % LANES] = (code - zero) * scale;
    }
  }
}
#ifdef COMPRESSOR_X86
template <int BITS> TARGET_AVX2 void dequantize_avx2(const Packed& w, int64_t tile, int64_t j, int64_t k, int64_t count, float* b) {
  const uint8_t* block = w.block(tile, j);
  const __m256i low = _mm256_set1_epi32(255);
  for (int c = 0; c < TILE / 8; c++) {
    const __m256i zero = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(block + w.zero_offset + c * 8)));
    const __m256 scale = scales_avx2(block + w.scale_offset, w.scale_dtype, c);
    float* to = b + c / 2 * count * LANES + c % 2 * 8;
    for (int64_t i = 0; i < count; i += 8)
      for (int half = 0; half < 2; half++) {
        const __m256i four = codes_avx2<BITS>(block + (k + i) / 8 * (TILE * BITS), c, half);
        for (int q = 0; q < 4; q++, to += LANES) {
          const __m256i code = _mm256_and_si256(_mm256_srli_epi32(four, q * 8), low);
          _mm256_storeu_ps(to, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(code, zero)), scale));
        }
      }
  }
}
#endif
using Dequantize = void (*)(const Packed& w, int64_t tile, int64_t j, int64_t k, int64_t count, float* b);
Dequantize dequantize_of(int64_t level, int64_t bits) {
#ifdef COMPRESSOR_X86
  if (level >= AVX2) return bits == 2 ? dequantize_avx2<2> : bits == 3 ? dequantize_avx2<3> : bits == 4 ? dequantize_avx2<4> : dequantize_avx2<8>;
#endif
  (void)level, (void)bits;
  return dequantize_scalar;
}

// Rows [m, m + PANEL_ROWS) of x as columns: a (padded, PANEL_ROWS), 0 beyond K and M.
void take_panel(int64_t level, const void* x, int64_t x_dtype, int64_t m, int64_t M, int64_t K, int64_t padded, float* a) {
  float* rows = (float*)scratch(1, size_t(PANEL_ROWS * K) * 4);
  const float* of[PANEL_ROWS];
  for (int64_t r = 0; r < PANEL_ROWS; r++) {
    if (m + r < M) of[r] = as_floats(level, x, x_dtype, (m + r) * K, rows + r * K, K);
    else of[r] = rows + r * K, memset(rows + r * K, 0, size_t(K) * 4);
  }
  for (int64_t k = 0; k < K; k++)
    for (int64_t r = 0; r < PANEL_ROWS; r++) a[k * PANEL_ROWS + r] = of[r][k];
  memset(a + K * PANEL_ROWS, 0, size_t((padded - K) * PANEL_ROWS) * 4);
}

}  // namespace

void float_products(int64_t level, int64_t threads, const void* x, int64_t x_dtype, const std::vector<Part>& parts, int64_t M,
                    const std::function<void(const Part& part, int64_t m, int64_t tile, float* values)>& finish) {
  if (parts.empty()) return;
  const Packed& first = parts[0].w;
  const int64_t K = first.in_features, padded = first.padded();
  const Dequantize dequantize = dequantize_of(level, first.bits);
  for (int64_t m0 = 0; m0 < M; m0 += BLOCK_ROWS) {
    const int64_t here = std::min(BLOCK_ROWS, M - m0), panels = (here + PANEL_ROWS - 1) / PANEL_ROWS;
    float* a = (float*)scratch(0, size_t(panels * PANEL_ROWS * padded) * 4);
    parallel(threads, panels, [&](int64_t p) {
      take_panel(level, x, x_dtype, m0 + p * PANEL_ROWS, M, K, padded, a + p * PANEL_ROWS * padded);
    });
    each_tile(threads, parts, [&](const Part& part, int64_t tile) {
      const Packed& w = part.w;
      float* b = (float*)scratch(2, size_t(CHUNK * TILE) * 4);
      float* c = (float*)scratch(3, size_t(here * TILE) * 4);
      memset(c, 0, size_t(here * TILE) * 4);
      for (int64_t j = 0; j < w.groups; j++)
        for (int64_t k = 0; k < w.group; k += CHUNK) {
          const int64_t count = std::min(CHUNK, w.group - k);
          dequantize(w, tile, j, k, count, b);
          for (int64_t s = 0; s < TILE / LANES; s++)
            for (int64_t p = 0; p < panels; p++) {
              const FloatTile add = tile_of(level, std::min(PANEL_ROWS, here - p * PANEL_ROWS));
              add(a + (p * padded + j * w.group + k) * PANEL_ROWS, b + s * count * LANES, count, c + p * PANEL_ROWS * TILE + s * LANES, TILE);
            }
        }
      for (int64_t m = 0; m < here; m++) finish(part, m0 + m, tile, c + m * TILE);
    });
  }
}

}  // namespace compressor
