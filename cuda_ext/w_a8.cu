// Multiplies 4- and 8-bit weights by inputs that quantize_rows.cu has rounded to int8:
//
//   x[m, k] ~ x_code[m, k] * x_scale[m]                W[n, k] = (code[n, k] - zero_point[j, n]) * scale[j, n], j = k / g
//   y[m, n] = x_scale[m] * (sum over j of scale[j, n] * sum over k in j of x_code[m, k] * (code[n, k] - zero_point[j, n])) + bias[n]
//
// Sums of integers are exact. Each output adds its groups in the order of K in float32, one fma a group; then come x_scale,
// the bias and the rounding to y's type. These are the CPU library's operations, so the bits are the same, and a row's
// bits don't depend on the other rows or on the kernel. K is therefore not divided into slices.
//
// Codes are made signed: code - c, c = 8 or 128. The zero point acts on the sum of a group: the sum of x_code * (code - z)
// is that of x_code * (code - c) less (z - c) times the sum of x_code.
//
// Layout "mma8a1" of the codes. K is padded to 64 and N to 64 with code c. Tiles of 64 outputs x 64 columns, in the order
// [N / 64][K / 64], are what the 4 x 32 lanes of m16n8k32 need, 16 bytes in one load. With l the lane, n = l / 4 and
// k = 4 * (l % 4), byte i of a word has columns k + i (+ 16, 32, 48) of outputs n and n + 8 in a piece of 16 outputs:
//
//   4 bits  [n / 16][lane]           word 0: k      word 1: k + 16  word 2: k + 32  word 3: k + 48
//                                    output n in bits 0 to 3 of a byte, n + 8 in bits 4 to 7; two's complement of code - 8
//   8 bits  [k / 32][n / 16][lane]   word 0: n, k   word 1: n+8, k  word 2: n, k+16 word 3: n+8, k+16; code - 128
//
// These are the registers of the left operand (16 outputs x 32 columns), and those of outputs n, or n + 8, are the two
// registers of a right operand (8 outputs), so one packed tensor serves both kernels. Four bits are multiplied in their
// place, the upper half of a byte: sums are 16 times the true ones.
#include "device.h"

namespace w_a8 {

constexpr int TILE_N = 64, TILE_K = 64;
constexpr i32 MAGIC = 0x4b400000;  // bits of float32 1.5 * 2^23; with a number below 2^22 added, those of their sum

template <int BITS>
struct Weight {
  static constexpr int tile_words = 128 * BITS;
  static constexpr int offset = BITS == 4 ? 8 : 128;
};

struct Arguments {
  const i8* x;           // (M, tiles * 64)
  const float* x_scale;  // (M)
  const i32* x_sum;      // (M, groups), read with zero points alone
  const u32* packed;
  const void* scale;     // (groups, N) of scale_type
  const u8* zero_point;  // (groups, N), or null: 8 or 128
  const void* bias;      // (N) of y_type, or null
  void* y;               // (M, N) of y_type
  int M, N;
  int tiles;            // of K
  int tiles_per_group;  // group size / 64
  int groups;
  int scale_type, y_type;
};

// The registers of the left operand of two steps of 32 columns, of 16 outputs (`piece` of the tile's four).
template <int BITS>
DEVICE void load_weights(u32 (&a)[2][4], const u32* tile, int piece, int lane) {
  if (BITS == 4) {
    const Words4 words = load16(tile + (piece * 32 + lane) * 4);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      a[i / 2][i % 2 * 2] = words.word[i] << 4 & 0xf0f0f0f0u;
      a[i / 2][i % 2 * 2 + 1] = words.word[i] & 0xf0f0f0f0u;
    }
  } else {
#pragma unroll
    for (int step = 0; step < 2; step++) {
      const Words4 words = load16(tile + ((step * 4 + piece) * 32 + lane) * 4);
#pragma unroll
      for (int i = 0; i < 4; i++) a[step][i] = words.word[i];
    }
  }
}

// How a group's sum of integers becomes float32. Up to 128 columns it is below 2^22, 128 * 127 * 128 with 8 bits and
// 128 * 127 * 16 * 8 with 4: sums that start at MAGIC are the bits of float32 numbers already, and an fma takes MAGIC away,
// where a conversion has a quarter of the rate. Wider groups are converted, and rounded where they need more than 24 bits.
template <int BITS, bool WIDE>
struct Sum;

template <int BITS>
struct Sum<BITS, true> {
  using Number = i32;
  static constexpr i32 start = 0;
  // minus_zero is c - z
  static DEVICE float value(i32 sum, i32 minus_zero, i32 x_sum) {
    return __int2float_rn((BITS == 4 ? sum >> 4 : sum) + minus_zero * x_sum);
  }
};

template <int BITS>
struct Sum<BITS, false> {
  using Number = float;
  static constexpr i32 start = MAGIC;
  static DEVICE float value(i32 sum, float minus_zero, float x_sum) {
    const float unit = BITS == 4 ? 0.0625f : 1.f;
    const float exact = __fmaf_rn(__uint_as_float((u32)sum), unit, -12582912.f * unit);
    return __fmaf_rn(minus_zero, x_sum, exact);  // exact, too: whole numbers below 2^24
  }
};

template <int BITS, class Number>
DEVICE Number minus_zero_of(const Arguments& args, int group, int n) {
  if (!args.zero_point || n >= args.N) return 0;
  return Number(Weight<BITS>::offset - i32(args.zero_point[u64(group) * args.N + n]));
}

template <class Number>
DEVICE Number x_sum_of(const Arguments& args, int group, int m) {
  return args.zero_point && m < args.M ? Number(args.x_sum[u64(m) * args.groups + group]) : 0;
}

DEVICE float scale_of(const Arguments& args, int group, int n) {
  return n < args.N ? load_as_float(args.scale, u64(group) * args.N + n, args.scale_type) : 0.f;
}

// The place of 16 columns of a row of a tile of x; rotated by the row, so that ldmatrix reads every bank.
DEVICE int place_of(int row, int chunk, int turn) { return row * TILE_K + (chunk ^ turn) * 16; }

DEVICE int turn_of(int row) { return row / 2 % 4; }

DEVICE float bias_of(const Arguments& args, int n) {
  return args.bias && n < args.N ? load_as_float(args.bias, n, args.y_type) : 0.f;
}

DEVICE float x_scale_of(const Arguments& args, int m) { return m < args.M ? args.x_scale[m] : 0.f; }

DEVICE void store(const Arguments& args, int m, int n, float total, float x_scale, float bias) {
  float value = __fmul_rn(total, x_scale);
  if (args.bias) value = __fadd_rn(value, bias);  // without one, -0 stays what it is
  store_from_float(args.y, u64(m) * args.N + n, args.y_type, value);
}

// All tiles, TILES in a stage, STAGES stages under way. fetch(stage) begins the copies of one; load_group(group) reads a
// group's scales and zero points while the one before is multiplied; take_group(group) makes them the present ones, in
// `tiled` for all threads, so that the barrier follows; add_group(group) takes the sums of a group into the totals.
template <int STAGES, int TILES, class Fetch, class LoadGroup, class TakeGroup, class Multiply, class AddGroup>
DEVICE void walk_tiles(const Arguments& args, const Fetch& fetch, const LoadGroup& load_group, const TakeGroup& take_group,
                       const Multiply& multiply, const AddGroup& add_group) {
  constexpr bool DECODE = TILES > 1;
  const int last = args.tiles, stages = (last + TILES - 1) / TILES;
  int group = 0, left_in_group = args.tiles_per_group;
  auto begin_group = [&] {
    take_group(group);
    if (group + 1 < args.groups) load_group(group + 1);
  };
  load_group(0);
  for (int stage = 0; stage < STAGES - 1; stage++) {
    if (stage < stages) fetch(stage);
    cp_async_commit();
  }
  for (int stage = 0; stage < stages; stage++) {
    cp_async_wait<STAGES - 2>();
    if (!DECODE && left_in_group == args.tiles_per_group) begin_group();
    // after this every thread's copies of the stage are there, and every thread is done with the stage before
    __syncthreads();
    if (stage + STAGES - 1 < stages) fetch(stage + STAGES - 1);
    cp_async_commit();
    for (int i = 0; i < TILES && stage * TILES + i < last; i++) {
      if (DECODE && left_in_group == args.tiles_per_group) begin_group();
      multiply(stage % STAGES, i);
      if (--left_in_group == 0 || stage * TILES + i + 1 == last) {
        add_group(group++);
        left_in_group = args.tiles_per_group;
      }
    }
  }
}

// A block computes ROWS rows of x (blockIdx.x) and 128 outputs (blockIdx.y). x is the left operand. 2 x 4 warps have half
// of the rows and 32 outputs each.
constexpr int THREADS = 256, OUTPUTS = 128;

template <int BITS, int ROWS, bool WIDE>
__global__ void __launch_bounds__(THREADS) tiled(Arguments args) {
  constexpr int STAGES = 3, PIECES = ROWS / 32, TILE_WORDS = Weight<BITS>::tile_words;
  constexpr int STAGE_X = ROWS * TILE_K, STAGE_WORDS = 2 * TILE_WORDS;
  using SumOf = Sum<BITS, WIDE>;
  using Number = typename SumOf::Number;
  SHARED(i8, shared_x, STAGES * STAGE_X);
  SHARED(u32, shared_words, STAGES * STAGE_WORDS);
  SHARED(float, shared_scale, 2 * OUTPUTS);  // of the present group and of the next
  SHARED(Number, shared_zero, 2 * OUTPUTS);
  SHARED(Number, shared_sum, 2 * ROWS);
  const int thread = threadIdx.x, lane = thread % 32, warp_m = thread / 128, warp_n = thread / 32 % 4;
  const int m0 = blockIdx.x * ROWS, n0 = blockIdx.y * OUTPUTS, tiles_n = (args.N + TILE_N - 1) / TILE_N;

  auto fetch = [&](int tile) {
    const int stage = tile % STAGES;
#pragma unroll
    for (int i = thread; i < ROWS * 4; i += THREADS) {
      const int row = i / 4, chunk = i % 4;
      const bool inside = m0 + row < args.M;
      cp_async16(shared_x + stage * STAGE_X + place_of(row, chunk, turn_of(row)),
                 args.x + (inside ? (u64(m0 + row) * args.tiles + tile) * TILE_K + chunk * 16 : 0), inside);
    }
#pragma unroll
    for (int i = thread * 4; i < STAGE_WORDS; i += THREADS * 4) {
      const int tile_n = blockIdx.y * 2 + i / TILE_WORDS;
      const bool inside = tile_n < tiles_n;
      cp_async16(shared_words + stage * STAGE_WORDS + i,
                 args.packed + (inside ? (u64(tile_n) * args.tiles + tile) * TILE_WORDS + i % TILE_WORDS : 0), inside);
    }
  };

  // one thread reads for all: scale and zero point of an output, or the sum of a row's codes
  float next_scale = 0;
  Number next_number = 0;
  auto load_group = [&](int group) {
    if (thread < OUTPUTS) {
      next_scale = scale_of(args, group, n0 + thread);
      next_number = minus_zero_of<BITS, Number>(args, group, n0 + thread);
    } else if (thread - OUTPUTS < ROWS) {
      next_number = x_sum_of<Number>(args, group, m0 + thread - OUTPUTS);
    }
  };
  auto take_group = [&](int group) {
    const int half = group % 2;
    if (thread < OUTPUTS) {
      shared_scale[half * OUTPUTS + thread] = next_scale;
      shared_zero[half * OUTPUTS + thread] = next_number;
    } else if (thread - OUTPUTS < ROWS) {
      shared_sum[half * ROWS + thread - OUTPUTS] = next_number;
    }
  };

  // part[p][q][i]: rows warp_m * ROWS / 2 + p * 16 + lane / 4 + 8 * (i / 2), outputs warp_n * 32 + q * 8 + 2 * (lane % 4) + i % 2
  const int first_row = warp_m * (ROWS / 2) + lane / 4, first_output = warp_n * 32 + lane % 4 * 2;
  float total[PIECES][4][4] = {};
  i32 part[PIECES][4][4];
#pragma unroll
  for (int p = 0; p < PIECES; p++)
#pragma unroll
    for (int q = 0; q < 4; q++)
#pragma unroll
      for (int i = 0; i < 4; i++) part[p][q][i] = SumOf::start;

  auto multiply = [&](int stage, int) {
    const i8* stage_x = shared_x + stage * STAGE_X;
    const u32* stage_words = shared_words + stage * STAGE_WORDS + warp_n / 2 * TILE_WORDS;
    u32 b[2][2][4];  // of 16 outputs each, two steps
#pragma unroll
    for (int h = 0; h < 2; h++) load_weights<BITS>(b[h], stage_words, warp_n % 2 * 2 + h, lane);
#pragma unroll
    for (int step = 0; step < 2; step++)
#pragma unroll
      for (int p = 0; p < PIECES; p++) {
        // lanes 0 to 15 name columns 0 to 15 of the 16 rows, lanes 16 to 31 columns 16 to 31
        const int row = warp_m * (ROWS / 2) + p * 16 + lane % 16, chunk = step * 2 + lane / 16;
        u32 a[4];
        ldmatrix_x4(a, stage_x + place_of(row, chunk, turn_of(row)));
#pragma unroll
        for (int q = 0; q < 4; q++) mma_s8(part[p][q], a, b[q / 2][step][q % 2], b[q / 2][step][q % 2 + 2]);
      }
  };
  auto add_group = [&](int group) {
    const int half = group % 2;
#pragma unroll
    for (int q = 0; q < 4; q++) {
      float scale[2];
      Number zero[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        scale[i] = shared_scale[half * OUTPUTS + first_output + q * 8 + i];
        zero[i] = shared_zero[half * OUTPUTS + first_output + q * 8 + i];
      }
#pragma unroll
      for (int p = 0; p < PIECES; p++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const Number x_sum = shared_sum[half * ROWS + first_row + p * 16 + 8 * (i / 2)];
          const float sum = SumOf::value(part[p][q][i], zero[i % 2], x_sum);
          total[p][q][i] = __fmaf_rn(sum, scale[i % 2], total[p][q][i]);
          part[p][q][i] = SumOf::start;
        }
    }
  };
  walk_tiles<STAGES, 1>(args, fetch, load_group, take_group, multiply, add_group);

  float x_scale[PIECES * 2];  // read once: the compiler can't know that y isn't in between
#pragma unroll
  for (int j = 0; j < PIECES * 2; j++) x_scale[j] = x_scale_of(args, m0 + first_row + j * 8);
#pragma unroll
  for (int q = 0; q < 4; q++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int n = n0 + first_output + q * 8 + i;
      const float bias = bias_of(args, n);
#pragma unroll
      for (int j = 0; j < PIECES * 2; j++) {
        const int m = m0 + first_row + j * 8;
        if (m < args.M && n < args.N) store(args, m, n, total[j / 2][q][j % 2 * 2 + i], x_scale[j], bias);
      }
    }
}

// Up to 16 rows of x: y^T = W x^T, so that the 16 rows of an mma are outputs and no more than HALVES * 8 rows of x are
// multiplied. Bound by the memory: a block has 64 outputs, a stage 8 KiB of weights, and three are under way.
constexpr int DECODE_THREADS = 128;

template <int BITS, int HALVES, bool WIDE>
__global__ void __launch_bounds__(DECODE_THREADS) decode(Arguments args) {
  constexpr int STAGES = 4, TILES = 16 / BITS, ROWS = HALVES * 8, TILE_WORDS = Weight<BITS>::tile_words;
  constexpr int TILE_X = ROWS * TILE_K;
  using SumOf = Sum<BITS, WIDE>;
  using Number = typename SumOf::Number;
  SHARED(i8, shared_x, STAGES * TILES * TILE_X);
  SHARED(u32, shared_words, STAGES * TILES * TILE_WORDS);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, n0 = blockIdx.x * TILE_N;
  const u64 policy = evict_first_policy();

  auto fetch = [&](int stage) {
    const int first = stage * TILES, slot = stage % STAGES * TILES;
#pragma unroll
    for (int i = thread; i < TILES * ROWS * 4; i += DECODE_THREADS) {
      const int tile = i / (ROWS * 4), row = i / 4 % ROWS, chunk = i % 4;
      const bool inside = row < args.M && first + tile < args.tiles;
      cp_async16(shared_x + (slot + tile) * TILE_X + place_of(row, chunk, turn_of(row)),
                 args.x + (inside ? (u64(row) * args.tiles + first + tile) * TILE_K + chunk * 16 : 0), inside);
    }
#pragma unroll
    for (int i = thread * 4; i < TILES * TILE_WORDS; i += DECODE_THREADS * 4)
      if (first + i / TILE_WORDS < args.tiles)
        cp_async16_once(shared_words + slot * TILE_WORDS + i,
                        args.packed + (u64(blockIdx.x) * args.tiles + first) * TILE_WORDS + i, policy);
  };

  const int n = n0 + warp * 16 + lane / 4;  // and n + 8: of the left operands and of the results
  float total[HALVES][4] = {}, scale[2], next_scale[2];
  Number zero[2], next_zero[2], x_sum[HALVES][2], next_x_sum[HALVES][2];
  i32 part[HALVES][4];
#pragma unroll
  for (int h = 0; h < HALVES; h++)
#pragma unroll
    for (int i = 0; i < 4; i++) part[h][i] = SumOf::start;
  auto load_group = [&](int group) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      next_scale[i] = scale_of(args, group, n + 8 * i);
      next_zero[i] = minus_zero_of<BITS, Number>(args, group, n + 8 * i);
#pragma unroll
      for (int h = 0; h < HALVES; h++) next_x_sum[h][i] = x_sum_of<Number>(args, group, h * 8 + lane % 4 * 2 + i);
    }
  };
  auto take_group = [&](int) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      scale[i] = next_scale[i];
      zero[i] = next_zero[i];
#pragma unroll
      for (int h = 0; h < HALVES; h++) x_sum[h][i] = next_x_sum[h][i];
    }
  };
  auto multiply = [&](int stage, int tile) {
    const int slot = stage * TILES + tile;
    u32 a[2][4], b[HALVES][4];
    load_weights<BITS>(a, shared_words + slot * TILE_WORDS, warp, lane);
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
      const int row = h * 8 + lane % 8, chunk = lane / 8;
      ldmatrix_x4(b[h], shared_x + slot * TILE_X + place_of(row, chunk, turn_of(row)));
    }
#pragma unroll
    for (int step = 0; step < 2; step++)
#pragma unroll
      for (int h = 0; h < HALVES; h++) mma_s8(part[h], a[step], b[h][step * 2], b[h][step * 2 + 1]);
  };
  auto add_group = [&](int) {
#pragma unroll
    for (int h = 0; h < HALVES; h++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float sum = SumOf::value(part[h][i], zero[i / 2], x_sum[h][i % 2]);
        total[h][i] = __fmaf_rn(sum, scale[i / 2], total[h][i]);
        part[h][i] = SumOf::start;
      }
  };
  walk_tiles<STAGES, TILES>(args, fetch, load_group, take_group, multiply, add_group);

#pragma unroll
  for (int h = 0; h < HALVES; h++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int m = h * 8 + lane % 4 * 2 + i % 2, out = n + 8 * (i / 2);
      const float x_scale = x_scale_of(args, m), bias = bias_of(args, out);
      if (m < args.M && out < args.N) store(args, m, out, total[h][i], x_scale, bias);
    }
}

}  // namespace w_a8
