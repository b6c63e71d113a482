// The 512-bit instructions that the CPU kernels use, as pairs of AVX2's, for g++ -include after dot_of_bytes.h: so their
// AVX-512 bodies run, and are compared with the others, on a machine that has none. What each does is Intel's description of it.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define AVX512_EMULATED 1
#define TARGET_AVX512 __attribute__((target("avx2,fma,f16c")))

namespace emulated {

struct Ints { __m256i low, high; };
struct Floats { __m256 low, high; };

// Both halves by the same instruction.
#define EACH(NAME, INSTRUCTION) \
  TARGET_AVX512 inline Ints NAME(const Ints& a, const Ints& b) { return {INSTRUCTION(a.low, b.low), INSTRUCTION(a.high, b.high)}; }
EACH(add8, _mm256_add_epi8)
EACH(add32, _mm256_add_epi32)
EACH(bit_and, _mm256_and_si256)
EACH(madd16, _mm256_madd_epi16)
EACH(max32, _mm256_max_epi32)
EACH(mullo32, _mm256_mullo_epi32)
EACH(shuffle8, _mm256_shuffle_epi8)  // within lanes of 16 bytes
EACH(sub8, _mm256_sub_epi8)
#undef EACH
#define EACH(NAME, INSTRUCTION) \
  TARGET_AVX512 inline Ints NAME(const Ints& a, int bits) { \
    const __m128i count = _mm_cvtsi32_si128(bits); \
    return {INSTRUCTION(a.low, count), INSTRUCTION(a.high, count)}; \
  }
EACH(left16, _mm256_sll_epi16)
EACH(left32, _mm256_sll_epi32)
EACH(right16, _mm256_srl_epi16)
EACH(right32_signed, _mm256_sra_epi32)
#undef EACH

TARGET_AVX512 inline Ints load(const void* at) { Ints r; memcpy(&r, at, 64); return r; }
TARGET_AVX512 inline Floats load_ps(const void* at) { Floats r; memcpy(&r, at, 64); return r; }
TARGET_AVX512 inline void store(void* at, const Ints& a) { memcpy(at, &a, 64); }
TARGET_AVX512 inline void store_ps(void* at, const Floats& a) { memcpy(at, &a, 64); }
template <class T> TARGET_AVX512 Ints load_masked(uint64_t mask, const void* at) {
  T r[64 / sizeof(T)] = {};
  for (int i = 0; i < 64 / int(sizeof(T)); i++) if (mask >> i & 1) memcpy(r + i, (const T*)at + i, sizeof(T));
  return load(r);
}
TARGET_AVX512 inline Floats as_floats(const Ints& a) { return {_mm256_castsi256_ps(a.low), _mm256_castsi256_ps(a.high)}; }
TARGET_AVX512 inline Floats load_masked_ps(uint64_t mask, const void* at) { return as_floats(load_masked<int32_t>(mask, at)); }
TARGET_AVX512 inline void store_low_bytes(void* at, uint64_t mask, const Ints& a) {
  uint32_t v[16];
  store(v, a);
  for (int i = 0; i < 16; i++) if (mask >> i & 1) ((uint8_t*)at)[i] = uint8_t(v[i]);
}
TARGET_AVX512 inline __m128i low_bytes(const Ints& a) { __m128i r; store_low_bytes(&r, 0xffff, a); return r; }
TARGET_AVX512 inline Ints set1_epi8(int v) { return {_mm256_set1_epi8(char(v)), _mm256_set1_epi8(char(v))}; }
TARGET_AVX512 inline Ints set1_epi32(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
TARGET_AVX512 inline Floats set1_ps(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
TARGET_AVX512 inline Ints four_times(__m128i a) { return {_mm256_broadcastsi128_si256(a), _mm256_broadcastsi128_si256(a)}; }
TARGET_AVX512 inline __m256i ternary256(__m256i a, __m256i b, __m256i c, int table) {
  const __m256i ones = _mm256_set1_epi32(-1);
  __m256i r = _mm256_setzero_si256();
  for (int entry = 0; entry < 8; entry++) {  // where a, b and c are the bits of entry, the result is that bit of the table
    if (!(table >> entry & 1)) continue;
    const __m256i x = entry & 4 ? a : _mm256_xor_si256(a, ones), y = entry & 2 ? b : _mm256_xor_si256(b, ones);
    r = _mm256_or_si256(r, _mm256_and_si256(_mm256_and_si256(x, y), entry & 1 ? c : _mm256_xor_si256(c, ones)));
  }
  return r;
}
TARGET_AVX512 inline Ints ternary(const Ints& a, const Ints& b, const Ints& c, int table) {
  return {ternary256(a.low, b.low, c.low, table), ternary256(a.high, b.high, c.high, table)};
}
TARGET_AVX512 inline Ints dot(const Ints& sum, const Ints& a, const Ints& b) {
  return {dot_of_bytes(sum.low, a.low, b.low), dot_of_bytes(sum.high, a.high, b.high)};
}
TARGET_AVX512 inline int32_t sum_of(const Ints& a) {
  uint32_t v[16], r = 0;
  store(v, a);
  for (const uint32_t of_lane : v) r += of_lane;
  return int32_t(r);
}
TARGET_AVX512 inline int32_t max_of(const Ints& a) {
  int32_t v[16];
  store(v, a);
  for (const int32_t of_lane : v) v[0] = of_lane > v[0] ? of_lane : v[0];
  return v[0];
}
TARGET_AVX512 inline Floats mul(const Floats& a, const Floats& b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
TARGET_AVX512 inline Floats fma(const Floats& a, const Floats& b, const Floats& c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
TARGET_AVX512 inline Floats to_floats(const Ints& a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
TARGET_AVX512 inline Ints to_ints(const Floats& a) { return {_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high)}; }
TARGET_AVX512 inline Ints widen8(__m128i a) { return {_mm256_cvtepu8_epi32(a), _mm256_cvtepu8_epi32(_mm_srli_si128(a, 8))}; }
TARGET_AVX512 inline Ints widen16(__m256i a) {
  return {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1))};
}
TARGET_AVX512 inline Floats halves(__m256i a) {
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))};
}

}  // namespace emulated

#define __m512i emulated::Ints
#define __m512 emulated::Floats
#define _mm512_add_epi32 emulated::add32
#define _mm512_add_epi8 emulated::add8
#define _mm512_and_si512 emulated::bit_and
#define _mm512_broadcast_i32x4 emulated::four_times
#define _mm512_castsi512_ps emulated::as_floats
#define _mm512_cvtepi32_epi8 emulated::low_bytes
#define _mm512_cvtepi32_ps emulated::to_floats
#define _mm512_cvtepu16_epi32 emulated::widen16
#define _mm512_cvtepu8_epi32 emulated::widen8
#define _mm512_cvtph_ps emulated::halves
#define _mm512_cvtps_epi32 emulated::to_ints
#define _mm512_dpbusd_epi32 emulated::dot
#define _mm512_fmadd_ps emulated::fma
#define _mm512_loadu_ps emulated::load_ps
#define _mm512_loadu_si512 emulated::load
#define _mm512_madd_epi16 emulated::madd16
#define _mm512_mask_cvtepi32_storeu_epi8 emulated::store_low_bytes
#define _mm512_maskz_loadu_epi32 emulated::load_masked<int32_t>
#define _mm512_maskz_loadu_epi8 emulated::load_masked<int8_t>
#define _mm512_maskz_loadu_ps emulated::load_masked_ps
#define _mm512_max_epi32 emulated::max32
#define _mm512_mul_ps emulated::mul
#define _mm512_mullo_epi32 emulated::mullo32
#define _mm512_reduce_add_epi32 emulated::sum_of
#define _mm512_reduce_max_epi32 emulated::max_of
#define _mm512_set1_epi32 emulated::set1_epi32
#define _mm512_set1_epi8 emulated::set1_epi8
#define _mm512_set1_ps emulated::set1_ps
#define _mm512_setzero_ps() emulated::set1_ps(0)
#define _mm512_setzero_si512() emulated::set1_epi32(0)
#define _mm512_shuffle_epi8 emulated::shuffle8
#define _mm512_slli_epi16 emulated::left16
#define _mm512_slli_epi32 emulated::left32
#define _mm512_srai_epi32 emulated::right32_signed
#define _mm512_srli_epi16 emulated::right16
#define _mm512_storeu_ps emulated::store_ps
#define _mm512_storeu_si512 emulated::store
#define _mm512_sub_epi8 emulated::sub8
#define _mm512_ternarylogic_epi32 emulated::ternary
