// LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339): y = (x without its outlier columns, rounded to int8) @ W^T
// + (those columns of x) @ (those of W)^T + bias, with W (N, K) int8 and w ~ code * absmax / 127.
//
//   an outlier column  has any |x| >= threshold among the rows of the call, or is one of the given columns
//   its weights        are given too, else they are code * absmax / 127, rounded to x's type
//
// The operations in float32 and their order are those of the CPU library, so the bits are the same: the sum of products of
// codes, to float32, times absmax / 127, times the row's largest magnitude over 127; then the outlier columns, ascending,
// a product and a sum for each, both rounded; the bias; the rounding to x's type. A row with NaN or infinity gives NaN.
//
// The outlier columns are a mask of K bits: bit k % 32 of word k / 32. A warp reads it with ballots, so a mask without
// outliers costs a few instructions. One row: `one_row` does everything in each block, since a scan of x costs less than
// a launch. More rows: `flag_columns`, a slice of the rows per block; `round_rows`; `product`.
#include "device.h"

namespace int8_outlier {

constexpr int MAX_COLUMNS = 65536, MAX_WORDS = MAX_COLUMNS / 32;
constexpr int THREADS = 256, WARPS = THREADS / 32;

struct Arguments {
  const void* x;              // (M, K) of type
  const i8* weight;           // (N, K)
  const float* absmax;        // (N)
  const i32* columns;         // (column_count) ascending; null: columns are found by the threshold
  const void* column_weight;  // (N, column_count) of type, with columns
  const void* bias;           // (N) of type, or null
  void* y;                    // (M, N) of type
  i8* codes;                  // (M, padded), workspace of M > 1, as the next three
  float* step;                // (M): largest magnitude / 127
  u32* mask;                  // (words)
  u32* slices;                // (slices, words): the outlier columns of some rows each
  int M, N, K;
  int padded, words;  // K rounded up to 64, and that over 32
  int slice_count, rows_per_slice;
  int column_count;
  float threshold;  // 0: no column is one
  int type;
};

// ---- which columns ----
// Bit i: element k + i of row m, of 8, makes its column an outlier.
DEVICE u32 outliers_of(const Arguments& args, const float (&v)[8]) {
  u32 bits = 0;
#pragma unroll
  for (int i = 0; i < 8; i++)
    if (__uint_as_float(magnitude_bits(v[i])) >= args.threshold) bits |= 1u << i;  // NaN isn't
  return bits;
}

// Word `word` of the mask of the given columns; those outside K are ignored.
DEVICE u32 given_columns(const Arguments& args, int word) {
  u32 bits = 0;
  for (int c = 0; c < args.column_count; c++) {
    const int k = args.columns[c];
    if (k >= 0 && k < args.K && k / 32 == word) bits |= 1u << (k % 32);
  }
  return bits;
}

// A block takes 2048 columns (blockIdx.x) of a slice of the rows (blockIdx.y).
__global__ void __launch_bounds__(THREADS) flag_columns(Arguments args) {
  const int byte = blockIdx.x * THREADS + threadIdx.x, k = byte * 8, first = blockIdx.y * args.rows_per_slice;
  const int end = first + args.rows_per_slice < args.M ? first + args.rows_per_slice : args.M;
  if (byte >= args.words * 4) return;
  u32 bits = 0;
  if (args.columns) {
    bits = given_columns(args, byte / 4) >> (byte % 4 * 8);
  } else if (k < args.K) {
    for (int m = first; m < end; m++) {
      float v[8];
      load8(v, args.x, u64(m) * args.K + k, args.type);
      bits |= outliers_of(args, v);
    }
  }
  ((u8*)args.slices)[u64(blockIdx.y) * args.words * 4 + byte] = u8(bits);
}

// ---- rows ----
// The larger magnitude, as bits: of all elements for `all`, of those that aren't outliers for `top`.
DEVICE void take_magnitudes(u32& top, u32& all, const float (&v)[8], u32 outliers) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const u32 size = magnitude_bits(v[i]);
    all = size > all ? size : all;
    if (!(outliers >> i & 1)) top = size > top ? size : top;
  }
}

// The rounding of a row, of which this thread has seen a part. An outlier that isn't finite breaks the row, too.
DEVICE RowRounding finish_magnitudes(u32 top, u32 all, u32* tops, int thread) {
  top = warp_max(top), all = warp_max(all);
  if (thread % 32 == 0) tops[thread / 32] = top, tops[WARPS + thread / 32] = all;
  __syncthreads();
  top = warp_max(tops[thread % WARPS]), all = warp_max(tops[WARPS + thread % WARPS]);
  return rounding_of(all >= 0x7f800000u ? all : top);
}

// Codes of elements k to k + 7 of a row that starts at `start`, 0 where there are outliers and beyond K.
DEVICE void round8(const Arguments& args, u64 start, int k, u32 outliers, const RowRounding& row, i8* target) {
  i32 code[8] = {};
  if (k < args.K) {
    float v[8];
    load8(v, args.x, start + k, args.type);
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (!(outliers >> i & 1)) code[i] = round_code(v[i], row);
  }
  ((u32*)target)[0] = pack_codes(code[0], code[1], code[2], code[3]);
  ((u32*)target)[1] = pack_codes(code[4], code[5], code[6], code[7]);
}

// Bits of elements k to k + 7, k a multiple of 8.
DEVICE u32 bits_of(const u32* mask, int k) { return mask[k / 32] >> (k % 32) & 255; }

// A block has a row of the call.
__global__ void __launch_bounds__(THREADS) round_rows(Arguments args) {
  SHARED(u32, mask, MAX_WORDS);
  SHARED(u32, tops, 2 * WARPS);
  const int m = blockIdx.x, thread = threadIdx.x;
  const u64 start = u64(m) * args.K;
  for (int word = thread; word < args.words; word += THREADS) {
    u32 bits = 0;
    for (int slice = 0; slice < args.slice_count; slice++) bits |= args.slices[u64(slice) * args.words + word];
    mask[word] = bits;
    if (m == 0) args.mask[word] = bits;
  }
  __syncthreads();
  u32 top = 0, all = 0;
  for (int k = thread * 8; k < args.K; k += THREADS * 8) {
    float v[8];
    load8(v, args.x, start + k, args.type);
    take_magnitudes(top, all, v, bits_of(mask, k));
  }
  const RowRounding row = finish_magnitudes(top, all, tops, thread);
  if (thread == 0) args.step[m] = row.step;
  for (int k = thread * 8; k < args.padded; k += THREADS * 8)
    round8(args, start, k, bits_of(mask, k), row, args.codes + u64(m) * args.padded + k);
}

// ---- outputs ----
DEVICE float scaled(i32 sum, float absmax, float step) {
  return __fmul_rn(__fmaf_rn(__int2float_rn(sum), __fdiv_rn(absmax, 127.f), 0.f), step);
}

DEVICE float round_to(float f, int type) {
  if (type == FLOAT32) return f;
  return type == FLOAT16 ? f16_to_float(float_to_f16(f)) : bf16_to_float(float_to_bf16(f));
}

// The weight of outlier column k, the c-th given one, for output n.
DEVICE float column_weight_of(const Arguments& args, int n, int c, int k, float absmax) {
  if (args.columns) return load_as_float(args.column_weight, u64(n) * args.column_count + c, args.type);
  const float code = __int2float_rn(args.weight[u64(n) * args.K + k]);
  const float exact = __fdiv_rn(__fmul_rn(code, absmax), 127.f);
  return round_to(exact, args.type);
}

// Calls take(c, k) for each outlier column k, ascending: all lanes of a warp together. `mask` is read if no columns are
// given.
template <class Take>
DEVICE void for_each_outlier(const Arguments& args, const u32* mask, int lane, const Take& take) {
  if (args.columns) {
    for (int c = 0; c < args.column_count; c++) {
      const int k = args.columns[c];
      if (k >= 0 && k < args.K) take(c, k);
    }
    return;
  }
  for (int first = 0; first < args.words; first += 32) {
    u32 mine = first + lane < args.words ? mask[first + lane] : 0;
    for (u32 some = __ballot_sync(0xffffffffu, mine != 0); some; some &= some - 1) {
      const int from = __ffs(some) - 1;
      for (u32 bits = __shfl_sync(0xffffffffu, mine, from); bits; bits &= bits - 1)
        take(0, (first + from) * 32 + __ffs(bits) - 1);
    }
  }
}

DEVICE void store(const Arguments& args, int m, int n, float value) {
  if (args.bias) value = __fadd_rn(value, load_as_float(args.bias, n, args.type));
  store_from_float(args.y, u64(m) * args.N + n, args.type, value);
}

// ---- one row ----
constexpr int OUTPUTS = 64, EACH = OUTPUTS / WARPS;
constexpr int CHUNK = 16384;  // columns of x whose codes are kept

// A block has 64 outputs, a warp 8 rows of W at once, 16 bytes of each in a lane. Bound by the memory: they are asked for
// before x is scanned, and then while those before are multiplied, so that each lane always has 8 loads under way.
__global__ void __launch_bounds__(THREADS) one_row(Arguments args) {
  SHARED(u32, mask, MAX_WORDS);
  SHARED(i8, codes, CHUNK);
  SHARED(u32, tops, 2 * WARPS);
  SHARED(i32, sums, OUTPUTS);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, n0 = blockIdx.x * OUTPUTS;
  int k = lane * 16;  // of W; the lane's next ones are 512 further
  auto load = [&](Words4(&w)[EACH], int from) {
    if (from >= args.K) return;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int n = n0 + warp * EACH + i, readable = n < args.N ? n : args.N - 1;
      w[i] = load16(args.weight + u64(readable) * args.K + from);
    }
  };
  Words4 w[EACH] = {};
  load(w, k);

  if (args.columns || args.threshold == 0) {
    for (int word = thread; word < args.words; word += THREADS) mask[word] = given_columns(args, word);
    __syncthreads();
  }
  u32 top = 0, all = 0;
  for (int byte = thread; byte < args.words * 4; byte += THREADS) {
    float v[8] = {};
    if (byte * 8 < args.K) load8(v, args.x, byte * 8, args.type);
    if (!args.columns && args.threshold != 0) ((u8*)mask)[byte] = u8(outliers_of(args, v));
    take_magnitudes(top, all, v, ((u8*)mask)[byte]);  // this thread's own, or behind a barrier
  }
  const RowRounding row = finish_magnitudes(top, all, tops, thread);  // with a barrier: the mask is there

  i32 sum[EACH] = {};
  for (int first = 0; first < args.K; first += CHUNK) {
    if (first) __syncthreads();
    const int left = args.padded - first, columns = left < CHUNK ? left : CHUNK;
    for (int i = thread * 8; i < columns; i += THREADS * 8) round8(args, 0, first + i, bits_of(mask, first + i), row, codes + i);
    __syncthreads();
    for (; k < args.K && k < first + CHUNK; k += 512) {
      Words4 next[EACH] = {};
      load(next, k + 512);
      const Words4 c = load16(codes + k - first);
#pragma unroll
      for (int i = 0; i < EACH; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) sum[i] = dot4(c.word[j], w[i].word[j], sum[i]);
        w[i] = next[i];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < EACH; i++) {
#pragma unroll
    for (int bit = 16; bit > 0; bit /= 2) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], bit);
    if (lane == 0) sums[warp * EACH + i] = sum[i];
  }
  __syncthreads();
  if (thread >= OUTPUTS) return;  // two whole warps continue
  const int n = n0 + thread, known = n < args.N ? n : args.N - 1;
  const float absmax = args.absmax[known];
  float value = scaled(sums[thread], absmax, row.step);
  for_each_outlier(args, mask, lane, [&](int c, int k) {
    const float x = load_as_float(args.x, k, args.type), w = column_weight_of(args, known, c, k, absmax);
    value = __fadd_rn(value, __fmul_rn(x, w));
  });
  if (n < args.N) store(args, 0, n, value);
}

// ---- more rows ----
constexpr int TILE = 64, TILE_K = 64, PRODUCT_THREADS = 128, STAGES = 4;

// The place of 16 columns of a row of a tile; rotated by the row, so that ldmatrix reads every bank.
DEVICE int place_of(int row, int chunk, int turn) { return row * TILE_K + (chunk ^ turn) * 16; }

DEVICE int turn_of(int row) { return row / 2 % 4; }

// A block computes 64 rows (blockIdx.x) and 64 outputs (blockIdx.y), each of 2 x 2 warps 32 of both.
__global__ void __launch_bounds__(PRODUCT_THREADS) product(Arguments args) {
  SHARED(i8, shared_x, STAGES * TILE * TILE_K);
  SHARED(i8, shared_w, STAGES * TILE * TILE_K);
  const int thread = threadIdx.x, lane = thread % 32, warp_m = thread / 64, warp_n = thread / 32 % 2;
  const int m0 = blockIdx.x * TILE, n0 = blockIdx.y * TILE, tiles = args.padded / TILE_K;

  auto fetch = [&](int tile) {
    const int stage = tile % STAGES * TILE * TILE_K, chunk = thread % 4, k = tile * TILE_K + chunk * 16;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int row = i * 32 + thread / 4, place = stage + place_of(row, chunk, turn_of(row));
      const bool in_x = m0 + row < args.M, in_w = n0 + row < args.N && k < args.K;
      cp_async16(shared_x + place, args.codes + (in_x ? u64(m0 + row) * args.padded + k : 0), in_x);
      cp_async16(shared_w + place, args.weight + (in_w ? u64(n0 + row) * args.K + k : 0), in_w);
    }
  };

  i32 sum[2][4][4] = {};
  for (int tile = 0; tile < STAGES - 1; tile++) {
    if (tile < tiles) fetch(tile);
    cp_async_commit();
  }
  for (int tile = 0; tile < tiles; tile++) {
    cp_async_wait<STAGES - 2>();
    // after this every thread's copies of the tile are there, and every thread is done with the tile before
    __syncthreads();
    if (tile + STAGES - 1 < tiles) fetch(tile + STAGES - 1);
    cp_async_commit();
    const int stage = tile % STAGES * TILE * TILE_K;
#pragma unroll
    for (int step = 0; step < 2; step++) {
      u32 a[2][4], b[2][4];
#pragma unroll
      for (int p = 0; p < 2; p++) {
        // left: lanes 0 to 15 name columns 0 to 15 of 16 rows, lanes 16 to 31 columns 16 to 31
        const int row = warp_m * 32 + p * 16 + lane % 16, chunk = step * 2 + lane / 16;
        ldmatrix_x4(a[p], shared_x + stage + place_of(row, chunk, turn_of(row)));
        // right: 8 lanes name columns 0 to 15 of 8 outputs, 8 more columns 16 to 31, then 8 outputs further
        const int out = warp_n * 32 + p * 16 + lane / 16 * 8 + lane % 8, side = step * 2 + lane / 8 % 2;
        ldmatrix_x4(b[p], shared_w + stage + place_of(out, side, turn_of(out)));
      }
#pragma unroll
      for (int p = 0; p < 2; p++)
#pragma unroll
        for (int q = 0; q < 4; q++) mma_s8(sum[p][q], a[p], b[q / 2][q % 2 * 2], b[q / 2][q % 2 * 2 + 1]);
    }
  }

  // sum[p][q][i]: row p * 16 + lane / 4 + 8 * (i / 2), output q * 8 + 2 * (lane % 4) + i % 2 of the warp's. A lane reads
  // for all what belongs to row `lane` and output `lane`.
  const int my_m = m0 + warp_m * 32 + lane, my_n = n0 + warp_n * 32 + lane;
  const int known_m = my_m < args.M ? my_m : args.M - 1, known_n = my_n < args.N ? my_n : args.N - 1;
  const float my_absmax = args.absmax[known_n], my_step = args.step[known_m];
  float value[2][4][4];
#pragma unroll
  for (int p = 0; p < 2; p++)
#pragma unroll
    for (int q = 0; q < 4; q++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float step = __shfl_sync(0xffffffffu, my_step, p * 16 + lane / 4 + 8 * (i / 2));
        const float absmax = __shfl_sync(0xffffffffu, my_absmax, q * 8 + lane % 4 * 2 + i % 2);
        value[p][q][i] = scaled(sum[p][q][i], absmax, step);
      }
  for_each_outlier(args, args.mask, lane, [&](int c, int k) {
    const float my_x = load_as_float(args.x, u64(known_m) * args.K + k, args.type);
    const float my_w = column_weight_of(args, known_n, c, k, my_absmax);
    float x[2][2];
#pragma unroll
    for (int j = 0; j < 4; j++) x[j / 2][j % 2] = __shfl_sync(0xffffffffu, my_x, j * 8 + lane / 4);
#pragma unroll
    for (int q = 0; q < 4; q++)
#pragma unroll
      for (int side = 0; side < 2; side++) {
        const float w = __shfl_sync(0xffffffffu, my_w, q * 8 + lane % 4 * 2 + side);
#pragma unroll
        for (int j = 0; j < 4; j++) {
          float& target = value[j / 2][q][j % 2 * 2 + side];
          target = __fadd_rn(target, __fmul_rn(x[j / 2][j % 2], w));
        }
      }
  });
#pragma unroll
  for (int p = 0; p < 2; p++)
#pragma unroll
    for (int q = 0; q < 4; q++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int m = m0 + warp_m * 32 + p * 16 + lane / 4 + 8 * (i / 2), n = n0 + warp_n * 32 + q * 8 + lane % 4 * 2 + i % 2;
        if (m < args.M && n < args.N) store(args, m, n, value[p][q][i]);
      }
}

}  // namespace int8_outlier
