// The operations beside the linear layers on odd shapes with buffers of exactly the right size: every level and number of
// threads against the first, and that against an obvious version in double or int64, or of the same bits. Part of the program of kernels_check.cpp.
#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "../../compressor/kernels/cpu/common.h"
#include "../../compressor/kernels/cpu/ops.h"

using namespace compressor;

std::string levels_asked;  // their digits; all of them without any

std::vector<int64_t> levels_here() {
  std::vector<int64_t> levels;
  for (int64_t level = SCALAR; level <= AMX; level++)
    if (has_level(level) && (levels_asked.empty() || levels_asked.find(char('0' + level)) != std::string::npos)) levels.push_back(level);
  return levels;
}

namespace {

std::mt19937 draw(2);
float number() { return float(int(draw() % 2001) - 1000) / 500; }
std::vector<float> floats(int64_t count) {
  std::vector<float> data(size_t(count), 0.f);
  for (auto& v : data) v = number();
  return data;
}
std::vector<uint8_t> stored(const std::vector<float>& values, int64_t dtype) {
  std::vector<uint8_t> data(values.size() * size_t(dtype_bytes(dtype)));
  for (size_t i = 0; i < values.size(); i++) store_number(data.data(), dtype, int64_t(i), values[i]);
  return data;
}
std::vector<float> read_back(const std::vector<uint8_t>& data, int64_t dtype) {
  std::vector<float> values(data.size() / size_t(dtype_bytes(dtype)));
  for (size_t i = 0; i < values.size(); i++) values[i] = load_number(data.data(), dtype, int64_t(i));
  return values;
}
// call(level, threads, y) at every level and number of threads; the outputs, empty if a call fails or they differ
template <class F> bool agree(size_t bytes, std::vector<uint8_t>& y, int64_t& calls, F call, const std::vector<int64_t>& counts = {1, 3}) {
  for (const int64_t level : levels_here())
    for (const int64_t threads : counts) {
      std::vector<uint8_t> here(bytes, 0xff);
      if (call(level, threads, here.data())) return false;
      if (!level && threads == 1) y = here;
      if (here != y) return false;
      calls++;
    }
  return true;
}
// What a value in y's type may differ from the exact one: `error` before it is rounded, and that rounding.
bool close(double value, double exact, double error, int64_t dtype) {
  const double unit = dtype == FLOAT32 ? 0 : dtype == FLOAT16 ? std::ldexp(1, -11) : std::ldexp(1, -8);
  return std::fabs(value - exact) <= error + unit * (std::fabs(exact) + error) + 1e-7;
}

bool integers(int64_t& calls) {
  for (const auto& s : std::vector<std::vector<int64_t>>{{1, 1, 1}, {5, 70, 13}, {131, 3, 64},
                                                          {7, 65, 200}, {0, 4, 8}, {4, 0, 8}}) {
    const int64_t M = s[0], N = s[1], K = s[2];
    std::vector<int8_t> a(size_t(M * K)), b(size_t(N * K));
    for (auto& v : a) v = int8_t(draw());
    for (auto& v : b) v = int8_t(draw());
    std::vector<uint8_t> y;
    if (!agree(size_t(M * N) * 4, y, calls, [&](int64_t level, int64_t threads, void* c) {
          return int8_matmul(level, threads, a.data(), b.data(), (int32_t*)c, M, N, K);
        }))
      return false;
    for (int64_t m = 0; m < M; m++)
      for (int64_t n = 0; n < N; n++) {
        int64_t sum = 0;
        for (int64_t k = 0; k < K; k++) sum += int64_t(a[size_t(m * K + k)]) * b[size_t(n * K + k)];
        if (((const int32_t*)y.data())[m * N + n] != sum) return false;
      }
  }
  return int8_matmul(0, 1, nullptr, nullptr, nullptr, 1, 1, 65537) == BAD_SHAPE;
}

bool transforms(int64_t& calls) {
  for (const int64_t m : {1, 4, 12, 20})
    for (const int64_t blocks : {1, 2, 8, 16, 64})
      for (const int64_t dtype : {FLOAT32, BFLOAT16, FLOAT16}) {
        const int64_t n = m * blocks, M = 3;
        std::vector<float> base(size_t(m * m));  // any signs will do: what makes a matrix Hadamard's is tested in Python
        for (auto& v : base) v = draw() % 2 ? 1.f : -1.f;
        const std::vector<uint8_t> x = stored(floats(M * n), dtype);
        std::vector<uint8_t> y;
        if (!agree(x.size(), y, calls, [&](int64_t level, int64_t threads, void* to) {
              return hadamard(level, threads, x.data(), dtype, m == 1 ? nullptr : base.data(), to, M, n, m, 0.5);
            }))
          return false;
        const std::vector<float> given = read_back(x, dtype), found = read_back(y, dtype);
        for (int64_t r = 0; r < M; r++)
          for (int64_t j = 0; j < n; j++) {
            double sum = 0, size = 0;
            for (int64_t i = 0; i < n; i++) {
              const double sign = __builtin_parityll(uint64_t(i / m & j / m)) ? -1 : 1;
              sum += given[size_t(r * n + i)] * sign * (m == 1 ? 1 : base[size_t(i % m * m + j % m)]) * 0.5;
              size += std::fabs(given[size_t(r * n + i)]) * 0.5;
            }
            if (!close(found[size_t(r * n + j)], sum, double(m + 8) * std::ldexp(1, -24) * size, dtype)) return false;
          }
      }
  const float x[6] = {};
  float y[6], base[36] = {};
  return hadamard(0, 1, x, FLOAT32, base, y, 1, 6, 1, 1) == BAD_SHAPE &&
         hadamard(0, 1, x, FLOAT32, base, y, 1, 6, 6, 1) == BAD_SHAPE;
}

bool factors(int64_t& calls) {
  const std::vector<std::vector<int64_t>> shapes{{1, 1, 1, 1, 1, 1}, {3, 70, 3, 37, 13, 5}, {17, 9, 2, 18, 32, 7},
                                                 {70, 5, 2, 5, 16, 3}, {6, 11, 1, 4, 8, 4}, {0, 3, 1, 4, 8, 2}, {3, 0, 1, 4, 8, 2}};
  for (const auto& s : shapes)
    for (const int64_t dtype : {FLOAT32, BFLOAT16, FLOAT16}) {
      const int64_t M = s[0], N = s[1], blocks = s[2], atoms = s[3], width = s[4], k = s[5];
      const auto x = stored(floats(M * blocks * width), dtype), dense = stored(floats(blocks * atoms * width), dtype);
      const auto value = stored(floats(N * blocks * k), dtype), bias = stored(floats(N), dtype);
      std::vector<uint16_t> index(size_t(N * blocks * k));
      for (auto& i : index) i = uint16_t(draw() % uint32_t(atoms));
      const auto call = [&](int64_t level, int64_t threads, void* y) {
        return linear_dense_sparse(level, threads, x.data(), dtype, dense.data(), dtype, index.data(), value.data(), dtype,
                                   bias.data(), dtype, y, M, N, blocks, atoms, width, k, nullptr, nullptr);
      };
      std::vector<uint8_t> y;
      if (!agree(size_t(M * N * dtype_bytes(dtype)), y, calls, call)) return false;
      const auto xs = read_back(x, dtype), ds = read_back(dense, dtype), vs = read_back(value, dtype), bs = read_back(bias, dtype);
      const auto found = read_back(y, dtype);
      for (int64_t r = 0; r < M; r++)
        for (int64_t n = 0; n < N; n++) {
          double sum = bs[size_t(n)], size = std::fabs(sum);
          for (int64_t b = 0; b < blocks; b++)
            for (int64_t t = 0; t < k; t++) {
              const int64_t at = (n * blocks + b) * k + t;
              for (int64_t c = 0; c < width; c++) {
                const double term = double(xs[size_t((r * blocks + b) * width + c)]) * vs[size_t(at)] *
                                    ds[size_t((b * atoms + index[size_t(at)]) * width + c)];
                sum += term, size += std::fabs(term);
              }
            }
          const double count = double((width + 15) / 16 + 5 + blocks * k);
          if (!close(found[size_t(r * N + n)], sum, count * std::ldexp(1, -24) * size, dtype)) return false;
        }
      // int8 factors times their scales have the bits of those products in float32
      std::vector<int8_t> atom_codes(ds.size()), value_codes(vs.size());
      for (auto& c : atom_codes) c = int8_t(int(draw() % 255) - 127);
      for (auto& c : value_codes) c = int8_t(int(draw() % 255) - 127);
      const std::vector<float> atom_scale = floats(blocks * atoms), value_scale = floats(N);
      std::vector<float> wide_atoms(ds.size()), wide_values(vs.size());
      for (size_t i = 0; i < ds.size(); i++) wide_atoms[i] = float(atom_codes[i]) * atom_scale[i / size_t(width)];
      for (size_t i = 0; i < vs.size(); i++) wide_values[i] = float(value_codes[i]) * value_scale[i / size_t(blocks * k)];
      const auto scaled = [&](int64_t level, int64_t threads, void* y) {
        return linear_dense_sparse(level, threads, x.data(), dtype, atom_codes.data(), FLOAT32, index.data(), value_codes.data(),
                                   FLOAT32, nullptr, 0, y, M, N, blocks, atoms, width, k, atom_scale.data(), value_scale.data());
      };
      const auto dequantized = [&](int64_t level, int64_t threads, void* y) {
        return linear_dense_sparse(level, threads, x.data(), dtype, wide_atoms.data(), FLOAT32, index.data(), wide_values.data(),
                                   FLOAT32, nullptr, 0, y, M, N, blocks, atoms, width, k, nullptr, nullptr);
      };
      std::vector<uint8_t> of_codes, of_floats;
      if (!agree(size_t(M * N * dtype_bytes(dtype)), of_codes, calls, scaled)) return false;
      if (!agree(size_t(M * N * dtype_bytes(dtype)), of_floats, calls, dequantized) || of_codes != of_floats) return false;
      if (index.empty()) continue;
      index.back() = uint16_t(atoms);
      std::vector<uint8_t> unused(size_t(M * N * dtype_bytes(dtype)) + 1);
      for (const int64_t level : levels_here())
        if (call(level, 1, unused.data()) != BAD_INDEX) return false;
    }
  return true;
}

bool products(int64_t& calls) {
  for (const auto& s : std::vector<std::vector<int64_t>>{{1, 1, 1}, {4, 6, 16}, {5, 7, 13}, {67, 9, 33}, {3, 13, 1045}, {6, 65, 64}, {0, 3, 8}, {3, 0, 8}, {2, 3, 0}})
    for (const int64_t dtype : {FLOAT32, BFLOAT16, FLOAT16})
      for (const int64_t bias_dtype : {FLOAT32, FLOAT16}) {
        const int64_t M = s[0], N = s[1], K = s[2];
        const auto x = stored(floats(M * K), dtype), weight = stored(floats(N * K), dtype), bias = stored(floats(N), bias_dtype);
        const bool biased = bias_dtype == FLOAT16 || K % 2;
        std::vector<uint8_t> y;
        if (!agree(size_t(M * N * dtype_bytes(dtype)), y, calls, [&](int64_t level, int64_t threads, void* to) {
              return linear_dense(level, threads, x.data(), weight.data(), dtype, biased ? bias.data() : nullptr, bias_dtype, to, M, N, K);
            }))
          return false;
        const auto xs = read_back(x, dtype), ws = read_back(weight, dtype), bs = read_back(bias, bias_dtype), found = read_back(y, dtype);
        for (int64_t m = 0; m < M; m++)
          for (int64_t n = 0; n < N; n++) {
            double sum = biased ? bs[size_t(n)] : 0, size = std::fabs(sum);
            for (int64_t k = 0; k < K; k++) {
              const double term = double(xs[size_t(m * K + k)]) * ws[size_t(n * K + k)];
              sum += term, size += std::fabs(term);
            }
            if (!close(found[size_t(m * N + n)], sum, double((K + 15) / 16 + 5) * std::ldexp(1, -24) * size, dtype)) return false;
          }
      }
  return linear_dense(0, 1, nullptr, nullptr, FLOAT32, nullptr, 0, nullptr, 1, 1, -1) == BAD_SHAPE;
}

bool roots(int64_t& calls) {
  for (const int64_t entries : {2, 257}) {
    const double step = 3 / double(entries - 1);
    std::vector<float> table(static_cast<size_t>(entries)), x(300);
    for (size_t i = 0; i < table.size(); i++) table[i] = float(1 / std::sqrt(1 + double(i) * step));
    for (size_t i = 0; i < x.size(); i++) x[i] = std::ldexp(number() + 3, int(i) - 150);
    std::vector<uint8_t> y;
    if (!agree(x.size() * 4, y, calls, [&](int64_t level, int64_t, void* to) {
          return table_inverse_root(level, x.data(), table.data(), (float*)to, int64_t(x.size()), entries, step, 1);
        }))
      return false;
    const std::vector<float> found = read_back(y, FLOAT32);
    for (size_t i = 0; i < x.size(); i++) {
      if (x[i] == 0) continue;
      const double exact = 1 / std::sqrt(double(x[i]));
      // a line between entries is above by step^2 / 8 * 3 / 4 of it at most; of two entries, by less than a half
      const double error = std::fmin(0.5, step * step * 3 / 32) + 1e-6;
      if (!(std::fabs(found[i] - exact) <= error * exact)) return false;
    }
  }
  const float special[5] = {0, INFINITY, -1, NAN, 1}, one[2] = {1, 0.5f};
  float y[5];
  if (table_inverse_root(levels_here().back(), special, one, y, 5, 2, 3, 1) != OK) return false;
  return y[0] == INFINITY && y[1] == 0 && std::isnan(y[2]) && std::isnan(y[3]) && y[4] == 1 &&
         table_inverse_root(0, special, one, y, 5, 1, 3, 1) == BAD_SHAPE;
}

bool tables(int64_t& calls) {
  for (const int64_t entries : {2, 3, 256})
    for (const int64_t linear : {0, 1})
      for (const int64_t dtype : {FLOAT32, BFLOAT16, FLOAT16}) {
        const std::vector<float> table = floats(entries);
        const float low = -1, step = 0.125f, slope = entries == 2 ? 0 : 0.75f;
        std::vector<float> values(613);
        for (auto& v : values) v = low + step * float(entries) * number();
        values[0] = NAN, values[1] = INFINITY, values[2] = -INFINITY, values.back() = low + step * float(entries - 1);
        const std::vector<uint8_t> x = stored(values, dtype);
        std::vector<uint8_t> y;
        if (!agree(x.size(), y, calls, [&](int64_t level, int64_t threads, void* to) {
              const int64_t count = int64_t(values.size());
              return table_lookup(level, threads, x.data(), dtype, table.data(), to, count, entries, low, step, linear, slope, -slope);
            }))
          return false;
        const std::vector<float> given = read_back(x, dtype), found = read_back(y, dtype);
        for (size_t i = 1; i < given.size(); i++) {
          const double place = std::fmin(std::fmax((double(given[i]) - low) / step, 0), double(entries - 1));
          const int64_t left = std::min(int64_t(place), entries - 2);
          const double start = table[size_t(left)], end = table[size_t(left + 1)];
          const double line = start + (place - double(left)) * (end - start);
          const double high = low + step * double(entries - 1);
          const double beyond = std::fmax(low - double(given[i]), double(given[i]) - high);
          const double straight = slope != 0 && beyond > 0 ? slope * beyond : 0;
          if (std::isinf(straight)) {
            if (found[i] != -straight) return false;
            continue;
          }
          const double exact = (linear ? line : table[size_t(std::nearbyint(place))]) - straight;
          // (x - low) / step has two roundings, and an entry differs by 4 at most from its neighbour; then three of 2
          const double inside = linear ? (place * 2 * 4 + 6 + 8) * std::ldexp(1, -24) : 0;
          const double error = inside + 3 * std::ldexp(straight + 2, -24);  // beyond: difference, product and sum are rounded
          const bool halfway = !linear && std::fabs(place - std::floor(place) - 0.5) < 1e-4;
          if (!halfway && !close(found[i], exact, error, dtype)) return false;
        }
        if (!std::isnan(found[0])) return false;
      }
  float one[1] = {}, y[1];
  return table_lookup(0, 1, one, FLOAT32, one, y, 1, 1, 0, 1, 1, 0, 0) == BAD_SHAPE &&
         table_lookup(0, 1, one, FLOAT32, one, y, 1, 2, 0, 0, 1, 0, 0) == BAD_SHAPE;
}

// Columns of GPTQ have the bits of this loop, one row and column after the other. Nothing is read of the factor below its diagonal
// and beyond the rows of [begin, stop), nor the groups of other columns; what work holds of rounded columns isn't compared.
bool columns(int64_t& calls) {
  const int64_t groups = 3;
  const std::vector<std::vector<int64_t>> ranges{{0, 1, 1}, {0, 5, 5}, {2, 3, 5}, {4, 4, 5}, {0, 32, 32}, {7, 18, 32}, {0, 37, 37}, {5, 30, 37}, {36, 37, 37}};
  for (const int64_t rows : {0, 1, 5, 63, 64, 65, 130})
    for (const auto& range : ranges)
      for (const bool symmetric : {true, false}) {
        const int64_t begin = range[0], stop = range[1], end = range[2], count = rows * end;
        const float low = symmetric ? -8 : 0, high = symmetric ? 7 : 15;
        std::vector<float> work = floats(count), scale = floats(groups * rows), zero(scale.size()), upper(size_t(end * end), NAN);
        std::vector<int64_t> group_of(size_t(end), groups);
        for (auto& v : scale) v = 0.2f + 0.05f * v;
        for (auto& v : zero) v = float(draw() % 16);
        for (int64_t j = begin; j < stop; j++) {
          for (int64_t i = j; i < end; i++) upper[size_t(j * end + i)] = i == j ? 1 + 0.25f * number() : 0.05f * number();
          group_of[size_t(j)] = int64_t(draw() % groups);
          for (int64_t r = 0; r < rows; r += 3)  // halfway between two codes
            work[size_t(j * rows + r)] = (float(int(draw() % 16) - 8) + 0.5f) * scale[size_t(group_of[size_t(j)] * rows + r)];
        }
        std::vector<uint8_t> y;
        if (!agree(size_t(3 * count) * 4, y, calls, [&](int64_t level, int64_t threads, void* to) {
              std::vector<float> left = work, errors(work.size(), -1.f), codes(work.size(), -1.f);
              const int64_t failed = gptq_solve(level, threads, left.data(), errors.data(), codes.data(), upper.data(), scale.data(),
                                                symmetric ? nullptr : zero.data(), group_of.data(), rows, groups, begin, stop, end, low, high);
              std::fill(left.begin() + begin * rows, left.begin() + stop * rows, 0.f);
              float* at = std::copy(left.begin(), left.end(), (float*)to);
              std::copy(codes.begin(), codes.end(), std::copy(errors.begin(), errors.end(), at));
              return failed;
            }, {1, 2, 5}))
          return false;
        std::vector<float> left = work, errors(work.size(), -1.f), codes(work.size(), -1.f);
        for (int64_t j = begin; j < stop; j++)
          for (int64_t r = 0; r < rows; r++) {
            const size_t at = size_t(j * rows + r), of = size_t(group_of[size_t(j)] * rows + r);
            float code = std::nearbyint(left[at] / scale[of]);
            if (!symmetric) code += zero[of];
            codes[at] = code < low ? low : code > high ? high : code;
            const float value = (symmetric ? codes[at] : codes[at] - zero[of]) * scale[of];
            errors[at] = (left[at] - value) / upper[size_t(j * end + j)];
            for (int64_t i = j + 1; i < end; i++) left[size_t(i * rows + r)] -= errors[at] * upper[size_t(j * end + i)];
          }
        std::fill(left.begin() + begin * rows, left.begin() + stop * rows, 0.f);
        std::vector<float> wanted = left;
        wanted.insert(wanted.end(), errors.begin(), errors.end());
        wanted.insert(wanted.end(), codes.begin(), codes.end());
        if (y != stored(wanted, FLOAT32)) return false;
      }
  const std::vector<std::vector<int64_t>> bad{{-1, 0, 0, 2}, {1, -1, 1, 2}, {1, 2, 1, 2}, {1, 0, 3, 2}, {1, 3, 3, 2}, {1, 0, 0, 65537}};
  for (const auto& b : bad)  // rows, begin, stop, end
    if (gptq_solve(0, 1, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, b[0], 1, b[1], b[2], b[3], 0, 1) != BAD_SHAPE) return false;
  for (const int64_t group : {int64_t(-1), groups, INT64_MAX}) {
    const int64_t group_of[2] = {0, group};
    if (gptq_solve(0, 1, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, group_of, 1, groups, 0, 2, 2, 0, 1) != BAD_SHAPE) return false;
  }
  return gptq_solve(AMX + 1, 1, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 1, 1, 0, 0, 0, 0, 1) == BAD_LEVEL;
}

struct Grid { float scale, zero; };
// Scale and zero point of a range, and the scale as it is stored.
float stored_scale(float scale, int64_t dtype) {
  const float least = dtype == FLOAT16 ? std::ldexp(1.f, -24) : std::ldexp(1.f, -126), normal = dtype == FLOAT16 ? std::ldexp(1.f, -14) : least;
  if (scale < normal) return std::max(least, std::ceil(scale / least) * least);
  return read_back(stored({scale}, dtype), dtype)[0];
}
Grid grid_of(float low, float high, int64_t bits, bool symmetric, int64_t dtype) {
  const float levels = float((1 << bits) - 1), half = float(1 << (bits - 1)), spread = symmetric ? 2 * std::max(-low, high) : high - low;
  if (spread == 0) return {1, 0};
  const float scale = stored_scale(spread / levels, dtype), below = symmetric ? half : std::min(std::max(std::nearbyint(-low / scale), 0.f), levels);
  const double largest = dtype == FLOAT16 ? 65504 : from_bits(dtype == BFLOAT16 ? 0x7f7f0000 : 0x7f7fffff);
  const double place = std::ldexp(1, dtype == FLOAT16 ? -10 : dtype == BFLOAT16 ? -7 : -23);
  const float most = 1 / std::max(below, levels - below) * float(largest * (1 - place));
  return {scale > most ? stored_scale(most, dtype) : scale, below - half};
}
double error_of(const float* w, const float* importance, int64_t size, const Grid& grid, int64_t bits) {
  double error = 0;
  for (int64_t k = 0; k < size; k++) {
    const float code = std::nearbyint(w[k] / grid.scale) + grid.zero, half = float(1 << (bits - 1));
    const double e = std::fabs((double(std::min(std::max(code, -half), half - 1)) - grid.zero) * grid.scale - w[k]);
    error += importance ? e * e * importance[k] : std::pow(e, 2.4);
  }
  return error;
}
// The error is that of an obvious search, except for rounding, and the scale one of those that it tries.
bool scales(int64_t& calls) {
  const double coarse = 0.06, fine = 0.02;
  for (const auto& s : std::vector<std::vector<int64_t>>{{1, 1, 1}, {3, 2, 16}, {5, 3, 13}, {2, 3, 128}, {3, 1, 201}, {0, 2, 8}, {2, 0, 8}})
    for (const int64_t bits : {2, 3, 4, 8})
      for (const bool symmetric : {true, false})
        for (const int64_t dtype : {FLOAT32, BFLOAT16, FLOAT16})
          for (const int64_t steps : {-1, 10}) {
            const int64_t rows = s[0], groups = s[1], size = s[2];
            const bool weighted = bits % 2 && steps > 0;
            std::vector<float> weight = floats(rows * groups * size), importance = floats(groups * size);
            for (auto& h : importance) h *= h;
            if (groups == 3) std::fill(importance.end() - size, importance.end(), 0.f);  // of equal errors the larger scale
            for (size_t i = 0; i < weight.size(); i++) weight[i] = std::ldexp(weight[i] * weight[i] * weight[i], i % 2 ? -3 : -4);
            if (groups == 3)
              for (int64_t k = 0; k < size; k++) {
                weight[size_t(k)] = 0;                                                                // a group of 0
                weight[size_t(size + k)] = std::ldexp(weight[size_t(size + k)], -17);                 // subnormal scales in float16
                weight[size_t(groups * size + k)] = std::fabs(weight[size_t(groups * size + k)]);     // a group without negative weights
                weight[size_t((groups + 1) * size + k)] = k % 2 ? 65504.f : -65504.f;                 // float16's largest
              }
            std::vector<uint8_t> y;
            if (!agree(size_t(2 * rows * groups) * 4, y, calls, [&](int64_t level, int64_t threads, void* to) {
                  float* scale = (float*)to;
                  return scale_search(level, threads, weight.data(), weighted ? importance.data() : nullptr, scale, scale + rows * groups, rows,
                                      groups, size, bits, symmetric, dtype, coarse, fine, steps);
                }))
              return false;
            for (int64_t i = 0; i < rows * groups; i++) {
              const float* w = weight.data() + i * size;
              const float* h = weighted ? importance.data() + i % groups * size : nullptr;
              const float low = std::min(0.f, *std::min_element(w, w + size)), high = std::max(0.f, *std::max_element(w, w + size));
              std::vector<float> factors{1};
              float best = 1;
              const auto error = [&](float factor) { return error_of(w, h, size, grid_of(low * factor, high * factor, bits, symmetric, dtype), bits); };
              for (int64_t step = 1; step <= steps; step++) factors.push_back(float(1 - double(step) * coarse));
              for (const float factor : factors) best = error(factor) < error(best) ? factor : best;
              if (steps > 0)
                for (const int step : {-2, -1, 1, 2}) factors.push_back(std::min(std::max(best + float(step * fine), 0.4f), 1.f));
              for (const float factor : factors) best = error(factor) < error(best) ? factor : best;
              const Grid found{((const float*)y.data())[i], ((const float*)y.data())[rows * groups + i]};
              bool tried = false;
              for (const float factor : factors) {
                const Grid grid = grid_of(low * factor, high * factor, bits, symmetric, dtype);
                tried = tried || (grid.scale == found.scale && grid.zero == found.zero);
              }
              const Grid extremes = grid_of(low, high, bits, symmetric, dtype);
              if (weighted && groups == 3 && i % groups == 2 && (found.scale != extremes.scale || found.zero != extremes.zero)) return false;
              if (!tried || !(error_of(w, h, size, found, bits) <= error(best) * 1.00001 + 1e-30)) return false;
            }
          }
  float x[8] = {}, y[8];
  return scale_search(0, 1, x, nullptr, y, y, 1, 1, 0, 4, 1, 0, coarse, fine, 10) == BAD_SHAPE &&
         scale_search(0, 1, x, nullptr, y, y, 1, 1, 8, 9, 1, 0, coarse, fine, 10) == BAD_SHAPE &&
         scale_search(0, 1, x, nullptr, y, y, 1, 1, 8, 4, 1, 3, coarse, fine, 10) == BAD_DTYPE &&
         scale_search(AMX + 1, 1, x, nullptr, y, y, 1, 1, 8, 4, 1, 0, coarse, fine, 10) == BAD_LEVEL;
}

// Second moments within the bound of a sum in float32; entries below the diagonal and beyond the columns stay.
bool moments(int64_t& calls) {
  for (const auto& s : std::vector<std::vector<int64_t>>{{1, 1, 1}, {7, 5, 9}, {34, 100, 100}, {259, 50, 51}, {5, 250, 251}, {3, 490, 490}, {0, 3, 3}, {4, 0, 0}})
    for (const double keep : {0., 0.5}) {
      const int64_t tokens = s[0], columns = s[1], stride = s[2], pairs = (tokens + 1) / 2;
      const std::vector<uint8_t> x = stored(floats(tokens * columns), BFLOAT16);
      std::vector<float> before(size_t(columns * stride), keep == 0 ? NAN : 3.f);
      std::vector<uint8_t> y;
      if (!agree(before.size() * 4, y, calls, [&](int64_t level, int64_t threads, void* to) {
            std::vector<uint32_t> packed(size_t((columns + 47) / 48 * 48 * pairs), 0x7fc07fc0u);
            std::copy(before.begin(), before.end(), (float*)to);
            return second_moments(level, threads, (const uint16_t*)x.data(), packed.data(), (float*)to, tokens, columns, stride, keep, 0.25);
          }))
        return false;
      const std::vector<float> values = read_back(x, BFLOAT16), found = read_back(y, FLOAT32);
      for (int64_t i = 0; i < columns; i++)
        for (int64_t j = 0; j < stride; j++) {
          const size_t at = size_t(i * stride + j);
          if (j < i || j >= columns) {
            if (keep == 0 ? !std::isnan(found[at]) : found[at] != 3) return false;
            continue;
          }
          double sum = keep * 3, size = sum;
          for (int64_t t = 0; t < tokens; t++) {
            const double term = 0.25 * values[size_t(t * columns + i)] * values[size_t(t * columns + j)];
            sum += term, size += std::fabs(term);
          }
          if (!close(found[at], sum, double(tokens + 3) * std::ldexp(1, -24) * size, FLOAT32)) return false;
        }
    }
  return second_moments(0, 1, nullptr, nullptr, nullptr, 1, 3, 2, 1, 1) == BAD_SHAPE && second_moments(AMX + 1, 1, nullptr, nullptr, nullptr, 1, 0, 0, 1, 1) == BAD_LEVEL;
}

// A number as it is stored, and back.
float kept(float value, int64_t dtype) { return read_back(stored({value}, dtype), dtype)[0]; }

// Norms of whole numbers, whose squares have exact sums in any order, have the bits of this formula; those of others are within its bound.
bool norms(int64_t& calls) {
  for (const auto& s : std::vector<std::vector<int64_t>>{{1, 1}, {3, 5}, {2, 16}, {4, 70}, {3, 259}, {130, 100}, {0, 8}})
    for (const int64_t dtype : {FLOAT32, BFLOAT16})
      for (const int form : {0, 1, 2, 3}) {
        const int64_t M = s[0], K = s[1], rounds = form % 2;
        const bool whole = form < 2;
        const double eps = 1e-3, offset = form == 2;
        std::vector<float> values = floats(M * K);
        for (auto& v : values) v = whole ? float(int(draw() % 9) - 4) : v;
        const auto x = stored(values, dtype), weight = stored(floats(K), dtype);
        std::vector<uint8_t> y;
        if (!agree(x.size(), y, calls, [&](int64_t level, int64_t threads, void* to) {
              return rms_norm(level, threads, x.data(), dtype, weight.data(), to, M, K, eps, offset, rounds);
            }))
          return false;
        const auto xs = read_back(x, dtype), ws = read_back(weight, dtype), found = read_back(y, dtype);
        for (int64_t m = 0; m < M; m++) {
          double sum = 0;
          for (int64_t k = 0; k < K; k++) sum += double(xs[size_t(m * K + k)]) * xs[size_t(m * K + k)];
          const float factor = 1 / std::sqrt(float(sum) / float(K) + float(eps));
          for (int64_t k = 0; k < K; k++) {
            const float value = xs[size_t(m * K + k)] * factor, gain = float(offset) + ws[size_t(k)], result = found[size_t(m * K + k)];
            const float expected = kept((rounds ? kept(value, dtype) : value) * gain, dtype);
            const double unit = std::ldexp(1, dtype == FLOAT32 ? -20 : -6);
            if (whole ? to_bits(expected) != to_bits(result) : std::fabs(expected - result) > unit * std::fabs(expected)) return false;
          }
        }
      }
  return rms_norm(0, 1, nullptr, FLOAT32, nullptr, nullptr, 1, 0, 0, 0, 0) == BAD_SHAPE &&
         rms_norm(0, 1, nullptr, FLOAT16, nullptr, nullptr, 1, 1, 0, 0, 0) == BAD_DTYPE &&
         rms_norm(AMX + 1, 1, nullptr, FLOAT32, nullptr, nullptr, 1, 1, 0, 0, 0) == BAD_LEVEL;
}

bool gates(int64_t& calls) {
  for (const int64_t count : {1, 5, 16, 100, 8192 + 37})
    for (const int64_t dtype : {FLOAT32, BFLOAT16}) {
      std::vector<float> values = floats(count), others = floats(count);
      for (int64_t k = 0; k < count; k++) values[size_t(k)] *= k % 3 ? 2.f : 40.f;
      const float special[] = {NAN, INFINITY, -INFINITY, 0.f, -0.f, 87.f, -87.f, 104.f, -200.f};
      for (int64_t k = 0; k < count && k < 9; k++) values[size_t(k)] = special[k];
      const auto gate = stored(values, dtype), up = stored(others, dtype);
      std::vector<uint8_t> y;
      if (!agree(gate.size(), y, calls, [&](int64_t level, int64_t threads, void* to) {
            return silu_product(level, threads, gate.data(), up.data(), dtype, to, count);
          }))
        return false;
      const auto gs = read_back(gate, dtype), us = read_back(up, dtype), found = read_back(y, dtype);
      for (int64_t k = 0; k < count; k++) {
        const float result = found[size_t(k)];
        const double exact = gs[size_t(k)] / (1 + std::exp(-double(gs[size_t(k)])));
        if (std::isnan(exact) || std::isinf(exact)) {
          if (std::isnan(exact) != std::isnan(result) || std::isfinite(result)) return false;
          continue;
        }
        bool is_close = std::fabs(result - exact * us[size_t(k)]) <= 6 * std::ldexp(std::fabs(exact * us[size_t(k)]), -24) + 1e-37;
        for (const int step : {-4, 0, 4})  // silu before it is rounded
          is_close = is_close || result == kept(kept(float(exact * (1 + std::ldexp(step, -24))), dtype) * us[size_t(k)], dtype);
        if (!is_close) return false;
      }
    }
  return silu_product(0, 1, nullptr, nullptr, FLOAT32, nullptr, -1) == BAD_SHAPE && silu_product(0, 1, nullptr, nullptr, FLOAT16, nullptr, 0) == BAD_DTYPE &&
         silu_product(AMX + 1, 1, nullptr, nullptr, FLOAT32, nullptr, 0) == BAD_LEVEL;
}

// Rotations have the bits of products that are rounded and then added.
bool rotations(int64_t& calls) {
  for (const auto& s : std::vector<std::vector<int64_t>>{{1, 1, 1, 2}, {2, 3, 2, 10}, {1, 5, 3, 64}, {3, 1, 4, 34}, {2, 2, 2, 96}, {0, 1, 1, 4}})
    for (const int64_t dtype : {FLOAT32, BFLOAT16})
      for (const bool shared : {true, false}) {
        const int64_t sequences = s[0], tokens = s[1], heads = s[2], width = s[3], stride = shared ? 0 : tokens;
        const int64_t angles = (shared ? 1 : sequences) * tokens * width;
        const auto x = stored(floats(sequences * tokens * heads * width), dtype), cos = stored(floats(angles), dtype), sin = stored(floats(angles), dtype);
        std::vector<uint8_t> y;
        if (!agree(x.size(), y, calls, [&](int64_t level, int64_t threads, void* to) {
              return rotate_halves(level, threads, x.data(), dtype, cos.data(), sin.data(), to, sequences, tokens, heads, width, stride);
            }))
          return false;
        const auto xs = read_back(x, dtype), cs = read_back(cos, dtype), ss = read_back(sin, dtype);
        std::vector<float> wanted(xs.size());
        for (int64_t b = 0; b < sequences; b++)
          for (int64_t t = 0; t < tokens; t++)
            for (int64_t h = 0; h < heads; h++)
              for (int64_t d = 0; d < width; d++) {
                const int64_t from = ((b * tokens + t) * heads + h) * width, angle = (b * stride + t) * width + d, half = width / 2;
                const float other = d < half ? -xs[size_t(from + d + half)] : xs[size_t(from + d - half)];
                const float straight = kept(xs[size_t(from + d)] * cs[size_t(angle)], dtype), crossed = kept(other * ss[size_t(angle)], dtype);
                wanted[size_t(((b * heads + h) * tokens + t) * width + d)] = straight + crossed;
              }
        if (y != stored(wanted, dtype)) return false;
      }
  return rotate_halves(0, 1, nullptr, FLOAT32, nullptr, nullptr, nullptr, 0, 1, 1, 3, 0) == BAD_SHAPE &&
         rotate_halves(0, 1, nullptr, FLOAT32, nullptr, nullptr, nullptr, 0, 1, 1, 4, 2) == BAD_SHAPE &&
         rotate_halves(0, 1, nullptr, FLOAT16, nullptr, nullptr, nullptr, 0, 1, 1, 4, 0) == BAD_DTYPE &&
         rotate_halves(AMX + 1, 1, nullptr, FLOAT32, nullptr, nullptr, nullptr, 0, 1, 1, 4, 0) == BAD_LEVEL;
}

// Numbers to 16 bits and back at every level: the bits of the scalar ones, NaN a NaN.
bool conversions(int64_t& calls) {
  std::vector<float> values;
  for (const uint32_t high : {0x0000u, 0x0001u, 0x007fu, 0x0080u, 0x3f80u, 0x3f81u, 0x4780u, 0x7f7fu, 0x7f80u, 0x7fbfu, 0xff80u, 0xffc0u, 0xbf81u})
    for (const uint32_t low : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) values.push_back(from_bits(high << 16 | low));
  const int64_t count = int64_t(values.size());
  for (const int64_t level : levels_here())
    for (const int64_t dtype : {FLOAT32, BFLOAT16, FLOAT16})
      for (int64_t from = 0; from < 9; from++, calls++) {
        const std::vector<uint8_t> wanted = stored(values, dtype);
        std::vector<uint8_t> found(wanted.size(), 0xff);
        from_float(level, values.data(), found.data(), dtype, 0, from);
        from_float(level, values.data() + from, found.data(), dtype, from, count - from);
        std::vector<float> back(values.size());
        to_float(level, found.data(), dtype, 0, back.data(), from);
        to_float(level, found.data(), dtype, from, back.data() + from, count - from);
        const std::vector<float> same = read_back(wanted, dtype);
        for (int64_t i = 0; i < count; i++) {
          if (std::isnan(values[size_t(i)]) ? !std::isnan(back[size_t(i)]) : to_bits(back[size_t(i)]) != to_bits(same[size_t(i)])) return false;
        }
      }
  return true;
}

}  // namespace

// 0, or the number of the first that is wrong
int check_ops(int64_t& calls, const std::string& name) {
  struct Check {
    const char* name;
    bool (*passes)(int64_t&);
  };
  const Check checks[] = {{"integers", integers}, {"transforms", transforms}, {"factors", factors}, {"tables", tables},
                          {"roots", roots}, {"conversions", conversions}, {"products", products}, {"columns", columns},
                          {"scales", scales}, {"moments", moments}, {"norms", norms}, {"gates", gates},
                          {"rotations", rotations}};
  int code = 20;
  const bool is_all = name == "operations";
  bool is_known = is_all;
  for (const Check& check : checks) {
    if (is_all || name == check.name) {
      is_known = true;
      if (!check.passes(calls)) return code;
    }
    code++;
  }
  if (!is_known) std::abort();
  return 0;
}
