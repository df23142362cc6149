// Latents to bits: groups of coordinates in 8, then 4, then 2 bits, each with a scale in half precision.
#include <algorithm>

#include "latents.h"

namespace capsight {

// Codes of one group in steps of its scale, which is written; `latents.h` opens them.
template <int BITS>
INLINE void pack(const float* x, float middle, uint8_t* to, uint16_t* scale) {
  constexpr int top = (1 << (BITS - 1)) - 1;
  float size = 0, y[GROUP];
  int none = 0;
  for (int i = 0; i < GROUP; i++) {
    size = BITS == 2 ? size + x[i] * x[i] : std::max(size, std::fabs(x[i]));
    none |= x[i] != x[i];
  }
  if (none) size = NAN;
  *scale = to_half(BITS == 2 ? std::sqrt(size / GROUP) : size / top);
  float step = std::max(of_half(*scale), 1e-30f);
  uint8_t code[GROUP];
  for (int i = 0; i < GROUP; i++) y[i] = x[i] / step;
  for (int i = 0; i < GROUP; i++)
    if constexpr (BITS == 2) code[i] = (y[i] >= 0 ? 2 : 0) + (std::fabs(y[i]) > middle ? 1 : 0);
    else code[i] = uint8_t(int(std::min(std::max(y[i], -float(top)), float(top)) + 12582912.f - 12582912.f) + top);
  for (int i = 0, each = 8 / BITS; i < GROUP / each; i++) {
    to[i] = 0;
    for (int n = 0; n < each; n++) to[i] |= code[i * each + n] << BITS * n;
  }
}

}  // namespace capsight

using namespace capsight;

// Latents [T, R] to codes [T, width] and scales [T, R / GROUP]; `stride` numbers from one token to the next.
EXPORT void capsight_pack(
    const float* x, int64_t stride, int64_t tokens, const int64_t* counts, float middle, int64_t threads, uint8_t* codes,
    uint16_t* scales) {
  int64_t eight = counts[0], four = counts[1], two = counts[2], width = eight + four / 2 + two / 4;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < tokens; t++) {
    const float *from = x + t * stride, *end = from;
    uint8_t* to = codes + t * width;
    uint16_t* scale = scales + t * ((eight + four + two) / GROUP);
    for (end += eight; from < end; from += GROUP, to += GROUP) pack<8>(from, middle, to, scale++);
    for (end += four; from < end; from += GROUP, to += GROUP / 2) pack<4>(from, middle, to, scale++);
    for (end += two; from < end; from += GROUP, to += GROUP / 4) pack<2>(from, middle, to, scale++);
  }
}
