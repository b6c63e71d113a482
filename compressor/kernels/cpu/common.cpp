#include "common.h"

#include <algorithm>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include "amx.h"
#include "ops.h"

namespace compressor {

// The result of cpuid is cached: a virtual machine takes microseconds for it.
#if defined(COMPRESSOR_AVXVNNI) && !defined(AVXVNNI_EMULATED)
static bool avxvnni_is_there() {
  static const bool there = [] {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
  }();
  return there;
}
#endif
#if defined(COMPRESSOR_AMX) && !defined(AMX_EMULATED)
// The processor has it, and Linux lets this process use it.
static bool ask_for_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 24 & 3) != 3) return false;  // amx-tile, amx-int8
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
static bool amx_is_there() {
  static const bool there = ask_for_amx();
  return there;
}
#endif

bool level_is_there(int64_t level) {
  if (level == SCALAR) return true;
#ifdef COMPRESSOR_X86  // __builtin_cpu_supports also asks whether the operating system saves the registers
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (level == AVX2) return avx2;
#ifdef AVXVNNI_EMULATED
  if (level == AVXVNNI) return avx2;
#elif defined(COMPRESSOR_AVXVNNI)
  if (level == AVXVNNI) return avx2 && avxvnni_is_there();
#endif
#ifdef AVX512_EMULATED
  if (level == AVX512VNNI) return avx2;
#endif
  if (level == AVX512VNNI)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
#ifdef AMX_EMULATED
  if (level == AMX) return level_is_there(AVX512VNNI);
#elif defined(COMPRESSOR_AMX)
  if (level == AMX) return level_is_there(AVX512VNNI) && amx_is_there();
#endif
#endif
  return false;
}

// ---- conversions ----
#ifdef COMPRESSOR_X86
TARGET_AVX2 static void halves_to_float(const uint16_t* in, float* out, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(in + i))));
  for (; i < count; i++) out[i] = half_to_float(in[i]);
}
TARGET_AVX2 static void floats_to_half(const float* in, uint16_t* out, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) _mm_storeu_si128((__m128i*)(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), 0));
  for (; i < count; i++) out[i] = float_to_half(in[i]);
}
TARGET_AVX2 static void bfloats_to_float(const uint16_t* in, float* out, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_si256((__m256i*)(out + i), _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(in + i))), 16));
  for (; i < count; i++) out[i] = bfloat16_to_float(in[i]);
}
TARGET_AVX2 static void floats_to_bfloat16(const float* in, uint16_t* out, int64_t count) {
  const __m256i below_half = _mm256_set1_epi32(0x7fff), one = _mm256_set1_epi32(1), quiet = _mm256_set1_epi32(0x40);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256 value = _mm256_loadu_ps(in + i);
    const __m256i bits = _mm256_castps_si256(value), high = _mm256_srli_epi32(bits, 16);
    const __m256i even = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, below_half), _mm256_and_si256(high, one)), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const __m256i found = _mm256_blendv_epi8(even, _mm256_or_si256(high, quiet), nan);
    _mm_storeu_si128((__m128i*)(out + i), _mm_packus_epi32(_mm256_castsi256_si128(found), _mm256_extracti128_si256(found, 1)));
  }
  for (; i < count; i++) out[i] = float_to_bfloat16(in[i]);
}
TARGET_AVX2 static void add_avx2(float* values, const float* more, int64_t count) {
  for (int64_t i = 0; i < count; i++) values[i] += more[i];
}
#endif
void to_float(int64_t level, const void* data, int64_t dtype, int64_t offset, float* out, int64_t count) {
  if (dtype == FLOAT32) { memcpy(out, (const float*)data + offset, size_t(count) * 4); return; }
  const uint16_t* in = (const uint16_t*)data + offset;
#ifdef COMPRESSOR_X86
  if (level > SCALAR) return dtype == FLOAT16 ? halves_to_float(in, out, count) : bfloats_to_float(in, out, count);
#endif
  for (int64_t i = 0; i < count; i++) out[i] = load_number(in, dtype, i);
}
void from_float(int64_t level, const float* values, void* data, int64_t dtype, int64_t offset, int64_t count) {
  if (dtype == FLOAT32) { memcpy((float*)data + offset, values, size_t(count) * 4); return; }
  uint16_t* out = (uint16_t*)data + offset;
#ifdef COMPRESSOR_X86
  if (level > SCALAR) return dtype == FLOAT16 ? floats_to_half(values, out, count) : floats_to_bfloat16(values, out, count);
#endif
  for (int64_t i = 0; i < count; i++) store_number(out, dtype, i, values[i]);
}

// ---- the packed weight ----
int64_t describe(Packed& w, const uint8_t* blocks, int64_t N, int64_t K, int64_t bits, int64_t group, int64_t scale_dtype) {
  if (N < 0 || K < 1 || group < 8 || group % 8 || group > (1 << 24) || N > (int64_t(1) << 40) || K > (int64_t(1) << 40)) return BAD_SHAPE;
  if (bits != 2 && bits != 3 && bits != 4 && bits != 8) return BAD_LAYOUT;
  if (scale_dtype < FLOAT32 || scale_dtype > FLOAT16) return BAD_DTYPE;
  w.blocks = blocks, w.out_features = N, w.in_features = K, w.bits = bits, w.group = group, w.scale_dtype = scale_dtype;
  w.groups = (K + group - 1) / group, w.tiles = (N + TILE - 1) / TILE;
  w.row_bytes = TILE * bits;
  w.scale_offset = group / 8 * w.row_bytes;
  w.zero_offset = w.scale_offset + TILE * dtype_bytes(scale_dtype);
  w.block_bytes = w.zero_offset + TILE;
  return OK;
}
int64_t open_packed(Packed& w, const uint8_t* packed, int64_t bytes, int64_t N, int64_t K, int64_t bits, int64_t group) {
  Header h;
  if (bytes < int64_t(sizeof h)) return BAD_LAYOUT;
  memcpy(&h, packed, sizeof h);
  if (h.magic != MAGIC) return BAD_LAYOUT;
  if (h.out_features != N || h.in_features != K || h.bits != bits || h.group != group) return BAD_SHAPE;
  const int64_t error = describe(w, packed + sizeof h, h.out_features, h.in_features, h.bits, h.group, h.scale_dtype);
  if (error) return error;
  w.largest_zero = h.largest_zero;
  return bytes == int64_t(sizeof h) + w.tiles * w.groups * w.block_bytes ? OK : BAD_LAYOUT;
}
// Eight codes of output n into its places of a row.
static void put_codes(uint8_t* row, int64_t bits, int n, const uint8_t* codes) {
  if (bits == 8) {
    memcpy(row + n * 4, codes, 4);
    memcpy(row + 256 + n * 4, codes + 4, 4);
  } else if (bits == 4) {
    for (int i = 0; i < 4; i++) row[n * 4 + i] = uint8_t(codes[i] | codes[i + 4] << 4);
  } else {
    for (int j = 0; j < 8; j++) {  // into a block of zeros
      const int lane = n % 16 * 4 + j % 4;
      row[n / 32 * 64 + lane] |= uint8_t((codes[j] & 3) << (n % 32 / 16 * 4 + j / 4 * 2));
      if (bits == 3) row[128 + lane] |= uint8_t((codes[j] >> 2) << (n / 16 * 2 + j / 4));
    }
  }
}

void store_outputs(const Output& to, const Packed& w, float* values, int64_t m, int64_t tile) {
  const int64_t first = tile * TILE, count = std::min<int64_t>(TILE, w.out_features - first);
  if (to.bias) {
    float memory[TILE];
    const float* bias = as_floats(to.level, to.bias, to.bias_dtype, first, memory, count);
#ifdef COMPRESSOR_X86
    if (to.level > SCALAR) add_avx2(values, bias, count);
    else
#endif
    for (int64_t n = 0; n < count; n++) values[n] += bias[n];
  }
  from_float(to.level, values, to.y, to.dtype, m * w.out_features + first, count);
}

}  // namespace compressor

using namespace compressor;

extern "C" int64_t has_level(int64_t level) { return level_is_there(level); }

extern "C" int64_t packed_bytes(int64_t N, int64_t K, int64_t bits, int64_t group, int64_t scale_dtype) {
  Packed w;
  const int64_t error = describe(w, nullptr, N, K, bits, group, scale_dtype);
  return error ? error : int64_t(sizeof(Header)) + w.tiles * w.groups * w.block_bytes;
}

extern "C" int64_t pack_weight(int64_t threads, const uint8_t* codes, const void* scale, const uint8_t* zero, uint8_t* out,
                               int64_t N, int64_t K, int64_t bits, int64_t group, int64_t scale_dtype) {
  Packed w;
  if (const int64_t error = describe(w, out + sizeof(Header), N, K, bits, group, scale_dtype)) return error;
  int64_t largest_zero = 1 << (bits - 1);
  if (zero) largest_zero = w.groups * N ? *std::max_element(zero, zero + w.groups * N) : 0;
  const Header header{MAGIC, uint32_t(bits), N, K, group, scale_dtype, largest_zero, {}};
  memcpy(out, &header, sizeof header);
  const int64_t bytes = dtype_bytes(scale_dtype);
  parallel(threads, w.tiles, [&](int64_t t) {
    for (int64_t j = 0; j < w.groups; j++) {
      uint8_t* b = const_cast<uint8_t*>(w.block(t, j));
      memset(b, 0, size_t(w.block_bytes));
      for (int n = 0; n < TILE && t * TILE + n < N; n++) {
        const int64_t r = t * TILE + n, end = std::min(group, K - j * group);
        memcpy(b + w.scale_offset + n * bytes, (const char*)scale + (r * w.groups + j) * bytes, size_t(bytes));
        b[w.zero_offset + n] = zero ? zero[r * w.groups + j] : uint8_t(1 << (bits - 1));
        const uint8_t* from = codes + r * K + j * group;
        int64_t k = 0;
        for (; k + 8 <= end; k += 8) put_codes(b + k / 8 * w.row_bytes, bits, n, from + k);
        if (k < end) {
          uint8_t last[8] = {};
          memcpy(last, from + k, size_t(end - k));
          put_codes(b + k / 8 * w.row_bytes, bits, n, last);
        }
      }
    }
  });
  return OK;
}

extern "C" int64_t unpack_weight(int64_t threads, const uint8_t* packed, int64_t packed_size, int64_t N, int64_t K, int64_t bits,
                                 int64_t group, uint8_t* codes, float* scale, uint8_t* zero) {
  Packed w;
  if (const int64_t error = open_packed(w, packed, packed_size, N, K, bits, group)) return error;
  parallel(threads, w.tiles, [&](int64_t t) {
    for (int64_t j = 0; j < w.groups; j++) {
      const uint8_t* b = w.block(t, j);
      for (int n = 0; n < TILE && t * TILE + n < w.out_features; n++) {
        const int64_t r = t * TILE + n, end = std::min(w.group, w.in_features - j * w.group);
        scale[r * w.groups + j] = load_number(b + w.scale_offset, w.scale_dtype, n);
        zero[r * w.groups + j] = b[w.zero_offset + n];
        for (int64_t k = 0; k < end; k++) codes[r * w.in_features + j * w.group + k] = get_code(b + k / 8 * w.row_bytes, w.bits, n, int(k % 8));
      }
    }
  });
  return OK;
}
