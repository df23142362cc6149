// Products of a few queries with a tile of tokens in bfloat16, and of their probabilities with the tokens', by tiles
// of matrices (Intel AMX).
#pragma once
#include "amx_tiles.h"

namespace capsight {

#ifdef __AMX_BF16__

// What is made for a tile, kept for the next chunk of the same thread.
struct AmxTile {
  Words queries, shares;  // [channels / SPAN, SIDE, SIDE], two channels each; [TILE / SIDE, SIDE, SIDE], see `sums`
  Halves tokens;          // [TILE, channels]
  Floats found;           // [TILE, SIDE]
};
static thread_local AmxTile amx_tile;

class Products {
 public:
  static bool serve(int32_t format, int64_t queries, int64_t channels) {
    return format == BF16 && queries >= LEAST && channels % SPAN == 0 && tiles_allowed();
  }

  Products(int64_t taken, int64_t channels) : taken(taken), channels(channels) {
    grow(room.queries, channels * SIDE / 2), grow(room.tokens, TILE * channels), grow(room.found, TILE * SIDE);
    room.shares.assign(TILE * SIDE, 0);
  }

  // Queries [taken, channels].
  void take(const float* q) {
    for (int64_t i = 0; i < channels; i += SPAN) {
      __m512i x[SIDE] = {};
      for (int64_t c = 0; c < taken; c++) x[c] = rounded(q + c * channels + i);
      transpose(x);
      for (int n = 0; n < SIDE; n++) _mm512_store_si512(&room.queries[(i / SPAN * SIDE + n) * SIDE], x[n]);
    }
  }

  // Their scores [taken, TILE] over a tile, times a factor; of what follows the tokens, 0.
  void scores(const Tile& d, float factor, float* p) {
    auto [tokens, stride, ahead] = opened(d);
    const int64_t step = SIDE * stride;
    settle();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < channels; i += SPAN, tokens += 64) {
      _tile_loadd(6, &room.queries[i * SIDE / 2], 64);
      _tile_loadd(4, tokens, stride);
      _tile_dpbf16ps(0, 4, 6);
      ahead.fetch(SIDE / 4);
      _tile_loadd(5, tokens + step, stride);
      _tile_dpbf16ps(1, 5, 6);
      ahead.fetch(SIDE / 4);
      _tile_loadd(4, tokens + 2 * step, stride);
      _tile_dpbf16ps(2, 4, 6);
      ahead.fetch(SIDE / 4);
      _tile_loadd(5, tokens + 3 * step, stride);
      _tile_dpbf16ps(3, 5, 6);
      ahead.fetch(SIDE / 4);
    }
    float* found = room.found.data();
    keep(found, SIDE * SIDE, 2 * SIDE * SIDE, 64);
    settle();
    for (int first = 0; first < TILE; first += SIDE, found += SIDE * SIDE) {
      __m512i x[SIDE];
      for (int n = 0; n < SIDE; n++) x[n] = _mm512_load_si512(found + n * SIDE);
      transpose(x);
      for (int64_t c = 0; c < taken; c++) put(p + c * TILE + first, (vf)x[c] * factor);
    }
  }

  // Adds what the tile has, times p [taken, TILE], to [taken, 2, channels / 2], even and odd channels. Two channels of a
  // token are multiplied as they lie: with its probability and 0, and with 0 and that.
  void sums(const Tile& d, const float* p, float* out) {
    auto [tokens, stride, ahead] = opened(d);
    for (int64_t c = 0; c < taken; c++)
      for (int t = 0; t < TILE; t += SIDE) {
        __m512i own = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(p + c * TILE + t)));
        _mm512_store_si512(&room.shares[t * SIDE + 2 * c * SIDE], own);
        _mm512_store_si512(&room.shares[t * SIDE + (2 * c + 1) * SIDE], _mm512_slli_epi32(own, 16));
      }
    settle();
    for (int64_t i = 0; i < channels; i += SPAN, tokens += 64) {
      _tile_loadd(0, out + i / 2, 2 * channels);
      _tile_loadd(4, &room.shares[0], 64);
      _tile_loadd(6, tokens, stride);
      _tile_dpbf16ps(0, 4, 6);
      ahead.fetch(SIDE / 4);
      _tile_loadd(5, &room.shares[SIDE * SIDE], 64);
      _tile_loadd(7, tokens + SIDE * stride, stride);
      _tile_dpbf16ps(0, 5, 7);
      ahead.fetch(SIDE / 4);
      _tile_loadd(4, &room.shares[2 * SIDE * SIDE], 64);
      _tile_loadd(6, tokens + 2 * SIDE * stride, stride);
      _tile_dpbf16ps(0, 4, 6);
      ahead.fetch(SIDE / 4);
      _tile_loadd(5, &room.shares[3 * SIDE * SIDE], 64);
      _tile_loadd(7, tokens + 3 * SIDE * stride, stride);
      _tile_dpbf16ps(0, 5, 7);
      ahead.fetch(SIDE / 4);
      _tile_stored(0, out + i / 2, 2 * channels);
    }
    settle();
  }

  // Sums of query c out of these.
  void result(const float* out, int64_t c, float* to) const {
    const float *even = out + c * channels, *odd = even + channels / 2;
    for (int64_t i = 0; i < channels; i += 2) to[i] = even[i / 2], to[i + 1] = odd[i / 2];
  }

 private:
  static constexpr int64_t LEAST = 4;  // queries; fewer are as much work without tiles
  const int64_t taken, channels;
  AmxTile& room = amx_tile;

  static INLINE __m512i rounded(const float* x) { return both(_mm512_loadu_ps(x), _mm512_loadu_ps(x + SIDE)); }

  struct Opened {
    const char* tokens;
    int64_t stride;
    Ahead ahead;  // of nothing where that is fetched by then
  };
  // A tile, 0 after its tokens.
  Opened opened(const Tile& d) {
    if (d.count == TILE) return {d.tokens, d.stride, {d.next, d.stride, d.lines}};
    uint16_t* to = room.tokens.data();
    for (int t = 0; t < d.count; t++, to += channels) fetch(d, t), std::memcpy(to, d.tokens + t * d.stride, 2 * channels);
    std::fill(to, room.tokens.data() + TILE * channels, 0);
    return {(const char*)room.tokens.data(), 2 * channels, {nullptr, 0, 0}};
  }
};

#else

// Nothing else multiplies tiles.
struct Products {
  static bool serve(int32_t, int64_t, int64_t) { return false; }
  Products(int64_t, int64_t) {}
  void take(const float*) {}
  void scores(const Tile&, float, float*) {}
  void sums(const Tile&, const float*, float*) {}
  void result(const float*, int64_t, float*) const {}
};
struct Tiles {};

#endif

}  // namespace capsight
