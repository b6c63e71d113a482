// Products of rows of int8 with a packed weight in registers of 8 outputs, by AVX2 or AVX-VNNI: the bits of int8_product.cpp.
#pragma once
#include "int8_product.h"

#ifdef COMPRESSOR_X86
namespace compressor {

constexpr int64_t PANEL = 6;  // rows of codes that share what is unpacked; times two registers of outputs they fill 12 of 16 registers

// Inputs as tiles read them: all digits of PANEL / digits rows make a panel of `count` rows of codes, what is left over a smaller one.
// A panel is (padded / 4, count, 4) bytes; or (padded / 4, 2, count, 2) words of 16 bits, columns 0 and 2, then 1 and 3.
struct Avx2Rows {
  const int8_t* panels;
  Int8Rows x;
  bool vnni;
};
// In memory of this thread, or x itself.
Avx2Rows avx2_rows(const Int8Rows& x, const Packed& w, int64_t M, bool vnni);
static inline int64_t avx2_together(const Int8Rows& x) { return PANEL / x.digits; }  // rows of a panel
// Writes 64 outputs of `rows` rows from m on: a panel.
void avx2_tile(const Avx2Rows& from, const Packed& w, int64_t m, int64_t rows, int64_t tile, float* out);

}  // namespace compressor
#endif
