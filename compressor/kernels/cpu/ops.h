// Every op of the library. Pointers, int64_t and double only, so that Python, C++ tests and sanitizers call the same
// symbols. level is one of common.h's Level, threads at least 1. They return 0 or one of common.h's Error.
#pragma once
#include <cstdint>

extern "C" {
int64_t has_level(int64_t level);  // 1 if this processor does
int64_t use_parallel_for(void* function);  // the address of torch_parallel_for; until then, and for null, all runs in the caller's thread
int64_t use_set_threads(void* function);  // the address of omp_set_num_threads in torch's OpenMP
// In the calling thread, torch's operations have teams of `of_torch` threads from now on, and this library has those of `threads`; 0: the same.
int64_t reserve_threads(int64_t threads, int64_t of_torch);
int64_t packed_bytes(int64_t N, int64_t K, int64_t bits, int64_t group, int64_t scale_dtype);  // or an Error
int64_t pack_weight(int64_t threads, const uint8_t* codes, const void* scale, const uint8_t* zero, uint8_t* out, int64_t N, int64_t K,
                    int64_t bits, int64_t group, int64_t scale_dtype);
int64_t unpack_weight(int64_t threads, const uint8_t* packed, int64_t packed_size, int64_t N, int64_t K, int64_t bits,
                      int64_t group, uint8_t* codes, float* scale, uint8_t* zero);
int64_t quantize_rows(int64_t level, const void* x, int64_t x_dtype, int8_t* codes, float* absmax, int64_t M, int64_t K);
int64_t linear_dynamic_int8(int64_t level, int64_t threads, const void* x, int64_t x_dtype, const uint8_t* packed, int64_t packed_size,
                            const void* bias, int64_t bias_dtype, void* y, int64_t M, int64_t N, int64_t K, int64_t bits, int64_t group);
int64_t linear_weight_only(int64_t level, int64_t threads, const void* x, int64_t x_dtype, const uint8_t* packed, int64_t packed_size,
                           const void* bias, int64_t bias_dtype, void* y, int64_t M, int64_t N, int64_t K, int64_t bits, int64_t group);
// The same x times each of `count` weights of one width and group. given (count, 6): address and bytes of a packed weight, address
// and type of its bias (address 0: none), its outputs N, address of y (M, N).
int64_t linear_dynamic_int8_parts(int64_t level, int64_t threads, const void* x, int64_t x_dtype, const int64_t* given, int64_t count,
                                  int64_t M, int64_t K, int64_t bits, int64_t group);
int64_t linear_weight_only_parts(int64_t level, int64_t threads, const void* x, int64_t x_dtype, const int64_t* given, int64_t count,
                                 int64_t M, int64_t K, int64_t bits, int64_t group);
// columns and stored (N, column_count) may be 0: outliers are then the columns with any |x| >= threshold, none for 0.
int64_t linear_int8_outlier(int64_t level, int64_t threads, const void* x, int64_t x_dtype, const uint8_t* packed, int64_t packed_size,
                            const float* absmax, const int64_t* columns, int64_t column_count, const void* stored, int64_t stored_dtype,
                            const void* bias, int64_t bias_dtype, void* y, int64_t M, int64_t N, int64_t K, double threshold);
// Columns [begin, stop) of a GPTQ block of `end` columns: codes, errors over pivots; columns [stop, end) of work updated.
// work, errors, codes (end, rows); upper (end, end); scale, zero (groups, rows), zero null if symmetric; group_of (end,).
int64_t gptq_solve(int64_t level, int64_t threads, float* work, float* errors, float* codes, const float* upper, const float* scale,
                   const float* zero, const int64_t* group_of, int64_t rows, int64_t groups, int64_t begin, int64_t stop, int64_t end,
                   double low, double high);
// Scales and zero points (rows, groups) of weight (rows, groups, size): of the extremes of each group, times the factors 1, 1 - coarse, ..,
// 1 - steps * coarse and those 1 and 2 times `fine` beside the best, with the least sum of |error|^2.4; or of error^2 times importance
// (groups, size), if it is given. Negative steps: the extremes alone. stored: the type to which scales are rounded.
int64_t scale_search(int64_t level, int64_t threads, const float* weight, const float* importance, float* scale, float* zero,
                     int64_t rows, int64_t groups, int64_t size, int64_t bits, int64_t symmetric, int64_t stored, double coarse, double fine,
                     int64_t steps);
int64_t has_bfloat16_products();  // 1 if this processor multiplies bfloat16 with sums in float32, faster than float32: second_moments is fast
// matrix (columns, columns) of rows `stride` apart = keep * matrix + weight * x^T x on and above the diagonal; x (tokens, columns) bfloat16.
// packed: memory for ceil(columns / 48) * ceil(tokens / 2) * 48 numbers.
int64_t second_moments(int64_t level, int64_t threads, const uint16_t* x, uint32_t* packed, float* matrix, int64_t tokens, int64_t columns,
                       int64_t stride, double keep, double weight);
// c (M, N) = a (M, K) @ b (N, K).T, exact; K at most 65,536.
int64_t int8_matmul(int64_t level, int64_t threads, const int8_t* a, const int8_t* b, int32_t* c, int64_t M, int64_t N, int64_t K);
// y = x (H_{n/m} (x) base) * scale, row by row, x and y (M, n); n / m a power of two, base (m, m) of +1 and -1, none for m = 1.
int64_t hadamard(int64_t level, int64_t threads, const void* x, int64_t x_dtype, const float* base, void* y, int64_t M, int64_t n,
                 int64_t m, double scale);
// x (M, blocks * width), dense (blocks, atoms, width), index and value (N, blocks, k): see dense_sparse.cpp. With dense_scale
// (blocks, atoms), or value_scale (N,), that factor is int8 and times its scale; null: it is of its dtype.
int64_t linear_dense_sparse(int64_t level, int64_t threads, const void* x, int64_t x_dtype, const void* dense, int64_t dense_dtype,
                            const uint16_t* index, const void* value, int64_t value_dtype, const void* bias, int64_t bias_dtype,
                            void* y, int64_t M, int64_t N, int64_t blocks, int64_t atoms, int64_t width, int64_t k,
                            const float* dense_scale, const float* value_scale);
// f(low + i * step) for i in [0, entries) is table[i]; between two, a line if linear, else the nearest. Beyond an end f goes on
// with that slope.
int64_t table_lookup(int64_t level, int64_t threads, const void* x, int64_t x_dtype, const float* table, void* y, int64_t count,
                     int64_t entries, double low, double step, int64_t linear, double left_slope, double right_slope);
// y (M, N) = x (M, K) @ weight (N, K).T + bias, x, weight and y of one type; for few rows.
int64_t linear_dense(int64_t level, int64_t threads, const void* x, const void* weight, int64_t dtype, const void* bias, int64_t bias_dtype,
                     void* y, int64_t M, int64_t N, int64_t K);
// 1 / sqrt(x) for x = a * 4^s, a in [1, 4), where 1 / sqrt(1 + i * step) is table[i].
int64_t table_inverse_root(int64_t level, const float* x, const float* table, float* y, int64_t count, int64_t entries, double step,
                           int64_t linear);
// y (M, K) = x * r * (offset + weight (K,)), r = 1 / sqrt(mean of x^2 + eps) of a row; all of one type. rounds: x * r is rounded to it.
int64_t rms_norm(int64_t level, int64_t threads, const void* x, int64_t dtype, const void* weight, void* y, int64_t M, int64_t K, double eps,
                 double offset, int64_t rounds);
// y = gate / (1 + exp(-gate)), rounded to the type, times up.
int64_t silu_product(int64_t level, int64_t threads, const void* gate, const void* up, int64_t dtype, void* y, int64_t count);
// y (sequences, heads, tokens, width) = x (sequences, tokens, heads, width) times cos, plus (-second, first) half of x times sin, each product
// rounded to the type. cos, sin (sequences or 1, tokens, width): sequence_stride is `tokens`, or 0 if all sequences share them.
int64_t rotate_halves(int64_t level, int64_t threads, const void* x, int64_t dtype, const void* cos, const void* sin, void* y, int64_t sequences,
                      int64_t tokens, int64_t heads, int64_t width, int64_t sequence_stride);
}
