// f(x) from a lookup table of equally spaced values, rounded as compressor.kernels.ops.table_functions.look_up: place = (x - low) / step
// in float32, clamped to the table; between two entries torch.lerp, whose product and sum are one fma. With slopes, those of
// `activate`. An inverse root reads only the root of x's mantissa, as inverse_root does.
#include <algorithm>

#include "common.h"
#include "ops.h"

using namespace compressor;

namespace {

constexpr int64_t PART = 256;                 // elements at once: what is between two steps stays in the first-level cache
constexpr int64_t MOST_ENTRIES = 1 << 22;     // adding 1.5 * 2^23 then rounds to a whole number
constexpr int64_t ELEMENTS_A_TASK = 16384;

struct Table {
  const float* values;
  int64_t entries;
  float low, high, step, left_slope, right_slope;
  bool linear;
};

ALWAYS_INLINE void look_up(const Table& t, const float* x, float* y, int64_t count) {
  const float last = float(t.entries - 1);
  float place[PART], left[PART], right[PART], rise[PART];
  int32_t index[PART];
  for (int64_t i = 0; i < count; i++) place[i] = (x[i] - t.low) / t.step;
  for (int64_t i = 0; i < count; i++) {  // NaN stays, and reads entry 0
    const float p = place[i] < 0 ? 0 : place[i];
    place[i] = p > last ? last : p;
  }
  if (!t.linear) {
    for (int64_t i = 0; i < count; i++) {
      const float rounded = (place[i] == place[i] ? place[i] : 0) + 12582912.f;  // half to even, in the low bits
      memcpy(&index[i], &rounded, 4);
      index[i] &= 0x3fffff;
    }
    for (int64_t i = 0; i < count; i++) left[i] = t.values[index[i]];
    for (int64_t i = 0; i < count; i++) y[i] = place[i] == place[i] ? left[i] : place[i];
    return;
  }
  const int32_t before = int32_t(t.entries - 2);
  for (int64_t i = 0; i < count; i++) {
    const int32_t floor = int32_t(place[i] == place[i] ? place[i] : 0);  // not below 0
    index[i] = floor > before ? before : floor;
  }
  for (int64_t i = 0; i < count; i++) left[i] = t.values[index[i]];
  for (int64_t i = 0; i < count; i++) right[i] = t.values[index[i] + 1];
  // One choice a loop, and nothing else with it: gcc makes branches of more.
  float* weight = place;
  for (int64_t i = 0; i < count; i++) weight[i] = place[i] - float(index[i]);
  for (int64_t i = 0; i < count; i++) rise[i] = right[i] - left[i];
  for (int64_t i = 0; i < count; i++) left[i] = std::fabs(weight[i]) < 0.5f ? left[i] : right[i];
  for (int64_t i = 0; i < count; i++) right[i] = std::fabs(weight[i]) < 0.5f ? 0.f : 1.f;
  for (int64_t i = 0; i < count; i++) weight[i] -= right[i];
  for (int64_t i = 0; i < count; i++) y[i] = __builtin_fmaf(weight[i], rise[i], left[i]);
}
// Beyond the ends, a straight line: product and sum are rounded separately, as in torch.
ALWAYS_INLINE void go_on(const Table& t, const float* x, float* y, int64_t count) {
  const float first = t.values[0], end = t.values[t.entries - 1];
  if (t.left_slope != 0)
    for (int64_t i = 0; i < count; i++) y[i] = x[i] < t.low ? first + t.left_slope * (x[i] - t.low) : y[i];
  if (t.right_slope != 0)
    for (int64_t i = 0; i < count; i++) y[i] = x[i] > t.high ? end + t.right_slope * (x[i] - t.high) : y[i];
}
void read_scalar(const Table& t, const float* x, float* y, int64_t count) {
  look_up(t, x, y, count);
  go_on(t, x, y, count);
}
#ifdef COMPRESSOR_X86
// Eight entries and those after them, each two in one load: two gathers take twice as long on a Zen processor.
TARGET_AVX2 ALWAYS_INLINE void pairs_at(const float* values, __m256i index, __m256& left, __m256& right) {
  alignas(32) int32_t i[8];
  _mm256_store_si256((__m256i*)i, index);
  __m128 two[4];
  for (int j = 0; j < 4; j++)
    two[j] = _mm_loadh_pi(_mm_castsi128_ps(_mm_loadu_si64(values + i[2 * j])), (const __m64*)(values + i[2 * j + 1]));
  const __m256 a = _mm256_set_m128(two[2], two[0]), b = _mm256_set_m128(two[3], two[1]);
  left = _mm256_shuffle_ps(a, b, 0x88), right = _mm256_shuffle_ps(a, b, 0xdd);
}
TARGET_AVX2 void read_avx2(const Table& t, const float* x, float* y, int64_t count) {
  const __m256 low = _mm256_set1_ps(t.low), step = _mm256_set1_ps(t.step), last = _mm256_set1_ps(float(t.entries - 1));
  const __m256 zero = _mm256_setzero_ps(), one = _mm256_set1_ps(1), half = _mm256_set1_ps(0.5f), sign = _mm256_set1_ps(-0.f);
  const __m256i before = _mm256_set1_epi32(int32_t(t.entries - 2));
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    __m256 place = _mm256_div_ps(_mm256_sub_ps(_mm256_loadu_ps(x + i), low), step);
    place = _mm256_min_ps(last, _mm256_max_ps(zero, place));  // NaN, the second operand, stays
    const __m256 is_number = _mm256_cmp_ps(place, place, _CMP_ORD_Q), known = _mm256_and_ps(place, is_number);
    if (!t.linear) {
      const __m256 found = _mm256_i32gather_ps(t.values, _mm256_cvtps_epi32(known), 4);
      _mm256_storeu_ps(y + i, _mm256_blendv_ps(place, found, is_number));
      continue;
    }
    const __m256i index = _mm256_min_epi32(_mm256_cvttps_epi32(known), before);
    __m256 left, right;
    pairs_at(t.values, index, left, right);
    const __m256 weight = _mm256_sub_ps(place, _mm256_cvtepi32_ps(index));
    const __m256 near = _mm256_cmp_ps(_mm256_andnot_ps(sign, weight), half, _CMP_LT_OQ);
    const __m256 from = _mm256_blendv_ps(right, left, near), w = _mm256_sub_ps(weight, _mm256_andnot_ps(near, one));
    _mm256_storeu_ps(y + i, _mm256_fmadd_ps(w, _mm256_sub_ps(right, left), from));
  }
  if (i < count) look_up(t, x + i, y + i, count - i);
  go_on(t, x, y, count);
}
#endif

using Body = void (*)(const Table&, const float*, float*, int64_t);
Body body_of(int64_t level) {
#ifdef COMPRESSOR_X86
  if (level > SCALAR) return read_avx2;
#endif
  (void)level;
  return read_scalar;
}

}  // namespace

extern "C" int64_t table_lookup(int64_t level, int64_t threads, const void* x, int64_t x_dtype, const float* table, void* y,
                                int64_t count, int64_t entries, double low, double step, int64_t linear,
                                double left_slope, double right_slope) {
  if (!level_is_there(level)) return BAD_LEVEL;
  if (x_dtype < FLOAT32 || x_dtype > FLOAT16) return BAD_DTYPE;
  if (count < 0 || entries < 2 || entries > MOST_ENTRIES || !(float(step) > 0)) return BAD_SHAPE;
  const float high = float(low + double(entries - 1) * step);
  const Table t{table, entries, float(low), high, float(step), float(left_slope), float(right_slope), linear != 0};
  const Body read = body_of(level);
  parallel(threads, (count + ELEMENTS_A_TASK - 1) / ELEMENTS_A_TASK, [&](int64_t task) {
    const int64_t end = std::min(count, (task + 1) * ELEMENTS_A_TASK);
    float values[PART], results[PART];
    for (int64_t i = task * ELEMENTS_A_TASK; i < end; i += PART) {
      const int64_t here = std::min(PART, end - i);
      read(t, as_floats(level, x, x_dtype, i, values, here), results, here);
      from_float(level, results, y, x_dtype, i, here);
    }
  });
  return OK;
}

extern "C" int64_t table_inverse_root(int64_t level, const float* x, const float* table, float* y, int64_t count, int64_t entries,
                                      double step, int64_t linear) {
  if (!level_is_there(level)) return BAD_LEVEL;
  if (count < 0 || entries < 2 || entries > MOST_ENTRIES || !(float(step) > 0)) return BAD_SHAPE;
  const Table t{table, entries, 1, float(1 + double(entries - 1) * step), float(step), 0, 0, linear != 0};
  const Body read = body_of(level);
  float parts[PART], roots[PART];
  int halves[PART];
  for (int64_t i = 0; i < count; i += PART) {
    const int64_t here = std::min(PART, count - i);
    for (int64_t j = 0; j < here; j++) {
      int power = 0;
      const float mantissa = std::frexp(x[i + j], &power);  // of what is no number or infinite, power may be anything
      halves[j] = std::isfinite(x[i + j]) ? (power - 1) >> 1 : 0;
      parts[j] = std::isfinite(x[i + j]) ? std::ldexp(mantissa, power - 2 * halves[j]) : 1;
    }
    read(t, parts, roots, here);
    for (int64_t j = 0; j < here; j++) {
      const float value = x[i + j];
      y[i + j] = value > 0 && std::isfinite(value) ? std::ldexp(roots[j], -halves[j]) : 1 / std::sqrt(value);
    }
  }
  return OK;
}
