// y = x H_n * scale for each row of x (rows, n). One read, one write; float32 inside, one rounding at the end. y may be x.
// H_n is Sylvester's matrix for n a power of two from 8 to 32768, and H_(n / m) (x) H_m, Sylvester's factor outside, for
// n / m a power of two and m one of 12, 20, 28, 36 (n determines m; 2^p * 40 is 2^(p + 1) * 20).
//
// Powers of two: `rows`.
//
// A thread has CHUNKS runs of 8 neighbours, `threads * 8` apart. A butterfly combines elements that differ in one bit of
// their index, and the bit decides how they are exchanged:
//
//   bits 0 to 2    in the run                  bits 8 and on            in shared memory, among the block's warps
//   bits 3 to 7    by shuffles in the warp     above threads * 8        among the runs of a thread
//
// In shared memory the block's warps and lanes are transposed: lane l then has 8 neighbours of warp l % warps.
//
// Other sizes: `rows_of_runs`. A run is m neighbours, which the thread multiplies by H_m in registers, m additions or half
// of them for an output; the bits of the run's number are then exchanged in lanes, warps, and runs of a thread as above, 4
// neighbours at a time.
#include "device.h"

namespace hadamard {

constexpr int RUN = 8, WARP_ELEMENTS = 256, MAX_THREADS = 1024;
constexpr int QUAD = 4, MAX_RUN_THREADS = 512;  // rows_of_runs: 36 numbers and their 36 sums need 128 registers
constexpr int PADDING = 4;  // floats after a warp's: 8 lanes with the same place in 8 warps meet all banks

struct Arguments {
  const void* x;
  void* y;
  u64 count;  // elements of x
  int n;
  float scale;
  int type;
  int runs;  // of m in a row; beside that, it leaves no gap in what a launch is given
};

template <int type>
struct Run;  // 8 elements, loaded and stored

template <>
struct Run<FLOAT32> {
  static DEVICE void load(float (&v)[RUN], const void* x, u64 index) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const Words4 words = load16((const float*)x + index + half * 4);
#pragma unroll
      for (int i = 0; i < 4; i++) v[half * 4 + i] = __uint_as_float(words.word[i]);
    }
  }
  static DEVICE void store(void* y, u64 index, const float (&v)[RUN]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      Words4 words;
#pragma unroll
      for (int i = 0; i < 4; i++) words.word[i] = __float_as_uint(v[half * 4 + i]);
      store16((float*)y + index + half * 4, words);
    }
  }
};

template <u16 (*from_float)(float), float (*to_float)(u16)>
struct Run16 {
  static DEVICE void load(float (&v)[RUN], const void* x, u64 index) {
    const Words4 words = load16((const u16*)x + index);
#pragma unroll
    for (int i = 0; i < RUN; i++) v[i] = to_float(u16(words.word[i / 2] >> (16 * (i % 2))));
  }
  static DEVICE void store(void* y, u64 index, const float (&v)[RUN]) {
    Words4 words;
#pragma unroll
    for (int i = 0; i < 4; i++) words.word[i] = from_float(v[2 * i]) | u32(from_float(v[2 * i + 1])) << 16;
    store16((u16*)y + index, words);
  }
};

template <>
struct Run<FLOAT16> : Run16<float_to_f16, f16_to_float> {};
template <>
struct Run<BFLOAT16> : Run16<float_to_bf16, bf16_to_float> {};

DEVICE void butterfly(float& a, float& b) {
  const float sum = a + b;
  b = a - b;
  a = sum;
}

// Among lanes that differ in bit `bit` of their number.
template <int WIDTH>
DEVICE void butterfly_of_lanes(float (&v)[WIDTH], int lane, int bit) {
#pragma unroll
  for (int i = 0; i < WIDTH; i++) {
    const float other = __shfl_xor_sync(0xffffffffu, v[i], bit);
    v[i] = lane & bit ? other - v[i] : v[i] + other;
  }
}

// Among the block's warps (a power of two, at most 32), through `buffer`.
template <int WIDTH>
DEVICE void butterfly_of_warps(float (&v)[WIDTH], float* buffer, int lane, int warp, int warps) {
  constexpr int WARP_FLOATS = 32 * WIDTH + PADDING;
  float* const mine = buffer + warp * WARP_FLOATS + lane * WIDTH;
#pragma unroll
  for (int i = 0; i < WIDTH; i++) mine[i] = v[i];
  __syncthreads();
  float* const turned = buffer + lane % warps * WARP_FLOATS + warp * (32 * WIDTH / warps) + lane / warps * WIDTH;
#pragma unroll
  for (int i = 0; i < WIDTH; i++) v[i] = turned[i];
#pragma unroll (WIDTH == QUAD ? 1 : 5)
  for (int bit = 1; bit < warps; bit *= 2) butterfly_of_lanes(v, lane, bit);
#pragma unroll
  for (int i = 0; i < WIDTH; i++) turned[i] = v[i];
  __syncthreads();
  // what this thread writes next is what it reads here, so the next call needs no barrier before it
#pragma unroll
  for (int i = 0; i < WIDTH; i++) v[i] = mine[i];
}

// A block has one row, or for n below 256 several: `threads * 8 * CHUNKS` elements.
template <int type, int CHUNKS>
__global__ void __launch_bounds__(MAX_THREADS) rows(Arguments args) {
  SHARED(float, buffer, 32 * (WARP_ELEMENTS + PADDING));
  const int thread = threadIdx.x, threads = blockDim.x, lane = thread % 32, warp = thread / 32;
  const u64 start = u64(blockIdx.x) * threads * RUN * CHUNKS + thread * RUN;
  float v[CHUNKS][RUN];
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const u64 index = start + u64(c) * threads * RUN;
    if (index < args.count) {
      Run<type>::load(v[c], args.x, index);
    } else {
#pragma unroll
      for (int i = 0; i < RUN; i++) v[c][i] = 0;
    }
#pragma unroll
    for (int bit = 1; bit < RUN; bit *= 2)
#pragma unroll
      for (int i = 0; i < RUN; i++)
        if (!(i & bit)) butterfly(v[c][i], v[c][i | bit]);
    for (int bit = 1; bit < 32 && bit * RUN < args.n; bit *= 2) butterfly_of_lanes(v[c], lane, bit);
    if (args.n > WARP_ELEMENTS) butterfly_of_warps(v[c], buffer, lane, warp, threads / 32);
  }
#pragma unroll
  for (int bit = 1; bit < CHUNKS; bit *= 2)
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
      if (!(c & bit))
#pragma unroll
        for (int i = 0; i < RUN; i++) butterfly(v[c][i], v[c | bit][i]);
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const u64 index = start + u64(c) * threads * RUN;
#pragma unroll
    for (int i = 0; i < RUN; i++) v[c][i] *= args.scale;
    if (index < args.count) Run<type>::store(args.y, index, v[c]);
  }
}

// H_m of a run, with chi(a) the quadratic character of a modulo a prime q:
//   Paley I, q = m - 1, 3 modulo 4 (m = 12, 20): H = I + S, S antisymmetric with first row (0, 1, ..., 1) and
//     S[i, j] = chi(j - i) after it
//   Paley II, q = m / 2 - 1, 1 modulo 4 (m = 28, 36): H = C (x) [1 1; 1 -1] + I (x) [1 -1; -1 -1], C symmetric with first
//     row (0, 1, ..., 1) and C[i, j] = chi(j - i) after it
// Bit j of row[i] is set where S or C has -1 at (i, j), off the diagonal.
template <int SIZE>
struct Signs {
  u64 row[SIZE] = {};
};

DEVICE constexpr bool is_square(int a, int q) {
  for (int x = 1; x < q; x++)
    if ((x * x - a) % q == 0) return true;
  return false;
}

template <int SIZE>
DEVICE constexpr Signs<SIZE> signs_of(bool antisymmetric) {
  Signs<SIZE> signs;
  for (int i = 1; i < SIZE; i++)
    for (int j = 0; j < SIZE; j++) {
      const bool negative = j == 0 ? antisymmetric : i != j && !is_square(j - i, SIZE - 1);
      if (negative) signs.row[i] |= u64(1) << j;
    }
  return signs;
}

// v H_m, v as quads.
template <int M>
DEVICE void multiply_run(float (&v)[M / QUAD][QUAD]) {
  // Paley II takes pairs of neighbours to their sum and difference, and each of those by C: half the additions
  constexpr bool PAIRS = M == 28 || M == 36;
  constexpr int WIDTH = PAIRS ? 2 : 1, SIZE = M / WIDTH;
  constexpr Signs<SIZE> signs = signs_of<SIZE>(!PAIRS);
  if (PAIRS) {
#pragma unroll
    for (int i = 0; i < M; i += 2) butterfly(v[i / QUAD][i % QUAD], v[i / QUAD][i % QUAD + 1]);
  }
  float sum[M];
#pragma unroll
  for (int j = 0; j < M; j++) {  // the diagonal: I, or (difference, -sum) for (sum, difference)
    const float value = PAIRS ? v[j / QUAD][j % QUAD ^ 1] : v[j / QUAD][j % QUAD];
    sum[j] = PAIRS && j % 2 ? -value : value;
  }
#pragma unroll
  for (int i = 0; i < SIZE; i++)
#pragma unroll
    for (int j = 0; j < SIZE; j++) {
      if (i == j) continue;
      const bool negative = signs.row[i] >> j & 1;
#pragma unroll
      for (int w = 0; w < WIDTH; w++) {
        const float value = v[(i * WIDTH + w) / QUAD][(i * WIDTH + w) % QUAD];
        float& to = sum[j * WIDTH + w];
        to = negative ? to - value : to + value;
      }
    }
#pragma unroll
  for (int j = 0; j < M; j++) v[j / QUAD][j % QUAD] = sum[j];
}

// The type is a run-time value: a kernel for each would take minutes to compile, and all threads take the same branch.
DEVICE void load_quad(float (&v)[QUAD], const void* x, u64 index, int type) {
  if (type == FLOAT32) {
    const Words4 words = load16((const float*)x + index);
#pragma unroll
    for (int i = 0; i < QUAD; i++) v[i] = __uint_as_float(words.word[i]);
  } else {
    const u64 bits = *(const u64*)((const u16*)x + index);
#pragma unroll
    for (int i = 0; i < QUAD; i++)
      v[i] = type == FLOAT16 ? f16_to_float(u16(bits >> (16 * i))) : bf16_to_float(u16(bits >> (16 * i)));
  }
}

DEVICE void store_quad(void* y, u64 index, const float (&v)[QUAD], int type) {
  if (type == FLOAT32) {
    Words4 words;
#pragma unroll
    for (int i = 0; i < QUAD; i++) words.word[i] = __float_as_uint(v[i]);
    store16((float*)y + index, words);
  } else {
    u64 bits = 0;
#pragma unroll
    for (int i = 0; i < QUAD; i++)
      bits |= u64(type == FLOAT16 ? float_to_f16(v[i]) : float_to_bf16(v[i])) << (16 * i);
    *(u64*)((u16*)y + index) = bits;
  }
}

// A thread has CHUNKS runs of M neighbours, `threads` runs apart; a block has a row of n = M * runs, or several.
template <int M, int CHUNKS>
__global__ void __launch_bounds__(MAX_RUN_THREADS, 1) rows_of_runs(Arguments args) {
  SHARED(float, buffer, MAX_RUN_THREADS / 32 * (32 * QUAD + PADDING));
  const int thread = threadIdx.x, threads = blockDim.x, lane = thread % 32, warp = thread / 32, runs = args.runs;
  const u64 start = (u64(blockIdx.x) * threads * CHUNKS + thread) * M;
  float v[CHUNKS][M / QUAD][QUAD];
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const u64 index = start + u64(c) * threads * M;
#pragma unroll
    for (int q = 0; q < M / QUAD; q++) {
      if (index < args.count) {
        load_quad(v[c][q], args.x, index + q * QUAD, args.type);
      } else {
#pragma unroll
        for (int i = 0; i < QUAD; i++) v[c][q][i] = 0;
      }
    }
    multiply_run<M>(v[c]);
#pragma unroll
    for (int q = 0; q < M / QUAD; q++) {
#pragma unroll 1
      for (int bit = 1; bit < 32 && bit < runs; bit *= 2) butterfly_of_lanes(v[c][q], lane, bit);
      if (runs > 32) butterfly_of_warps(v[c][q], buffer, lane, warp, threads / 32);
    }
  }
#pragma unroll
  for (int bit = 1; bit < CHUNKS; bit *= 2)
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
      if (!(c & bit))
#pragma unroll
        for (int i = 0; i < M; i++) butterfly(v[c][i / QUAD][i % QUAD], v[c | bit][i / QUAD][i % QUAD]);
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const u64 index = start + u64(c) * threads * M;
#pragma unroll
    for (int q = 0; q < M / QUAD; q++) {
#pragma unroll
      for (int i = 0; i < QUAD; i++) v[c][q][i] *= args.scale;
      if (index < args.count) store_quad(args.y, index + q * QUAD, v[c][q], args.type);
    }
  }
}

}  // namespace hadamard
