// Codes of 2, 3, 4 or 8 bits in layout "mma1", and the numbers that a lane makes of them for an mma.
//
// K is padded to 64 and N to 64 (any code does: x is read as zero there, y isn't written). Tiles of 64 outputs x 64
// columns come in the order [N / 64][K / 64]. A 16 x 16 piece of a tile has 8 codes for each lane l of m16n8k16, with
// c = 2 * (l % 4) at the places
//
//   register i      0        1        2        3
//   n of the 16     l/4      l/4+8    l/4      l/4+8
//   k of the 16     c        c        c+8      c+8      in the lower half of a word, k + 1 in the upper half
//
// which is what the lane needs of the piece, both as the left operand (16 rows of W) and as the right one (two times 8
// columns of W^T). So a shift and a mask give register i of the left one as two codes, 16 bits apart. Halves of words:
//
//   4 bits   512 words, word[k / 16][n / 16][lane]                i at bits 4 i
//                         15..12  11..8   7..4    3..0
//                         3       2       1       0
//   8 bits   1024 words, word[k / 16][i / 2][n / 16][lane]        i at bits 8 (i % 2)
//                         15..8           7..0
//                         1 or 3          0 or 2
//   2 bits   256 words, word[k / 32][n / 16][lane]                i of piece p = k / 16 % 2 at bits 8 p + 2 i
//                         p = 1: 3  2  1  0   p = 0: 3  2  1  0
//   3 bits   256 words as for 2 bits with bits 0 and 1 of the codes, then 128, word[n / 16][lane], with bit 2:
//                         i of piece p = k / 16 at bit 4 p + i
#pragma once
#include "device.h"

namespace codes {

constexpr int PIECES = 4;  // of 16 columns in a tile; and of 16 outputs, one for each warp
constexpr int PLANE = PIECES * 32;

// What a lane has of one piece. pair(i): register i as codes, one in each half of a word.
template <int bits>
struct Codes;

template <>
struct Codes<4> {
  static constexpr int TILE_WORDS = PIECES * PLANE;
  u32 word;
  DEVICE Codes(const u32* tile, int piece, int warp, int lane) : word(tile[piece * PLANE + warp * 32 + lane]) {}
  DEVICE u32 pair(int i) const { return word >> (4 * i) & 0x000f000fu; }
};

template <>
struct Codes<8> {
  static constexpr int TILE_WORDS = 2 * PIECES * PLANE;
  u32 word[2];
  DEVICE Codes(const u32* tile, int piece, int warp, int lane) {
#pragma unroll
    for (int half = 0; half < 2; half++)
      word[half] = tile[(piece * 2 + half) * PLANE + warp * 32 + lane];
  }
  DEVICE u32 pair(int i) const { return word[i / 2] >> (8 * (i % 2)) & 0x00ff00ffu; }
};

template <>
struct Codes<2> {
  static constexpr int TILE_WORDS = PIECES / 2 * PLANE;
  u32 word;
  DEVICE Codes(const u32* tile, int piece, int warp, int lane)
      : word(tile[piece / 2 * PLANE + warp * 32 + lane] >> (piece % 2 * 8)) {}
  DEVICE u32 pair(int i) const { return word >> (2 * i) & 0x00030003u; }
};

template <>
struct Codes<3> {
  static constexpr int TILE_WORDS = Codes<2>::TILE_WORDS + PLANE;
  Codes<2> low;
  u32 high;
  DEVICE Codes(const u32* tile, int piece, int warp, int lane)
      : low(tile, piece, warp, lane),
        high(tile[Codes<2>::TILE_WORDS + warp * 32 + lane] >> (piece * 4)) {}
  DEVICE u32 pair(int i) const { return low.pair(i) | (high >> i & 0x00010001u) << 2; }
};

// float16 1024 + v and bfloat16 128 + v have v in their last bits, so a bit-wise or makes a number of a code, and taking
// 1024 + z or 128 + z away is exact. A bfloat16 has no room for 8 bits there: its codes become float32 2^23 + v, and what is
// left of the difference, 8 bits at most, is the upper half.

// What numbers_of takes away from codes with zero point z.
template <int bits, int type>
DEVICE u32 offset_of(u32 z) {
  if (type == FLOAT16) return 0x64006400u + z * 0x00010001u;
  return bits == 8 ? 0x4b000000u + z : 0x43004300u + z * 0x00010001u;
}

// Two codes -> two numbers code - z.
template <int bits, int type>
DEVICE u32 numbers_of(u32 pair, u32 offset) {
  if (type == FLOAT16) return subtract_f16x2(pair | 0x64006400u, offset);
  if (bits < 8) return subtract_bf16x2(pair | 0x43004300u, offset);
  const float z = __uint_as_float(offset);
  const float low = __uint_as_float(0x4b000000u | (pair & 0xffff)) - z;
  const float high = __uint_as_float(0x4b000000u | pair >> 16) - z;
  return __float_as_uint(low) >> 16 | (__float_as_uint(high) & 0xffff0000u);
}

}  // namespace codes
