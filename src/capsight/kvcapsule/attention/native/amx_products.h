// Products of a few queries with a tile of tokens in bfloat16, and of their probabilities with the tokens', by tiles
// of matrices (Intel AMX).
#pragma once
#include "amx_tiles.h"
#include "tile.h"

namespace capsight {

#ifdef __AMX_BF16__

// What is made for a tile, kept for the next chunk of the same thread.
struct AmxTile {
  Words queries, mixed;   // [channels / SPAN, SIDE, SIDE], two channels each; [2, 2, SIDE, SIDE], two tokens each
  Halves tokens, shares;  // [TILE, channels]; [SIDE, TILE]
  Floats found;           // [TILE, SIDE]
};
static thread_local AmxTile amx_tile;

class Products {
 public:
  static constexpr int ROWS = SIDE;  // of sums
  static bool serve(int32_t format, int64_t queries, int64_t channels) {
    return format == BF16 && queries >= LEAST && channels % SPAN == 0 && tiles_allowed();
  }

  Products(int64_t taken, int64_t channels) : taken(taken), channels(channels) {
    grow(room.queries, channels * SIDE / 2), grow(room.mixed, 4 * SIDE * SIDE), grow(room.tokens, TILE * channels), grow(room.found, TILE * SIDE);
    room.shares.assign(SIDE * TILE, 0);
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
    auto [tokens, stride, next] = opened(d);
    const int64_t step = SIDE * stride;
    settle();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < channels; i += SPAN, tokens += 64, next = next ? next + 64 - TILE * stride : next) {
      _tile_loadd(6, &room.queries[i * SIDE / 2], 64);
      _tile_loadd(4, tokens, stride);
      _tile_dpbf16ps(0, 4, 6);
      ahead(next, stride);
      _tile_loadd(5, tokens + step, stride);
      _tile_dpbf16ps(1, 5, 6);
      ahead(next, stride);
      _tile_loadd(4, tokens + 2 * step, stride);
      _tile_dpbf16ps(2, 4, 6);
      ahead(next, stride);
      _tile_loadd(5, tokens + 3 * step, stride);
      _tile_dpbf16ps(3, 5, 6);
      ahead(next, stride);
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

  // Adds what the tile has, times p [taken, TILE], to [ROWS, channels].
  void sums(const Tile& d, const float* p, float* out) {
    auto [tokens, stride, next] = opened(d);
    for (int64_t c = 0; c < taken; c++)
      for (int t = 0; t < TILE; t += SPAN) _mm512_store_si512(&room.shares[c * TILE + t], rounded(p + c * TILE + t));
    settle();
    _tile_loadd(4, room.shares.data(), 2 * TILE);
    _tile_loadd(5, room.shares.data() + SPAN, 2 * TILE);
    for (int64_t i = 0; i < channels; i += SPAN, tokens += 64) {
      uint32_t* mixed = room.mixed.data();
      for (int half = 0; half < 2; half++, mixed += 2 * SIDE * SIDE)
        for (int n = 0; n < SIDE; n++) {
          const int64_t at = (half * SPAN + 2 * n) * stride;
          const char* from = tokens + at;
          __m512i a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + stride);
          if (next) __builtin_prefetch(next + i * 2 + at, 0, 2), __builtin_prefetch(next + i * 2 + at + stride, 0, 2);
          _mm512_store_si512(mixed + n * SIDE, _mm512_unpacklo_epi16(a, b));
          _mm512_store_si512(mixed + (SIDE + n) * SIDE, _mm512_unpackhi_epi16(a, b));
        }
      mixed = room.mixed.data();
      settle();
      _tile_loadd(0, out + i, 4 * channels);
      _tile_loadd(1, out + i + SIDE, 4 * channels);
      _tile_loadd(6, mixed, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, mixed + SIDE * SIDE, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(6, mixed + 2 * SIDE * SIDE, 64);
      _tile_dpbf16ps(0, 5, 6);
      _tile_loadd(7, mixed + 3 * SIDE * SIDE, 64);
      _tile_dpbf16ps(1, 5, 7);
      _tile_stored(0, out + i, 4 * channels);
      _tile_stored(1, out + i + SIDE, 4 * channels);
    }
    settle();
  }

  // Sums of query c out of [ROWS, channels].
  void result(const float* out, int64_t c, float* to) const {
    for (int64_t i = 0; i < channels; i += SPAN) unmix(out + c * channels + i, to + i);
  }

 private:
  static constexpr int64_t LEAST = 5;  // queries that are as much work without tiles
  const int64_t taken, channels;
  AmxTile& room = amx_tile;

  static INLINE __m512i rounded(const float* x) { return both(_mm512_loadu_ps(x), _mm512_loadu_ps(x + SIDE)); }

  struct Opened {
    const char* tokens;
    int64_t stride;
    const char* next;  // what is read next, if that is not fetched by then
  };
  // A tile, 0 after its tokens.
  Opened opened(const Tile& d) {
    if (d.count == TILE) return {d.tokens, d.stride, d.next};
    uint16_t* to = room.tokens.data();
    for (int t = 0; t < d.count; t++, to += channels) fetch(d, t), std::memcpy(to, d.tokens + t * d.stride, 2 * channels);
    std::fill(to, room.tokens.data() + TILE * channels, 0);
    return {(const char*)room.tokens.data(), 2 * channels, nullptr};
  }
  // Fetches a line of each of the next tokens, if any.
  static INLINE void ahead(const char*& next, int64_t stride) {
    for (int t = 0; t < SIDE && next; t++, next += stride) __builtin_prefetch(next, 0, 2);
  }
};

#else

// Nothing else multiplies tiles.
struct Products {
  static constexpr int ROWS = 0;
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
