// A row of inputs rounded to int8 by its own largest magnitude.
#pragma once
#include "int8_product.h"

namespace compressor {

// One row (K,) to codes (padded) and minus the sums of its groups; returns absmax / 127.
// codes = round(x * ((1 / absmax) * 127)), half to even, in [-127, 127], with the roundings of int8_split.round_rows. absmax
// below 2^-120 (the factor would overflow) counts as 0 with codes 0; a row with NaN or Inf has absmax NaN and codes 0.
float take_row(int64_t level, const float* x, const Packed& w, int8_t* codes, int32_t* minus_sum);

}  // namespace compressor
