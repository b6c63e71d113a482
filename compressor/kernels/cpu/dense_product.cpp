// y = x @ W.T + bias for few rows of x and a dense weight in 32 or 16 bits, such as a model's output head.
// Lane l of 16 adds the columns k with k % 16 = l, one fma each in the order of k; lanes are added 8, 4, 2 and 1 apart, then the bias:
//   |y - exact| <= (ceil(K / 16) + 5) 2^-24 sum |x| |w|, before the rounding to y's type
// Every level, number of threads and batch gives the same bits.
#include <algorithm>

#include "common.h"
#include "ops.h"

namespace compressor {
namespace {

constexpr int LANES = 16, OUTPUTS = 6, ROWS = 4;  // times each other, 24 registers of 16 sums
constexpr int64_t CHUNK = 1024;                   // of k: those of OUTPUTS are 24 KiB, and are read again for every ROWS rows
constexpr int64_t MANY = 64;                      // rows whose sums are kept at a time
constexpr int64_t AHEAD = 16384;  // bytes; the weight is prefetched in the order of its memory. 6144 took 1.4 times as long, none 1.5 times

// Lines of the weight that are prefetched while others are multiplied: `pace` bytes for each 16 columns of `divisor` / 64 blocks of rows.
struct Stream {
  const char* next;
  int64_t due, pace, divisor;
  ALWAYS_INLINE void step() {
    if ((due += pace) > 0) do __builtin_prefetch(next, 0, 2), next += 64; while ((due -= divisor) > 0);
  }
};
// Columns [from, to) of `outputs` rows of the weight, `stride` bytes apart, and of `rows` rows of x (., K); sums (outputs, ROWS, LANES).
struct Block {
  const char* weight;
  int64_t stride, dtype, outputs;
  const float* x;
  int64_t K, rows, from, to;
  float* sums;
};

// Columns [from, to), one after the other: all of them, or the rest of a row after whole registers.
void add_rest(const Block& b, int64_t from) {
  for (int64_t r = 0; r < b.outputs; r++)
    for (int64_t m = 0; m < b.rows; m++)
      for (int64_t k = from; k < b.to; k++) {
        float& sum = b.sums[(r * ROWS + m) * LANES + k % LANES];
        sum = std::fma(load_number(b.weight + r * b.stride, b.dtype, k), b.x[m * b.K + k], sum);
      }
}
void add_scalar(const Block& b, Stream&) {
  if (b.from == 0) std::fill(b.sums, b.sums + b.outputs * ROWS * LANES, 0.f);
  add_rest(b, b.from);
}
float total_scalar(const float* sum) {
  float lanes[LANES];
  std::copy(sum, sum + LANES, lanes);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int l = 0; l < width; l++) lanes[l] += lanes[l + width];
  return lanes[0];
}
void totals_scalar(const float* sums, float* out) {
  for (int m = 0; m < ROWS; m++) out[m] = total_scalar(sums + m * LANES);
}

#ifdef COMPRESSOR_X86
template <int64_t DTYPE, int R, int M> TARGET_AVX2 void add_avx2(const Block& b, int64_t r0, int64_t m0, int64_t to, Stream& stream) {
  constexpr int64_t SIZE = DTYPE == FLOAT32 ? 4 : 2;
  const char* w = b.weight + r0 * b.stride;
  const float* x = b.x + m0 * b.K;
  __m256 sum[R][M][2];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int m = 0; m < M; m++) UNROLL for (int h = 0; h < 2; h++)
    sum[r][m][h] = b.from ? _mm256_loadu_ps(b.sums + ((r0 + r) * ROWS + m0 + m) * LANES + h * 8) : _mm256_setzero_ps();
  for (int64_t k = b.from; k < to; k += LANES) {
    stream.step();
    UNROLL for (int h = 0; h < 2; h++) {
      __m256 v[R];
      UNROLL for (int r = 0; r < R; r++) v[r] = scales_avx2((const uint8_t*)w + r * b.stride + (k + h * 8) * SIZE, DTYPE, 0);
      UNROLL for (int m = 0; m < M; m++) {
        const __m256 xm = _mm256_loadu_ps(x + m * b.K + k + h * 8);
        UNROLL for (int r = 0; r < R; r++) sum[r][m][h] = _mm256_fmadd_ps(v[r], xm, sum[r][m][h]);
      }
    }
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int m = 0; m < M; m++) UNROLL for (int h = 0; h < 2; h++)
    _mm256_storeu_ps(b.sums + ((r0 + r) * ROWS + m0 + m) * LANES + h * 8, sum[r][m][h]);
}
template <int64_t DTYPE> void block_avx2(const Block& b, Stream& stream) {
  constexpr int R = 3, M = 2;
  const int64_t to = b.to - (b.to - b.from) % LANES;
  Stream none{nullptr, 0, 0, 1};
  for (int64_t r = 0; r < b.outputs; r += R)
    for (int64_t m = 0; m < b.rows; m += M) {
      using Add = void (*)(const Block&, int64_t, int64_t, int64_t, Stream&);
      static constexpr Add of[R][M] = {{add_avx2<DTYPE, 1, 1>, add_avx2<DTYPE, 1, 2>}, {add_avx2<DTYPE, 2, 1>, add_avx2<DTYPE, 2, 2>}, {add_avx2<DTYPE, 3, 1>, add_avx2<DTYPE, 3, 2>}};
      of[std::min<int64_t>(R, b.outputs - r) - 1][std::min<int64_t>(M, b.rows - m) - 1](b, r, m, to, r + m == 0 ? stream : none);
    }
  add_rest(b, to);
}

template <int64_t DTYPE, int R, int M> TARGET_AVX512 void add_avx512(const Block& b, int64_t to, Stream& stream) {
  constexpr int64_t SIZE = DTYPE == FLOAT32 ? 4 : 2;
  const int64_t stride = b.stride, K = b.K;
  Stream asked = stream;
  __m512 sum[R][M];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int m = 0; m < M; m++)
    sum[r][m] = b.from ? _mm512_loadu_ps(b.sums + (r * ROWS + m) * LANES) : _mm512_setzero_ps();
  const char* w = b.weight + b.from * SIZE;
  const float *x = b.x + b.from, *end = b.x + to;
  for (; x < end; x += LANES, w += LANES * SIZE) {
    asked.step();
    __m512 v[R];
    UNROLL for (int r = 0; r < R; r++) v[r] = scales_avx512((const uint8_t*)w + r * stride, DTYPE, 0);
    UNROLL for (int m = 0; m < M; m++) {
      const __m512 xm = _mm512_loadu_ps(x + m * K);
      UNROLL for (int r = 0; r < R; r++) sum[r][m] = _mm512_fmadd_ps(v[r], xm, sum[r][m]);
    }
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int m = 0; m < M; m++) _mm512_storeu_ps(b.sums + (r * ROWS + m) * LANES, sum[r][m]);
  stream = asked;
}
template <int64_t DTYPE> void block_avx512(const Block& b, Stream& stream) {
  const int64_t to = b.to - (b.to - b.from) % LANES;
  using Add = void (*)(const Block&, int64_t, Stream&);
#define OF(R) {add_avx512<DTYPE, R, 1>, add_avx512<DTYPE, R, 2>, add_avx512<DTYPE, R, 3>, add_avx512<DTYPE, R, 4>}
  static constexpr Add of[OUTPUTS][ROWS] = {OF(1), OF(2), OF(3), OF(4), OF(5), OF(6)};
#undef OF
  of[b.outputs - 1][b.rows - 1](b, to, stream);
  add_rest(b, to);
}

// Totals of ROWS consecutive sums.
TARGET_AVX2 void totals_avx2(const float* sums, float* out) {
  __m128 four[ROWS];
  UNROLL for (int m = 0; m < ROWS; m++) {
    const __m256 eight = _mm256_add_ps(_mm256_loadu_ps(sums + m * LANES), _mm256_loadu_ps(sums + m * LANES + 8));
    four[m] = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  }
  const __m128 first = _mm_add_ps(_mm_movelh_ps(four[0], four[1]), _mm_movehl_ps(four[1], four[0]));
  const __m128 second = _mm_add_ps(_mm_movelh_ps(four[2], four[3]), _mm_movehl_ps(four[3], four[2]));
  _mm_storeu_ps(out, _mm_add_ps(_mm_shuffle_ps(first, second, 0x88), _mm_shuffle_ps(first, second, 0xdd)));
}
#endif

using Add = void (*)(const Block&, Stream&);
Add block_of(int64_t level, int64_t dtype) {
#ifdef COMPRESSOR_X86
  if (level >= AVX512VNNI) return dtype == FLOAT32 ? block_avx512<FLOAT32> : dtype == FLOAT16 ? block_avx512<FLOAT16> : block_avx512<BFLOAT16>;
  if (level >= AVX2) return dtype == FLOAT32 ? block_avx2<FLOAT32> : dtype == FLOAT16 ? block_avx2<FLOAT16> : block_avx2<BFLOAT16>;
#endif
  (void)level, (void)dtype;
  return add_scalar;
}

}  // namespace
}  // namespace compressor

using namespace compressor;

extern "C" int64_t linear_dense(int64_t level, int64_t threads, const void* x, const void* weight, int64_t dtype, const void* bias,
                                int64_t bias_dtype, void* y, int64_t M, int64_t N, int64_t K) {
  if (!level_is_there(level)) return BAD_LEVEL;
  if (M < 0 || N < 0 || K < 0) return BAD_SHAPE;
  const int64_t size = dtype_bytes(dtype);
  const Add add = block_of(level, dtype);
  auto* totals = totals_scalar;
#ifdef COMPRESSOR_X86
  if (level >= AVX2) totals = totals_avx2;
#endif
  for (int64_t m0 = 0; m0 < M; m0 += MANY) {
    const int64_t here = std::min(MANY, M - m0), blocks = (here + ROWS - 1) / ROWS;
    const float* rows = as_floats(level, x, dtype, m0 * K, (float*)scratch(1, size_t(here * K) * 4), here * K);
    parallel(threads, (N + OUTPUTS - 1) / OUTPUTS, [&](int64_t task) {
      const int64_t n = task * OUTPUTS, outputs = std::min<int64_t>(OUTPUTS, N - n);
      float* sums = (float*)scratch(0, size_t(blocks * OUTPUTS * ROWS * LANES) * 4);
      const char* from = (const char*)weight + n * K * size;
      Stream stream{from + AHEAD, 0, outputs * LANES * size, 64 * blocks};
      for (int64_t k = 0; k == 0 || k < K; k += CHUNK)
        for (int64_t b = 0; b < blocks; b++)
          add(Block{from, K * size, dtype, outputs, rows + b * ROWS * K, K, std::min<int64_t>(ROWS, here - b * ROWS), k, std::min(k + CHUNK, K),
                    sums + b * OUTPUTS * ROWS * LANES},
              stream);
      float added[OUTPUTS] = {};
      if (bias) to_float(level, bias, bias_dtype, n, added, outputs);
      for (int64_t b = 0; b < blocks; b++) {
        float out[OUTPUTS][ROWS], row[OUTPUTS];
        for (int64_t r = 0; r < outputs; r++) totals(sums + (b * OUTPUTS + r) * ROWS * LANES, out[r]);
        for (int64_t m = 0; m < ROWS && b * ROWS + m < here; m++) {
          for (int64_t r = 0; r < outputs; r++) row[r] = bias ? out[r][m] + added[r] : out[r][m];
          from_float(level, row, y, dtype, (m0 + b * ROWS + m) * N + n, outputs);
        }
      }
    });
  }
  return OK;
}
