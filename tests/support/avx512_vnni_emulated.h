// The 512-bit instructions that the CPU kernels use, in plain C++, for g++ -include: so their AVX-512 bodies run, and are
// compared with the others, on a machine that has none. What each does is Intel's description of it.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#define AVX512_EMULATED 1
#define TARGET_AVX512 __attribute__((target("avx2,fma,f16c")))  // of the 256-bit parts of the same bodies

namespace emulated {

template <class T> constexpr int LANES = 64 / sizeof(T);
struct Floats { float v[16]; };
struct Ints {
  uint8_t bytes[64];
  template <class T> T get(int i) const { T r; memcpy(&r, bytes + i * sizeof(T), sizeof(T)); return r; }
  template <class T> void set(int i, T value) { memcpy(bytes + i * sizeof(T), &value, sizeof(T)); }
};
template <class T, class F> Ints each(F f) { Ints r; for (int i = 0; i < LANES<T>; i++) r.set<T>(i, T(f(i))); return r; }
template <class F> Floats each_float(F f) { Floats r; for (int i = 0; i < 16; i++) r.v[i] = f(i); return r; }

inline Ints load(const void* at) { Ints r; memcpy(r.bytes, at, 64); return r; }
inline Floats load_ps(const void* at) { Floats r; memcpy(r.v, at, 64); return r; }
inline void store(void* at, const Ints& a) { memcpy(at, a.bytes, 64); }
inline void store_ps(void* at, const Floats& a) { memcpy(at, a.v, 64); }
template <class T> Ints load_masked(uint64_t mask, const void* at) {
  return each<T>([&](int i) { T r = 0; if (mask >> i & 1) memcpy(&r, (const char*)at + i * sizeof(T), sizeof(T)); return r; });
}
inline Floats load_masked_ps(uint64_t mask, const void* at) { const Ints a = load_masked<int32_t>(mask, at); return load_ps(a.bytes); }
inline void store_low_bytes(void* at, uint64_t mask, const Ints& a) {
  for (int i = 0; i < 16; i++) if (mask >> i & 1) ((uint8_t*)at)[i] = uint8_t(a.get<uint32_t>(i));
}
inline __m128i low_bytes(const Ints& a) { uint8_t r[16]; store_low_bytes(r, 0xffff, a); return _mm_loadu_si128((const __m128i*)r); }
inline Ints set1_epi8(int v) { return each<int8_t>([&](int) { return v; }); }
inline Ints set1_epi32(int32_t v) { return each<int32_t>([&](int) { return v; }); }
inline Floats set1_ps(float v) { return each_float([&](int) { return v; }); }
inline Ints add8(const Ints& a, const Ints& b) { return each<uint8_t>([&](int i) { return a.get<uint8_t>(i) + b.get<uint8_t>(i); }); }
inline Ints four_times(__m128i a) { Ints r; for (int i = 0; i < 4; i++) _mm_storeu_si128((__m128i*)r.bytes + i, a); return r; }
inline Ints shuffle8(const Ints& a, const Ints& at) {  // within lanes of 16 bytes
  return each<uint8_t>([&](int i) { const uint8_t n = at.get<uint8_t>(i); return n & 0x80 ? 0 : a.get<uint8_t>(i / 16 * 16 + n % 16); });
}
inline Ints add32(const Ints& a, const Ints& b) { return each<uint32_t>([&](int i) { return a.get<uint32_t>(i) + b.get<uint32_t>(i); }); }
template <class T> Ints sub(const Ints& a, const Ints& b) { return each<T>([&](int i) { return a.get<T>(i) - b.get<T>(i); }); }
inline Ints max32(const Ints& a, const Ints& b) {
  return each<int32_t>([&](int i) { return a.get<int32_t>(i) > b.get<int32_t>(i) ? a.get<int32_t>(i) : b.get<int32_t>(i); });
}
inline Ints mullo32(const Ints& a, const Ints& b) { return each<uint32_t>([&](int i) { return a.get<uint32_t>(i) * b.get<uint32_t>(i); }); }
inline Ints bit_and(const Ints& a, const Ints& b) { return each<uint64_t>([&](int i) { return a.get<uint64_t>(i) & b.get<uint64_t>(i); }); }
inline Ints ternary(const Ints& a, const Ints& b, const Ints& c, int table) {
  return each<uint64_t>([&](int i) {
    uint64_t r = 0;
    for (int bit = 0; bit < 64; bit++) {
      const int entry = int(a.get<uint64_t>(i) >> bit & 1) << 2 | int(b.get<uint64_t>(i) >> bit & 1) << 1 | int(c.get<uint64_t>(i) >> bit & 1);
      r |= uint64_t(table >> entry & 1) << bit;
    }
    return r;
  });
}
template <class T> Ints left(const Ints& a, unsigned n) { return each<T>([&](int i) { return n < sizeof(T) * 8 ? a.get<T>(i) << n : 0; }); }
template <class T> Ints right(const Ints& a, unsigned n) { return each<T>([&](int i) { return n < sizeof(T) * 8 ? a.get<T>(i) >> n : 0; }); }
inline Ints madd16(const Ints& a, const Ints& b) {
  return each<int32_t>([&](int i) {
    return int32_t(a.get<int16_t>(2 * i)) * b.get<int16_t>(2 * i) + int32_t(a.get<int16_t>(2 * i + 1)) * b.get<int16_t>(2 * i + 1);
  });
}
inline Ints dot(const Ints& sum, const Ints& a, const Ints& b) {  // vpdpbusd: bytes of a without sign, of b with
  return each<uint32_t>([&](int i) {
    int32_t r = 0;
    for (int k = 0; k < 4; k++) r += int32_t(a.get<uint8_t>(4 * i + k)) * b.get<int8_t>(4 * i + k);
    return sum.get<uint32_t>(i) + uint32_t(r);
  });
}
inline int32_t sum_of(const Ints& a) { uint32_t r = 0; for (int i = 0; i < 16; i++) r += a.get<uint32_t>(i); return int32_t(r); }
inline int32_t max_of(const Ints& a) { int32_t r = a.get<int32_t>(0); for (int i = 1; i < 16; i++) r = a.get<int32_t>(i) > r ? a.get<int32_t>(i) : r; return r; }
inline Floats mul(const Floats& a, const Floats& b) { return each_float([&](int i) { return a.v[i] * b.v[i]; }); }
inline Floats fma(const Floats& a, const Floats& b, const Floats& c) { return each_float([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); }); }
inline Floats to_floats(const Ints& a) { return each_float([&](int i) { return float(a.get<int32_t>(i)); }); }
inline Ints to_ints(const Floats& a) {  // out of range and NaN: 0x80000000
  return each<int32_t>([&](int i) { return std::fabs(a.v[i]) < 2147483648.f ? int32_t(std::nearbyint(a.v[i])) : INT32_MIN; });
}
inline Ints widen8(__m128i a) { uint8_t b[16]; _mm_storeu_si128((__m128i*)b, a); return each<uint32_t>([&](int i) { return b[i]; }); }
inline Ints widen16(const __m256i& a) { uint16_t b[16]; memcpy(b, &a, 32); return each<uint32_t>([&](int i) { return b[i]; }); }
TARGET_AVX512 inline Floats halves(const __m256i& a) {
  Floats r;
  _mm256_storeu_ps(r.v, _mm256_cvtph_ps(_mm256_castsi256_si128(a)));
  _mm256_storeu_ps(r.v + 8, _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
  return r;
}

}  // namespace emulated

#define __m512i emulated::Ints
#define __m512 emulated::Floats
#define _mm512_add_epi32 emulated::add32
#define _mm512_add_epi8 emulated::add8
#define _mm512_and_si512 emulated::bit_and
#define _mm512_broadcast_i32x4 emulated::four_times
#define _mm512_castsi512_ps(a) emulated::load_ps((a).bytes)
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
#define _mm512_slli_epi16 emulated::left<uint16_t>
#define _mm512_slli_epi32 emulated::left<uint32_t>
#define _mm512_srai_epi32 emulated::right<int32_t>
#define _mm512_srli_epi16 emulated::right<uint16_t>
#define _mm512_storeu_ps emulated::store_ps
#define _mm512_storeu_si512 emulated::store
#define _mm512_sub_epi8 emulated::sub<uint8_t>
#define _mm512_ternarylogic_epi32 emulated::ternary
