// Products of a few queries with a tile of tokens in levels of 8 or 4 bits, and of their probabilities with the
// tokens', by tiles of matrices of bytes (Intel AMX). Levels are multiplied as they are; a query's channels are integers
// of 22 bits in steps of the largest one, as three bytes, and its probabilities in a tile of 15, as two.
#pragma once
#include "amx_tiles.h"

namespace capsight {

#ifdef __AMX_INT8__

// What is made for a tile, kept for the next chunk of the same thread.
struct AmxBytes {
  Words queries, rest;  // [channels / TILE, SIDE, SIDE], four channels each: two bytes, and the third
  Words mixed, found;   // [4, SIDE, SIDE], four tokens each; [TILE, SIDE], and for the third byte
  std::vector<uint8_t, Lines<uint8_t>> tokens, shares;  // [TILE, channels]; [SIDE, TILE]
};
static thread_local AmxBytes amx_bytes;

class Levels {
 public:
  static bool serve(int32_t format, int64_t queries, int64_t channels) {
    bool whole = channels % (format == U8 ? TILE : 2 * TILE) == 0 || channels == TILE;
    return (format == U8 || format == U4) && whole && channels <= WIDEST && queries >= LEAST && tiles_allowed();
  }

  Levels(int32_t format, int64_t taken, int64_t channels) : format(format), taken(taken), channels(channels) {
    grow(room.queries, channels * SIDE / 4), grow(room.rest, channels * SIDE / 4), grow(room.mixed, 4 * SIDE * SIDE), grow(room.found, 2 * TILE * SIDE), grow(room.tokens, TILE * channels);
    room.shares.assign(SIDE * TILE, 0);
  }

  // Queries [taken, channels].
  void take(const float* q) {
    for (int64_t c = 0; c < taken; c++) sizes[c] = step_of(q + c * channels, channels);
    for (int64_t i = 0; i < channels; i += TILE) {
      __m512i x[SIDE] = {}, rest[SIDE] = {};
      for (int64_t c = 0; c < taken; c++) split(q + c * channels + i, sizes[c], x + c, x + MOST + c, rest + MOST + c);
      transpose(x), transpose(rest);
      for (int n = 0; n < SIDE; n++) {
        _mm512_store_si512(&room.queries[(i / TILE * SIDE + n) * SIDE], x[n]);
        _mm512_store_si512(&room.rest[(i / TILE * SIDE + n) * SIDE], rest[n]);
      }
    }
  }

  // Their scores [taken, TILE] over a tile; of what follows the tokens, 0.
  void scores(const Tile& d, float* p) {
    Ahead ahead(d.next, d.stride, d.lines);
    auto [tokens, stride] = format == U8 && d.count == TILE ? Bytes{d.tokens, d.stride} : opened(d);
    uint32_t* found = room.found.data();
    settle();
    for (int half = 0; half < 2; half++, found += 2 * SIDE * SIDE) {
      const char *own = tokens + half * SPAN * stride, *below = own + SIDE * stride;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t i = 0; i < channels; i += TILE) {
        _tile_loadd(6, &room.queries[i * SIDE / 4], 64);
        _tile_loadd(4, own + i, stride);
        _tile_dpbusd(0, 4, 6);
        if (i < d.lines * 64) ahead.fetch(SIDE / 4);
        _tile_loadd(5, below + i, stride);
        _tile_dpbusd(1, 5, 6);
        if (i < d.lines * 64) ahead.fetch(SIDE / 4);
        _tile_loadd(7, &room.rest[i * SIDE / 4], 64);
        _tile_dpbusd(2, 4, 7);
        _tile_dpbusd(3, 5, 7);
      }
      keep((float*)found, SIDE * SIDE, TILE * SIDE, 64);
    }
    settle();
    for (int first = 0; first < TILE; first += SIDE) {
      __m512i x[SIDE];
      for (int n = 0; n < SIDE; n++) {  // of a query's two sums the second takes in the third
        const uint32_t* from = &room.found[(first + n) * SIDE];
        x[n] = _mm512_load_si512(from);
        x[n] = _mm512_mask_add_epi32(x[n], 0xff00, _mm512_slli_epi32(x[n], 7), _mm512_load_si512(from + TILE * SIDE));
      }
      transpose(x);
      for (int64_t c = 0; c < taken; c++) {
        vf low = (vf)_mm512_cvtepi32_ps(x[MOST + c]) * (sizes[c] / 128);
        put(p + c * TILE + first, (vf)_mm512_cvtepi32_ps(x[c]) * (sizes[c] * 128) + low);
      }
    }
  }

  // Adds what the tile has, times p [taken, TILE], to [taken, channels].
  void sums(const Tile& d, const float* p, float* out) {
    Ahead ahead(d.next, d.stride, d.lines);
    float steps[MOST];
    for (int64_t c = 0; c < taken; c++) {
      steps[c] = step_of(p + c * TILE, TILE);
      split(p + c * TILE, steps[c], (__m512i*)&room.shares[c * TILE], (__m512i*)&room.shares[(MOST + c) * TILE], nullptr);
    }
    settle();
    _tile_loadd(4, room.shares.data(), 64);
    const Bytes own = d.count == TILE ? Bytes{d.tokens, d.stride} : opened(d);
    for (int64_t i = 0; i < channels; i += TILE) {
      by_kind(format == U8 || d.count < TILE, [&](auto levels) {
        for (int n = 0; n < SIDE; n++) {
          auto x = [&](int t) { return levels(own.tokens + (4 * n + t) * own.stride, i); };
          mix(x(0), x(1), x(2), x(3), &room.mixed[n * SIDE]);
          if (i < d.lines * 64) ahead.fetch(1);
        }
      });
      settle();
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      _tile_loadd(5, &room.mixed[0], 64);
      _tile_dpbsud(0, 4, 5);
      _tile_loadd(6, &room.mixed[SIDE * SIDE], 64);
      _tile_dpbsud(1, 4, 6);
      _tile_loadd(5, &room.mixed[2 * SIDE * SIDE], 64);
      _tile_dpbsud(2, 4, 5);
      _tile_loadd(6, &room.mixed[3 * SIDE * SIDE], 64);
      _tile_dpbsud(3, 4, 6);
      keep((float*)room.found.data(), SIDE * SIDE, 2 * SIDE * SIDE, 64);
      settle();
      for (int64_t c = 0; c < taken; c++)
        for (int n = 0; n < 4; n++) {
          const uint32_t* own = &room.found[(n * SIDE + c) * SIDE];
          float* to = out + c * channels + i + n * SIDE;
          put(to, get<vf>(to) + together(_mm512_load_si512(own), _mm512_load_si512(own + MOST * SIDE)) * steps[c]);
        }
    }
  }

  // Sums of query c out of [taken, channels].
  void result(const float* out, int64_t c, float* to) const {
    for (int64_t i = 0; i < channels; i += 4) {  // four channels of each of four tiles follow each other
      int64_t lane = i % TILE / SIDE, n = i % SIDE / 4;
      std::copy_n(out + c * channels + i / TILE * TILE + n * SIDE + 4 * lane, 4, to + i);
    }
  }

 private:
  static constexpr int64_t LEAST = 2, WIDEST = 512;  // fewer queries are as much work without tiles; more channels do not fit sums
  static constexpr float TOP = 127 * 128 + 63;
  const int32_t format;
  const int64_t taken, channels;
  float sizes[MOST];  // steps of queries
  AmxBytes& room = amx_bytes;

  // The step in which numbers are integers up to TOP; NaN where one is none or endless.
  static float step_of(const float* x, int64_t count) {
    __m512 most = _mm512_setzero_ps(), sum = most;
    for (int64_t i = 0; i < count; i += SIDE) {
      __m512 own = _mm512_loadu_ps(x + i);
      most = _mm512_max_ps(_mm512_abs_ps(own), most), sum += own * 0.f;
    }
    return _mm512_reduce_max_ps(most) / TOP + _mm512_reduce_add_ps(sum);
  }

  // TILE numbers in steps, as 128 times the first byte and the second; and 128 times what is left, unless null.
  static INLINE void split(const float* x, float step, __m512i* first, __m512i* second, __m512i* third) {
    const __m512 inverse = _mm512_set1_ps(step > 0 ? 1 / step : 0);
    for (int i = 0; i < 4; i++) {
      __m512 given = _mm512_loadu_ps(x + i * SIDE) * inverse;
      __m512i own = _mm512_cvtps_epi32(given);
      if (third) _mm_store_si128((__m128i*)third + i, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32((given - _mm512_cvtepi32_ps(own)) * 128.f)));
      __m512i high = _mm512_srai_epi32(_mm512_add_epi32(own, _mm512_set1_epi32(64)), 7);
      _mm_store_si128((__m128i*)first + i, _mm512_cvtepi32_epi8(high));
      _mm_store_si128((__m128i*)second + i, _mm512_cvtepi32_epi8(_mm512_sub_epi32(own, _mm512_slli_epi32(high, 7))));
    }
  }
  static INLINE vf together(__m512i first, __m512i second) {
    return (vf)_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(first, 7), second));
  }

  // A tile in bytes.
  struct Bytes {
    const char* tokens;
    int64_t stride;
  };
  // The same of one that is not, or not full: 0 after its tokens.
  Bytes opened(const Tile& d) {
    uint8_t* to = room.tokens.data();
    by_kind(format == U8, [&](auto levels) {
      for (int64_t i = 0; i < channels; i += TILE)
        for (int t = 0; t < d.count; t++) _mm512_store_si512(to + t * channels + i, levels(d.tokens + t * d.stride, i));
    });
    std::fill(to + d.count * channels, to + TILE * channels, 0);
    return {(const char*)to, channels};
  }

  // Runs with what gives TILE channels of a token, from one on, as bytes.
  template <class F>
  INLINE void by_kind(bool bytes, F run) const {
    const __m512i low = _mm512_set1_epi8(15);
    const int64_t half = channels / 2;
    if (bytes) run([](const char* token, int64_t from) { return _mm512_loadu_si512(token + from); });
    else if (channels == TILE)
      run([=](const char* token, int64_t) {
        __m256i x = _mm256_loadu_si256((const __m256i*)token);
        return _mm512_and_si512(_mm512_inserti64x4(_mm512_castsi256_si512(x), _mm256_srli_epi16(x, 4), 1), low);
      });
    else
      run([=](const char* token, int64_t from) {
        if (from < half) return _mm512_and_si512(_mm512_loadu_si512(token + from), low);
        return _mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(token + from - half), 4), low);
      });
  }

  // TILE channels of four tokens, side by side in four tiles.
  static INLINE void mix(__m512i x, __m512i y, __m512i z, __m512i w, uint32_t* to) {
    __m512i a = _mm512_unpacklo_epi8(x, y), b = _mm512_unpackhi_epi8(x, y);
    __m512i c = _mm512_unpacklo_epi8(z, w), d = _mm512_unpackhi_epi8(z, w);
    _mm512_store_si512(to, _mm512_unpacklo_epi16(a, c));
    _mm512_store_si512(to + SIDE * SIDE, _mm512_unpackhi_epi16(a, c));
    _mm512_store_si512(to + 2 * SIDE * SIDE, _mm512_unpacklo_epi16(b, d));
    _mm512_store_si512(to + 3 * SIDE * SIDE, _mm512_unpackhi_epi16(b, d));
  }
};

#else

// Nothing else multiplies tiles of bytes.
struct Levels {
  static bool serve(int32_t, int64_t, int64_t) { return false; }
  Levels(int32_t, int64_t, int64_t) {}
  void take(const float*) {}
  void scores(const Tile&, float*) {}
  void sums(const Tile&, const float*, float*) {}
  void result(const float*, int64_t, float*) const {}
};

#endif

}  // namespace capsight
