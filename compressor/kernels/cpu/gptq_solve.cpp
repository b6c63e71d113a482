// GPTQ: rounds the columns of a block one by one. Rows of the weight are the lanes; a tile of rows and its errors stay in L1.
// Every element gets the operations of the torch version in the same order: products and differences are rounded
// separately, true division, half to even. So the codes are equal for every level and number of threads.
#include <algorithm>

#include "common.h"
#include "ops.h"

using namespace compressor;

namespace {

constexpr int PANEL = 4;   // columns that are updated together
constexpr int WIDTH = 16;  // lanes of a vector; the compiler splits it if registers are narrower
typedef float Vector __attribute__((vector_size(4 * WIDTH)));

struct Task {
  float *work, *errors, *codes;
  const float *upper, *scale, *zero;
  const int64_t* group_of;
  int64_t rows, begin, stop, end;
  float low, high;
};

// LANES rows from `first` on: rounds columns [begin, stop) and adds their errors to columns [stop, end).
template <int LANES> ALWAYS_INLINE void solve_rows(const Task& t, int64_t first, float* errors) {
  constexpr int V = LANES / WIDTH;
  const int64_t lanes = std::min<int64_t>(LANES, t.rows - first);
  const size_t bytes = size_t(lanes) * 4;
  for (int64_t c = t.begin; c < t.end; c += PANEL) {
    const int width = int(std::min<int64_t>(PANEL, t.end - c));
    alignas(64) float values[PANEL][LANES] = {};
    Vector sums[PANEL][V];
    for (int q = 0; q < width; q++) memcpy(values[q], t.work + (c + q) * t.rows + first, bytes);
    memcpy(sums, values, sizeof sums);
    const int64_t known = std::min(c, t.stop);  // errors before this panel
    if (width == PANEL) {
      for (int64_t i = t.begin; i < known; i++) {
        const Vector* error = reinterpret_cast<const Vector*>(errors + (i - t.begin) * LANES);
        const float* factor = t.upper + i * t.end + c;
        for (int q = 0; q < PANEL; q++)
          for (int v = 0; v < V; v++) sums[q][v] -= error[v] * factor[q];
      }
    } else {
      for (int64_t i = t.begin; i < known; i++) {
        const Vector* error = reinterpret_cast<const Vector*>(errors + (i - t.begin) * LANES);
        for (int q = 0; q < width; q++)
          for (int v = 0; v < V; v++) sums[q][v] -= error[v] * t.upper[i * t.end + c + q];
      }
    }
    memcpy(values, sums, sizeof sums);
    for (int q = 0; q < width; q++) {
      const int64_t j = c + q;
      float* value = values[q];
      if (j >= t.stop) {
        memcpy(t.work + j * t.rows + first, value, bytes);
        continue;
      }
      alignas(64) float code[LANES], scale[LANES], zero[LANES] = {};
      std::fill(scale, scale + LANES, 1.0f);
      memcpy(scale, t.scale + t.group_of[j] * t.rows + first, bytes);
      if (t.zero) memcpy(zero, t.zero + t.group_of[j] * t.rows + first, bytes);
      float* error = errors + (j - t.begin) * LANES;
      const float pivot = t.upper[j * t.end + j];
      for (int l = 0; l < LANES; l++) {
        float rounded = __builtin_rintf(value[l] / scale[l]);
        if (t.zero) rounded += zero[l];
        rounded = rounded < t.low ? t.low : rounded;  // NaN stays
        rounded = rounded > t.high ? t.high : rounded;
        code[l] = rounded;
        const float level = t.zero ? rounded - zero[l] : rounded;
        error[l] = (value[l] - level * scale[l]) / pivot;
      }
      memcpy(t.codes + j * t.rows + first, code, bytes);
      memcpy(t.errors + j * t.rows + first, error, bytes);
      for (int p = q + 1; p < width; p++) {
        const float factor = t.upper[j * t.end + c + p];
        for (int l = 0; l < LANES; l++) values[p][l] -= error[l] * factor;
      }
    }
  }
}

void solve_scalar(const Task& t, int64_t first, float* errors) { solve_rows<TILE>(t, first, errors); }
#ifdef COMPRESSOR_X86
TARGET_AVX2 void solve_avx2(const Task& t, int64_t first, float* errors) {
  for (int64_t r = first; r < std::min(first + TILE, t.rows); r += WIDTH) solve_rows<WIDTH>(t, r, errors);
}
TARGET_AVX512 void solve_avx512(const Task& t, int64_t first, float* errors) { solve_rows<TILE>(t, first, errors); }
#endif

}  // namespace

extern "C" int64_t gptq_solve(int64_t level, int64_t threads, float* work, float* errors, float* codes, const float* upper,
                              const float* scale, const float* zero, const int64_t* group_of, int64_t rows, int64_t groups,
                              int64_t begin, int64_t stop, int64_t end, double low, double high) {
  if (rows < 0 || begin < 0 || begin > stop || stop > end || end > (1 << 16)) return BAD_SHAPE;
  for (int64_t j = begin; j < stop; j++)
    if (group_of[j] < 0 || group_of[j] >= groups) return BAD_SHAPE;
  if (!level_is_there(level)) return BAD_LEVEL;
  const Task task{work, errors, codes, upper, scale, zero, group_of, rows, begin, stop, end, float(low), float(high)};
  auto f = solve_scalar;
#ifdef COMPRESSOR_X86
  if (level >= AVX2) f = solve_avx2;
  if (level >= AVX512VNNI) f = solve_avx512;
#endif
  parallel(threads, (rows + TILE - 1) / TILE, [&](int64_t tile) {
    f(task, tile * TILE, static_cast<float*>(scratch(0, size_t(stop - begin) * TILE * 4)));
  });
  return OK;
}
