// The tiles of AMX: eight registers of 16 rows of 64 bytes, and products of bytes of two of them. Assembly, so that a compiler keeps them
// in order with the stores they read, which intrinsics of gcc 12 don't say.
#pragma once
#include "common.h"

#if defined(COMPRESSOR_X86) && (defined(AMX_EMULATED) || (defined(__linux__) && __has_include(<amxtileintrin.h>)))
#define COMPRESSOR_AMX 1

namespace compressor {

constexpr int TILE_ROWS = 16, TILE_COLUMNS = 64, TILE_BYTES = TILE_ROWS * TILE_COLUMNS;

#ifndef AMX_EMULATED  // tests do that, on machines without these instructions
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t columns[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static ALWAYS_INLINE void tiles_begin() {
  static const TileShapes shapes;
  asm volatile("ldtilecfg %0" : : "m"(shapes));
}
static ALWAYS_INLINE void tiles_end() { asm volatile("tilerelease"); }
template <int T> ALWAYS_INLINE void tile_zero() { asm volatile("tilezero %%tmm%c0" : : "i"(T)); }
template <int T> ALWAYS_INLINE void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T> ALWAYS_INLINE void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(T) : "memory");
}
// C (16, 16) += A (16, 64) B, int32. A has signs; B, (16, 16, 4): byte n * 4 + i of its row r is of column n and k = 4 r + i.
template <int C, int A, int B> ALWAYS_INLINE void tile_dot_signed() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B> ALWAYS_INLINE void tile_dot_unsigned() {  // B without signs
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
#endif

}  // namespace compressor
#endif
