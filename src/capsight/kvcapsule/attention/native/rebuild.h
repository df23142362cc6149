// Scores over keys that are rebuilt, a tile at a time: where nearly every token has a place of its own.
#pragma once
#include "fold.h"

namespace capsight {

// Keys of up to TILE tokens of one KV head: channel by channel, so that tokens lie in the lanes.
class Rebuilt {
 public:
  explicit Rebuilt(const Joint& s) : s(s), rank(s.latents.rank()), keys((s.channels + SOME) * TILE), some(SOME * rank) {}

  // Latents [count, R] of tokens from number `first` on.
  void make(const float* z, int64_t first, int count, int64_t head) {
    auto by = kernels(SOME, F32);
    Tile tile{(const char*)z, rank * 4, count, int(rank / W), int(rank), (const char*)z, 0};
    for (int64_t i = 0; i < s.channels; i += SOME) {
      int here = std::min<int64_t>(SOME, s.channels - i);
      for (int n = 0; n < here; n++) {
        float* own = some.data() + n * rank;
        widen(s.axis(s.key_axes, head, i + n), rank, own);
        for (int64_t r = 0; r < rank; r += W) put(own + r, get<vf>(own + r) * get<vf>(s.key_steps + r));
      }
      by.dots(tile, some.data(), &keys[i * TILE]);
    }
    for (int64_t i = 0; i < s.channels; i++) {
      float mean = s.key_mean[head * s.channels + i];
      for (int t = 0; t < count; t++) keys[i * TILE + t] += mean;
    }
    for (int axis = 0; axis < 3; axis++)
      for (int64_t i = 0; i < s.pairs[axis]; i++) {
        float *a = &keys[s.order[axis][i] * TILE], *b = &keys[s.order[axis][s.pairs[axis] + i] * TILE];
        for (int t = 0; t < count; t++) {
          int64_t at = s.places[axis * s.tokens + first + t] * s.padded(axis) + i;
          float cosine = s.cosines[axis][at], sine = s.sines[axis][at], x = a[t];
          a[t] = x * cosine - b[t] * sine, b[t] = b[t] * cosine + x * sine;
        }
      }
  }

  // Scores p [C, TILE] of queries [C, D].
  void score(const float* query, int64_t taken, float* p) const {
    for (int64_t c = 0; c < taken; c++) {
      vf sum[TILE / W] = {};
      for (int64_t i = 0; i < s.channels; i++)
        for (int t = 0; t < TILE / W; t++) sum[t] += query[c * s.channels + i] * get<vf>(&keys[i * TILE + t * W]);
      for (int t = 0; t < TILE / W; t++) put(p + c * TILE + t * W, sum[t]);
    }
  }

 private:
  static constexpr int SOME = MOST;  // channels at a time
  const Joint& s;
  const int64_t rank;
  Floats keys, some;  // [D, TILE] and [SOME, R]
};

}  // namespace capsight
