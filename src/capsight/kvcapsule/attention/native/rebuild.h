// Scores over keys that are rebuilt, a tile at a time: where nearly every token has a place of its own.
#pragma once
#include "fold.h"

namespace capsight {

// Keys of up to TILE tokens of one KV head: channel by channel, so that tokens lie in the lanes.
template <class N>
class Rebuilt {
 public:
  explicit Rebuilt(const Joint& s) : s(s), rank(s.latents.rank()), by(scores_of<N>(MOST)), keys((s.channels + MOST) * TILE), some(MOST * rank) {}

  // Latents [count, R] of tokens from number `first` on.
  void make(const typename N::T* z, int64_t first, int count, int64_t head) {
    vf found[W * MOST];
    alignas(64) float none[W] = {};
    for (int64_t i = 0; i < s.channels; i += MOST) {
      int here = std::min<int64_t>(MOST, s.channels - i);
      for (int n = 0; n < here; n++)
        for (int64_t r = 0; r < rank; r += N::width) {
          vf x[N::pair];
          for (int j = 0; j < N::pair; j++)
            Stored<I8>::load(s.axis(s.key_axes, head, i + n) + r + j * W, x + j), x[j] *= get<vf>(s.key_steps + r + j * W);
          auto made = N::vector(x);
          std::memcpy(&some[n * rank + r], &made, sizeof made);
        }
      for (int t = 0; t < count; t += W) {
        int own = std::min(W, count - t);
        by.plain(z + t * rank, rank, rank, own, some.data(), nullptr, found, nullptr);
        for (int rest = own * MOST; rest < W * MOST; rest++) found[rest] = vf{};
        by.add(found, none, 0, &keys[i * TILE + t]);
      }
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
  const Joint& s;
  const int64_t rank;
  const Scores<N> by;
  Floats keys;      // [D, TILE]
  Numbers<N> some;  // [MOST, R], axes of some channels
};

}  // namespace capsight
