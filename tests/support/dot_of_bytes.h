// vpdpbusd of 256 bits by instructions of AVX2, for g++ -include before the headers that emulate AVX-VNNI and AVX-512.
#pragma once
#include <immintrin.h>

// Each int32 of sum plus the four products of bytes in its place, those of codes without signs. Two of the products at a
// time are exact sums of int32: those of the even bytes and those of the odd ones.
__attribute__((target("avx2"))) inline __m256i dot_of_bytes(__m256i sum, __m256i codes, __m256i x) {
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(codes, 8), _mm256_srai_epi16(x, 8));
  return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
}
