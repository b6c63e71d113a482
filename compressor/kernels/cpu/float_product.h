// Many rows times a packed weight in float32, where integers are no faster: at every level but AVX512VNNI. Weights become
// floats a tile at a time, (code - zero) * scale; an output is summed by fma in the order of k, CHUNK at a time, and the sums of
// chunks are added. So a level, a number of threads or other rows beside it never change a bit of it.
//   |y - exact| <= (L + ceil(K/L) + 3) 2^-24 sum |x| |w| before the bias, L = min(group, 128)
#pragma once
#include "int8_product.h"

namespace compressor {

// x (M, K) of any dtype. finish as for int8_products.
void float_products(int64_t level, int64_t threads, const void* x, int64_t x_dtype, const std::vector<Part>& parts, int64_t M,
                    const std::function<void(const Part& part, int64_t m, int64_t tile, float* values)>& finish);

}  // namespace compressor
