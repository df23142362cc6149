// What latents are multiplied in: floats, or bfloat16 two by two where the machine adds up products of pairs
// (AVX512_BF16), twice as many at a time. Sums are floats.
#pragma once
#include "vectors.h"

namespace capsight {

struct Single {
  typedef float T;
  typedef vf V;
  static constexpr int width = W, pair = 1;  // numbers of a vector; how many a lane adds up products of
  static INLINE vf add(vf sum, V x, V y) { return sum + x * y; }
  static INLINE vf add(vf sum, V x, V y, V other) { return sum + x * (y + other); }
  static INLINE V repeat(const T* p) { return all(*p); }
  static INLINE V vector(const vf* x) { return x[0]; }
  static INLINE V beside(V x, V, bool) { return x; }
  static INLINE V integers(const char* p, const char*) { return __builtin_convertvector(signed8(p), vf); }
};

#ifdef __AVX512BF16__
struct Pairs {
  typedef uint16_t T;
  typedef vi V;
  static constexpr int width = 2 * W, pair = 2;
  static INLINE vf add(vf sum, V x, V y) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y); }
  static INLINE vf add(vf sum, V x, V y, V other) { return add(add(sum, x, y), x, other); }
  static INLINE V repeat(const T* p) { return vi{} + get<int32_t>(p); }
  static INLINE V vector(const vf* x) { return (V)_mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]); }
  // Of numbers of two tokens the first or second half, so that a lane has both of one channel.
  static INLINE V beside(V x, V y, bool second) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    return (V)_mm512_permutex2var_epi16((__m512i)x, second ? _mm512_add_epi16(low, _mm512_set1_epi16(16)) : low, (__m512i)y);
  }
  static INLINE V integers(const char* p, const char* other) { return joined(Single::integers(p, p), Single::integers(other, other)); }

 private:
  static constexpr int32_t HIGH = int32_t(0xffff0000);
  static INLINE V joined(vf even, vf odd) {
    return (V)(((__v16su)even + 0x8000u) >> 16) | (((vi)odd + 0x8000) & HIGH);
  }
};
typedef Pairs Best;
#else
typedef Single Best;
#endif

template <class N>
using Numbers = std::vector<typename N::T, Lines<typename N::T>>;

// `count` floats, a multiple of 32, as N has them.
template <class N>
INLINE void round_to(const float* from, int64_t count, typename N::T* to) {
  for (int64_t i = 0; i < count; i += N::width) {
    vf x[N::pair];
    for (int n = 0; n < N::pair; n++) x[n] = get<vf>(from + i + n * W);
    auto made = N::vector(x);
    std::memcpy(to + i, &made, sizeof made);
  }
}

}  // namespace capsight
