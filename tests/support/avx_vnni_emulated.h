// vpdpbusd of 256 bits in plain C++, for g++ -include: so the AVX-VNNI bodies of the CPU kernels run on a machine without it.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define AVXVNNI_EMULATED 1

// Each int32 of sum plus the four products of bytes in its place, those of codes without signs.
__attribute__((target("avx2"))) inline __m256i dot_of_bytes(__m256i sum, __m256i codes, __m256i x) {
  int32_t s[8];
  uint8_t u[32];
  int8_t v[32];
  memcpy(s, &sum, 32), memcpy(u, &codes, 32), memcpy(v, &x, 32);
  for (int i = 0; i < 32; i++) s[i / 4] += u[i] * v[i];
  memcpy(&sum, s, 32);
  return sum;
}
