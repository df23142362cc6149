// Latents as they are stored: 8, then 4, then 2 bits a coordinate, with a scale for each group of a token.
#pragma once
#include "vectors.h"

namespace capsight {

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

template <int BITS>
INLINE void open(const Latents& s, const uint8_t* p, const float* scale, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += W) {
    vi code = codes<BITS>(p + i * BITS / 8);
    vf x;
    if constexpr (BITS == 2) {
      x = (code & 1) != 0 ? all(s.outer) : all(s.inner);
      x = (code & 2) != 0 ? x : -x;
    } else x = __builtin_convertvector(code - ((1 << (BITS - 1)) - 1), vf);
    put(out + i, x * scale[i / GROUP]);
  }
}

// `count` latents from token `first` on: out [count, R]; scales is room for their scales.
inline void open(const Latents& s, int64_t first, int64_t count, float* scales, float* out) {
  int64_t rank = s.rank(), groups = rank / GROUP, all = count * groups, i = 0;
  const uint16_t* given = s.scales + first * groups;
  for (; i + W <= all; i += W) {
    vf x;
    Stored<F16>::load((const char*)(given + i), &x);
    put(scales + i, x);
  }
  for (; i < all; i++) scales[i] = of_half(given[i]);
  for (int64_t t = 0; t < count; t++, out += rank, scales += groups) {
    const uint8_t* p = s.codes + (first + t) * s.width;
    open<8>(s, p, scales, s.eight, out);
    open<4>(s, p + s.eight, scales + s.eight / GROUP, s.four, out + s.eight);
    int64_t before = s.eight + s.four;
    open<2>(s, p + s.eight + s.four / 2, scales + before / GROUP, s.two, out + before);
  }
}

}  // namespace capsight
