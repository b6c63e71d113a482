// Rounds rows of x (M, K) to int8, each by its own largest magnitude: x ~ code * scale, scale = largest / 127, code from
// -127 to 127, half to even. Codes are padded to a multiple of 64 columns with 0. The matmul of a weight with zero points
// also needs the sums of codes in each group of columns. Codes, scales and sums have the bits of the CPU library.
#include "device.h"

namespace quantize_rows {

constexpr int THREADS = 256;

struct Arguments {
  const void* x;  // (M, K) of type
  i8* codes;      // (M, padded)
  float* scale;   // (M)
  i32* sum;       // (M, groups), or null
  int M, K, padded, columns_per_group, groups, type;
};

// A block has a row. A thread has 8 neighbours in each round.
__global__ void __launch_bounds__(THREADS) rows(Arguments args) {
  SHARED(u32, tops, THREADS / 32);
  const int m = blockIdx.x, thread = threadIdx.x, lane = thread % 32;
  const u64 start = u64(m) * args.K;
  u32 top = 0;
  for (int k = thread * 8; k < args.K; k += THREADS * 8) {
    float v[8];
    load8(v, args.x, start + k, args.type);
#pragma unroll
    for (int i = 0; i < 8; i++) top = magnitude_bits(v[i]) > top ? magnitude_bits(v[i]) : top;
  }
  top = warp_max(top);
  if (lane == 0) tops[thread / 32] = top;
  if (args.sum)
    for (int j = thread; j < args.groups; j += THREADS) args.sum[u64(m) * args.groups + j] = 0;
  __syncthreads();
  top = warp_max(tops[lane % (THREADS / 32)]);
  const RowRounding row = rounding_of(top);
  if (thread == 0) args.scale[m] = row.step;

  // all lanes of a warp make as many rounds, and 64 columns are 8 lanes: their sum is one addition to the group's
  for (int first = 0; first < args.padded; first += THREADS * 8) {
    const int k = first + thread * 8;
    i32 code[8] = {}, sum = 0;
    if (k < args.K) {
      float v[8];
      load8(v, args.x, start + k, args.type);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        code[i] = round_code(v[i], row);
        sum += code[i];
      }
    }
    if (k < args.padded) {
      u32* const place = (u32*)(args.codes + u64(m) * args.padded + k);
      place[0] = pack_codes(code[0], code[1], code[2], code[3]);
      place[1] = pack_codes(code[4], code[5], code[6], code[7]);
    }
    if (args.sum) {
#pragma unroll
      for (int bit = 1; bit < 8; bit *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bit);
      // the order of these additions doesn't matter: integers
      if (lane % 8 == 0 && k < args.padded) atomicAdd(args.sum + u64(m) * args.groups + k / args.columns_per_group, sum);
    }
  }
}

}  // namespace quantize_rows
