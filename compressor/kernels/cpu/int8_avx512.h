// Products of rows of int8 with a packed weight in registers of 16 outputs, by AVX-512 VNNI: the bits of int8_product.cpp.
#pragma once
#include "int8_product.h"

#ifdef COMPRESSOR_X86
namespace compressor {

// M rows go through a tile in `count` passes, as even as they get: the first `larger` ones have `least` + 1 rows, the others `least`. The first
// pass reads the tile from memory; where two tiles fit into the second-level cache the others fetch the next one meanwhile.
struct Avx512Passes {
  Int8Rows x;
  int64_t M, least, larger;
  int64_t pieces;  // of the columns of a tile of one group, so that two pieces fit; 1 for others
  bool near;  // what the first pass asks for goes into the first-level cache: faster on Zen 4, an eighth slower on processors with AMX
  int64_t rows(int64_t m) const { return m < larger * (least + 1) ? least + 1 : least; }
};
Avx512Passes avx512_passes(const Int8Rows& x, const Packed& w, int64_t M, bool near);
// All rows times all pieces of a tile but the last.
void avx512_begin(const Avx512Passes& passes, const Packed& w, int64_t tile);
// Writes 64 outputs of `rows` rows from m on: a pass, through the last piece.
void avx512_tile(const Avx512Passes& passes, const Packed& w, int64_t m, int64_t rows, int64_t tile, float* out);

}  // namespace compressor
#endif
