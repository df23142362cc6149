// Softmax as scores come, and of parts that were attended apart.
#pragma once
#include "tile.h"

namespace capsight {

// The state of up to MOST queries.
struct Softmax {
  float most[MOST], total[MOST] = {};  // largest score, normaliser
  Softmax() {
    for (float& x : most) x = -INFINITY;
  }

  // Scores of query c, `count` in tiles of TILE that are `stride` apart, become probabilities before they are
  // normalised; the factor of earlier ones.
  float take(int64_t c, float* x, int count, int64_t stride = TILE) {
    int tiles = (count + TILE - 1) / TILE;
    for (int t = count - (tiles - 1) * TILE; t < TILE; t++) x[(tiles - 1) * stride + t] = -INFINITY;
    vf best = get<vf>(x), sum = {};
    for (int i = 0; i < tiles; i++)
      for (int t = 0; t < TILE; t += W) {
        vf other = get<vf>(x + i * stride + t);
        best = other > best ? other : best;
      }
    float top = most_of(best, most[c]), shift = top == -INFINITY ? 0 : top;
    float keep = most[c] == shift ? 1 : std::exp(most[c] - shift);
    for (int i = 0; i < tiles; i++)
      for (int t = 0; t < TILE; t += W) {
        vf y = exp_of(get<vf>(x + i * stride + t) - shift);
        put(x + i * stride + t, y);
        sum += y;
      }
    most[c] = top, total[c] = total[c] * keep + sum_of(sum);
    return keep;
  }
};
INLINE void multiply(float* x, int64_t count, float factor) {
  if (factor != 1)
    for (int64_t i = 0; i < count; i += W) put(x + i, get<vf>(x + i) * factor);
}

// Parts [most, total, `count` numbers], `stride` apart, added up to `sum`; the log of their normaliser.
inline float add_up(const float* parts, int64_t many, int64_t stride, int64_t count, float* sum) {
  float most = -INFINITY, total = 0;
  for (int64_t i = 0; i < many; i++) most = parts[i * stride] > most ? parts[i * stride] : most;
  for (int64_t d = 0; d < count; d++) sum[d] = 0;
  for (int64_t i = 0; i < many; i++) {
    const float* x = parts + i * stride;
    float share = x[0] == -INFINITY ? 0 : std::exp(x[0] - most);
    total += share * x[1];
    for (int64_t d = 0; d < count; d++) sum[d] += share * x[2 + d];
  }
  float factor = total == 0 ? 0 : 1 / total;
  for (int64_t d = 0; d < count; d++) sum[d] *= factor;
  return total == 0 ? -INFINITY : most + std::log(total);
}

}  // namespace capsight
