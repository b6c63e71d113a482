// y (M, N) = sum over blocks b of z_b S_b^T + bias, z_b = x_b D_b^T. x (M, B * w) has B blocks of w columns. D_b
// (m, w) has m dense atoms. A row of S_b (N, m) has k stored values, each with the number of its atom.
// x, D, bias and y are float16 or bfloat16, all of one type. z and all sums are float32, with one rounding at the end.
// Atoms and values that are stored as int8 are exact in both types: they are passed as such, with separate steps.
//
// Two kernels. `responses` writes z to a workspace. One kernel for both steps would compute z again for each block of
// outputs. With 4096 outputs, 256 per block, and 256 atoms that is all of the dense matmul that S saves. It is a matmul
// with mma: m * B * w multiply-adds for a row of x are about as many as the N * B * k of the sparse step, and fma has a
// fifteenth of the rate (data sheets of A100 and H100). `combine` gathers: it has z of a few rows of x in shared memory
// and streams the values.
//
// Order of a sum, the same in every call of a shape: an output's values in order of b and then t, SPLIT apart, one fma
// each; then the SPLIT parts; then the step of the values, the bias. No atomics.
//
// Layout "ds1" of S: entry[ceil(N / 32)][B][k][32], one word each: the atom's number in the lower half, the value as a
// number of x's type in the upper half. So the 32 lanes of a warp, one output each, read 128 consecutive bytes.
// Padding of N has atom 0 and value 0.
//
// Layout of z: z[ceil(M / ROWS)][B][ceil(m / 4) * 4][ROWS] float32, ROWS as `combine` takes them.
#include "device.h"

namespace dense_sparse {

constexpr int THREADS = 128, WARPS = 8;   // of `responses`; of `combine`
constexpr int TILE_ATOMS = 64, TILE_W = 64;
constexpr int STAGES = 3;                 // tiles of w under way: our choice, w is 64 to 384 where it is chosen by itself
constexpr int STAGE_FLOATS = 4096;        // z of one stage of `combine`
constexpr int UNROLL = 4;                 // entries that a thread of `combine` has under way

struct Arguments {
  const u16* x;            // (M, B * w), w a multiple of 8
  const u16* atoms;        // (B, m, w)
  const float* atom_step;  // (B, m), or null: 1
  const u32* entries;      // (N / 32, B, k, 32)
  const float* step;       // (N), or null: 1
  const u16* bias;         // (N), or null
  u16* y;                  // (M, N)
  float* z;
  int M, N, B, m, w, k;
  int rows;    // of x in a block of z
  int padded;  // m, rounded up to 4
};

// The place of 8 columns (16 bytes) of a row of a stage; rotated by the row, so that ldmatrix reads every bank.
DEVICE int place_of(int row, int chunk, int turn) { return row * TILE_W + (chunk ^ turn) * 8; }

// z^T = D x^T: a block has 64 atoms (blockIdx.y) of one block of columns (blockIdx.z), each of its 4 warps 16 of them
// as the left operand, and HALVES * 8 rows of x (blockIdx.x).
template <int type, int HALVES>
__global__ void __launch_bounds__(THREADS) responses(Arguments args) {
  constexpr int ROWS = HALVES * 8;
  SHARED(u16, shared_atoms, STAGES * TILE_ATOMS * TILE_W);
  SHARED(u16, shared_x, STAGES * ROWS * TILE_W);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int m0 = blockIdx.x * ROWS, atom0 = blockIdx.y * TILE_ATOMS, b = blockIdx.z;
  const u64 stride = u64(args.B) * args.w;
  const int tiles = (args.w + TILE_W - 1) / TILE_W;

  auto fetch = [&](int tile) {
    const int stage = tile % STAGES, chunk = thread % 8, column = tile * TILE_W + chunk * 8;
#pragma unroll
    for (int i = 0; i < TILE_ATOMS / 16; i++) {
      const int row = i * 16 + thread / 8;
      const bool inside = atom0 + row < args.m && column < args.w;
      cp_async16(shared_atoms + stage * TILE_ATOMS * TILE_W + place_of(row, chunk, row & 7),
                 args.atoms + (inside ? (u64(b) * args.m + atom0 + row) * args.w + column : 0), inside);
    }
#pragma unroll
    for (int i = 0; i < (ROWS + 15) / 16; i++) {
      const int row = i * 16 + thread / 8;
      if (row >= ROWS) continue;
      const bool inside = m0 + row < args.M && column < args.w;
      cp_async16(shared_x + stage * ROWS * TILE_W + place_of(row, chunk, row & 7),
                 args.x + (inside ? (m0 + row) * stride + u64(b) * args.w + column : 0), inside);
    }
  };

  float sum[HALVES][4] = {};
  auto multiply = [&](int stage) {
    const u16* stage_atoms = shared_atoms + stage * TILE_ATOMS * TILE_W;
    const u16* stage_x = shared_x + stage * ROWS * TILE_W;
#pragma unroll
    for (int pair = 0; pair < TILE_W / 32; pair++) {
      u32 right[HALVES][4];  // of two steps of 16 columns
#pragma unroll
      for (int h = 0; h < HALVES; h++) {
        const int row = h * 8 + lane % 8, chunk = pair * 4 + lane / 8;
        ldmatrix_x4(right[h], stage_x + place_of(row, chunk, row & 7));
      }
#pragma unroll
      for (int step = 0; step < 2; step++) {
        // lanes 0 to 15 name columns 0 to 7 of the 16 atoms, lanes 16 to 31 columns 8 to 15
        const int row = warp * 16 + lane % 16, chunk = pair * 4 + step * 2 + lane / 16;
        u32 left[4];
        ldmatrix_x4(left, stage_atoms + place_of(row, chunk, row & 7));
#pragma unroll
        for (int h = 0; h < HALVES; h++) Element<type>::mma(sum[h], left, right[h][step * 2], right[h][step * 2 + 1]);
      }
    }
  };

  for (int tile = 0; tile < STAGES - 1; tile++) {
    if (tile < tiles) fetch(tile);
    cp_async_commit();
  }
  for (int tile = 0; tile < tiles; tile++) {
    const bool more = tile + STAGES - 1 < tiles;
    cp_async_wait<STAGES - 2>();
    // after this every thread's copies of the tile are there, and every thread is done with the tile before
    __syncthreads();
    if (more) fetch(tile + STAGES - 1);
    cp_async_commit();
    multiply(tile % STAGES);
  }

  const int rows_of_z = (args.M + args.rows - 1) / args.rows * args.rows;  // those after row M - 1 are zeros
#pragma unroll
  for (int h = 0; h < HALVES; h++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int atom = atom0 + warp * 16 + lane / 4 + 8 * (i / 2), row = m0 + h * 8 + lane % 4 * 2 + i % 2;
      if (atom >= args.m || row >= rows_of_z) continue;
      const float step = args.atom_step ? args.atom_step[u64(b) * args.m + atom] : 1.f;
      args.z[((u64(row / args.rows) * args.B + b) * args.padded + atom) * args.rows + row % args.rows] = sum[h][i] * step;
    }
}

// A block has ROWS rows of x (blockIdx.x) and 32 * WARPS / SPLIT outputs (blockIdx.y): a lane an output, SPLIT warps the
// entries of the same 32. z of as many blocks of columns as fit a stage is in shared memory, the next ones under way.
template <int type, int ROWS, int SPLIT>
__global__ void __launch_bounds__(32 * WARPS) combine(Arguments args) {
  SHARED(float, shared_z, 2 * STAGE_FLOATS);
  SHARED(float, parts, SPLIT == 1 ? 1 : WARPS * 32 * ROWS);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, part = warp % SPLIT;
  const int group = blockIdx.y * (WARPS / SPLIT) + warp / SPLIT, n = group * 32 + lane;
  const int floats = args.padded * ROWS, at_once = STAGE_FLOATS / floats;  // of a block of columns; such blocks
  const int chunks = (args.B + at_once - 1) / at_once;
  const bool is_there = group * 32 < args.N;
  const float* z = args.z + u64(blockIdx.x) * args.B * floats;
  const u32* entries = args.entries + u64(group) * args.B * args.k * 32 + lane;

  auto fetch = [&](int chunk) {
    const int first = chunk * at_once, blocks = first + at_once < args.B ? at_once : args.B - first;
    for (int i = thread * 4; i < blocks * floats; i += 32 * WARPS * 4)
      cp_async16(shared_z + chunk % 2 * STAGE_FLOATS + i, z + u64(first) * floats + i, true);
  };

  float sum[ROWS] = {};
  auto add = [&](int chunk) {
    const float* const stage = shared_z + chunk % 2 * STAGE_FLOATS;
    const int first = chunk * at_once, blocks = first + at_once < args.B ? at_once : args.B - first;
    const int count = blocks * args.k;
    const u32* const of_chunk = entries + u64(first) * args.k * 32;
    int base = 0, next = args.k;  // where z of the entry's block starts, and the first entry of the block after
    for (int i = part; i < count; i += SPLIT * UNROLL) {
      u32 entry[UNROLL];
#pragma unroll
      for (int u = 0; u < UNROLL; u++) entry[u] = i + u * SPLIT < count ? of_chunk[u64(i + u * SPLIT) * 32] : 0;
#pragma unroll
      for (int u = 0; u < UNROLL; u++) {
        const int e = i + u * SPLIT;
        if (e >= count) break;
        while (e >= next) base += floats, next += args.k;
        const int atom = entry[u] & 0xffff;
        const bool known = atom < args.m;  // nothing is read for an atom that isn't there; the output is NaN
        const float value = known ? Element<type>::to_float(u16(entry[u] >> 16)) : __uint_as_float(0x7fffffffu);
        const float* const row = stage + base + (known ? atom : 0) * ROWS;
#pragma unroll
        for (int r = 0; r < ROWS; r++) sum[r] = __fmaf_rn(row[r], value, sum[r]);
      }
    }
  };

  fetch(0);
  cp_async_commit();
  for (int chunk = 0; chunk < chunks; chunk++) {
    cp_async_wait<0>();
    __syncthreads();
    if (chunk + 1 < chunks) fetch(chunk + 1);
    cp_async_commit();
    if (is_there) add(chunk);
  }

  if (SPLIT > 1) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) parts[(warp * ROWS + r) * 32 + lane] = sum[r];
    __syncthreads();
    if (part) return;
#pragma unroll
    for (int r = 0; r < ROWS; r++)
      for (int p = 1; p < SPLIT; p++) sum[r] += parts[((warp + p) * ROWS + r) * 32 + lane];
  }
  if (n >= args.N) return;
  const float step = args.step ? args.step[n] : 1.f;
  const float bias = args.bias ? Element<type>::to_float(args.bias[n]) : 0.f;
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const int row = blockIdx.x * ROWS + r;
    if (row < args.M) args.y[u64(row) * args.N + n] = Element<type>::from_float(__fmaf_rn(sum[r], step, bias));
  }
}

}  // namespace dense_sparse
