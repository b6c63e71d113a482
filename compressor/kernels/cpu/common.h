// Declarations for all CPU kernels: number formats, the packed weight "cpu2", threads, and the instruction levels.
// Plain C++17; no torch and no Python. Every op is one extern "C" function of pointers, int64_t and double (ops.h).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#define COMPRESSOR_X86 1
#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11  // which came with assemblers that know it
#define COMPRESSOR_AVXVNNI 1
#endif
#ifndef AVX512_EMULATED  // tests do that, on machines without these instructions
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")))
#endif
#define TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#endif
#define ALWAYS_INLINE inline __attribute__((always_inline))
// Before a loop over registers: gcc keeps an array in memory unless its loops are unrolled early.
#define UNROLL _Pragma("GCC unroll 16")

namespace compressor {

enum Level : int64_t { SCALAR, AVX2, AVXVNNI, AVX512VNNI, AMX };  // AVXVNNI has the bodies of AVX2, except for products of integers
enum DType : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum Error : int64_t { OK = 0, BAD_SHAPE = -1, BAD_LEVEL = -2, BAD_LAYOUT = -3, BAD_DTYPE = -4, BAD_INDEX = -5 };

bool level_is_there(int64_t level);

constexpr int TILE = 64;  // outputs that are computed together, in the lanes of 4 registers of 16 floats

// ---- numbers ----
static inline float from_bits(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
static inline uint32_t to_bits(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }
static inline float bfloat16_to_float(uint16_t b) { return from_bits(uint32_t(b) << 16); }
static inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest < 0x400) return from_bits(sign | to_bits(float(rest) * 5.9604644775390625e-8f));  // * 2^-24, exact
  return from_bits(sign | ((rest << 13) + 0x38000000));
}
static inline uint16_t float_to_bfloat16(float f) {  // to nearest even; NaN stays NaN
  const uint32_t bits = to_bits(f);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static inline uint16_t float_to_half(float f) {  // to nearest even; beyond 65504 Inf; NaN stays NaN
  const uint32_t bits = to_bits(f), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);
  if (rest < 0x38800000)  // below 2^-14: adding 1/2 leaves multiples of 2^-24 in the low bits
    return uint16_t(sign | (to_bits(from_bits(rest) + 0.5f) - 0x3f000000));
  return uint16_t(sign | (((rest + 0xfff + (rest >> 13 & 1)) >> 13) - 0x1c000));
}
static inline int64_t dtype_bytes(int64_t dtype) { return dtype == FLOAT32 ? 4 : 2; }
static inline float load_number(const void* data, int64_t dtype, int64_t i) {
  if (dtype == FLOAT32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  return dtype == BFLOAT16 ? bfloat16_to_float(bits) : half_to_float(bits);
}
static inline void store_number(void* data, int64_t dtype, int64_t i, float value) {
  if (dtype == FLOAT32) static_cast<float*>(data)[i] = value;
  else static_cast<uint16_t*>(data)[i] = dtype == BFLOAT16 ? float_to_bfloat16(value) : float_to_half(value);
}
// count numbers of any dtype to float32, at the speed of the level
void to_float(int64_t level, const void* data, int64_t dtype, int64_t offset, float* out, int64_t count);
// The same, or the floats themselves where they are float32.
static inline const float* as_floats(int64_t level, const void* data, int64_t dtype, int64_t offset, float* out, int64_t count) {
  if (dtype == FLOAT32) return static_cast<const float*>(data) + offset;
  to_float(level, data, dtype, offset, out, count);
  return out;
}
void from_float(int64_t level, const float* values, void* data, int64_t dtype, int64_t offset, int64_t count);

// ---- the packed weight, layout "cpu2" ----
//   packed = one line of 64 bytes (Header), then [ceil(N/64) tiles][ceil(K/group) groups] of one block
//   block  = group/8 rows | 64 scales, 2 or 4 bytes each | 64 zero points u8         all of whole 64-byte lines
//   row    = columns k .. k+7 of the group for 64 outputs, n = 0 .. 63, i = 0 .. 3:
//     8 bits  256 bytes: byte n*4+i = code[n][k+i];  256 bytes: byte n*4+i = code[n][k+4+i]
//     4 bits  256 bytes: byte n*4+i = code[n][k+i] | code[n][k+4+i] << 4
//     2 bits  two lines of 32 outputs, for n = 0 .. 15 of each: byte n*4+i = code[n][k+i] | code[n][k+4+i] << 2
//                                                                        | code[n+16][k+i] << 4 | code[n+16][k+4+i] << 6
//     3 bits  the low two bits as for 2 bits; one line for the high bits: byte n*4+i, n = 0 .. 15,
//             bit 2c = of code[16c+n][k+i], bit 2c+1 = of code[16c+n][k+4+i]
// Outputs beyond N have scale 0; columns beyond K have code 0, and their inputs are taken as 0.
struct Header {
  uint32_t magic, bits;
  int64_t out_features, in_features, group, scale_dtype, largest_zero, reserved[2];
};
static_assert(sizeof(Header) == 64, "one line");
constexpr uint32_t MAGIC = 0x32757063;  // "cpu2"

struct Packed {
  const uint8_t* blocks;
  int64_t out_features, in_features, bits, group, groups, tiles, scale_dtype, largest_zero, row_bytes, scale_offset, zero_offset, block_bytes;
  int64_t padded() const { return groups * group; }
  const uint8_t* block(int64_t tile, int64_t j) const { return blocks + (tile * groups + j) * block_bytes; }
};
int64_t describe(Packed& w, const uint8_t* blocks, int64_t N, int64_t K, int64_t bits, int64_t group, int64_t scale_dtype);
// Reads the header and checks it against what the caller believes and against the size of the tensor.
int64_t open_packed(Packed& w, const uint8_t* packed, int64_t bytes, int64_t N, int64_t K, int64_t bits, int64_t group);

static inline uint8_t get_code(const uint8_t* row, int64_t bits, int n, int j) {
  if (bits == 8) return row[j / 4 * 256 + n * 4 + j % 4];
  if (bits == 4) return row[n * 4 + j % 4] >> (j / 4 * 4) & 15;
  const int lane = n % 16 * 4 + j % 4;
  const uint8_t low = row[n / 32 * 64 + lane] >> (n % 32 / 16 * 4 + j / 4 * 2) & 3;
  return bits == 2 ? low : uint8_t(low | (row[128 + lane] >> (n / 16 * 2 + j / 4) & 1) << 2);
}

#ifdef COMPRESSOR_X86
// Codes of outputs c*8 .. c*8+7, columns 4*half .. 4*half+3 of a row of 8, as bytes.
template <int BITS> TARGET_AVX2 static ALWAYS_INLINE __m256i codes_avx2(const uint8_t* row, int c, int half) {
  if (BITS == 8) return _mm256_loadu_si256((const __m256i*)(row + half * 256) + c);
  if (BITS == 4) return _mm256_and_si256(_mm256_srli_epi16(_mm256_loadu_si256((const __m256i*)row + c), half * 4), _mm256_set1_epi8(15));
  const __m256i both = _mm256_loadu_si256((const __m256i*)(row + c / 4 * 64) + c % 2);
  const __m256i low = _mm256_and_si256(_mm256_srli_epi16(both, c % 4 / 2 * 4 + half * 2), _mm256_set1_epi8(3));
  if (BITS == 2) return low;
  const __m256i high = _mm256_srli_epi16(_mm256_loadu_si256((const __m256i*)(row + 128) + c % 2), c / 2 * 2 + half);
  return _mm256_or_si256(low, _mm256_slli_epi16(_mm256_and_si256(high, _mm256_set1_epi8(1)), 2));
}
// Codes of outputs c*16 .. c*16+15, the same.
template <int BITS> TARGET_AVX512 static ALWAYS_INLINE __m512i codes_avx512(const uint8_t* row, int c, int half) {
  if (BITS == 8) return _mm512_loadu_si512((const __m512i*)(row + half * 256) + c);
  if (BITS == 4) {
    const __m512i both = _mm512_loadu_si512((const __m512i*)row + c);
    return _mm512_and_si512(half ? _mm512_srli_epi16(both, 4) : both, _mm512_set1_epi8(15));
  }
  const __m512i low = _mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512((const __m512i*)row + c / 2), c % 2 * 4 + half * 2), _mm512_set1_epi8(3));
  if (BITS == 2) return low;
  const __m512i bits = _mm512_loadu_si512((const __m512i*)row + 2);
  const int at = c * 2 + half;  // bring this bit of each byte to bit 2
  const __m512i high = at < 2 ? _mm512_slli_epi16(bits, 2 - at) : _mm512_srli_epi16(bits, at - 2);
  return _mm512_ternarylogic_epi32(low, high, _mm512_set1_epi8(4), 0xf8);  // low | (high & 4)
}
#endif
// 8 or 16 numbers of a type, such as a block's scales, from c * 8 or c * 16 on
#ifdef COMPRESSOR_X86
TARGET_AVX2 static ALWAYS_INLINE __m256 scales_avx2(const uint8_t* at, int64_t dtype, int c) {
  if (dtype == FLOAT32) return _mm256_loadu_ps((const float*)at + c * 8);
  const __m128i bits = _mm_loadu_si128((const __m128i*)at + c);
  return dtype == FLOAT16 ? _mm256_cvtph_ps(bits) : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
TARGET_AVX512 static ALWAYS_INLINE __m512 scales_avx512(const uint8_t* at, int64_t dtype, int c) {
  if (dtype == FLOAT32) return _mm512_loadu_ps((const float*)at + c * 16);
  const __m256i bits = _mm256_loadu_si256((const __m256i*)at + c);
  return dtype == FLOAT16 ? _mm512_cvtph_ps(bits) : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
#endif

#ifdef COMPRESSOR_X86
// sum += groups of 4 bytes of codes times those of x. Written out, since gcc 12 copies and spills sums around its intrinsic:
// 5 % of a product where they fill 16 registers.
TARGET_AVX512 static ALWAYS_INLINE void add_dot(__m512i& sum, __m512i codes, __m512i x) {
#ifdef AVX512_EMULATED
  sum = _mm512_dpbusd_epi32(sum, codes, x);
#else
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
#endif
}
#endif

constexpr int64_t ROWS_AT_ONCE = 128;  // of x: what is kept of them stays in the second-level cache beside a tile

struct Output {
  void* y;
  int64_t dtype, level;
  const void* bias;
  int64_t bias_dtype;
};
// The processor may fetch the lines of 64 outputs of `rows` rows from m on, while their product is made: rows lie in pages of their own, and
// stores that wait for theirs held up the next product, 3 % of 64 rows and more on Zen 4. Inlined early, or gcc drops the call as without effect.
static ALWAYS_INLINE void expect_outputs(const Output& to, const Packed& w, int64_t m, int64_t rows, int64_t tile) {
  const int64_t size = dtype_bytes(to.dtype), begin = tile * TILE, end = begin + TILE < w.out_features ? begin + TILE : w.out_features;
  for (int64_t i = m; i < m + rows; i++)
    for (const char *y = (const char*)to.y + (i * w.out_features + begin) * size, *stop = y + (end - begin) * size; y < stop; y += 64)
      __builtin_prefetch(y, 1);
}
// 64 outputs of row m: the bias added in float32, rounded once to y's type.
void store_outputs(const Output& to, const Packed& w, float* values, int64_t m, int64_t tile);

// ---- threads (threads.cpp) ----
// f(i) for i in [0, tasks), each once, by at most `threads` threads of torch, the caller among them; what f throws is thrown
// here. Which thread runs what never changes a result. A call from within f, or from torch's own parallel loops, runs here alone;
// so does a call shortly after others whose threads came too late to help.
void parallel(int64_t threads, int64_t tasks, const std::function<void(int64_t)>& f);

// Memory of this thread, kept for its next call; grows only. 64-byte aligned; contents undefined.
void* scratch(int slot, size_t bytes);

}  // namespace compressor
