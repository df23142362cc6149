// Latents and axes in bfloat16, as tiles of matrices take them.
#pragma once
#include "amx_tiles.h"
#include "fold.h"

#ifdef __AMX_BF16__
namespace capsight {

// What keys of a layer are made with, the same for all chunks. The channels of a head are put into lanes: first
// halves of pairs, second halves, then what is not turned; each part is filled up with zeros.
struct AmxLayer {
  int64_t of = 0;                // number of the call
  int64_t rank, half, wide;      // R; lanes of first halves, lanes
  int64_t pairs[3];              // of each axis, the fastest, that keys are made of
  std::vector<int64_t> channel;  // [wide], which one a lane has, or -1
  Words axes;                    // [H, wide / SIDE, R / GROUP, SIDE, SIDE], two coordinates each
  Floats means;                  // [H, wide]

  // With what is not turned, or without.
  void take(const Joint& s, int64_t heads, const int64_t* some, bool with_rest) {
    std::copy_n(some, 3, pairs);
    rank = s.latents.rank(), half = up(pairs[0] + pairs[1] + pairs[2], SIDE), wide = 2 * half;
    channel.assign(wide, -1);
    for (int64_t axis = 0, at = 0; axis < 3; at += pairs[axis++])
      for (int64_t i = 0; i < pairs[axis]; i++)
        channel[at + i] = s.order[axis][i], channel[half + at + i] = s.order[axis][s.pairs[axis] + i];
    for (int64_t i = 2 * s.pairs[0]; with_rest && i < s.widths[0]; i++) channel.push_back(s.order[0][i]);
    wide = up(channel.size(), 2 * SIDE), channel.resize(wide, -1);
    axes.resize(heads * wide * rank / 2), means.resize(heads * wide);
    uint32_t* to = axes.data();
    for (int64_t head = 0; head < heads; head++)
      for (int64_t i = 0; i < wide; i += SIDE) {
        for (int n = 0; n < SIDE; n++)
          means[head * wide + i + n] = channel[i + n] < 0 ? 0 : s.key_mean[head * s.channels + channel[i + n]];
        for (int64_t r = 0; r < rank; r += GROUP, to += SIDE * SIDE) {
          __m512i x[SIDE];
          for (int n = 0; n < SIDE; n++)
            x[n] = row(s, head, channel[i + n], r);
          transpose(x);
          for (int n = 0; n < SIDE; n++) _mm512_store_si512(to + n * SIDE, x[n]);
        }
      }
  }

  static int64_t up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

  // A group of a channel's axes from number `first` on; 0 for no channel.
  static __m512i row(const Joint& s, int64_t head, int64_t channel, int64_t first) {
    if (channel < 0) return __m512i{};
    const char* row = s.axis(s.key_axes, head, channel) + first;
    const float* steps = s.key_steps + first;
    vf x[2];
    Stored<I8>::load(row, x), Stored<I8>::load(row + W, x + 1);
    return both((__m512)(x[0] * get<vf>(steps)), (__m512)(x[1] * get<vf>(steps + W)));
  }
};

static thread_local AmxLayer amx_layer;

// What opened latents lie in, kept for the next ones of the same thread.
struct AmxOpened {
  Floats scales;       // [tokens, R / GROUP]
  Words plain, along;  // [spans, R / GROUP, SPAN, SIDE], two coordinates each; [spans, 2, SIDE, SIDE], two tokens each
};
static thread_local AmxOpened amx_opened;

class AmxLatents {
 public:
  explicit AmxLatents(const Latents& latents) : latents(latents), groups(latents.rank() / GROUP) {
    alignas(64) float number[2][SIDE];
    for (int n = 0; n < SIDE; n++)
      number[0][n] = n - 7, number[1][n] = (n & 2 ? 1 : -1) * (n & 1 ? latents.outer : latents.inner);
    four = _mm512_load_ps(number[0]), two = _mm512_load_ps(number[1]);
  }

  // Latents of tokens from one on; what spans have more is 0.
  void open(int64_t first, int64_t tokens) {
    int64_t spans = (tokens + SPAN - 1) / SPAN, i = 0, many = tokens * groups;
    grow(room.scales, spans * SPAN * groups), grow(room.plain, spans * SPAN * groups * SIDE), grow(room.along, spans * SPAN * SIDE);
    const uint16_t* given = latents.scales + first * groups;
    for (; i + W <= many; i += W) Stored<F16>::load((const char*)(given + i), (vf*)&room.scales[i]);
    for (; i < many; i++) room.scales[i] = of_half(given[i]);
    std::fill(room.scales.begin() + many, room.scales.begin() + spans * SPAN * groups, 0.f);
    const uint8_t* codes = latents.codes + first * latents.width;
    for (int64_t t = 0; t < spans * SPAN; t += 2) {
      const uint8_t *x = codes + std::min(t, tokens - 1) * latents.width, *y = codes + std::min(t + 1, tokens - 1) * latents.width;
      int64_t four = latents.eight / GROUP, two = four + latents.four / GROUP;
      open_pair<8>(x, y, t, 0, four);
      open_pair<4>(x + latents.eight, y + latents.eight, t, four, two);
      open_pair<2>(x + latents.eight + latents.four / 2, y + latents.eight + latents.four / 2, t, two, groups);
    }
  }

  // Tiles of a span, group after group: tokens 0 to 15, then 16 to 31.
  const uint32_t* plain(int64_t span) const { return &room.plain[span * groups * SPAN * SIDE]; }
  // The two tiles of a span for one group, if it was put there.
  const uint32_t* along(int64_t span) const { return &room.along[span * SPAN * SIDE]; }
  void put_along(int64_t span, int64_t r) {
    const uint32_t* x = &room.plain[(span * groups + r / GROUP) * SPAN * SIDE];
    uint32_t* to = &room.along[span * SPAN * SIDE];
#pragma GCC unroll 4
    for (int t = 0; t < SIDE; t++, x += 2 * SIDE, to += SIDE) {
      __m512i a = _mm512_load_si512(x), b = _mm512_load_si512(x + SIDE);
      _mm512_store_si512(to, _mm512_unpacklo_epi16(a, b));
      _mm512_store_si512(to + SIDE * SIDE, _mm512_unpackhi_epi16(a, b));
    }
    settle();
  }

 private:
  const Latents& latents;
  const int64_t groups;
  __m512 four, two;  // what codes stand for
  AmxOpened& room = amx_opened;

  // A group of one token.
  template <int BITS>
  INLINE __m512i group(const uint8_t* p, float scale) const {
    __m512 size = _mm512_set1_ps(scale);
    if constexpr (BITS == 8) {
      __m256i code = _mm256_sub_epi8(_mm256_loadu_si256((const __m256i*)p), _mm256_set1_epi8(127));
      __m512 x = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(code)));
      __m512 y = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(code, 1)));
      return both(x * size, y * size);
    } else {  // all that codes may stand for, twice, since the fifth bit of an index is that of a neighbour
      __m512i table = both((BITS == 4 ? four : two) * size, (BITS == 4 ? four : two) * size), code;
      if constexpr (BITS == 4) {
        code = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
        code = _mm512_or_si512(code, _mm512_slli_epi32(code, 12));
      } else {
        const vi n = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, at = n * 0x40004 + 0x20000;  // bits 0, 2, .. 62
        code = _mm512_multishift_epi64_epi8((__m512i)at, _mm512_set1_epi64(get<int64_t>(p)));
      }
      return _mm512_permutexvar_epi16(code, table);
    }
  }

  // Groups of two tokens, whose codes begin at x and y.
  template <int BITS>
  INLINE void open_pair(const uint8_t* x, const uint8_t* y, int64_t t, int64_t from, int64_t to) {
    constexpr int64_t EACH = SPAN * SIDE;
    const float *scales = &room.scales[t * groups], *others = scales + groups;
    uint32_t* plain = &room.plain[(t / SPAN * groups + from) * EACH + t % SPAN * SIDE];
    for (int64_t g = from; g < to; g++, plain += EACH, x += GROUP * BITS / 8, y += GROUP * BITS / 8) {
      __m512i a = group<BITS>(x, scales[g]), b = group<BITS>(y, others[g]);
      _mm512_store_si512(plain, a);
      _mm512_store_si512(plain + SIDE, b);
    }
  }
};

}  // namespace capsight
#endif
