// Tiles of matrices (Intel AMX): what they are multiplied with, and numbers as they take them.
#pragma once
#include "tile.h"

#ifdef __AMX_BF16__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace capsight {

constexpr int SIDE = 16, SPAN = 2 * SIDE;  // rows of a tile, or its numbers of 32 bits; tokens at a time
typedef std::vector<uint32_t, Lines<uint32_t>> Words;
typedef std::vector<uint16_t, Lines<uint16_t>> Halves;

// Makes room for so many numbers: never less than before, since what a vector gets anew is filled with zeros.
template <class V>
INLINE void grow(V& x, size_t count) {
  if (x.size() < count) x.resize(count);
}

// Tile instructions do not tell compilers what memory they read and write.
INLINE void settle() { __asm__ volatile("" ::: "memory"); }

// Tiles 0 to 3, side by side in memory, or two by two in rows of `wide` numbers.
INLINE void keep(float* to, int64_t wide, int64_t below, int64_t step) {
  _tile_stored(0, to, step);
  _tile_stored(1, to + wide, step);
  _tile_stored(2, to + below, step);
  _tile_stored(3, to + below + wide, step);
}
// Adds products of two tiles with two to tiles 0 to 3.
INLINE void multiply_tiles(const uint32_t* a, const uint32_t* below, const uint32_t* b, const uint32_t* more) {
  _tile_loadd(4, a, 64);
  _tile_loadd(6, b, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, more, 64);
  _tile_dpbf16ps(1, 4, 7);
  _tile_loadd(5, below, 64);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// Numbers 0 to 15 and 16 to 31 in bfloat16.
INLINE __m512i both(__m512 first, __m512 second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }

// Rows of 16 numbers of 32 bits: rows become columns.
INLINE void transpose(__m512i* x) {
  __m512i y[SIDE];
#pragma GCC unroll 8
  for (int i = 0; i < SIDE; i += 2) y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]), y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < SIDE; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
      x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
    }
#pragma GCC unroll 2
  for (int i = 0; i < SIDE; i += 8)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      y[i + j] = _mm512_shuffle_i32x4(x[i + j], x[i + j + 4], 0x88);
      y[i + j + 4] = _mm512_shuffle_i32x4(x[i + j], x[i + j + 4], 0xdd);
    }
#pragma GCC unroll 8
  for (int j = 0; j < 8; j++) {
    x[j] = _mm512_shuffle_i32x4(y[j], y[j + 8], 0x88);
    x[j + 8] = _mm512_shuffle_i32x4(y[j], y[j + 8], 0xdd);
  }
}

// 32 numbers in their order again, that lie as two rows of numbers were mixed.
INLINE void unmix(const float* from, float* to) {
  __m512d a = _mm512_loadu_pd(from), b = _mm512_loadu_pd(from + SIDE);
  _mm512_storeu_pd(to, _mm512_permutex2var_pd(a, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), b));
  _mm512_storeu_pd(to + SIDE, _mm512_permutex2var_pd(a, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), b));
}

// What is read after a tile, fetched a few lines at a time, from four places: machines read several pages at once
// faster than one after the other.
class Ahead {
 public:
  // Tokens `stride` bytes apart of `lines` lines each; of none where `from` is null.
  Ahead(const char* from, int64_t stride, int lines) : from(from), stride(stride), lines(lines) {}

  // Fetches so many lines of each place; after SIDE * lines of them all are fetched.
  INLINE void fetch(int many) {
    for (; many && from; many--) {
      for (int place = 0; place < TILE / SIDE; place++) __builtin_prefetch(from + place * SIDE * stride + line * 64, 0, 2);
      if (++line == lines) line = 0, from += stride;
    }
  }

 private:
  const char* from;
  const int64_t stride;
  const int lines;
  int line = 0;
};

// Whether the system lets this process.
inline bool tiles_allowed() {
  static const bool found = !syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */);
  return found;
}

// Has all tiles of full size as long as it lives.
class Tiles {
 public:
  Tiles() {
    struct {
      uint8_t palette = 1, other[15] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shapes;
    settle();
    _tile_loadconfig(&shapes);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
};

}  // namespace capsight
#endif
