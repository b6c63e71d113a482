// What a kernel may use of the hardware. The only file with PTX: NVRTC sees the instructions, g++ sees their meaning
// (emulate.h). It includes nothing under CUDA, so NVRTC compiles a kernel from one string without a search path.
#pragma once

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef int i32;
typedef unsigned long long u64;
typedef long long i64;

struct alignas(16) Words4 {
  u32 word[4];
};

// Codes of an element type at the C ABI.
enum Type { FLOAT16 = 0, BFLOAT16 = 1, FLOAT32 = 2 };

#ifdef __CUDACC__

#define DEVICE __device__ __forceinline__
// One array per block. Its address is a multiple of 128 bytes.
#define SHARED(type, name, count) __shared__ alignas(128) type name[count]

DEVICE u32 shared_address(const void* pointer) {
  u64 address;
  asm("cvta.to.shared.u64 %0, %1;" : "=l"(address) : "l"(pointer));
  return (u32)address;
}

// 16 bytes of global memory, in one piece.
DEVICE Words4 load16(const void* source) { return *(const Words4*)source; }
DEVICE void store16(void* target, const Words4& words) { *(Words4*)target = words; }

// Copies 16 bytes to shared memory, later; writes zeros, and reads nothing, unless `inside`.
DEVICE void cp_async16(void* target, const void* source, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(target)), "l"(source), "r"(inside ? 16 : 0)
               : "memory");
}

// The same for what is read once: the L2 cache gives these lines up first.
DEVICE u64 evict_first_policy() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

DEVICE void cp_async16_once(void* target, const void* source, u64 policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(target)), "l"(source), "l"(policy)
               : "memory");
}

DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of this thread's groups of copies are under way.
template <int pending>
DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(pending) : "memory");
}

// Four 8x8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix l / 8, and receives of each
// matrix row l / 4, columns 2 * (l % 4) and the next one.
DEVICE void ldmatrix_x4(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// c (16 x 8, float32) += a (16 x 16) times b (16 x 8). Lane l holds
//   a[i]: row l / 4 + 8 * (i % 2), columns 2 * (l % 4) + 8 * (i / 2) and the next one
//   b[i]: rows 2 * (l % 4) + 8 * i and the next one, column l / 4
//   c[i]: row l / 4 + 8 * (i / 2), column 2 * (l % 4) + i % 2
DEVICE void mma_f16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

DEVICE void mma_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c (16 x 8, int32) += a (16 x 32) times b (32 x 8), signed bytes, sums modulo 2^32. Lane l holds
//   a[i]: row l / 4 + 8 * (i % 2), columns 4 * (l % 4) + 16 * (i / 2) and the next three
//   b[i]: rows 4 * (l % 4) + 16 * i and the next three, column l / 4
//   c[i]: as above
DEVICE void mma_s8(i32 (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// sum + the four products of signed bytes.
DEVICE i32 dot4(u32 a, u32 b, i32 sum) {
  asm("dp4a.s32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(a), "r"(b));
  return sum;
}

// Both halves of a word: a - b, rounded once.
DEVICE u32 subtract_f16x2(u32 a, u32 b) {
  u32 r;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

// sub.bf16x2 needs sm_90; a * 1 - b is the same number and needs sm_80. The sign of b is inverted in software.
DEVICE u32 subtract_bf16x2(u32 a, u32 b) {
  u32 r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(0x3f803f80u), "r"(b ^ 0x80008000u));
  return r;
}

DEVICE float f16_to_float(u16 bits) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
  return f;
}

DEVICE u16 float_to_f16(float f) {
  u16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f));
  return bits;
}

DEVICE float bf16_to_float(u16 bits) { return __uint_as_float((u32)bits << 16); }

DEVICE u16 float_to_bf16(float f) {
  u16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(f));
  return bits;
}

// To a whole number, ties to even.
DEVICE float round_half_even(float f) {
  float r;
  asm("cvt.rni.f32.f32 %0, %1;" : "=f"(r) : "f"(f));
  return r;
}

#else
#include "emulate.h"
#include "emulate_int8.h"
#endif

// A 16-bit element type, known at compile time.
template <int type>
struct Element;

template <>
struct Element<FLOAT16> {
  static DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_f16(c, a, b0, b1); }
  static DEVICE float to_float(u16 bits) { return f16_to_float(bits); }
  static DEVICE u16 from_float(float f) { return float_to_f16(f); }
};

template <>
struct Element<BFLOAT16> {
  static DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_bf16(c, a, b0, b1); }
  static DEVICE float to_float(u16 bits) { return bf16_to_float(bits); }
  static DEVICE u16 from_float(float f) { return float_to_bf16(f); }
};

// Element `index` of an array whose type is known at run time.
DEVICE float load_as_float(const void* array, u64 index, int type) {
  if (type == FLOAT32) return ((const float*)array)[index];
  const u16 bits = ((const u16*)array)[index];
  return type == FLOAT16 ? f16_to_float(bits) : bf16_to_float(bits);
}

DEVICE void store_from_float(void* array, u64 index, int type, float value) {
  if (type == FLOAT32)
    ((float*)array)[index] = value;
  else
    ((u16*)array)[index] = type == FLOAT16 ? float_to_f16(value) : float_to_bf16(value);
}

// Elements `index` and the 7 after it, which start at a multiple of 16 bytes.
DEVICE void load8(float (&v)[8], const void* array, u64 index, int type) {
  if (type == FLOAT32) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const Words4 words = load16((const float*)array + index + half * 4);
#pragma unroll
      for (int i = 0; i < 4; i++) v[half * 4 + i] = __uint_as_float(words.word[i]);
    }
    return;
  }
  const Words4 words = load16((const u16*)array + index);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const u16 bits = u16(words.word[i / 2] >> (16 * (i % 2)));
    v[i] = type == FLOAT16 ? f16_to_float(bits) : bf16_to_float(bits);
  }
}

// How a row is rounded to int8: code = x * inverse, half to even, and x is about code * step. The operations and their
// roundings are those of the CPU library, so that codes and steps are the same bits.
struct RowRounding {
  float inverse, step;
};

// `top` has the bits of the row's largest magnitude, which order as magnitudes do, NaN above infinity. A row with either
// has codes of 0 and a step of NaN; below 2^-120 all is 0, since 127 / top overflows not far below it.
DEVICE RowRounding rounding_of(u32 top) {
  if (top >= 0x7f800000u) return {0.f, __uint_as_float(0x7fc00000u)};
  if (top < 0x03800000u) return {0.f, 0.f};  // 2^-120
  const float absmax = __uint_as_float(top);
  return {__fmul_rn(__frcp_rn(absmax), 127.f), __fdiv_rn(absmax, 127.f)};
}

// Where the inverse is 0, so is the code: the conversion makes 0 of NaN.
DEVICE i32 round_code(float x, const RowRounding& row) { return __float2int_rn(__fmul_rn(x, row.inverse)); }

// Four codes in the bytes of a word, the first in the lowest.
DEVICE u32 pack_codes(i32 a, i32 b, i32 c, i32 d) {
  return (a & 255) | (b & 255) << 8 | (c & 255) << 16 | (u32)d << 24;
}

DEVICE u32 magnitude_bits(float f) { return __float_as_uint(f) & 0x7fffffffu; }

// The largest of the lanes' numbers, in all of them.
DEVICE u32 warp_max(u32 value) {
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) {
    const u32 other = __shfl_xor_sync(0xffffffffu, value, bit);
    value = other > value ? other : value;
  }
  return value;
}
