// Every op on odd shapes with buffers of exactly the right size, at every level, for a build with sanitizers. Prints the
// number of calls; a difference between levels, or what a sanitizer finds, ends it with another exit code than 0.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "../../compressor/kernels/cpu/common.h"
#include "../../compressor/kernels/cpu/ops.h"

using namespace compressor;

int check_ops(int64_t& calls, const std::string& name);  // kernels_check_ops.cpp
int check_threads();  // kernels_check_threads.cpp; gives the library the threads with which all else is checked
std::vector<int64_t> levels_here();
extern std::string levels_asked;

// Code without the registers of its level is slow.
static bool is_plain(int64_t level) {
#ifdef AVX512_EMULATED
  if (level >= AVX512VNNI) return true;
#endif
  return level == SCALAR;
}

// Another call in between, so that memory that is kept from call to call holds something else each time.
static void disturb(std::mt19937& random) {
  static std::vector<float> x(size_t(8 * 4096));
  static std::vector<uint8_t> packed, codes(4096);
  float scale = 1, y[8];
  uint32_t drawn = random();
  for (auto& v : x) v = float((drawn = drawn * 1664525 + 1013904223) >> 22) - 500;  // many, so from a quick generator
  packed.resize(size_t(packed_bytes(1, 4096, 4, 4096, FLOAT32)));
  pack_weight(1, codes.data(), &scale, nullptr, packed.data(), 1, 4096, 4, 4096, FLOAT32);
  linear_dynamic_int8(level_is_there(AVX2), 1, x.data(), FLOAT32, packed.data(), int64_t(packed.size()), nullptr, 0, y, 8, 1, 4096, 4, 4096);
  const int64_t bytes = packed_bytes(1, 512, 4, 512, FLOAT32);
  pack_weight(1, codes.data(), &scale, nullptr, packed.data(), 1, 512, 4, 512, FLOAT32);
  linear_weight_only(level_is_there(AVX2), 1, x.data(), FLOAT32, packed.data(), bytes, nullptr, 0, y, 8, 1, 512, 4, 512);  // as floats
}

// The first argument says what is checked: "linear" and widths of weights (all without any), as in linear48, the linear
// layers; "threads" how tasks are shared out; "operations" all of kernels_check_ops.cpp, and other names one of them. A
// second one has the digits of the levels that are compared, as in "02": scalar code and AVX-512 without VNNI.
int main(int count, char** arguments) {
  if (count < 2) return 11;
  if (count > 2) levels_asked = arguments[2];
  const std::string name = arguments[1];
  int64_t calls = 0;
  const bool is_linear = name.substr(0, 6) == "linear";
  if (const int wrong = is_linear || name == "threads" ? check_threads() : check_ops(calls, name)) return wrong;
  if (!is_linear) {
    printf("%lld calls\n", (long long)calls);
    return 0;
  }
  const std::string widths = name.substr(6);
  std::mt19937 random(1);
  const int64_t shapes[][4] = {{1, 64, 64, 64}, {3, 70, 192, 32}, {6, 130, 328, 64}, {2, 5, 13, 8}, {2, 1, 13, 16},
                               {9, 65, 320, 320}, {5, 8, 1, 8}, {0, 3, 8, 8}, {3, 0, 8, 8}, {130, 3, 24, 24}, {45, 66, 40, 24}, {4, 64, 600, 296},
                               {37, 9, 320, 128}, {20, 64, 200, 96}, {33, 66, 328, 64}, {10, 60, 584, 584}, {17, 49, 576, 576}, {5, 17, 4168, 4168}, {7, 9, 4232, 4232}};
  for (const auto& s : shapes)
    for (const int64_t bits : {2, 3, 4, 8}) {
      if (!widths.empty() && widths.find(char('0' + bits)) == std::string::npos) continue;
      for (const int64_t dtype : {FLOAT32, BFLOAT16, FLOAT16}) {
        const int64_t M = s[0], N = s[1], K = s[2], group = s[3], G = (K + group - 1) / group, size = dtype_bytes(dtype);
        std::vector<uint8_t> codes(size_t(N * K)), zeros(size_t(N * G));
        for (auto& c : codes) c = uint8_t(random() % (1u << bits));
        for (auto& z : zeros) z = uint8_t(random() % (dtype == FLOAT16 ? 256 : 1u << bits));  // beyond the codes too
        auto numbers = [&](int64_t count, float low, float high) {
          std::vector<uint8_t> data(size_t(count * size));
          for (int64_t i = 0; i < count; i++) store_number(data.data(), dtype, i, low + (high - low) * float(random() % 1000) / 1000);
          return data;
        };
        const auto scale = numbers(N * G, 0.01f, 0.03f), x = numbers(M * K, -2, 2), bias = numbers(N, -1, 1);
        std::vector<uint8_t> packed(size_t(packed_bytes(N, K, bits, group, dtype)));
        if (pack_weight(2, codes.data(), scale.data(), zeros.data(), packed.data(), N, K, bits, group, dtype)) return 2;
        std::vector<uint8_t> again(codes.size()), zeros_again(zeros.size());
        std::vector<float> scale_again(size_t(N * G));
        if (unpack_weight(1, packed.data(), int64_t(packed.size()), N, K, bits, group, again.data(), scale_again.data(), zeros_again.data())) return 3;
        if (again != codes || zeros_again != zeros) return 4;
        for (const bool rounded : {false, true}) {
          std::vector<uint8_t> first[2];
          for (const int64_t level : levels_here())
            for (const int64_t threads : {1, 2}) {
              if (threads == 2 && (level == AVX2 || (is_plain(level) && M * N * K > 1 << 16))) continue;
              std::vector<uint8_t> y(size_t(M * N * size), 0xff);
              disturb(random);
              if ((rounded ? linear_dynamic_int8 : linear_weight_only)(level, threads, x.data(), dtype, packed.data(), int64_t(packed.size()),
                                                                       bias.data(), dtype, y.data(), M, N, K, bits, group)) return 5;
              // many rows that are not rounded are multiplied otherwise with VNNI
              std::vector<uint8_t>& same = first[!rounded && level >= AVXVNNI && M >= (dtype == FLOAT32 ? 6 : 12)];
              if (same.empty()) same = y;
              if (y != same) return 6;
              calls++;
            }
        }
        if (bits == 8 && group == (K + 7) / 8 * 8) {
          const std::vector<float> absmax(size_t(N), 1.f);
          const std::vector<int64_t> columns{0, K - 1};
          const auto stored = numbers(N * 2, -1, 1);
          for (const bool calibrated : {false, true}) {
            std::vector<uint8_t> first;
            for (const int64_t level : levels_here()) {
              std::vector<uint8_t> y(size_t(M * N * size), 0xff);
              if (linear_int8_outlier(level, 2, x.data(), dtype, packed.data(), int64_t(packed.size()), absmax.data(),
                                      calibrated ? columns.data() : nullptr, calibrated ? 2 : 0, calibrated ? stored.data() : nullptr, dtype,
                                      bias.data(), dtype, y.data(), M, N, K, 1.9)) return 7;
              if (first.empty()) first = y;
              if (y != first) return 10;
              calls++;
            }
          }
        }
      }
    }
  // Damaged or foreign packed tensors are refused before anything else is read.
  std::vector<uint8_t> short_one(63), foreign(64 * 200, 7);
  float x[8] = {}, y[8];
  if (!linear_weight_only(0, 1, x, FLOAT32, short_one.data(), 63, nullptr, 0, y, 1, 8, 8, 4, 8)) return 8;
  if (!linear_weight_only(0, 1, x, FLOAT32, foreign.data(), int64_t(foreign.size()), nullptr, 0, y, 1, 8, 8, 4, 8)) return 9;
  printf("%lld calls\n", (long long)calls);
  return 0;
}
