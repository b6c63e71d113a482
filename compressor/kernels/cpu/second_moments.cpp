// Adds x^T x of bfloat16 inputs to the upper triangle of a float32 matrix. Products of two bfloat16 are exact in float32; the sum over
// the tokens of a call is in float32, two tokens after each other in the instruction of AVX512-BF16, then it is added to the matrix.
// Every level and number of threads gives the same bits, except where inputs or products are subnormal: the instruction takes them as 0.
#include <algorithm>

#include "common.h"
#include "ops.h"
#if defined(COMPRESSOR_AVXVNNI) && !defined(AVX512_EMULATED)
#define COMPRESSOR_AVX512BF16 1
#define TARGET_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")))
#endif

using namespace compressor;

namespace {

// packed = [panels of PANEL columns][pairs of tokens][PANEL] of two numbers: the even token's in the low half. 0 beyond the last
// token and column. What a tile of sums reads lies in the first two caches.
constexpr int64_t PANEL = 48, ROWS = 8, TILE_PANELS = 5, SIDE = PANEL * TILE_PANELS, DEPTH = 128;

void pack(const uint16_t* x, uint32_t* packed, int64_t tokens, int64_t columns, int64_t panel) {
  const int64_t pairs = (tokens + 1) / 2, first = panel * PANEL, width = std::min(PANEL, columns - first);
  uint32_t* to = packed + panel * pairs * PANEL;
  for (int64_t pair = 0; pair < pairs; pair++, to += PANEL) {
    const uint16_t* even = x + 2 * pair * columns + first;
    if (2 * pair + 1 < tokens) {
      const uint16_t* odd = even + columns;
      for (int64_t c = 0; c < width; c++) to[c] = even[c] | uint32_t(odd[c]) << 16;
    } else {
      for (int64_t c = 0; c < width; c++) to[c] = even[c];
    }
    std::fill(to + width, to + PANEL, 0u);
  }
}

// sums (ROWS of SIDE) += columns a .. a + ROWS of one panel times the PANEL columns of b, over `pairs` of tokens.
using Multiply = void (*)(const uint32_t* a, const uint32_t* b, int64_t pairs, float* sums);
void multiply_scalar(const uint32_t* a, const uint32_t* b, int64_t pairs, float* sums) {
  for (int64_t r = 0; r < ROWS; r++)
    for (int64_t c = 0; c < PANEL; c++) {
      float sum = sums[r * SIDE + c];
      for (int64_t p = 0; p < pairs; p++) {
        const uint32_t first = a[p * PANEL + r], second = b[p * PANEL + c];
        sum = sum + from_bits(first & 0xffff0000) * from_bits(second & 0xffff0000);  // exact products
        sum = sum + from_bits(first << 16) * from_bits(second << 16);
      }
      sums[r * SIDE + c] = sum;
    }
}
#ifdef COMPRESSOR_AVX512BF16
TARGET_BF16 void multiply_bf16(const uint32_t* a, const uint32_t* b, int64_t pairs, float* sums) {
  constexpr int V = PANEL / 16;
  __m512 sum[ROWS][V];
  UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int v = 0; v < V; v++) sum[r][v] = _mm512_loadu_ps(sums + r * SIDE + v * 16);
  for (const uint32_t* end = b + pairs * PANEL; b < end; a += PANEL, b += PANEL) {
    __m512bh columns[V];
    UNROLL for (int v = 0; v < V; v++) columns[v] = (__m512bh)_mm512_loadu_si512(b + v * 16);
    UNROLL for (int r = 0; r < ROWS; r++) {
      const __m512bh row = (__m512bh)_mm512_set1_epi32(int32_t(a[r]));
      UNROLL for (int v = 0; v < V; v++) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], row, columns[v]);
    }
  }
  UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int v = 0; v < V; v++) _mm512_storeu_ps(sums + r * SIDE + v * 16, sum[r][v]);
}
#endif

}  // namespace

extern "C" int64_t has_bfloat16_products() {
#ifdef COMPRESSOR_AVX512BF16
  // On Zen 4 the instruction does twice the products of float32 in the same time, on Emerald Rapids two thirds of them (our measurements).
  return level_is_there(AVX512VNNI) && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_is("amd");
#else
  return 0;
#endif
}

extern "C" int64_t second_moments(int64_t level, int64_t threads, const uint16_t* x, uint32_t* packed, float* matrix, int64_t tokens,
                                  int64_t columns, int64_t stride, double keep, double weight) {
  if (tokens < 0 || columns < 0 || stride < columns) return BAD_SHAPE;
  if (!level_is_there(level)) return BAD_LEVEL;
  Multiply multiply = multiply_scalar;
#ifdef COMPRESSOR_AVX512BF16
  if (level >= AVX512VNNI && __builtin_cpu_supports("avx512bf16")) multiply = multiply_bf16;
#endif
  const int64_t panels = (columns + PANEL - 1) / PANEL, pairs = (tokens + 1) / 2, sides = (columns + SIDE - 1) / SIDE;
  parallel(threads, panels, [&](int64_t panel) { pack(x, packed, tokens, columns, panel); });
  parallel(threads, sides * (sides + 1) / 2, [&](int64_t task) {
    int64_t I = 0, J = task;  // tiles on and right of the diagonal, row by row
    for (; J >= sides - I; I++) J -= sides - I;
    J += I;
    float* sums = static_cast<float*>(scratch(0, size_t(SIDE * SIDE) * 4));
    std::fill(sums, sums + SIDE * SIDE, 0.f);
    const int64_t last_row = std::min(SIDE, columns - I * SIDE);
    for (int64_t p = 0; p < pairs; p += DEPTH)
      for (int64_t j = 0; j < TILE_PANELS && J * TILE_PANELS + j < panels; j++) {
        const int64_t right = J * SIDE + (j + 1) * PANEL;
        const uint32_t* b = packed + ((J * TILE_PANELS + j) * pairs + p) * PANEL;
        for (int64_t i = 0; i < last_row && I * SIDE + i < right; i += ROWS) {
          const int64_t panel = I * TILE_PANELS + i / PANEL;
          multiply(packed + (panel * pairs + p) * PANEL + i % PANEL, b, std::min(DEPTH, pairs - p), sums + i * SIDE + j * PANEL);
        }
      }
    const int64_t end = std::min((J + 1) * SIDE, columns);
    for (int64_t i = I * SIDE; i < I * SIDE + last_row; i++)
      for (int64_t j = std::max(i, J * SIDE); j < end; j++) {
        float& entry = matrix[i * stride + j];
        const float added = float(weight) * sums[(i - I * SIDE) * SIDE + j - J * SIDE];
        entry = keep == 0 ? added : float(keep) * entry + added;  // what isn't a number is forgotten too
      }
  });
  return OK;
}
