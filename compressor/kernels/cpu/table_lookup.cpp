// f(x) from a table of equally spaced values, with the roundings of compressor.kernels.tables.look_up: place = (x - low) / step
// in float32, clamped to the table; between two entries torch.lerp, whose product and sum are one fma.
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
  float low, step;
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
void look_up_scalar(const Table& t, const float* x, float* y, int64_t count) { look_up(t, x, y, count); }
#ifdef COMPRESSOR_X86
TARGET_AVX2 void look_up_avx2(const Table& t, const float* x, float* y, int64_t count) { look_up(t, x, y, count); }
TARGET_AVX512 void look_up_avx512(const Table& t, const float* x, float* y, int64_t count) { look_up(t, x, y, count); }
#endif

}  // namespace

extern "C" int64_t table_lookup(int64_t level, int64_t threads, const void* x, int64_t x_dtype, const float* table, void* y,
                                int64_t count, int64_t entries, double low, double step, int64_t linear) {
  if (!level_is_there(level)) return BAD_LEVEL;
  if (x_dtype < FLOAT32 || x_dtype > FLOAT16) return BAD_DTYPE;
  if (count < 0 || entries < 2 || entries > MOST_ENTRIES || !(float(step) > 0)) return BAD_SHAPE;
  const Table t{table, entries, float(low), float(step), linear != 0};
  auto f = look_up_scalar;
#ifdef COMPRESSOR_X86
  if (level == AVX2) f = look_up_avx2;
  if (level == AVX512VNNI) f = look_up_avx512;
#endif
  parallel(threads, (count + ELEMENTS_A_TASK - 1) / ELEMENTS_A_TASK, [&](int64_t task) {
    const int64_t end = std::min(count, (task + 1) * ELEMENTS_A_TASK);
    float values[PART], results[PART];
    for (int64_t i = task * ELEMENTS_A_TASK; i < end; i += PART) {
      const int64_t here = std::min(PART, end - i);
      f(t, as_floats(level, x, x_dtype, i, values, here), results, here);
      from_float(level, results, y, x_dtype, i, here);
    }
  });
  return OK;
}
