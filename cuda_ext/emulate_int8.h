// What emulate.h is for the rest: integer products, and operations of float32 that are rounded one by one.
#pragma once
#include <cstring>

namespace emulate {

struct Int8Operands {
  u32 a[4], b[2];
  i32 c[4];
};
struct Int8Result {
  i32 c[4];
};

inline i32 signed_byte(u32 word, int i) { return i8(word >> (8 * i)); }

}  // namespace emulate

DEVICE void mma_s8(i32 (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  const emulate::Int8Operands mine{{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
  const auto multiply = [](const emulate::Int8Operands* lane, emulate::Int8Result* out) {
    i32 left[16][32], right[8][32];
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 4; i++)
        for (int byte = 0; byte < 4; byte++) {
          const int k = l % 4 * 4 + byte + 16 * (i / 2);
          left[l / 4 + 8 * (i % 2)][k] = emulate::signed_byte(lane[l].a[i], byte);
          if (i % 2 == 0) right[l / 4][k] = emulate::signed_byte(lane[l].b[i / 2], byte);
        }
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 4; i++) {
        u32 sum = lane[l].c[i];  // wraps, as the hardware's does
        for (int k = 0; k < 32; k++) sum += u32(left[l / 4 + 8 * (i / 2)][k] * right[l % 4 * 2 + i % 2][k]);
        out[l].c[i] = i32(sum);
      }
  };
  const auto result = emulate::collective<emulate::Int8Result>("mma.s8", mine, multiply);
  memcpy(c, result.c, sizeof c);
}

DEVICE i32 dot4(u32 a, u32 b, i32 sum) {
  u32 total = sum;
  for (int i = 0; i < 4; i++) total += u32(emulate::signed_byte(a, i) * emulate::signed_byte(b, i));
  return i32(total);
}

DEVICE u32 __ballot_sync(u32 mask, int predicate) {
  if (mask != 0xffffffffu) emulate::die("a ballot of a part of a warp");
  return emulate::collective<u32>("ballot", predicate, [](const int* given, u32* out) {
    u32 votes = 0;
    for (int lane = 0; lane < 32; lane++) votes |= u32(given[lane] != 0) << lane;
    for (int lane = 0; lane < 32; lane++) out[lane] = votes;
  });
}

DEVICE int __ffs(int bits) { return __builtin_ffs(bits); }

DEVICE i32 atomicAdd(i32* target, i32 value) {  // fibers change only where they wait
  const i32 before = *target;
  *target = i32(u32(before) + u32(value));
  return before;
}

// Built with -ffp-contract=off, so each of these rounds once.
DEVICE float __fmul_rn(float a, float b) { return a * b; }
DEVICE float __fadd_rn(float a, float b) { return a + b; }
DEVICE float __fsub_rn(float a, float b) { return a - b; }
DEVICE float __fdiv_rn(float a, float b) { return a / b; }
DEVICE float __frcp_rn(float a) { return 1 / a; }
DEVICE float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
DEVICE float __int2float_rn(i32 value) { return (float)value; }
DEVICE i32 __float2int_rn(float f) {  // NaN becomes 0, what is too large the nearest integer
  if (f != f) return 0;
  if (f >= 0x1p31f) return 0x7fffffff;
  return f <= -0x1p31f ? i32(0x80000000u) : (i32)std::nearbyint(f);
}
