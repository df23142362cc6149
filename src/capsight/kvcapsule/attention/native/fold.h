// Queries seen through a layer's basis, and their products with latents.
#pragma once
#include <algorithm>
#include <vector>

#include "latents.h"
#include "tile.h"

namespace capsight {

constexpr int PAD = 16;  // channels of tables are a multiple of it

struct Joint {
  Latents latents;
  const int64_t *starts, *counts;   // [B], tokens of each row
  const int32_t* places;            // [3, T], which of an axis' places
  int64_t tokens, sizes[3];         // T, places of each axis
  // Channels that an axis turns, first halves of its pairs first; the first axis has those not turned, too.
  const int64_t* order[3];
  int64_t pairs[3], widths[3];
  const float *cosines[3], *sines[3];  // [places, widths, filled up with 0 to PAD]; of second halves -sines
  const int8_t *key_axes, *value_axes;   // [H, D, R], in steps
  const float *key_steps, *value_steps;  // [R], of each coordinate
  const float *key_mean, *value_mean;    // [H, D]
  int64_t channels;                      // D
  const double* spots[3];        // [places], positions, rising
  const double* frequencies[3];  // [pairs], none below 0, falling

  const char* axis(const int8_t* of, int64_t head, int64_t channel) const {
    return (const char*)of + (head * channels + channel) * latents.rank();
  }
  int64_t padded(int axis) const { return (widths[axis] + PAD - 1) / PAD * PAD; }
  int64_t partner(int axis, int64_t i) const {
    return i < pairs[axis] ? i + pairs[axis] : i < 2 * pairs[axis] ? i - pairs[axis] : i;
  }
};

// Numbers of a row of axes, a multiple of W, as they are stored, to aligned floats.
inline void widen(const char* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += W) Stored<I8>::load(from + i, (vf*)(to + i));
}

constexpr int BLOCK = W == 16 ? 4 : 2;  // vectors of coordinates at a time; GROUP is a multiple of two of them or of half
constexpr int ROWS = 6;                 // sums of each that registers hold

// to[m] = steps * sum of weights[m, i] * x[i], M rows of N vectors.
template <int M, int N>
INLINE void some_folds(
    const float* weights, int64_t stride, int64_t count, const float* x, const float* steps, int64_t rank, float* to) {
  vf sum[M][N] = {};
  for (int64_t i = 0; i < count; i++) {
    vf own[N];
    for (int n = 0; n < N; n++) own[n] = get<vf>(x + (i * BLOCK + n) * W);
    for (int m = 0; m < M; m++) {
      vf weight = all(weights[m * stride + i]);
      for (int n = 0; n < N; n++) sum[m][n] += weight * own[n];
    }
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) put(to + m * rank + n * W, sum[m][n] * get<vf>(steps + n * W));
}
template <int N>
void folds(
    const float* weights, int64_t rows, int64_t stride, int64_t count, const float* x, const float* steps, int64_t rank,
    float* to) {
  int64_t m = 0;
  auto some = [&](auto by, int64_t step) {
    for (; m + step <= rows; m += step) by(weights + m * stride, stride, count, x, steps, rank, to + m * rank);
  };
  some(some_folds<ROWS, N>, ROWS), some(some_folds<2, N>, 2), some(some_folds<1, N>, 1);
}

// found[t * C + c] = lanes of z[t] . (line[c] + columns[t][c]).
template <int C, int T>
INLINE void some_scores(const float* z, int64_t rank, const float* line, const float* const* columns, vf* found) {
  vf sum[T][C] = {};
  for (int64_t i = 0; i < rank; i += W) {
    vf x[T];
    for (int t = 0; t < T; t++) x[t] = get<vf>(z + t * rank + i);
    for (int c = 0; c < C; c++) {
      vf own = get<vf>(line + c * rank + i);
      for (int t = 0; t < T; t++) sum[t][c] += x[t] * (own + get<vf>(columns[t] + c * rank + i));
    }
  }
  for (int t = 0; t < T; t++)
    for (int c = 0; c < C; c++) found[t * C + c] = sum[t][c];
}
// Tokens that share a line.
template <int C>
void scores(const float* z, int64_t rank, int count, const float* line, const float* const* columns, vf* found) {
  constexpr int T = C <= (W == 8 ? 1 : 4) ? 4 : 2;
  int t = 0;
  for (; t + T <= count; t += T) some_scores<C, T>(z + t * rank, rank, line, columns + t, found + t * C);
  for (; t < count; t++) some_scores<C, 1>(z + t * rank, rank, line, columns + t, found + t * C);
}
template <int C>
void add_lanes(const vf* found, const float* more, float* p) {
  for (int c = 0; c < C; c++) put(p + c * TILE, sums<W>(found + c, C) + get<vf>(more + c * W));
}
struct Scores {
  void (*score)(const float*, int64_t, int, const float*, const float* const*, vf*);
  void (*add)(const vf*, const float*, float*);  // scores of W tokens
};
template <int C = MOST>
Scores scores_of(int64_t queries) {
  if constexpr (C > 1) {
    if (queries < C) return scores_of<C - 1>(queries);
  }
  return {scores<C>, add_lanes<C>};
}

// Queries of one KV head, turned back by places of one axis, seen through its channels.
struct Folded {
  std::vector<int32_t> places;
  std::vector<int> slot;         // of each place, where it is among them; or -1
  Floats u, constant;            // [places, C, R] and [places, C]

  void clear() {
    for (int32_t place : places) slot[place] = -1;
    places.clear();
  }
  bool add(int32_t place) {  // whether it is new
    if (slot[place] >= 0) return false;
    slot[place] = places.size(), places.push_back(place);
    return true;
  }

  void fold(const Joint& s, int axis, const float* query, int64_t taken, int64_t head) {
    int64_t width = s.widths[axis], padded = s.padded(axis), rank = s.latents.rank(), rows = places.size() * taken;
    constant.assign((rows + W - 1) / W * W, 0.f);
    if (!width) return u.assign(rows * rank, 0.f);
    u.resize(rows * rank), weights.resize(constant.size() * padded), part.resize(width * BLOCK * W);
    mean.assign(padded, 0.f), asked.assign(taken * padded, 0.f), turned.assign(taken * padded, 0.f);
    for (int64_t i = 0; i < width; i++) {
      mean[i] = s.key_mean[head * s.channels + s.order[axis][i]];
      for (int64_t c = 0; c < taken; c++) {
        asked[c * padded + i] = query[c * s.channels + s.order[axis][i]];
        turned[c * padded + i] = query[c * s.channels + s.order[axis][s.partner(axis, i)]];
      }
    }
    float* to = weights.data();
    for (int32_t place : places) {
      const float *cosine = s.cosines[axis] + place * padded, *sine = s.sines[axis] + place * padded;
      for (int64_t c = 0; c < taken; c++, to += padded)
        for (int64_t i = 0; i < padded; i += W)
          put(to + i, get<vf>(&asked[c * padded + i]) * get<vf>(cosine + i) + get<vf>(&turned[c * padded + i]) * get<vf>(sine + i));
    }
    for (int64_t row = 0; row < rows; row += W) {
      vf sum[W] = {};
      for (int m = 0; m < W; m++)
        for (int64_t i = 0; i < padded; i += W) sum[m] += get<vf>(&weights[(row + m) * padded + i]) * get<vf>(&mean[i]);
      put(&constant[row], sums<W>(sum, 1));
    }
    for (int64_t first = 0; first < rank; first += BLOCK * W) {
      int64_t here = std::min<int64_t>(BLOCK * W, rank - first);
      float* x = part.data();
      for (int64_t i = 0; i < width; i++)
        widen(s.axis(s.key_axes, head, s.order[axis][i]) + first, here, x + i * BLOCK * W);
      auto run = here == BLOCK * W ? folds<BLOCK> : folds<2>;
      run(weights.data(), rows, padded, width, x, s.key_steps + first, rank, &u[first]);
    }
  }

 private:
  Floats weights, asked, turned, mean;  // [places, C, channels], twice [C, channels], [channels]
  Floats part;                  // [channels, BLOCK vectors], a block of the channels' axes
};

}  // namespace capsight
