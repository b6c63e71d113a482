// What a block computes between its matrix products, each in one pass over memory: RMSNorm, the product with a SiLU, and rotary
// position embeddings. Inputs are float32 or bfloat16. Numbers are float32, and are rounded to
// the type of the inputs wherever torch's operations for the same round.
// Each number gets the same operations at every level, and sums have the same order, so results don't depend on instructions or threads.
#include <algorithm>

#include "common.h"
#include "ops.h"

using namespace compressor;

namespace {

constexpr int64_t SUMS = 64;              // partial sums of a row
constexpr int64_t NUMBERS_A_TASK = 8192;
constexpr float TO_INTEGER = 12582912.f;  // 1.5 * 2^23: what is added to it is rounded to an integer, half to even

template <int W> struct Register;
#define REGISTER_OF(W)                                             \
  template <> struct Register<W> {                                 \
    typedef float Vector __attribute__((vector_size(4 * W)));      \
    typedef int32_t Integers __attribute__((vector_size(4 * W)));  \
    typedef uint32_t Bits __attribute__((vector_size(4 * W)));     \
    typedef uint16_t Halves __attribute__((vector_size(2 * W)));   \
  };
REGISTER_OF(4) REGISTER_OF(8) REGISTER_OF(16)

// Numbers of type D, a register of W at a time. The last ones of a row may be fewer; zeros follow them.
template <int64_t D, int W> struct Numbers {
  using Vector = typename Register<W>::Vector;
  using Integers = typename Register<W>::Integers;
  using Bits = typename Register<W>::Bits;
  using Halves = typename Register<W>::Halves;
  static constexpr int64_t SIZE = D == FLOAT32 ? 4 : 2;

  static ALWAYS_INLINE void load(Vector& v, const void* data, int64_t at, int64_t count = W) {
    const char* from = (const char*)data + at * SIZE;
    char memory[W * SIZE];
    if (count < W) memset(memory, 0, sizeof memory), memcpy(memory, from, size_t(count * SIZE)), from = memory;
    if constexpr (D == FLOAT32) memcpy(&v, from, sizeof v);
    else {
      Halves high;
      memcpy(&high, from, sizeof high);
      const Bits bits = __builtin_convertvector(high, Bits) << 16;
      memcpy(&v, &bits, sizeof v);
    }
  }
  static ALWAYS_INLINE void rounded(const Vector& v, Bits& bits) {  // bfloat16 in the high half, any bits in the low one
    memcpy(&bits, &v, sizeof bits);
    const Bits even = bits + 0x7fff + (bits >> 16 & 1);
    bits = v == v ? even : bits | 0x400000;
  }
  static ALWAYS_INLINE void store(const Vector& v, void* data, int64_t at, int64_t count = W) {
    char memory[W * SIZE], *end = (char*)data + at * SIZE, *to = count < W ? memory : end;
    if constexpr (D == FLOAT32) memcpy(to, &v, sizeof v);
    else {
      Bits bits;
      rounded(v, bits);
      const Halves high = __builtin_convertvector(bits >> 16, Halves);
      memcpy(to, &high, sizeof high);
    }
    if (count < W) memcpy(end, memory, size_t(count * SIZE));
  }
  static ALWAYS_INLINE void round(Vector& v) {  // to the type and back
    if constexpr (D == BFLOAT16) {
      Bits bits;
      rounded(v, bits);
      bits &= 0xffff0000u;
      memcpy(&v, &bits, sizeof v);
    }
  }
  // x / (1 + exp(-x)). exp(t) is 2^n times a polynomial of t - n log 2, whose error is below 2^-27 of it; 2^n in two factors, of which the
  // product may overflow to Inf or be subnormal.
  static ALWAYS_INLINE void silu(Vector& x) {
    Vector t = -x, a, b;
    t = t > 89.f ? Vector{} + 89.f : t;  // NaN stays
    t = t < -104.f ? Vector{} - 104.f : t;
    const Vector shifted = t * 1.44269504f + TO_INTEGER, n = shifted - TO_INTEGER;
    const Vector r = (t - n * 0.693359375f) + n * 2.12194440e-4f;  // log 2 in two parts, the first of few bits: its product is exact
    const Vector p = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f + r * (1 / 5040.f)))))));
    Integers power;
    memcpy(&power, &shifted, sizeof power);
    power = t == t ? power - 0x4b400000 : Integers{};
    const Integers low = ((power >> 1) + 127) << 23, high = (power - (power >> 1) + 127) << 23;
    memcpy(&a, &low, sizeof a), memcpy(&b, &high, sizeof b);
    x /= 1 + p * a * b;
  }
};

struct Norm {
  const void *x, *weight;
  void* y;
  int64_t columns;
  float eps, offset;
  bool rounds;
};
template <int64_t D, int W> ALWAYS_INLINE void norm_row(const Norm& t, int64_t m) {
  using N = Numbers<D, W>;
  using Vector = typename N::Vector;
  constexpr int64_t COUNT = SUMS / W;
  const int64_t first = m * t.columns;
  Vector sum[COUNT] = {};
  int64_t k = 0;
  for (; k + SUMS <= t.columns; k += SUMS)
    UNROLL for (int64_t s = 0; s < COUNT; s++) {
      Vector v;
      N::load(v, t.x, first + k + s * W);
      sum[s] += v * v;
    }
  for (int64_t s = 0; k < t.columns; k += W, s++) {
    Vector v;
    N::load(v, t.x, first + k, std::min<int64_t>(W, t.columns - k));
    sum[s] += v * v;
  }
  float lanes[SUMS];
  memcpy(lanes, sum, sizeof lanes);
  for (int64_t half = SUMS / 2; half; half /= 2)
    for (int64_t l = 0; l < half; l++) lanes[l] += lanes[l + half];
  const float factor = 1 / std::sqrt(lanes[0] / float(t.columns) + t.eps);
  for (k = 0; k < t.columns; k += W) {
    const int64_t count = std::min<int64_t>(W, t.columns - k);
    Vector v, weight;
    N::load(v, t.x, first + k, count);
    N::load(weight, t.weight, k, count);
    v *= factor;
    if (t.rounds) N::round(v);
    v *= t.offset + weight;
    N::store(v, t.y, first + k, count);
  }
}

struct Gated {
  const void *gate, *up;
  void* y;
};
template <int64_t D, int W> ALWAYS_INLINE void gate_range(const Gated& t, int64_t begin, int64_t end) {
  using N = Numbers<D, W>;
  for (int64_t k = begin; k < end; k += W) {
    const int64_t count = std::min<int64_t>(W, end - k);
    typename N::Vector gate, up;
    N::load(gate, t.gate, k, count);
    N::load(up, t.up, k, count);
    N::silu(gate);
    N::round(gate);
    gate *= up;
    N::store(gate, t.y, k, count);
  }
}

struct Rotation {
  const void *x, *cos, *sin;
  void* y;
  int64_t tokens, heads, width, sequence_stride;
};
// All heads of token m: y = x cos + (-second half of x, first half of x) sin
template <int64_t D, int W> ALWAYS_INLINE void rotate_token(const Rotation& t, int64_t m) {
  using N = Numbers<D, W>;
  using Vector = typename N::Vector;
  const int64_t sequence = m / t.tokens, token = m % t.tokens, half = t.width / 2;
  const int64_t place = (sequence * t.sequence_stride + token) * t.width;
  for (int64_t h = 0; h < t.heads; h++) {
    const int64_t from = (m * t.heads + h) * t.width, to = ((sequence * t.heads + h) * t.tokens + token) * t.width;
    for (int64_t d = 0; d < half; d += W) {
      const int64_t count = std::min<int64_t>(W, half - d);
      Vector x[2], cos[2], sin[2];
      UNROLL for (int64_t i = 0; i < 2; i++) {
        N::load(x[i], t.x, from + i * half + d, count);
        N::load(cos[i], t.cos, place + i * half + d, count);
        N::load(sin[i], t.sin, place + i * half + d, count);
      }
      UNROLL for (int64_t i = 0; i < 2; i++) {
        Vector straight = x[i] * cos[i], crossed = (i ? x[0] : -x[1]) * sin[i];
        N::round(straight), N::round(crossed);
        straight += crossed;
        N::store(straight, t.y, to + i * half + d, count);
      }
    }
  }
}

template <int64_t D> void norm_scalar(const Norm& t, int64_t m) { norm_row<D, 4>(t, m); }
template <int64_t D> void gate_scalar(const Gated& t, int64_t begin, int64_t end) { gate_range<D, 4>(t, begin, end); }
template <int64_t D> void rotate_scalar(const Rotation& t, int64_t m) { rotate_token<D, 4>(t, m); }
#define OF_TYPE(f, dtype) (dtype == FLOAT32 ? f<FLOAT32> : f<BFLOAT16>)
#ifdef COMPRESSOR_X86
template <int64_t D> TARGET_AVX2 void norm_avx2(const Norm& t, int64_t m) { norm_row<D, 8>(t, m); }
template <int64_t D> TARGET_AVX2 void gate_avx2(const Gated& t, int64_t begin, int64_t end) { gate_range<D, 8>(t, begin, end); }
template <int64_t D> TARGET_AVX2 void rotate_avx2(const Rotation& t, int64_t m) { rotate_token<D, 8>(t, m); }
template <int64_t D> TARGET_AVX512 void norm_avx512(const Norm& t, int64_t m) { norm_row<D, 16>(t, m); }
template <int64_t D> TARGET_AVX512 void gate_avx512(const Gated& t, int64_t begin, int64_t end) { gate_range<D, 16>(t, begin, end); }
template <int64_t D> TARGET_AVX512 void rotate_avx512(const Rotation& t, int64_t m) { rotate_token<D, 16>(t, m); }
#define AT_LEVEL(f, level, dtype) \
  (level >= AVX512VNNI ? OF_TYPE(f##_avx512, dtype) : level >= AVX2 ? OF_TYPE(f##_avx2, dtype) : OF_TYPE(f##_scalar, dtype))
#else
#define AT_LEVEL(f, level, dtype) OF_TYPE(f##_scalar, dtype)
#endif

}  // namespace

extern "C" int64_t rms_norm(int64_t level, int64_t threads, const void* x, int64_t dtype, const void* weight, void* y, int64_t M, int64_t K,
                            double eps, double offset, int64_t rounds) {
  if (!level_is_there(level)) return BAD_LEVEL;
  if (M < 0 || K < 1) return BAD_SHAPE;
  if (dtype != FLOAT32 && dtype != BFLOAT16) return BAD_DTYPE;
  const Norm task{x, weight, y, K, float(eps), float(offset), rounds != 0};
  const auto row = AT_LEVEL(norm, level, dtype);
  const int64_t rows = std::max<int64_t>(1, NUMBERS_A_TASK / K);
  parallel(threads, (M + rows - 1) / rows, [&](int64_t n) {
    for (int64_t m = n * rows; m < std::min(M, (n + 1) * rows); m++) row(task, m);
  });
  return OK;
}

extern "C" int64_t silu_product(int64_t level, int64_t threads, const void* gate, const void* up, int64_t dtype, void* y, int64_t count) {
  if (!level_is_there(level)) return BAD_LEVEL;
  if (count < 0) return BAD_SHAPE;
  if (dtype != FLOAT32 && dtype != BFLOAT16) return BAD_DTYPE;
  const Gated task{gate, up, y};
  const auto range = AT_LEVEL(gate, level, dtype);
  parallel(threads, (count + NUMBERS_A_TASK - 1) / NUMBERS_A_TASK,
           [&](int64_t n) { range(task, n * NUMBERS_A_TASK, std::min(count, (n + 1) * NUMBERS_A_TASK)); });
  return OK;
}

extern "C" int64_t rotate_halves(int64_t level, int64_t threads, const void* x, int64_t dtype, const void* cos, const void* sin, void* y,
                                 int64_t sequences, int64_t tokens, int64_t heads, int64_t width, int64_t sequence_stride) {
  if (!level_is_there(level)) return BAD_LEVEL;
  if (sequences < 0 || tokens < 0 || heads < 0 || width < 0 || width % 2 || (sequence_stride && sequence_stride != tokens)) return BAD_SHAPE;
  if (dtype != FLOAT32 && dtype != BFLOAT16) return BAD_DTYPE;
  const Rotation task{x, cos, sin, y, tokens, heads, width, sequence_stride};
  const auto token = AT_LEVEL(rotate, level, dtype);
  parallel(threads, sequences * tokens, [&](int64_t m) { token(task, m); });
  return OK;
}
