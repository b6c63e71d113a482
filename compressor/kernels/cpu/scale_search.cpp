// The scale of each group of a row with the least error: the extremes of the group, shrunk by factors of a coarse search and of a
// finer one around the best of those. A group's columns are the lanes, 16 sums that are then added 8, 4, 2 and 1 apart.
// Every element gets the same operations, each rounded separately, so the scales are equal for every level and number of threads.
#include <algorithm>
#include <limits>

#include "common.h"
#include "ops.h"

using namespace compressor;

namespace {

constexpr int WIDTH = 16;  // lanes of a vector; the compiler splits it if registers are narrower
typedef float Vector __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Integers __attribute__((vector_size(4 * WIDTH)));
constexpr float TO_INTEGER = 12582912.f;  // 1.5 * 2^23: what is added to it is rounded to an integer, half to even

struct Task {
  const float *weight, *importance;  // (rows, groups, size), (groups, size) or null
  float *scale, *zero;               // (rows, groups)
  int64_t groups, size, bits, symmetric, stored;
  double coarse, fine;  // steps of the factor
  int64_t steps;        // coarse ones; negative: the extremes alone
};
struct Grid { float scale, zero; };

// |x|^2.4 of x >= 0, within 2^-19 of it: x^2 times 2^(0.4 log2 x), by polynomials for log2 in [sqrt 1/2, sqrt 2) and for 2^f, |f| <= 1/2.
ALWAYS_INLINE void power(const Vector& x, Vector& result) {
  const Vector least = x < 1e-18f ? Vector{} + 1e-18f : x;
  Integers bits, whole;
  memcpy(&bits, &least, sizeof bits);
  const Integers exponent = (bits - 0x3f3504f3) >> 23;
  bits -= exponent << 23;
  Vector z, shifted;
  memcpy(&z, &bits, sizeof z);
  z -= 1.f;
  const Vector z2 = z * z;  // pairs of terms don't wait for each other
  const Vector log = (1.4427135f - 0.72113186f * z) + z2 * ((0.47934803f - 0.36749f * z) + z2 * (0.32215476f - 0.20659164f * z));
  const Vector y = 0.4f * (log * z + __builtin_convertvector(exponent, Vector));
  shifted = y + TO_INTEGER;
  const Vector f = y - (shifted - TO_INTEGER);
  const Vector f2 = f * f;
  const Vector two = (1.f + 0.69314724f * f) + f2 * ((0.24022107f + 0.055502973f * f) + f2 * (0.009676036f + 0.0013410004f * f));
  memcpy(&bits, &two, sizeof bits);
  memcpy(&whole, &shifted, sizeof whole);
  bits += whole << 23;  // the bits above the integer's are shifted out
  memcpy(&result, &bits, sizeof result);
  result *= x * x;
}
ALWAYS_INLINE float power(float x) {
  Vector result;
  power(Vector{} + x, result);
  return result[0];
}

// The scale as it is stored, never 0: rounded to nearest, or up where float16 is subnormal.
ALWAYS_INLINE float rounded_scale(float scale, int64_t stored) {
  if (stored == FLOAT16) {
    constexpr float NORMAL = 6.103515625e-5f, STEP = 5.9604644775390625e-8f;
    const float value = scale < NORMAL ? std::ceil(scale / STEP) * STEP : half_to_float(float_to_half(scale));
    return value < STEP ? STEP : value;
  }
  const float value = stored == BFLOAT16 ? bfloat16_to_float(float_to_bfloat16(scale)) : scale;
  return value < std::numeric_limits<float>::min() ? std::numeric_limits<float>::min() : value;
}
ALWAYS_INLINE float largest_scale(int64_t stored) {  // of a code of 1; without the last place
  if (stored == FLOAT16) return float(65504. * (1 - 0.0009765625));
  if (stored == BFLOAT16) return float(3.3895313892515355e38 * (1 - 0.0078125));
  return float(3.4028234663852886e38 * (1 - 1.1920928955078125e-7));
}
// Scale and zero point of a range low <= 0 <= high.
ALWAYS_INLINE Grid grid_of_range(const Task& t, float low, float high) {
  const float levels = float((1 << t.bits) - 1), half = float(1 << (t.bits - 1));
  const float spread = t.symmetric ? 2 * std::max(-low, high) : high - low;
  float scale = spread == 0 ? 1.f : rounded_scale(spread / levels, t.stored), below = half;  // codes between zero and the least value
  if (!t.symmetric && spread != 0) below = std::min(std::max(__builtin_rintf(-low / scale), 0.f), levels);
  // The lowest or highest code times the scale must not overflow the stored type.
  const float most = 1 / std::max(below, levels - below) * largest_scale(t.stored);
  if (scale > most) scale = t.stored == FLOAT16 ? half_to_float(float_to_half(most)) : t.stored == BFLOAT16 ? bfloat16_to_float(float_to_bfloat16(most)) : most;
  return {scale, below - half};
}

template <int HALF, class F> ALWAYS_INLINE float reduced(float* lanes, F f) {
  if constexpr (HALF == 0) return lanes[0];
  else {
    float half[HALF];
    UNROLL for (int l = 0; l < HALF; l++) half[l] = f(lanes[l], lanes[l + HALF]);
    return reduced<HALF / 2>(half, f);
  }
}
template <class F> ALWAYS_INLINE float reduced(const Vector& v, F f) {
  float lanes[WIDTH];
  memcpy(lanes, &v, sizeof lanes);
  return reduced<WIDTH / 2>(lanes, f);
}
ALWAYS_INLINE float smaller(float a, float b) { return b < a ? b : a; }
ALWAYS_INLINE float larger(float a, float b) { return a < b ? b : a; }
ALWAYS_INLINE float sum(float a, float b) { return a + b; }

// Error of a group rounded to a grid, in units of the scale: sum of |e|^2.4, or of e^2 times the importance.
ALWAYS_INLINE float error_of(const float* weight, const float* importance, int64_t padded, const Grid& grid, float lowest, float highest) {
  const float inverse = 1 / grid.scale, low = lowest - grid.zero, high = highest - grid.zero;
  Vector total = {};
  for (int64_t k = 0; k < padded; k += WIDTH) {
    Vector w, h;
    memcpy(&w, weight + k, sizeof w);
    w *= inverse;
    Vector code = w < low ? Vector{} + low : w;  // NaN stays
    code = code > high ? Vector{} + high : code;
    code = (code + TO_INTEGER) - TO_INTEGER;
    const Vector e = w - code;
    if (importance) {
      memcpy(&h, importance + k, sizeof h);
      total += e * e * h;
    } else {
      Vector powers;
      power(e < 0 ? -e : e, powers);
      total += powers;
    }
  }
  return reduced(total, sum);
}

// `size` numbers as they lie, or copied and filled up with 0 to whole vectors.
ALWAYS_INLINE const float* whole(const float* values, int64_t size, int64_t padded, float* memory) {
  if (size == padded) return values;
  memcpy(memory, values, size_t(size) * 4);
  std::fill(memory + size, memory + padded, 0.f);
  return memory;
}

ALWAYS_INLINE void search_row(const Task& t, int64_t row, float* memory) {
  const int64_t padded = (t.size + WIDTH - 1) / WIDTH * WIDTH;
  const float lowest = float(-(1 << (t.bits - 1))), highest = float((1 << (t.bits - 1)) - 1);
  for (int64_t j = 0; j < t.groups; j++) {
    const float* w = whole(t.weight + (row * t.groups + j) * t.size, t.size, padded, memory);
    const float* h = t.importance ? whole(t.importance + j * t.size, t.size, padded, memory + padded) : nullptr;
    Vector low = {}, high = {};
    for (int64_t k = 0; k < padded; k += WIDTH) {
      Vector v;
      memcpy(&v, w + k, sizeof v);
      low = v < low ? v : low;
      high = v > high ? v : high;
    }
    const float least = reduced(low, smaller), most = reduced(high, larger);
    const Grid extremes = grid_of_range(t, least, most);
    Grid best = extremes;
    float best_error = INFINITY, best_factor = 1;
    const auto attempt = [&](float factor) __attribute__((always_inline)) {
      const Grid grid = grid_of_range(t, least * factor, most * factor);
      const float ratio = grid.scale / extremes.scale;  // makes errors in units of different scales comparable
      const float error = error_of(w, h, padded, grid, lowest, highest) * (h ? ratio * ratio : power(ratio));
      if (error < best_error || (error == best_error && factor > best_factor)) best = grid, best_error = error, best_factor = factor;
    };
    for (int64_t step = 0; step <= t.steps; step++) attempt(float(1 - double(step) * t.coarse));
    if (t.steps >= 0) {
      const float centre = best_factor, smallest = float(1 - double(t.steps) * t.coarse);
      for (const int step : {-2, -1, 1, 2}) attempt(std::min(std::max(centre + float(step * t.fine), smallest), 1.f));
    }
    t.scale[row * t.groups + j] = best.scale;
    t.zero[row * t.groups + j] = best.zero;
  }
}

void search_scalar(const Task& t, int64_t row, float* memory) { search_row(t, row, memory); }
#ifdef COMPRESSOR_X86
TARGET_AVX2 void search_avx2(const Task& t, int64_t row, float* memory) { search_row(t, row, memory); }
TARGET_AVX512 void search_avx512(const Task& t, int64_t row, float* memory) { search_row(t, row, memory); }
#endif

}  // namespace

extern "C" int64_t scale_search(int64_t level, int64_t threads, const float* weight, const float* importance, float* scale, float* zero,
                                int64_t rows, int64_t groups, int64_t size, int64_t bits, int64_t symmetric, int64_t stored, double coarse,
                                double fine, int64_t steps) {
  if (rows < 0 || groups < 0 || size < 1 || bits < 2 || bits > 8) return BAD_SHAPE;
  if (stored < FLOAT32 || stored > FLOAT16) return BAD_DTYPE;
  if (!level_is_there(level)) return BAD_LEVEL;
  const Task task{weight, importance, scale, zero, groups, size, bits, symmetric, stored, coarse, fine, steps};
  auto f = search_scalar;
#ifdef COMPRESSOR_X86
  if (level >= AVX2) f = search_avx2;
  if (level >= AVX512VNNI) f = search_avx512;
#endif
  parallel(threads, rows, [&](int64_t row) { f(task, row, static_cast<float*>(scratch(0, size_t(size + WIDTH) * 8))); });
  return OK;
}
