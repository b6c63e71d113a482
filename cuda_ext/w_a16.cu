// y (M, N) = x (M, K) W^T + bias with 4-bit weights: W[n, k] = (code[n, k] - zero_point[j, n]) * scale[j, n], j = k / g.
// x, y and bias are float16 or bfloat16. Sums are float32; a scale acts on the sum of its group; one rounding at the end.
//
// Layout "mma1" of the codes. K is padded to 64 and N to 64 (any code does: x is read as zero there, y isn't written).
// Tiles of 64 outputs x 64 columns, in the order [N / 64][K / 64], have 512 words: word[k / 16][n / 16][lane]
//
//   bits of a word    31..28  27..24  23..20  19..16 | 15..12  11..8   7..4    3..0
//   n of the 16       l/4+8   l/4     l/4+8   l/4    | l/4+8   l/4     l/4+8   l/4         l = lane
//   k of the 16       c+9     c+9     c+1     c+1    | c+8     c+8     c       c           c = 2 * (l % 4)
//
// so one word holds what a lane of m16n8k16 needs of a 16 x 16 piece, both as the left operand (16 rows of W) and as
// the right one (two times 8 columns of W^T), and (word >> 4 * i) & 0x000f000f is the pair of register i of the left one.
#include "device.h"

// Tiles of the packed codes and threads of a block.
constexpr int TILE_N = 64, TILE_K = 64, TILE_WORDS = 512, THREADS = 128;

struct Arguments {
  const u16* x;          // (M, K), K a multiple of 8
  const u32* packed;     // (N / 64, K / 64, 512), both rounded up
  const void* scale;     // (groups, N) of scale_type
  const u8* zero_point;  // (groups, N), or null: 8
  const u16* bias;       // (N), or null
  u16* y;                // (M, N)
  int M, N, K;
  int tiles;            // of K
  int tiles_per_group;  // group size / 64
  int scale_type;
};

// float16 1024 + v and bfloat16 128 + v have v in their last bits, so a bit-wise or makes a number of a code, and
// taking 1024 + z or 128 + z away is exact.
template <int type>
struct Element;

template <>
struct Element<FLOAT16> {
  static constexpr u32 base = 0x64006400u;
  static DEVICE u32 subtract(u32 a, u32 b) { return subtract_f16x2(a, b); }
  static DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_f16(c, a, b0, b1); }
  static DEVICE float to_float(u16 bits) { return f16_to_float(bits); }
  static DEVICE u16 from_float(float f) { return float_to_f16(f); }
};

template <>
struct Element<BFLOAT16> {
  static constexpr u32 base = 0x43004300u;
  static DEVICE u32 subtract(u32 a, u32 b) { return subtract_bf16x2(a, b); }
  static DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_bf16(c, a, b0, b1); }
  static DEVICE float to_float(u16 bits) { return bf16_to_float(bits); }
  static DEVICE u16 from_float(float f) { return float_to_bf16(f); }
};

// base + z twice, to be taken away from base + code.
template <int type>
DEVICE u32 offset_of(const Arguments& args, int group, int n) {
  u32 z = 8;
  if (args.zero_point) z = n < args.N ? args.zero_point[u64(group) * args.N + n] : 0;
  if (MUTANT == 9 && args.zero_point) z = n < args.N ? args.zero_point[u64(group) * args.N + (n ^ 1) % args.N] : 0;
  return Element<type>::base + z * 0x00010001u;
}

DEVICE float scale_of(const Arguments& args, int group, int n) {
  if (MUTANT == 6 && group > 0) group--;
  return n < args.N ? load_as_float(args.scale, u64(group) * args.N + n, args.scale_type) : 0.f;
}

template <int type>
DEVICE u32 decode(u32 word, int i, u32 offset) {
  return Element<type>::subtract(((word >> (4 * i)) & 0x000f000fu) | Element<type>::base, offset);
}

// 8 columns (16 bytes) of row `row` of a stage of x; the place depends on the row, so that ldmatrix meets every bank.
DEVICE int place_of(int row, int chunk, int swizzle) { return row * TILE_K + (chunk ^ swizzle) * 8; }

// Any M: a block computes ROWS rows of x and 64 outputs; x is the left operand. Each of the 4 warps has 16 outputs.
template <int type, int ROWS>
__global__ void __launch_bounds__(THREADS) w4_a16_tiled(Arguments args) {
  constexpr int STAGES = 4, PIECES = ROWS / 16;
  SHARED(u16, shared_x, STAGES * ROWS * TILE_K);
  SHARED(u32, shared_words, STAGES * TILE_WORDS);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int m0 = blockIdx.x * ROWS, n0 = blockIdx.y * TILE_N, tiles = MUTANT == 10 ? args.tiles - 1 : args.tiles;
  const int readable = MUTANT == 4 ? args.M + 1 : args.M;

  auto fetch = [&](int tile) {
    const int stage = tile % STAGES;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
      const int row = i * 16 + thread / 8, chunk = thread % 8, k = tile * TILE_K + chunk * 8;
      const bool inside = m0 + row < readable && k < args.K;
      cp_async16(shared_x + stage * ROWS * TILE_K + place_of(row, chunk, row & 7),
                 args.x + (inside ? u64(m0 + row) * args.K + k : 0), inside);
    }
    cp_async16(shared_words + stage * TILE_WORDS + thread * 4,
               args.packed + (u64(blockIdx.y) * args.tiles + tile) * TILE_WORDS + thread * 4, true);
  };

  // this lane's outputs: as results (two neighbours in each half of 16) and as right operands (one in each half)
  const int n_result = n0 + warp * 16 + lane % 4 * 2, n_operand = n0 + warp * 16 + lane / 4;
  float total[PIECES][2][4] = {}, part[PIECES][2][4] = {}, scale[2][2], next_scale[2][2];
  u32 offset[2], next_offset[2];
  auto load_next_group = [&](int group) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      next_offset[h] = offset_of<type>(args, group, n_operand + 8 * h);
#pragma unroll
      for (int i = 0; i < 2; i++) next_scale[h][i] = scale_of(args, group, n_result + 8 * h + i);
    }
  };

  load_next_group(0);
  for (int tile = 0; tile < STAGES - 1; tile++) {
    if (tile < tiles) fetch(tile);
    cp_async_commit();
  }
  int group = 0, left_in_group = 0;
  for (int tile = 0; tile < tiles; tile++) {
    if (MUTANT == 7 && tile + STAGES - 1 < tiles) fetch(tile + STAGES - 1);
    if (MUTANT == 2) __syncthreads();
    if (MUTANT != 1) cp_async_wait<STAGES - 2>();
    // after this every thread's copies of the tile are there, and every thread is done with the tile before
    if (MUTANT != 2) __syncthreads();
    if (MUTANT != 7 && tile + STAGES - 1 < tiles) fetch(tile + STAGES - 1);
    cp_async_commit();
    if (left_in_group == 0) {
      left_in_group = args.tiles_per_group;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        offset[h] = next_offset[h];
#pragma unroll
        for (int i = 0; i < 2; i++) scale[h][i] = next_scale[h][i];
      }
      group++;
      if (tile + left_in_group < tiles) load_next_group(group);  // there when its first tile comes
    }

    const u16* stage_x = shared_x + tile % STAGES * ROWS * TILE_K;
    const u32* stage_words = shared_words + tile % STAGES * TILE_WORDS;
#pragma unroll
    for (int step = 0; step < TILE_K / 16; step++) {
      const u32 word = stage_words[step * 128 + warp * 32 + (MUTANT == 3 ? lane ^ 1 : lane)];
      u32 b[2][2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        b[h][0] = decode<type>(word, h, offset[h]);
        b[h][1] = decode<type>(word, h + 2, offset[h]);
      }
#pragma unroll
      for (int p = 0; p < PIECES; p++) {
        // lanes 0 to 15 name columns 0 to 7 of the 16 rows, lanes 16 to 31 columns 8 to 15
        const int row = p * 16 + lane % 16, chunk = step * 2 + lane / 16;
        u32 a[4];
        ldmatrix_x4(a, stage_x + place_of(row, chunk, MUTANT == 5 ? 0 : row & 7));
#pragma unroll
        for (int h = 0; h < 2; h++) Element<type>::mma(part[p][h], a, b[h][0], b[h][1]);
      }
    }

    if (--left_in_group == 0 || tile + 1 == tiles) {
#pragma unroll
      for (int p = 0; p < PIECES; p++)
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            total[p][h][i] += part[p][h][i] * scale[h][i % 2];
            if (MUTANT == 12) total[p][h][i] = Element<type>::to_float(Element<type>::from_float(total[p][h][i]));
            part[p][h][i] = 0;
          }
    }
  }

  const int writable = MUTANT == 8 ? args.M + 1 : args.M;
#pragma unroll
  for (int p = 0; p < PIECES; p++)
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int m = m0 + p * 16 + lane / 4 + 8 * (i / 2), n = n_result + 8 * h + i % 2;
        if (m >= writable || n >= args.N) continue;
        float bias = args.bias ? Element<type>::to_float(args.bias[n]) : 0.f;
        if (MUTANT == 11) bias *= 2;
        args.y[u64(m) * args.N + n] = Element<type>::from_float(total[p][h][i] + bias);
      }
}

#ifndef __CUDACC_RTC__  // the driver interface launches kernels by itself

template <int type>
int launch_tiled(const Arguments& args, void* stream) {
  const unsigned blocks_n = (args.N + TILE_N - 1) / TILE_N;
  if (args.M <= 16) return LAUNCH((w4_a16_tiled<type, 16>), dim3(1, blocks_n), dim3(THREADS), stream, args);
  return LAUNCH((w4_a16_tiled<type, 64>), dim3((args.M + 63) / 64, blocks_n), dim3(THREADS), stream, args);
}

// 0, a cudaError, or -1 for a shape, a type or an address that no kernel takes. Nothing is allocated and nothing waited
// for. group_size is a multiple of 64, or -1 for one group. x and packed start at multiples of 16 bytes, and K is a
// multiple of 8: pad x with zeros otherwise. bias has x's type.
extern "C" int compressor_w4_a16(const void* x, const void* packed, const void* scale, const void* zero_point,
                                 const void* bias, void* y, int M, int N, int K, int group_size, int x_type,
                                 int scale_type, void* stream) {
  if (M < 0 || N < 0 || K < 1 || K % 8 || K > (1 << 30) || N > 65535 * TILE_N) return -1;
  if (group_size != -1 && (group_size < TILE_K || group_size % TILE_K)) return -1;
  if ((x_type != FLOAT16 && x_type != BFLOAT16) || scale_type < FLOAT16 || scale_type > FLOAT32) return -1;
  if (M == 0 || N == 0) return 0;
  if (!x || !packed || !scale || !y || !aligned16(x) || !aligned16(packed)) return -1;
  const int tiles = (K + TILE_K - 1) / TILE_K;
  const int tiles_per_group = group_size == -1 ? tiles : group_size / TILE_K;
  const Arguments args{(const u16*)x,
                       (const u32*)packed,
                       scale,
                       (const u8*)zero_point,
                       (const u16*)bias,
                       (u16*)y,
                       M,
                       N,
                       K,
                       tiles,
                       tiles_per_group,
                       scale_type};
  return x_type == FLOAT16 ? launch_tiled<FLOAT16>(args, stream) : launch_tiled<BFLOAT16>(args, stream);
}

#endif
