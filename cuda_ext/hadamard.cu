// y = x H_n * scale for each row of x (rows, n), H_n Sylvester's matrix, n a power of two from 8 to 32768. One read, one
// write; float32 inside, one rounding at the end. y may be x.
//
// A thread has CHUNKS runs of 8 neighbours, `threads * 8` apart. A butterfly joins elements that differ in one bit of
// their index, and where the bit is tells how they meet:
//
//   bits 0 to 2    in the run                  bits 8 and on            in shared memory, among the block's warps
//   bits 3 to 7    by shuffles in the warp     above threads * 8        among the runs of a thread
//
// In shared memory the block's warps are turned into lanes: lane l then has 8 neighbours of warp l % warps.
#include "device.h"

namespace hadamard {

constexpr int RUN = 8, WARP_ELEMENTS = 256, MAX_THREADS = 1024;
constexpr int WARP_FLOATS = WARP_ELEMENTS + 4;  // so that 8 lanes with the same place in 8 warps meet all banks

struct Arguments {
  const void* x;
  void* y;
  u64 count;  // elements of x
  int n;
  float scale;
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
  b = MUTANT == 4 ? b - a : a - b;
  a = sum;
}

// Among lanes that differ in bit `bit` of their number.
DEVICE void butterfly_of_lanes(float (&v)[RUN], int lane, int bit) {
#pragma unroll
  for (int i = 0; i < RUN; i++) {
    const float other = __shfl_xor_sync(0xffffffffu, v[i], bit);
    v[i] = lane & bit ? other - v[i] : v[i] + other;
  }
}

// Among the block's warps (a power of two, at most 32), through `buffer`.
DEVICE void butterfly_of_warps(float (&v)[RUN], float* buffer, int lane, int warp, int warps) {
  float* const mine = buffer + warp * WARP_FLOATS + lane * RUN;
#pragma unroll
  for (int i = 0; i < RUN; i++) mine[i] = v[i];
  if (MUTANT != 1) __syncthreads();
  float* const turned = buffer + lane % warps * WARP_FLOATS + warp * (WARP_ELEMENTS / warps) + lane / warps * RUN;
#pragma unroll
  for (int i = 0; i < RUN; i++) v[i] = turned[i];
  for (int bit = 1; bit < warps; bit *= 2) butterfly_of_lanes(v, lane, MUTANT == 3 ? bit ^ 1 : bit);
#pragma unroll
  for (int i = 0; i < RUN; i++) turned[i] = v[i];
  if (MUTANT != 2) __syncthreads();
  // what this thread writes next is what it reads here, so the next call needs no barrier before it
#pragma unroll
  for (int i = 0; i < RUN; i++) v[i] = mine[i];
}

// A block has one row, or for n below 256 several: `threads * 8 * CHUNKS` elements.
template <int type, int CHUNKS>
__global__ void __launch_bounds__(MAX_THREADS) rows(Arguments args) {
  SHARED(float, buffer, 32 * WARP_FLOATS);
  const int thread = threadIdx.x, threads = blockDim.x, lane = thread % 32, warp = thread / 32;
  const u64 start = u64(blockIdx.x) * threads * RUN * CHUNKS + thread * RUN;
  float v[CHUNKS][RUN];
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const u64 index = start + u64(c) * threads * RUN;
    if (index < args.count + (MUTANT == 5 ? RUN : 0)) {
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
    for (int i = 0; i < RUN; i++) {
      if (MUTANT == 7) v[c][i] = f16_to_float(float_to_f16(v[c][i]));
      v[c][i] *= MUTANT == 8 && c == CHUNKS - 1 && i == RUN - 1 ? 1.f : args.scale;
    }
    if (index < args.count + (MUTANT == 6 ? RUN : 0)) Run<type>::store(args.y, index, v[c]);
  }
}

}  // namespace hadamard

#ifndef __CUDACC_RTC__

namespace hadamard {

template <int type>
int launch(const Arguments& args, void* stream) {
  int threads = 128;  // four warps with rows of their own, where a row needs no more than one
  if (args.n > WARP_ELEMENTS) threads = args.n / RUN < MAX_THREADS ? args.n / RUN : MAX_THREADS;
  const int chunks = args.n > MAX_THREADS * RUN ? args.n / (MAX_THREADS * RUN) : 1;
  const u64 elements = u64(threads) * RUN * chunks, blocks = (args.count + elements - 1) / elements;
  if (blocks >> 31) return -1;
  const dim3 grid((unsigned)blocks), block((unsigned)threads);
  if (chunks == 1) return LAUNCH((rows<type, 1>), grid, block, stream, args);
  if (chunks == 2) return LAUNCH((rows<type, 2>), grid, block, stream, args);
  return LAUNCH((rows<type, 4>), grid, block, stream, args);
}

}  // namespace hadamard

// 0, a cudaError, or -1 for a shape, a type or an address that the kernel doesn't take. x and y start at multiples of
// 16 bytes.
extern "C" int compressor_hadamard(const void* x, void* y, i64 rows, int n, float scale, int type, void* stream) {
  if (rows < 0 || n < hadamard::RUN || n > 4 * hadamard::MAX_THREADS * hadamard::RUN || (n & (n - 1))) return -1;
  if (rows > (i64(1) << 40) || type < FLOAT16 || type > FLOAT32) return -1;
  if (rows == 0) return 0;
  if (!x || !y || !aligned16(x) || !aligned16(y)) return -1;
  const hadamard::Arguments args{x, y, u64(rows) * u64(n), n, scale};
  if (type == FLOAT16) return hadamard::launch<FLOAT16>(args, stream);
  if (type == BFLOAT16) return hadamard::launch<BFLOAT16>(args, stream);
  return hadamard::launch<FLOAT32>(args, stream);
}

#endif
