// y = sum over blocks b and t of z_b[index[n, b, t]] * value[n, b, t], with z_b = x_b D_b^T: the atoms once for each row of x, then
// k of them for each output.
// Sums have one order at every level and for any number of rows. A dot product has 16 partial sums, of the columns that are
// equal mod 16, by fma in ascending order; halves of them are added until one is left. An output adds its entries by fma, in
// the order of b and t. So, before the bias and the rounding to y's type,
//   |y - exact| <= (ceil(w / 16) + B k + 4) 2^-24 sum |value| |D| |x|     to first order
#include <algorithm>
#include <atomic>

#include "common.h"
#include "ops.h"

using namespace compressor;

namespace {

constexpr int LANES = 16;            // of a dot product, and rows of x that are multiplied by an entry together
constexpr int FEW = 8;               // rows that do so in one register, with all blocks of an output at once
constexpr int TOGETHER = 4;          // outputs of few rows, so that their sums don't wait for each other
constexpr int ATOMS = 4;             // that read a row of x together
constexpr int64_t PANELS = 4;        // of LANES rows: the factors are read once for this many
constexpr int64_t ATOMS_A_TASK = 16;

struct Factors {
  const void* dense;
  int64_t dense_dtype;
  const uint16_t* index;
  const void* value;
  int64_t value_dtype, outputs, blocks, atoms, width, k;
  const float *dense_scale, *value_scale;  // of each atom and of each output, which are then int8; null: there is none
  int64_t padded() const { return (width + LANES - 1) / LANES * LANES; }
};

// ---- is every index an atom? ----
ALWAYS_INLINE uint16_t largest(const uint16_t* index, int64_t count) {
  uint16_t top = 0;
  for (int64_t i = 0; i < count; i++) top = index[i] > top ? index[i] : top;
  return top;
}
uint16_t largest_scalar(const uint16_t* index, int64_t count) { return largest(index, count); }

// ---- the products with atoms: ROWS rows of x (padded) times ATOMS atoms (ATOMS, padded), to out (ROWS, ATOMS) ----
void dots_scalar(const float* x, const float* atoms, int64_t padded, float* out) {
  for (int a = 0; a < ATOMS; a++) {
    float s[LANES] = {};
    for (int64_t i = 0; i < padded; i += LANES)
      for (int l = 0; l < LANES; l++) s[l] = std::fma(x[i + l], atoms[a * padded + i + l], s[l]);
    for (int half = LANES / 2; half; half /= 2)
      for (int l = 0; l < half; l++) s[l] = s[l] + s[l + half];
    out[a] = s[0];
  }
}
// ---- the sums of an output: entries of z, `lanes` rows of x side by side ----
void entries_scalar(const Factors& f, const float* z, int64_t lanes, const uint16_t* index, const float* value, float* total) {
  for (int64_t t = 0; t < f.k; t++)
    for (int64_t l = 0; l < lanes; l++) total[l] = std::fma(z[index[t] * lanes + l], value[t], total[l]);
}

#ifdef COMPRESSOR_X86
TARGET_AVX2 uint16_t largest_avx2(const uint16_t* index, int64_t count) { return largest(index, count); }

// The partial sums of four dot products, (4, 16), to four numbers.
TARGET_AVX2 ALWAYS_INLINE __m128 add_lanes(const float* s) {
  __m128 four[ATOMS];
  for (int a = 0; a < ATOMS; a++) {
    const __m256 eight = _mm256_add_ps(_mm256_load_ps(s + a * LANES), _mm256_load_ps(s + a * LANES + 8));
    four[a] = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  }
  _MM_TRANSPOSE4_PS(four[0], four[1], four[2], four[3]);
  return _mm_add_ps(_mm_add_ps(four[0], four[2]), _mm_add_ps(four[1], four[3]));
}
template <int ROWS> TARGET_AVX2 void dots_avx2(const float* x, int64_t stride, const float* atoms, int64_t padded, float* out) {
  alignas(64) float sums[ROWS][ATOMS][LANES];
  for (int half = 0; half < LANES; half += 8) {  // each half of the partial sums on its own: all fit the registers
    __m256 sum[ROWS][ATOMS];
    for (auto& row : sum) for (auto& v : row) v = _mm256_setzero_ps();
    for (int64_t i = half; i < padded; i += LANES) {
      __m256 v[ROWS];
      for (int r = 0; r < ROWS; r++) v[r] = _mm256_loadu_ps(x + r * stride + i);
      for (int a = 0; a < ATOMS; a++) {
        const __m256 atom = _mm256_loadu_ps(atoms + a * padded + i);
        for (int r = 0; r < ROWS; r++) sum[r][a] = _mm256_fmadd_ps(v[r], atom, sum[r][a]);
      }
    }
    for (int r = 0; r < ROWS; r++)
      for (int a = 0; a < ATOMS; a++) _mm256_store_ps(&sums[r][a][half], sum[r][a]);
  }
  for (int r = 0; r < ROWS; r++) _mm_storeu_ps(out + r * ATOMS, add_lanes(sums[r][0]));
}
template <int ROWS> TARGET_AVX512 void dots_avx512(const float* x, int64_t stride, const float* atoms, int64_t padded, float* out) {
  alignas(64) float sums[ROWS][ATOMS][LANES];
  __m512 sum[ROWS][ATOMS];
  for (auto& row : sum) for (auto& v : row) v = _mm512_setzero_ps();
  for (int64_t i = 0; i < padded; i += LANES) {
    __m512 v[ROWS];
    for (int r = 0; r < ROWS; r++) v[r] = _mm512_loadu_ps(x + r * stride + i);
    for (int a = 0; a < ATOMS; a++) {
      const __m512 atom = _mm512_loadu_ps(atoms + a * padded + i);
      for (int r = 0; r < ROWS; r++) sum[r][a] = _mm512_fmadd_ps(v[r], atom, sum[r][a]);
    }
  }
  for (int r = 0; r < ROWS; r++) {
    for (int a = 0; a < ATOMS; a++) _mm512_storeu_ps(sums[r][a], sum[r][a]);
    _mm_storeu_ps(out + r * ATOMS, add_lanes(sums[r][0]));
  }
}
// COUNT outputs at once, so that their sums don't wait for each other; index and value are `apart` from output to output.
template <int COUNT>
TARGET_AVX2 void entries_avx2(int64_t k, const float* z, const uint16_t* const* index, const float* const* value,
                              float* const* total) {
  __m256 sum[COUNT][2];
  for (int n = 0; n < COUNT; n++) sum[n][0] = _mm256_loadu_ps(total[n]), sum[n][1] = _mm256_loadu_ps(total[n] + 8);
  for (int64_t t = 0; t < k; t++)
    for (int n = 0; n < COUNT; n++) {
      const float* row = z + int64_t(index[n][t]) * LANES;
      const __m256 v = _mm256_set1_ps(value[n][t]);
      sum[n][0] = _mm256_fmadd_ps(_mm256_loadu_ps(row), v, sum[n][0]);
      sum[n][1] = _mm256_fmadd_ps(_mm256_loadu_ps(row + 8), v, sum[n][1]);
    }
  for (int n = 0; n < COUNT; n++) _mm256_storeu_ps(total[n], sum[n][0]), _mm256_storeu_ps(total[n] + 8, sum[n][1]);
}
template <int COUNT>
TARGET_AVX512 void entries_avx512(int64_t k, const float* z, const uint16_t* const* index, const float* const* value,
                                  float* const* total) {
  __m512 sum[COUNT];
  for (int n = 0; n < COUNT; n++) sum[n] = _mm512_loadu_ps(total[n]);
  for (int64_t t = 0; t < k; t++)
    for (int n = 0; n < COUNT; n++)
      sum[n] = _mm512_fmadd_ps(_mm512_loadu_ps(z + int64_t(index[n][t]) * LANES), _mm512_set1_ps(value[n][t]), sum[n]);
  for (int n = 0; n < COUNT; n++) _mm512_storeu_ps(total[n], sum[n]);
}
template <class T> void fetch(const T* from, int64_t count, _mm_hint hint) {
  for (int64_t i = 0; i < count; i += int64_t(64 / sizeof(T))) _mm_prefetch((const char*)(from + i), hint);
}
template <int WIDE> TARGET_AVX2 ALWAYS_INLINE auto nothing() {
  if constexpr (WIDE == 1) return _mm_setzero_ps();
  else return _mm256_setzero_ps();
}
// All entries of COUNT outputs that lie one after the other, for WIDE rows of x side by side, 1 or 8. What is read of z is small
// then, and the entries are read from start to end.
template <int WIDE, int COUNT>
TARGET_AVX2 void entries_of_few(const Factors& f, const float* z, const uint16_t* index, const float* value, float* total) {
  const int64_t apart = f.blocks * f.k, part = COUNT * f.k;
  const bool in_place = !f.value_scale && f.value_dtype == FLOAT32;
  const uint16_t* next_index = index + COUNT * apart;
  const float* next_value = value + COUNT * apart;
  decltype(nothing<WIDE>()) sum[COUNT];
  for (auto& v : sum) v = nothing<WIDE>();
  for (int64_t b = 0; b < f.blocks; b++) {
    // of the next outputs, a part with each block: these are read at COUNT places in turn, which the processor doesn't foresee
    fetch(next_index + b * part, part, _MM_HINT_T1);
    if (in_place) fetch(next_value + b * part, part, _MM_HINT_T1);
    for (int64_t t = 0; t < f.k; t++)
      for (int n = 0; n < COUNT; n++) {
        const float* row = z + int64_t(index[n * apart + t]) * WIDE;
        const float* v = value + n * apart + t;
        if constexpr (WIDE == 1) sum[n] = _mm_fmadd_ss(_mm_load_ss(row), _mm_load_ss(v), sum[n]);
        else sum[n] = _mm256_fmadd_ps(_mm256_loadu_ps(row), _mm256_broadcast_ss(v), sum[n]);
      }
    index += f.k, value += f.k, z += f.atoms * WIDE;
  }
  for (int n = 0; n < COUNT; n++) {
    if constexpr (WIDE == 1) _mm_store_ss(total + n * LANES, sum[n]);
    else _mm256_storeu_ps(total + n * LANES, sum[n]);
  }
}
TARGET_AVX2 void codes_to_float_avx2(const int8_t* codes, float scale, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i++) out[i] = float(codes[i]) * scale;
}
#endif

uint16_t largest_at(int64_t level, const uint16_t* index, int64_t count) {
#ifdef COMPRESSOR_X86
  if (level > SCALAR) return largest_avx2(index, count);
#endif
  return largest_scalar(index, count);
}
// rows of x (1 or 2) times ATOMS atoms
void dots_at(int64_t level, const float* x, int64_t stride, int64_t rows, const float* atoms, int64_t padded, float* out) {
#ifdef COMPRESSOR_X86
  if (level >= AVX512VNNI) return (rows == 2 ? dots_avx512<2> : dots_avx512<1>)(x, stride, atoms, padded, out);
  if (level >= AVX2) return (rows == 2 ? dots_avx2<2> : dots_avx2<1>)(x, stride, atoms, padded, out);
#endif
  for (int64_t r = 0; r < rows; r++) dots_scalar(x + r * stride, atoms, padded, out + r * ATOMS);
}
// A block's entries of `count` outputs, for LANES rows; index and value begin at their first output's, total (count, LANES).
void entries_at(int64_t level, const Factors& f, const float* z, const uint16_t* index, const float* value, int64_t count,
                float* total) {
  const int64_t apart = f.blocks * f.k;
#ifdef COMPRESSOR_X86
  if (level > SCALAR) {
    for (int64_t n = 0; n < count; n += 8) {
      const uint16_t* indices[8];
      const float* values[8];
      float* totals[8];
      float ignored[8][LANES] = {};  // of missing outputs
      for (int64_t i = 0; i < 8; i++) {
        const int64_t here = std::min(n + i, count - 1);
        indices[i] = index + here * apart, values[i] = value + here * apart;
        if (n + i < count) {  // the next block's: outputs lie apart, which the processor doesn't foresee
          fetch(indices[i] + f.k, f.k, _MM_HINT_T0);
          fetch(values[i] + f.k, f.k, _MM_HINT_T0);
        }
        totals[i] = n + i < count ? total + here * LANES : ignored[i];
      }
      if (level >= AVX512VNNI) {
        entries_avx512<8>(f.k, z, indices, values, totals);
      } else {
        entries_avx2<4>(f.k, z, indices, values, totals);
        entries_avx2<4>(f.k, z, indices + 4, values + 4, totals + 4);
      }
    }
    return;
  }
#endif
  for (int64_t n = 0; n < count; n++) entries_scalar(f, z, LANES, index + n * apart, value + n * apart, total + n * LANES);
}
// All entries of `count` outputs, for few rows: lanes is 1 or FEW, total (count, LANES) and 0.
void entries_of_few_at(int64_t level, const Factors& f, const float* z, int64_t lanes, const uint16_t* index, const float* value,
                       int64_t count, float* total) {
  const int64_t apart = f.blocks * f.k;
#ifdef COMPRESSOR_X86
  if (level > SCALAR) {
    const auto all = lanes == 1 ? entries_of_few<1, TOGETHER> : entries_of_few<FEW, TOGETHER>;
    const auto one = lanes == 1 ? entries_of_few<1, 1> : entries_of_few<FEW, 1>;
    if (count == TOGETHER) return all(f, z, index, value, total);
    for (int64_t n = 0; n < count; n++) one(f, z, index + n * apart, value + n * apart, total + n * LANES);
    return;
  }
#endif
  for (int64_t n = 0; n < count; n++)
    for (int64_t b = 0; b < f.blocks; b++) {
      const int64_t at = n * apart + b * f.k;
      entries_scalar(f, z + b * f.atoms * lanes, lanes, index + at, value + at, total + n * LANES);
    }
}
void codes_to_float(int64_t level, const int8_t* codes, float scale, float* out, int64_t count) {
#ifdef COMPRESSOR_X86
  if (level > SCALAR) return codes_to_float_avx2(codes, scale, out, count);
#endif
  for (int64_t i = 0; i < count; i++) out[i] = float(codes[i]) * scale;
}
// All values of `count` outputs from the first on: in place, or in `out`.
const float* values_of(int64_t level, const Factors& f, int64_t first, int64_t count, float* out) {
  const int64_t entries = f.blocks * f.k;
  if (!f.value_scale) return as_floats(level, f.value, f.value_dtype, first * entries, out, count * entries);
  for (int64_t n = 0; n < count; n++)
    codes_to_float(level, (const int8_t*)f.value + (first + n) * entries, f.value_scale[first + n], out + n * entries, entries);
  return out;
}

// z (panels, blocks * atoms, lanes) of rows of x (rows, blocks, padded), those atoms of a block.
void multiply_atoms(int64_t level, const Factors& f, const float* x, int64_t rows, int64_t lanes, int64_t block, int64_t first,
                    float* z) {
  const int64_t padded = f.padded(), stride = f.blocks * padded, all = f.blocks * f.atoms;
  const int64_t end = std::min(f.atoms, first + ATOMS_A_TASK);
  for (int64_t a = first; a < end; a += ATOMS) {
    const int64_t here = std::min<int64_t>(ATOMS, end - a), at = (block * f.atoms + a) * f.width;
    const float* atoms = (const float*)f.dense + at;
    if (f.dense_scale || f.dense_dtype != FLOAT32 || padded != f.width || here < ATOMS) {
      float* copy = (float*)scratch(2, size_t(ATOMS * padded) * 4);
      memset(copy, 0, size_t(ATOMS * padded) * 4);
      for (int64_t i = 0; i < here; i++) {
        const int64_t from = at + i * f.width;
        float* to = copy + i * padded;
        if (f.dense_scale) codes_to_float(level, (const int8_t*)f.dense + from, f.dense_scale[at / f.width + i], to, f.width);
        else to_float(level, f.dense, f.dense_dtype, from, to, f.width);
      }
      atoms = copy;
    }
    for (int64_t r = 0; r < rows; r += 2) {
      const int64_t two = std::min<int64_t>(2, rows - r);
      float out[2 * ATOMS];
      dots_at(level, x + r * stride + block * padded, stride, two, atoms, padded, out);
      for (int64_t i = 0; i < two; i++)
        for (int64_t j = 0; j < here; j++)
          z[((r + i) / lanes * all + block * f.atoms + a + j) * lanes + (r + i) % lanes] = out[i * ATOMS + j];
    }
  }
}

}  // namespace

extern "C" int64_t linear_dense_sparse(int64_t level, int64_t threads, const void* x, int64_t x_dtype, const void* dense,
                                       int64_t dense_dtype, const uint16_t* index, const void* value, int64_t value_dtype,
                                       const void* bias, int64_t bias_dtype, void* y, int64_t M, int64_t N, int64_t blocks,
                                       int64_t atoms, int64_t width, int64_t k, const float* dense_scale,
                                       const float* value_scale) {
  if (!level_is_there(level)) return BAD_LEVEL;
  for (const int64_t dtype : {x_dtype, dense_dtype, value_dtype, bias_dtype})
    if (dtype < FLOAT32 || dtype > FLOAT16) return BAD_DTYPE;
  if (M < 0 || N < 0 || blocks < 1 || atoms < 1 || atoms > 65536 || width < 1 || k < 0) return BAD_SHAPE;
  const auto is_bad = [&](int64_t first, int64_t count) {
    return largest_at(level, index + first * blocks * k, count * blocks * k) >= atoms;
  };
  const bool is_few = M >= 1 && M <= FEW;  // then each output's entries are read once, and checked right before
  if (!is_few && is_bad(0, N)) return BAD_INDEX;
  std::atomic<bool> found_bad{false};
  const Factors f{dense, dense_dtype, index, value, value_dtype, N, blocks, atoms, width, k, dense_scale, value_scale};
  const int64_t padded = f.padded(), all = blocks * atoms, entries = blocks * k;
  for (int64_t m = 0; m < M;) {
    const int64_t lanes = M - m == 1 ? 1 : M - m <= FEW ? FEW : LANES, rows = std::min(M - m, PANELS * LANES);
    const int64_t panels = (rows + lanes - 1) / lanes;
    float* wide = (float*)scratch(0, size_t(rows * blocks * padded) * 4);
    float* z = (float*)scratch(1, size_t(panels * all * lanes) * 4);
    for (int64_t r = 0; r < rows; r++)
      for (int64_t b = 0; b < blocks; b++) {
        float* row = wide + (r * blocks + b) * padded;
        to_float(level, x, x_dtype, ((m + r) * blocks + b) * width, row, width);
        memset(row + width, 0, size_t(padded - width) * 4);
      }
    if (rows % lanes) memset(z + (panels - 1) * all * lanes, 0, size_t(all * lanes) * 4);  // lanes without a row
    const int64_t parts = (atoms + ATOMS_A_TASK - 1) / ATOMS_A_TASK;
    parallel(threads, blocks * parts, [&](int64_t i) {
      multiply_atoms(level, f, wide, rows, lanes, i / parts, i % parts * ATOMS_A_TASK, z);
    });
    parallel(threads, (N + TILE - 1) / TILE, [&](int64_t tile) {
      const int64_t n = tile * TILE, count = std::min<int64_t>(TILE, N - n);
      const int64_t together = lanes < LANES ? TOGETHER : count;
      float* values = (float*)scratch(3, size_t(together * entries) * 4);
      const float* of_tile = lanes < LANES ? nullptr : values_of(level, f, n, count, values);
      for (int64_t p = 0; p < panels; p++) {
        float total[TILE * LANES] = {}, out[TILE];
        if (lanes < LANES) {
          for (int64_t j = 0; j < count; j += together) {
            const int64_t first = n + j, here = std::min(together, count - j);
            if (is_few && is_bad(first, here)) {
              found_bad = true;
              return;
            }
            const float* those = values_of(level, f, first, here, values);
            entries_of_few_at(level, f, z, lanes, index + first * entries, those, here, total + j * LANES);
          }
        } else {  // a block's z stays in the first-level cache for all outputs of the tile
          for (int64_t b = 0; b < blocks; b++)
            entries_at(level, f, z + (p * all + b * atoms) * lanes, index + n * entries + b * k, of_tile + b * k, count, total);
        }
        for (int64_t r = 0; r < std::min(lanes, rows - p * lanes); r++) {
          for (int64_t j = 0; j < count; j++) out[j] = total[j * LANES + r] + (bias ? load_number(bias, bias_dtype, n + j) : 0);
          from_float(level, out, y, x_dtype, (m + p * lanes + r) * N + n, count);
        }
      }
    });
    m += rows;
  }
  return found_bad ? BAD_INDEX : OK;
}
