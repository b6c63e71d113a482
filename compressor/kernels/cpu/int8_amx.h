// Products of rows of int8 with a packed weight in tiles of AMX, sixteen rows of codes at a time: the bits of int8_product.cpp.
#pragma once
#include "amx.h"
#include "int8_product.h"

#ifdef COMPRESSOR_AMX
namespace compressor {

// Inputs as tiles read them: 16 / digits rows make a block, all their digits together; what is beyond M, K or a group is 0.
struct AmxRows {
  const int8_t* codes;       // (blocks * groups * chunks, 16, 64), chunks of 64 columns, in the order in which they are multiplied
  const int32_t* minus_sum;  // (blocks, groups, 16)
  const float* step;         // (blocks, groups, 16 / digits); not read if digits is 1
  int64_t digits, blocks, chunks;
};
// Whether tiles can multiply M rows, and are the faster way.
bool amx_pays(const Int8Rows& x, const Packed& w, int64_t M);
// In memory of this thread.
AmxRows amx_rows(const Int8Rows& x, const Packed& w, int64_t M);
// 64 outputs of each row, before the row's step if digits is 1: (blocks * (16 / digits), 64) in memory of this thread.
float* amx_tile(const AmxRows& x, const Packed& w, int64_t tile);

}  // namespace compressor
#endif
