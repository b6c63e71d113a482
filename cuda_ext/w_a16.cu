// y (M, N) = x (M, K) W^T + bias: W[n, k] = (code[n, k] - zero_point[j, n]) * scale[j, n], j = k / g, with codes of 2, 3, 4
// or 8 bits. x, y and bias are float16 or bfloat16. Sums are float32; a scale acts on the sum of its group; one rounding at
// the end.
//
// Two kernels: `decode` for up to 16 rows of x, `tiled` for more. For up to 64 rows, K is divided into slices, so
// that there are enough blocks to keep the memory busy. Their sums are written to a workspace, and `add_slices` adds them
// in the order of K. The number of slices depends only on the shape, so the same call gives the same bits on every GPU.
//
// codes.h describes layout "mma1" of the codes and how they are turned into numbers.
#include "codes.h"

namespace w_a16 {  // names of several sources meet in one library

using namespace codes;

// Tiles of the packed codes and threads of a block.
constexpr int TILE_N = 64, TILE_K = 64, THREADS = 128;

struct Arguments {
  const u16* x;          // (M, K), K a multiple of 8
  const u32* packed;     // (N / 64, K / 64, TILE_WORDS), both rounded up
  const void* scale;     // (groups, N) of scale_type
  const u8* zero_point;  // (groups, N), or null: half of the codes' range
  const u16* bias;       // (N), or null
  u16* y;                // (M, N)
  float* sums;           // (slices, M, N), or null with one slice
  int M, N, K;
  int tiles;            // of K
  int tiles_per_group;  // group size / 64
  int tiles_per_slice;
  int slices;
  int scale_type;
};

// The zero point of output n as numbers_of takes it.
template <int bits, int type>
DEVICE u32 zero_of(const Arguments& args, int group, int n) {
  u32 z = 1 << (bits - 1);
  if (args.zero_point) z = n < args.N ? args.zero_point[u64(group) * args.N + n] : 0;
  return offset_of<bits, type>(z);
}

DEVICE float scale_of(const Arguments& args, int group, int n) {
  return n < args.N ? load_as_float(args.scale, u64(group) * args.N + n, args.scale_type) : 0.f;
}

// Copies the words of a tile, 16 bytes each time, by copy(to, from).
template <int WORDS, class Copy>
DEVICE void fetch_words(const Arguments& args, u32* stage, int tile, const Copy& copy) {
  const u32* const from = args.packed + (u64(blockIdx.y) * args.tiles + tile) * WORDS;
#pragma unroll
  for (int first = 0; first < WORDS; first += 4 * THREADS) {
    const int word = first + threadIdx.x * 4;
    if (word < WORDS) copy(stage + word, from + word);
  }
}

// The place of 8 columns (16 bytes) of a row of a stage of x; rotated by the row, so that ldmatrix reads every bank.
DEVICE int place_of(int row, int chunk, int turn) { return row * TILE_K + (chunk ^ turn) * 8; }

// A finished sum of this block's slice.
template <int type>
DEVICE void store(const Arguments& args, int m, int n, float sum) {
  const u64 place = u64(m) * args.N + n;
  if (args.sums) {
    args.sums[u64(blockIdx.z) * args.M * args.N + place] = sum;
  } else {
    const float bias = args.bias ? Element<type>::to_float(args.bias[n]) : 0.f;
    args.y[place] = Element<type>::from_float(sum + bias);
  }
}

// The tiles of this block's slice, STAGES of them under way. fetch(tile) begins the copies of a tile; load_group(group)
// reads the next group's scales and zero points while the last tiles of the one before are multiplied, take_group() makes
// them the present ones, and add_group() takes the sums of a group into the totals.
template <int STAGES, class Fetch, class LoadGroup, class TakeGroup, class Multiply, class AddGroup>
DEVICE void walk_tiles(const Arguments& args, const Fetch& fetch, const LoadGroup& load_group,
                       const TakeGroup& take_group, const Multiply& multiply, const AddGroup& add_group) {
  const int first = blockIdx.z * args.tiles_per_slice, end = first + args.tiles_per_slice;
  const int last = end < args.tiles ? end : args.tiles;
  int group = first / args.tiles_per_group, left_in_group = 0;
  load_group(group);
  for (int tile = first; tile < first + STAGES - 1; tile++) {
    if (tile < last) fetch(tile);
    cp_async_commit();
  }
  for (int tile = first; tile < last; tile++) {
    cp_async_wait<STAGES - 2>();
    // after this every thread's copies of the tile are there, and every thread is done with the tile before
    __syncthreads();
    if (tile + STAGES - 1 < last) fetch(tile + STAGES - 1);
    cp_async_commit();
    if (left_in_group == 0) {
      left_in_group = args.tiles_per_group - tile % args.tiles_per_group;
      take_group();
      if (tile + left_in_group < last) load_group(++group);  // there when its first tile comes
    }
    multiply(tile % STAGES);
    if (--left_in_group == 0 || tile + 1 == last) add_group();
  }
}

// A block computes ROWS rows of x (blockIdx.x) and 64 outputs (blockIdx.y) over one slice of K (blockIdx.z). x is the
// left operand. Each of the 4 warps has 16 outputs.
template <int bits, int type, int ROWS>
__global__ void __launch_bounds__(THREADS) tiled(Arguments args) {
  constexpr int STAGES = 4, ROW_PIECES = ROWS / 16, WORDS = Codes<bits>::TILE_WORDS;
  SHARED(u16, shared_x, STAGES * ROWS * TILE_K);
  SHARED(u32, shared_words, STAGES * WORDS);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int m0 = blockIdx.x * ROWS, n0 = blockIdx.y * TILE_N;

  auto fetch = [&](int tile) {
    const int stage = tile % STAGES;
#pragma unroll
    for (int i = 0; i < ROW_PIECES; i++) {
      const int row = i * 16 + thread / 8, chunk = thread % 8, k = tile * TILE_K + chunk * 8;
      const bool inside = m0 + row < args.M && k < args.K;
      cp_async16(shared_x + stage * ROWS * TILE_K + place_of(row, chunk, row & 7),
                 args.x + (inside ? u64(m0 + row) * args.K + k : 0), inside);
    }
    fetch_words<WORDS>(args, shared_words + stage * WORDS, tile,
                       [](u32* to, const u32* from) { cp_async16(to, from, true); });
  };

  // this lane's outputs: of its results (two neighbours in each half of 16) and of its right operands (one in each)
  const int n_result = n0 + warp * 16 + lane % 4 * 2, n_operand = n0 + warp * 16 + lane / 4;
  float total[ROW_PIECES][2][4] = {}, part[ROW_PIECES][2][4] = {}, scale[2][2], next_scale[2][2];
  u32 offset[2], next_offset[2];
  auto load_group = [&](int group) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      next_offset[h] = zero_of<bits, type>(args, group, n_operand + 8 * h);
#pragma unroll
      for (int i = 0; i < 2; i++) next_scale[h][i] = scale_of(args, group, n_result + 8 * h + i);
    }
  };

  auto take_group = [&] {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      offset[h] = next_offset[h];
#pragma unroll
      for (int i = 0; i < 2; i++) scale[h][i] = next_scale[h][i];
    }
  };

  auto multiply = [&](int stage) {
    const u16* stage_x = shared_x + stage * ROWS * TILE_K;
    const u32* stage_words = shared_words + stage * WORDS;
#pragma unroll
    for (int step = 0; step < TILE_K / 16; step++) {
      const Codes<bits> piece(stage_words, step, warp, lane);
      u32 b[2][2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        b[h][0] = numbers_of<bits, type>(piece.pair(h), offset[h]);
        b[h][1] = numbers_of<bits, type>(piece.pair(h + 2), offset[h]);
      }
#pragma unroll
      for (int p = 0; p < ROW_PIECES; p++) {
        // lanes 0 to 15 name columns 0 to 7 of the 16 rows, lanes 16 to 31 columns 8 to 15
        const int row = p * 16 + lane % 16, chunk = step * 2 + lane / 16;
        u32 a[4];
        ldmatrix_x4(a, stage_x + place_of(row, chunk, row & 7));
#pragma unroll
        for (int h = 0; h < 2; h++) Element<type>::mma(part[p][h], a, b[h][0], b[h][1]);
      }
    }
  };
  auto add_group = [&] {
#pragma unroll
    for (int p = 0; p < ROW_PIECES; p++)
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          total[p][h][i] += part[p][h][i] * scale[h][i % 2];
          part[p][h][i] = 0;
        }
  };
  walk_tiles<STAGES>(args, fetch, load_group, take_group, multiply, add_group);

#pragma unroll
  for (int p = 0; p < ROW_PIECES; p++)
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int m = m0 + p * 16 + lane / 4 + 8 * (i / 2), n = n_result + 8 * h + i % 2;
        if (m < args.M && n < args.N) store<type>(args, m, n, total[p][h][i]);
      }
}

// Up to 16 rows of x: y^T = W x^T, so that the 16 rows of an mma are outputs and no more than HALVES * 8 rows of x are
// multiplied. Bound by the memory, so many tiles are under way at once, and codes don't push x out of the L2 cache.
// Asking for one block at least keeps nvcc 13.0 from holding 2 bits within 64 registers, where they spill; 0 asks for
// nothing.
template <int bits, int type, int HALVES>
__global__ void __launch_bounds__(THREADS, bits == 2) decode(Arguments args) {
  constexpr int STAGES = 6, ROWS = HALVES * 8, WORDS = Codes<bits>::TILE_WORDS;
  SHARED(u16, shared_x, STAGES * ROWS * TILE_K);
  SHARED(u32, shared_words, STAGES * WORDS);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, n0 = blockIdx.y * TILE_N;
  const u64 policy = evict_first_policy();

  auto fetch = [&](int tile) {
    const int stage = tile % STAGES, row = thread / 8, chunk = thread % 8, k = tile * TILE_K + chunk * 8;
    if (row < ROWS) {
      const bool inside = row < args.M && k < args.K;
      cp_async16(shared_x + stage * ROWS * TILE_K + place_of(row, chunk, row & 7),
                 args.x + (inside ? u64(row) * args.K + k : 0), inside);
    }
    fetch_words<WORDS>(args, shared_words + stage * WORDS, tile,
                       [&](u32* to, const u32* from) { cp_async16_once(to, from, policy); });
  };

  const int n = n0 + warp * 16 + lane / 4;  // and n + 8: of the left operands and of the results
  float total[HALVES][4] = {}, part[HALVES][4] = {}, scale[2], next_scale[2];
  u32 offset[2], next_offset[2];
  auto load_group = [&](int group) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      next_offset[h] = zero_of<bits, type>(args, group, n + 8 * h);
      next_scale[h] = scale_of(args, group, n + 8 * h);
    }
  };

  auto take_group = [&] {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      offset[h] = next_offset[h];
      scale[h] = next_scale[h];
    }
  };

  auto multiply = [&](int stage) {
    const u16* stage_x = shared_x + stage * ROWS * TILE_K;
    const u32* stage_words = shared_words + stage * WORDS;
#pragma unroll
    for (int pair = 0; pair < TILE_K / 32; pair++) {
      u32 b[HALVES][4];  // of two steps
#pragma unroll
      for (int h = 0; h < HALVES; h++) {
        const int row = h * 8 + lane % 8, chunk = pair * 4 + lane / 8;
        ldmatrix_x4(b[h], stage_x + place_of(row, chunk, row & 7));
      }
#pragma unroll
      for (int step = 0; step < 2; step++) {
        const Codes<bits> piece(stage_words, pair * 2 + step, warp, lane);
        u32 a[4];
#pragma unroll
        for (int i = 0; i < 4; i++) a[i] = numbers_of<bits, type>(piece.pair(i), offset[i % 2]);
#pragma unroll
        for (int h = 0; h < HALVES; h++) Element<type>::mma(part[h], a, b[h][step * 2], b[h][step * 2 + 1]);
      }
    }
  };
  auto add_group = [&] {
#pragma unroll
    for (int h = 0; h < HALVES; h++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        total[h][i] += part[h][i] * scale[i / 2];
        part[h][i] = 0;
      }
  };
  walk_tiles<STAGES>(args, fetch, load_group, take_group, multiply, add_group);

#pragma unroll
  for (int h = 0; h < HALVES; h++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int m = h * 8 + lane % 4 * 2 + i % 2, out = n + 8 * (i / 2);
      if (m < args.M && out < args.N) store<type>(args, m, out, total[h][i]);
    }
}

// y = the sum of the slices, in the order of K, + bias. A thread for each output.
template <int type>
__global__ void __launch_bounds__(THREADS) add_slices(Arguments args) {
  const u64 count = u64(args.M) * args.N, place = u64(blockIdx.x) * THREADS + threadIdx.x;
  if (place >= count) return;
  float sum = 0;
  for (int slice = 0; slice < args.slices; slice++) sum += args.sums[slice * count + place];
  const float bias = args.bias ? Element<type>::to_float(args.bias[place % args.N]) : 0.f;
  args.y[place] = Element<type>::from_float(sum + bias);
}

}  // namespace w_a16
