// Products of a few queries with a few tokens, and of their probabilities with the tokens', in what N multiplies.
#pragma once
#include "numbers.h"
#include "tile.h"

namespace capsight {

// found[t * C + c] = lanes of z[t] . line[c], or of z[t] . (line[c] + columns[t][c]). Meanwhile `next` is fetched,
// which has as many numbers as z, if there is any.
template <class N, int C, int T, bool placed>
INLINE void some_scores(
    const typename N::T* z, int64_t stride, int64_t rank, const typename N::T* line, const typename N::T* const* columns, vf* found,
    const typename N::T* next) {
  typedef typename N::V V;
  vf sum[T][C] = {};
  for (int64_t i = 0; i < rank; i += N::width) {
    V x[T];
    for (int t = 0; t < T; t++) x[t] = get<V>(z + t * stride + i);
    for (int t = 0; t < T && !placed && next; t++) __builtin_prefetch(next + t * stride + i, 0, 2);
    for (int c = 0; c < C; c++) {
      V own = get<V>(line + c * rank + i);
      for (int t = 0; t < T; t++)
        if constexpr (placed) sum[t][c] = N::add(sum[t][c], x[t], own, get<V>(columns[t] + c * rank + i));
        else sum[t][c] = N::add(sum[t][c], x[t], own);
    }
  }
  for (int t = 0; t < T; t++)
    for (int c = 0; c < C; c++) found[t * C + c] = sum[t][c];
}
// Tokens that share a line.
template <class N, int C, bool placed>
void scores(
    const typename N::T* z, int64_t stride, int64_t rank, int count, const typename N::T* line, const typename N::T* const* columns, vf* found,
    const typename N::T* next) {
  auto ahead = [&](int t) { return next ? next + t * stride : next; };
  constexpr int T = C <= (W == 8 ? 1 : 4) ? 4 : 2;
  int t = 0;
  for (; t + T <= count; t += T) some_scores<N, C, T, placed>(z + t * stride, stride, rank, line, columns + t, found + t * C, ahead(t));
  for (; t < count; t++) some_scores<N, C, 1, placed>(z + t * stride, stride, rank, line, columns + t, found + t * C, ahead(t));
}
template <int C>
void add_lanes(const vf* found, const float* more, int64_t step, float* p) {
  for (int c = 0; c < C; c++) put(p + c * TILE, sums<W>(found + c, C) + get<vf>(more + c * step));
}
template <class N>
struct Scores {
  typedef typename N::T T;
  void (*placed)(const T*, int64_t, int64_t, int, const T*, const T* const*, vf*, const T*);
  void (*plain)(const T*, int64_t, int64_t, int, const T*, const T* const*, vf*, const T*);
  void (*add)(const vf*, const float*, int64_t, float*);  // scores of W tokens
};
template <class N, int C = MOST>
Scores<N> scores_of(int64_t queries) {
  if constexpr (C > 1) {
    if (queries < C) return scores_of<N, C - 1>(queries);
  }
  return {scores<N, C, true>, scores<N, C, false>, add_lanes<C>};
}

// out[c] += sum of p[c * TILE + t] * z[t], C queries, a tile's tokens, L vectors from number i on; `next` is fetched, too.
template <class N, int C, int L>
INLINE void some_sums(
    const typename N::T* z, int64_t stride, int count, const typename N::T* p, int64_t i, int64_t wide, float* out, const typename N::T* next) {
  typedef typename N::V V;
  vf sum[C][L * N::pair];
  for (int c = 0; c < C; c++)
    for (int n = 0; n < L * N::pair; n++) sum[c][n] = get<vf>(out + c * wide + i + n * W);
  auto add = [&](int t, auto&& pair) {
    V x[L * N::pair];
    for (int n = 0; n < L * N::pair && next; n++) __builtin_prefetch(next + (t + n % N::pair) * stride + i + n / N::pair * N::width, 0, 2);
    for (int n = 0; n < L; n++) {
      V first = get<V>(z + t * stride + i + n * N::width), other = pair(n);
      for (int half = 0; half < N::pair; half++) x[n * N::pair + half] = N::beside(first, other, half);
    }
    for (int c = 0; c < C; c++) {
      V own = N::repeat(p + c * TILE + t);
      for (int n = 0; n < L * N::pair; n++) sum[c][n] = N::add(sum[c][n], x[n], own);
    }
  };
  int t = 0;
  for (; t + N::pair <= count; t += N::pair) add(t, [&](int n) { return get<V>(z + (t + N::pair - 1) * stride + i + n * N::width); });
  if (t < count) add(t, [](int) { return V{}; });
  for (int c = 0; c < C; c++)
    for (int n = 0; n < L * N::pair; n++) put(out + c * wide + i + n * W, sum[c][n]);
}
template <class N, int C>
void gathered(
    const typename N::T* z, int64_t stride, int64_t rank, int count, const typename N::T* p, int64_t wide, float* out, const typename N::T* next) {
  constexpr int L = (W < 16 || C > 4 ? 2 : 4) / N::pair;
  int64_t i = 0;
  for (; i + L * N::width <= rank; i += L * N::width) some_sums<N, C, L>(z, stride, count, p, i, wide, out, next);
  if constexpr (L > 1)
    for (; i < rank; i += N::width) some_sums<N, C, 1>(z, stride, count, p, i, wide, out, next);
}
// For up to MOST of so many queries, or a few more, as `kernels` has them.
template <class N>
struct Gather {
  typedef typename N::T T;
  void (*sums)(const T*, int64_t, int64_t, int, const T*, int64_t, float*, const T*);
  int queries;
};
template <class N>
Gather<N> gather_of(int64_t queries) {
  if constexpr (MOST == 8) {
    if (queries >= 8) return {gathered<N, MOST>, MOST};
    if (queries >= 5) return {gathered<N, MOST - 1>, MOST - 1};
  }
  if (queries >= 3) return {gathered<N, 4>, 4};
  if (queries == 2) return {gathered<N, 2>, 2};
  return {gathered<N, 1>, 1};
}

}  // namespace capsight
