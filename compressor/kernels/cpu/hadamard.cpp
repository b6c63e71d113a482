// y = x (H_blocks (x) H_m) * scale for each row, H_blocks Sylvester's matrix of a power of two and H_m given. Each block of m
// is first multiplied by H_m, summed in the order of its rows; then pairs of blocks are combined in butterflies, from
// neighbours to halves. Every element is the result of the same sums in the same order, for any width of registers.
#include <algorithm>
#include <utility>

#include "common.h"
#include "ops.h"

using namespace compressor;

namespace {

constexpr int64_t MOST_OF_BASE = 64;             // m
constexpr int64_t ELEMENTS_A_TASK = 16384;       // rows of fewer elements go to a thread together
constexpr int64_t MOST_ELEMENTS = int64_t(1) << 30;

template <int W> struct Register { typedef float V __attribute__((vector_size(4 * W))); };

// Butterflies of the lanes H apart: the lower of two becomes the sum, the higher one the difference.
template <int H, class V, int... L> ALWAYS_INLINE void meet(V& v, std::integer_sequence<int, L...>) {
  const V sign = {((L & H) ? -1.f : 1.f)...};
#ifdef __clang__
  v = __builtin_shufflevector(v, v, (L ^ H)...) + v * sign;
#else
  typedef int32_t Lanes __attribute__((vector_size(sizeof(V))));
  v = __builtin_shuffle(v, Lanes{(L ^ H)...}) + v * sign;
#endif
}
template <int W> ALWAYS_INLINE void within_registers(float* row, int64_t n) {
  typedef typename Register<W>::V V;
  for (int64_t i = 0; i < n; i += W) {
    V v;
    memcpy(&v, row + i, sizeof v);
    meet<1>(v, std::make_integer_sequence<int, W>());
    meet<2>(v, std::make_integer_sequence<int, W>());
    if constexpr (W > 4) meet<4>(v, std::make_integer_sequence<int, W>());
    if constexpr (W > 8) meet<8>(v, std::make_integer_sequence<int, W>());
    memcpy(row + i, &v, sizeof v);
  }
}

// log2(R) stages at once: runs of h elements meet those h, 2h, .. apart. first: where the W lanes begin in each run.
template <int W, int R> ALWAYS_INLINE int64_t runs(float* row, int64_t h, int64_t first) {
  typedef typename Register<W>::V V;
  for (; first + W <= h; first += W) {
    V v[R];
    for (int j = 0; j < R; j++) memcpy(&v[j], row + j * h + first, sizeof(V));
    for (int apart = 1; apart < R; apart *= 2)
      for (int j = 0; j < R; j++)
        if (!(j & apart)) {
          const V low = v[j], high = v[j + apart];
          v[j] = low + high, v[j + apart] = low - high;
        }
    for (int j = 0; j < R; j++) memcpy(row + j * h + first, &v[j], sizeof(V));
  }
  return first;
}
template <int W, int R> ALWAYS_INLINE void stages(float* row, int64_t n, int64_t h) {
  for (int64_t at = 0; at < n; at += R * h) {
    int64_t done = runs<W, R>(row + at, h, 0);
    if (W > 4) done = runs<4, R>(row + at, h, done);  // runs of blocks of 12, 20, .. aren't whole registers
    for (; done < h; done++)  // runs of 1 or 2: rows of less than a register
      for (int apart = 1; apart < R; apart *= 2)
        for (int j = 0; j < R; j++)
          if (!(j & apart)) {
            float &low = row[at + j * h + done], &high = row[at + (j + apart) * h + done];
            const float sum = low + high, difference = low - high;
            low = sum, high = difference;
          }
  }
}

// N registers of outputs of a block, from c on
template <int W, int N> ALWAYS_INLINE void block_part(const float* x, const float* base, float* out, int64_t m, int64_t c) {
  typedef typename Register<W>::V V;
  V sum[N] = {};
  for (int64_t b = 0; b < m; b++)
    for (int i = 0; i < N; i++) {
      V entry;
      memcpy(&entry, base + b * m + c + i * W, sizeof entry);
      sum[i] = sum[i] + entry * x[b];  // the product is exact
    }
  memcpy(out + c, sum, sizeof sum);
}
template <int W> ALWAYS_INLINE void blocks(float* row, const float* base, int64_t n, int64_t m) {
  float x[MOST_OF_BASE];
  for (int64_t at = 0; at < n; at += m) {
    memcpy(x, row + at, size_t(m) * 4);
    int64_t c = 0;
    for (; c + 4 * W <= m; c += 4 * W) block_part<W, 4>(x, base, row + at, m, c);
    for (; c + 2 * W <= m; c += 2 * W) block_part<W, 2>(x, base, row + at, m, c);
    for (; c + W <= m; c += W) block_part<W, 1>(x, base, row + at, m, c);
    for (; c < m; c += 4) block_part<4, 1>(x, base, row + at, m, c);
  }
}

template <int W> ALWAYS_INLINE void transform(float* row, const float* base, int64_t n, int64_t m) {
  int64_t h = m;
  if (m > 1) {
    blocks<W>(row, base, n, m);
  } else if (n >= W) {
    within_registers<W>(row, n);
    h = W;
  }
  while (h < n) {
    if (n / h >= 8) stages<W, 8>(row, n, h), h *= 8;
    else if (n / h >= 4) stages<W, 4>(row, n, h), h *= 4;
    else stages<W, 2>(row, n, h), h *= 2;
  }
}
ALWAYS_INLINE void multiply(float* row, int64_t n, float scale) {
  for (int64_t i = 0; i < n; i++) row[i] *= scale;
}
void transform_scalar(float* row, const float* base, int64_t n, int64_t m, float scale) {
  transform<4>(row, base, n, m), multiply(row, n, scale);
}
#ifdef COMPRESSOR_X86
TARGET_AVX2 void transform_avx2(float* row, const float* base, int64_t n, int64_t m, float scale) {
  transform<8>(row, base, n, m), multiply(row, n, scale);
}
TARGET_AVX512 void transform_avx512(float* row, const float* base, int64_t n, int64_t m, float scale) {
  transform<16>(row, base, n, m), multiply(row, n, scale);
}
#endif

}  // namespace

extern "C" int64_t hadamard(int64_t level, int64_t threads, const void* x, int64_t x_dtype, const float* base, void* y, int64_t M,
                            int64_t n, int64_t m, double scale) {
  if (!level_is_there(level)) return BAD_LEVEL;
  if (x_dtype < FLOAT32 || x_dtype > FLOAT16) return BAD_DTYPE;
  if (M < 0 || m < 1 || m > MOST_OF_BASE || (m > 1 && (m % 4 || !base)) || n < m || n > MOST_ELEMENTS || n % m) return BAD_SHAPE;
  if (n / m & (n / m - 1)) return BAD_SHAPE;
  auto f = transform_scalar;
#ifdef COMPRESSOR_X86
  if (level >= AVX2) f = transform_avx2;
  if (level >= AVX512VNNI) f = transform_avx512;
#endif
  const int64_t rows = std::max<int64_t>(1, ELEMENTS_A_TASK / n);
  parallel(threads, (M + rows - 1) / rows, [&](int64_t task) {
    float* row = (float*)scratch(0, size_t(n) * 4);
    for (int64_t r = task * rows; r < std::min(M, (task + 1) * rows); r++) {
      if (x_dtype == FLOAT32) row = (float*)y + r * n;  // in place
      to_float(level, x, x_dtype, r * n, row, n);
      f(row, base, n, m, float(scale));
      if (x_dtype != FLOAT32) from_float(level, row, y, x_dtype, r * n, n);
    }
  });
  return OK;
}
