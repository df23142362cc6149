// Latents as they are stored: 8, then 4, then 2 bits a coordinate, with a scale for each group of a token.
#pragma once
#include <algorithm>

#include "numbers.h"

namespace capsight {

constexpr int AHEAD = 8;   // tokens that are fetched before they are opened
constexpr int GROUP = 32;  // coordinates that share a scale; a multiple of W

struct Latents {
  const uint8_t* codes;    // [T, width]
  const uint16_t* scales;  // half precision [T, R / GROUP]
  int64_t width, eight, four, two;  // bytes of a token; coordinates of each kind
  float inner, outer;               // the sizes that two bits stand for
  int64_t rank() const { return eight + four + two; }
};

// W codes of so many bits.
template <int BITS>
INLINE vi codes(const uint8_t* p) {
  if constexpr (BITS == 8) return wide8((const char*)p);
  else {
    uint64_t word = 0;
    std::memcpy(&word, p, W * BITS / 8);
    vi shift, own = vi{} + int32_t(word);
    for (int i = 0; i < W; i++) shift[i] = i * BITS % 32;
    if constexpr (W * BITS > 32) {
      vi lane;
      for (int i = 0; i < W; i++) lane[i] = i;
      own = lane < 32 / BITS ? own : vi{} + int32_t(word >> 32);
    }
    return (own >> shift) & ((1 << BITS) - 1);
  }
}

// What all codes of so many bits stand for, before they are scaled.
template <int BITS>
struct Codebook {
  vf of;  // by four bits, of which all or two count
  Codebook(const Latents& s) {
    float given[] = {-s.inner, -s.outer, s.inner, s.outer};
    for (int i = 0; i < W; i++) of[i] = BITS == 2 ? given[i & 3] : i - 7;
  }
  INLINE vf open(const uint8_t* p) const {  // W of them
#if LANES == 16
    if constexpr (BITS != 8) {
      vi shift;
      for (int i = 0; i < W; i++) shift[i] = i * BITS % 32;
      vi own = vi{} + get<int32_t>(p);
      if constexpr (BITS == 4) own = (vi)_mm512_mask_set1_epi32((__m512i)own, 0xff00, get<int32_t>(p + 4));
      return (vf)_mm512_permutexvar_ps((__m512i)(own >> shift), (__m512)of);
    }
#endif
    vi code = codes<BITS>(p);
    if constexpr (BITS != 2) return __builtin_convertvector(code - ((1 << (BITS - 1)) - 1), vf);
    vf x = (code & 1) != 0 ? all(of[3]) : all(of[2]);
    return (code & 2) != 0 ? x : -x;
  }
};
template <int BITS, class N>
INLINE void open(Codebook<BITS> book, const uint8_t* p, int64_t count, const float* scale, typename N::T* out) {
  for (int64_t i = 0; i < count; i += GROUP, p += GROUP * BITS / 8)
    for (int64_t j = 0; j < GROUP; j += N::width) {
      vf x[N::pair];
      for (int n = 0; n < N::pair; n++) x[n] = book.open(p + (j + n * W) * BITS / 8) * scale[i / GROUP];
      auto made = N::vector(x);
      std::memcpy(out + i + j, &made, sizeof made);
    }
}

// `count` of `all` latents, from token `first` on, in `own` coordinates from one on: out [count, own]; scales is room
// for a token's and W more.
template <class N>
inline void open(
    const Latents& s, int64_t all, int64_t first, int64_t count, int64_t from, int64_t own, float* scales, typename N::T* out) {
  const int64_t groups = s.rank() / GROUP, end = from + own, eight = s.eight, four = s.eight + s.four;
  const int64_t cuts[] = {from, std::clamp(eight, from, end), std::clamp(four, from, end), end};
  const uint8_t *codes = s.codes + first * s.width, *parts[] = {codes + cuts[0], codes + eight + (cuts[1] - eight) / 2, codes + eight + s.four / 2 + (cuts[2] - four) / 4};
  const Codebook<8> by8(s);
  const Codebook<4> by4(s);
  const Codebook<2> by2(s);
  for (int64_t t = 0; t < count; t++, out += own) {
    for (int64_t i = 0, at = (first + t) * groups + from / GROUP; i < own / GROUP; i += W, at += W)
      if (at + W <= all * groups) Stored<F16>::load((const char*)(s.scales + at), (vf*)(scales + i));
      else
        for (int64_t n = 0; n < own / GROUP - i; n++) scales[i + n] = of_half(s.scales[at + n]);
    auto part = [&](int k) { return parts[k] + t * s.width; };
    for (int k = 0; k < 3; k++)  // what some tokens on is read, a part of each at a time, is not foreseen by the machine
      for (int64_t i = 0; i < cuts[k + 1] - cuts[k] >> k; i += 64) __builtin_prefetch(part(k) + AHEAD * s.width + i);
    auto scale = [&](int k) { return scales + (cuts[k] - from) / GROUP; };
    open<8, N>(by8, part(0), cuts[1] - cuts[0], scale(0), out);
    open<4, N>(by4, part(1), cuts[2] - cuts[1], scale(1), out + cuts[1] - from);
    open<2, N>(by2, part(2), cuts[3] - cuts[2], scale(2), out + cuts[2] - from);
  }
}

}  // namespace capsight
