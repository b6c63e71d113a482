// The tiles of AMX in plain C++, for g++ -include, on a machine that has none: what each instruction does is Intel's description of it. Tiles
// that weren't begun hold nothing and can't be used.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define AMX_EMULATED 1

namespace compressor {

struct Tile { int8_t rows[16][64]; };
inline thread_local Tile tiles[8];
inline thread_local bool tiles_there = false;
inline Tile& tile_of(int t) { return tiles_there ? tiles[t] : (abort(), tiles[t]); }

inline void tiles_begin() { memset(tiles, 0, sizeof tiles), tiles_there = true; }
inline void tiles_end() { memset(tiles, 0x55, sizeof tiles), tiles_there = false; }
template <int T> void tile_zero() { memset(&tile_of(T), 0, sizeof(Tile)); }
template <int T> void tile_load(const void* from, int64_t stride) {
  for (int r = 0; r < 16; r++) memcpy(tile_of(T).rows[r], static_cast<const char*>(from) + r * stride, 64);
}
template <int T> void tile_store(void* to, int64_t stride) {
  for (int r = 0; r < 16; r++) memcpy(static_cast<char*>(to) + r * stride, tile_of(T).rows[r], 64);
}
// Not checked by sanitizers, and optimized: it is most of the time of the tests, and the indices are these loops'.
template <class B> __attribute__((no_sanitize("address", "undefined"), optimize("O3"))) void tile_dot(Tile& c, const Tile& a, const Tile& b) {
  for (int m = 0; m < 16; m++)
    for (int n = 0; n < 16; n++) {
      uint32_t sum;
      memcpy(&sum, c.rows[m] + n * 4, 4);
      for (int k = 0; k < 64; k++) sum += uint32_t(int32_t(a.rows[m][k]) * B(b.rows[k / 4][n * 4 + k % 4]));
      memcpy(c.rows[m] + n * 4, &sum, 4);
    }
}
template <int C, int A, int B> void tile_dot_signed() { tile_dot<int8_t>(tile_of(C), tile_of(A), tile_of(B)); }
template <int C, int A, int B> void tile_dot_unsigned() { tile_dot<uint8_t>(tile_of(C), tile_of(A), tile_of(B)); }

}  // namespace compressor
