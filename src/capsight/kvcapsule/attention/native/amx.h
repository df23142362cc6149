// A chunk of one row's latents on machines that multiply tiles of matrices (Intel AMX): keys are rebuilt.
//
// Latents and probabilities are rounded to bfloat16, the axes are stored so; sums are float.
#pragma once
#include "fold.h"
#include "softmax.h"

#ifdef __AMX_BF16__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace capsight {

constexpr int64_t AMX_STRETCH = 1 << 18;    // numbers of latents that are at hand
constexpr int64_t AMX_AXES = 3 << 18;       // bytes of axes that stay in cache
constexpr int SIDE = 16, SPAN = 2 * SIDE;  // rows of a tile, or its numbers of 32 bits; tokens at a time

// What a chunk needs room for, kept for the next one of the same thread.
struct AmxRoom {
  Floats scales, keys, p;  // [SPAN, R / GROUP], [spans, H D, SPAN], [tiles, H C, TILE]
  Floats cosines, sines;   // [pairs, SPAN]
  std::vector<uint32_t, Lines<uint32_t>> across, along;  // two numbers each: [spans, 2, R / 2, SIDE] and [tokens / 2, R]
  std::vector<uint16_t, Lines<uint16_t>> shares, axes;   // in bfloat16: p [H C, tokens]; [2 SIDE, coordinates at a time]
};
inline thread_local AmxRoom amx_room;

// Tile instructions do not tell compilers what memory they read and write.
INLINE void settle() { __asm__ volatile("" ::: "memory"); }

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

class AmxChunk {
 public:
  // Whether it can: whole tiles, and the system lets this process.
  static bool takes(const Joint& s, int64_t heads) {
    static const bool allowed = !syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */);
    return allowed && heads * s.channels % (2 * SIDE) == 0;
  }

  // Queries [H, C, D], scaled.
  AmxChunk(const Joint& s, const float* query, int64_t heads, int64_t count)
      : s(s), rank(s.latents.rank()), count(count), all(heads * count), rows(heads * s.channels),
        padded((all + SIDE - 1) / SIDE * SIDE), query(query), out(padded * rank), run((all + MOST - 1) / MOST) {
    float number[SIDE];
    for (int n = 0; n < SIDE; n++) number[n] = (n & 2 ? 1 : -1) * (n & 1 ? s.latents.outer : s.latents.inner);
    two = _mm512_loadu_ps(number);
    for (int n = 0; n < SIDE; n++) number[n] = n - 7;
    four = _mm512_loadu_ps(number);
  }

  void attend(int64_t start, int64_t tokens) {
    struct {
      uint8_t palette = 1, other[15] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shapes;
    settle();
    _tile_loadconfig(&shapes);
    int64_t most = std::max<int64_t>(4, AMX_STRETCH / rank / TILE) * TILE;
    for (int64_t first = start, end = start + tokens, here; first < end; first += here) {
      here = std::min(most, end - first);
      int64_t tiles = (here + TILE - 1) / TILE, spans = tiles * TILE / SPAN;
      room.across.resize(spans * rank * SIDE), room.along.resize(spans * rank * SIDE), room.keys.resize(spans * rows * SPAN);
      room.p.resize(tiles * all * TILE), room.shares.assign(padded * tiles * TILE, 0);
      auto some = [&](int64_t span) { return std::max<int64_t>(0, std::min<int64_t>(SPAN, here - span * SPAN)); };
      for (int64_t i = 0; i < spans; i++) open_span(first + i * SPAN, some(i), i);
      make_keys(spans);
      for (int64_t i = 0; i < spans; i++)
        score(first + i * SPAN, some(i), &room.keys[i * rows * SPAN], &room.p[i * SPAN / TILE * all * TILE + i * SPAN % TILE]);
      for (int64_t c = 0; c < all; c++) {
        float* p = &room.p[c * TILE];
        multiply(&out[c * rank], rank, run[c / MOST].take(c % MOST, p, here, all * TILE));
        for (int64_t i = 0; i < tiles; i++)
          for (int t = 0; t < TILE; t += 2 * SIDE)
            _mm512_storeu_si512(&room.shares[(c * tiles + i) * TILE + t], both(_mm512_loadu_ps(p + i * all * TILE + t), _mm512_loadu_ps(p + i * all * TILE + t + SIDE)));
      }
      gather(tiles);
    }
    _tile_release();
  }

  // [H, C] times [most, total, R numbers].
  void results(float* x) const {
    for (int64_t c = 0; c < all; c++, x += rank + 2) {
      x[0] = run[c / MOST].most[c % MOST], x[1] = run[c / MOST].total[c % MOST];
      for (int64_t i = 0; i < rank; i += GROUP) {  // that lie as two rows of numbers were mixed
        __m512d a = _mm512_loadu_pd(&out[c * rank + i]), b = _mm512_loadu_pd(&out[c * rank + i + SIDE]);
        _mm512_storeu_pd(x + 2 + i, _mm512_permutex2var_pd(a, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), b));
        _mm512_storeu_pd(x + 2 + i + SIDE, _mm512_permutex2var_pd(a, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), b));
      }
    }
  }

 private:
  const Joint& s;
  const int64_t rank, count, all, rows, padded;
  const float* query;
  Floats out;  // [H C, R]
  std::vector<Softmax> run;
  __m512 two, four;  // what codes stand for
  AmxRoom& room = amx_room;

  // Numbers 0 to 15 and 16 to 31 in bfloat16.
  static INLINE __m512i both(__m512 first, __m512 second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }

  // 32 numbers of one token.
  template <int BITS>
  INLINE __m512i group(const uint8_t* p, float scale) const {
    __m512 x[2], size = _mm512_set1_ps(scale);
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++, p += SIDE * BITS / 8) {
      if constexpr (BITS == 8)
        x[i] = _mm512_cvtepi32_ps(_mm512_sub_epi32((__m512i)wide8((const char*)p), _mm512_set1_epi32(127)));
      else if constexpr (BITS == 4) {
        const __m512i half = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
        const __m512i shift = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
        __m512i code = _mm512_castsi128_si512(_mm_loadl_epi64((const __m128i*)p));
        code = _mm512_srlv_epi32(_mm512_permutexvar_epi32(half, code), shift);
        x[i] = _mm512_permutexvar_ps(code, four);
      } else {
        const __m512i shift = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        x[i] = _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_set1_epi32(get<int32_t>(p)), shift), two);
      }
    }
    return both(_mm512_mul_ps(x[0], size), _mm512_mul_ps(x[1], size));
  }

  // Groups of the tokens of a span: pairs of numbers `across`, pairs of tokens `along`.
  template <int BITS>
  void open_groups(int64_t first, int tokens, int64_t span, int64_t from, int64_t groups, int64_t at) {
    int64_t each = rank / GROUP, width = s.latents.width, size = rank;
    const uint8_t* codes = s.latents.codes + first * width + at;
    const float* scales = room.scales.data() + from;
    uint32_t *across = &room.across[span * rank * SIDE + from * SIDE * SIDE], *along = &room.along[span * rank * SIDE + from * GROUP];
    for (int64_t g = 0; g < groups; g++)
      for (int t = 0; t < SPAN; t += SIDE) {
        __m512i x[SIDE];
#pragma GCC unroll 16
        for (int n = 0; n < SIDE; n++) {
          int token = std::max(0, std::min(t + n, tokens - 1));
          x[n] = group<BITS>(codes + token * width + g * GROUP * BITS / 8, t + n < tokens ? scales[token * each + g] : 0);
        }
#pragma GCC unroll 8
        for (int n = 0; n < SIDE; n += 2) {
          uint32_t* to = along + (t + n) / 2 * size + g * GROUP;
          _mm512_storeu_si512(to, _mm512_unpacklo_epi16(x[n], x[n + 1]));
          _mm512_storeu_si512(to + SIDE, _mm512_unpackhi_epi16(x[n], x[n + 1]));
        }
        transpose(x);
#pragma GCC unroll 16
        for (int n = 0; n < SIDE; n++) _mm512_storeu_si512(across + t * size / 2 + (g * SIDE + n) * SIDE, x[n]);
      }
  }
  void open_span(int64_t first, int tokens, int64_t span) {
    const Latents& z = s.latents;
    int64_t each = rank / GROUP;
    room.scales.resize(SPAN * each);
    const uint16_t* scales = z.scales + first * each;
    int64_t i = 0, many = tokens * each;
    for (; i + W <= many; i += W) Stored<F16>::load((const char*)(scales + i), (vf*)&room.scales[i]);
    for (; i < many; i++) room.scales[i] = of_half(scales[i]);
    open_groups<8>(first, tokens, span, 0, z.eight / GROUP, 0);
    open_groups<4>(first, tokens, span, z.eight / GROUP, z.four / GROUP, z.eight);
    open_groups<2>(first, tokens, span, (z.eight + z.four) / GROUP, z.two / GROUP, z.eight + z.four / 2);
  }

  // Axes of two tiles' rows, so many groups of coordinates from one on, to room.axes.
  void open_axes(int64_t row, int64_t from, int64_t groups) {
    const float* steps = s.key_steps + from * GROUP;
    settle();
    for (int64_t i = 0; i < 2 * SIDE; i++) {
      const char* given = (const char*)s.key_axes + (row + i) * rank + from * GROUP;
      uint16_t* to = &room.axes[i * groups * GROUP];
      for (int64_t r = 0; r < groups * GROUP; r += GROUP) {
        vf x[2];
        Stored<I8>::load(given + r, x), Stored<I8>::load(given + r + W, x + 1);
        _mm512_storeu_si512(to + r, both((__m512)(x[0] * get<vf>(steps + r)), (__m512)(x[1] * get<vf>(steps + r + W))));
      }
    }
    settle();
  }

  // Keys [spans, H D, SPAN] before RoPE, less their means; so many coordinates at a time that axes stay in cache.
  void make_keys(int64_t spans) {
    int64_t groups = rank / GROUP, most = std::max<int64_t>(1, std::min(groups, AMX_AXES / rows / 64));
    room.axes.resize(2 * SIDE * most * GROUP);
    for (int64_t from = 0, here; from < groups; from += here) {
      here = std::min(most, groups - from);
      for (int64_t row = 0, step = here * 64; row < rows; row += 2 * SIDE) {
        open_axes(row, from, here);
        for (int64_t span = 0; span < spans; span++) {
          const char* axes = (const char*)room.axes.data();
          const uint32_t *z = &room.across[span * rank * SIDE + from * SIDE * SIDE], *more = z + rank / 2 * SIDE;
          float *to = &room.keys[(span * rows + row) * SPAN], *below = to + SIDE * SPAN;
          if (from) {
            _tile_loadd(0, to, SPAN * 4);
            _tile_loadd(1, to + SIDE, SPAN * 4);
            _tile_loadd(2, below, SPAN * 4);
            _tile_loadd(3, below + SIDE, SPAN * 4);
          } else {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
          }
          for (int64_t k = 0; k < here; k++, axes += 64, z += SIDE * SIDE, more += SIDE * SIDE) {
            _tile_loadd(4, axes, step);
            _tile_loadd(5, axes + SIDE * step, step);
            _tile_loadd(6, z, 64);
            _tile_loadd(7, more, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
          }
          _tile_stored(0, to, SPAN * 4);
          _tile_stored(1, to + SIDE, SPAN * 4);
          _tile_stored(2, below, SPAN * 4);
          _tile_stored(3, below + SIDE, SPAN * 4);
        }
      }
    }
    settle();
  }

  // Scores of the keys, turned to the places of tokens from one on: p [H C, TILE].
  void score(int64_t first, int tokens, const float* keys, float* p) {
    int64_t pairs = s.pairs[0] + s.pairs[1] + s.pairs[2];
    room.cosines.resize(pairs * SPAN), room.sines.resize(pairs * SPAN);
    float *cosine = room.cosines.data(), *sine = room.sines.data();
    for (int axis = 0; axis < 3; axis++) {
      int32_t at[SPAN] = {};
      for (int t = 0; t < tokens; t++) at[t] = s.places[axis * s.tokens + first + t] * s.padded(axis);
      for (int64_t i = 0; i < s.pairs[axis]; i++, cosine += SPAN, sine += SPAN)
        for (int t = 0; t < SPAN; t += SIDE) {
          __m512i index = _mm512_loadu_si512(at + t);
          _mm512_storeu_ps(cosine + t, _mm512_i32gather_ps(index, s.cosines[axis] + i, 4));
          _mm512_storeu_ps(sine + t, _mm512_i32gather_ps(index, s.sines[axis] + i, 4));
        }
    }
    for (int64_t c = 0; c < all;) {
      int64_t taken = std::min<int64_t>((c / count + 1) * count - c, MOST);
      some_scores(taken)(*this, c, keys, p);
      c += taken;
    }
  }

  typedef void (*Some)(const AmxChunk&, int64_t, const float*, float*);
  template <int C = MOST>
  static Some some_scores(int64_t queries) {
    if constexpr (C > 1) {
      if (queries < C) return some_scores<C - 1>(queries);
    }
    return [](const AmxChunk& own, int64_t c, const float* keys, float* p) { own.head_scores<C>(c, keys, p); };
  }

  // Queries c to c + C of one head.
  template <int C>
  void head_scores(int64_t c, const float* all_keys, float* p) const {
    int64_t head = c / count;
    const float *q = query + c * s.channels, *keys = all_keys + head * s.channels * SPAN, *mean = s.key_mean + head * s.channels;
    for (int t = 0; t < SPAN; t += SIDE) {
      __m512 sum[C] = {};
      const float *cosine = &room.cosines[t], *sine = &room.sines[t];
      auto key = [&](int64_t i) { return _mm512_loadu_ps(keys + i * SPAN + t) + _mm512_set1_ps(mean[i]); };
      for (int axis = 0; axis < 3; axis++) {
        const int64_t *order = s.order[axis], half = s.pairs[axis];
        for (int64_t i = 0; i < half; i++, cosine += SPAN, sine += SPAN) {
          int64_t x = order[i], y = order[half + i];
          __m512 a = key(x), b = key(y), cosines = _mm512_loadu_ps(cosine), sines = _mm512_loadu_ps(sine);
          __m512 first = a * cosines - b * sines, second = b * cosines + a * sines;
          for (int n = 0; n < C; n++)
            sum[n] += first * _mm512_set1_ps(q[n * s.channels + x]) + second * _mm512_set1_ps(q[n * s.channels + y]);
        }
        for (int64_t i = 2 * half; i < s.widths[axis]; i++)
          for (int n = 0; n < C; n++) sum[n] += key(order[i]) * _mm512_set1_ps(q[n * s.channels + order[i]]);
      }
      for (int n = 0; n < C; n++) _mm512_storeu_ps(p + (c + n) * TILE + t, sum[n]);
    }
  }

  // Sums of latents by probability.
  void gather(int64_t tiles) {
    settle();
    for (int64_t c = 0; c < padded; c += SIDE)
      for (int64_t r = 0; r < rank; r += 2 * SIDE) {
        float* to = &out[c * rank + r];
        _tile_loadd(0, to, rank * 4);
        _tile_loadd(1, to + SIDE, rank * 4);
        const uint32_t* z = &room.along[r];
        for (int64_t k = 0; k < tiles * 2; k++, z += SIDE * rank) {
          _tile_loadd(2, &room.shares[c * tiles * TILE + k * 2 * SIDE], tiles * TILE * 2);
          _tile_loadd(3, z, rank * 4);
          _tile_loadd(4, z + SIDE, rank * 4);
          _tile_dpbf16ps(0, 2, 3);
          _tile_dpbf16ps(1, 2, 4);
        }
        _tile_stored(0, to, rank * 4);
        _tile_stored(1, to + SIDE, rank * 4);
      }
    settle();
  }
};

}  // namespace capsight
#endif
