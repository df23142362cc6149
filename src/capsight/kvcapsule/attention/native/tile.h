// Products of a few queries with a few tokens, and of their probabilities with the tokens' values.
#pragma once
#include "vectors.h"

namespace capsight {

constexpr int TILE = 64;               // tokens whose scores are at hand
constexpr int MOST = W == 16 ? 8 : 4;  // queries that share what is read, as registers allow

// What a tile's functions take: `count` tokens, `stride` bytes apart, of `vectors` full vectors in each part.
struct Tile {
  const char* tokens;
  int64_t stride;
  int count, vectors, width;  // width: floats of all parts
  const char* next;           // tokens that are read after these, likewise
  int lines;                  // cache lines of one of them
};
INLINE void fetch(const Tile& d, int token) {
  for (int i = 0; i < d.lines; i++) __builtin_prefetch(d.next + token * d.stride + i * 64, 0, 2);
}

// found[n * C + c] = lanes of q[c] . level_n, of N tokens.
template <int C, int N, class S>
INLINE void some_dots(const char* tokens, const Tile& d, const float* q, vf* found) {
  vf sum[N][C] = {};
  for (int i = 0; i < d.vectors; i++) {
    vf x[N][S::parts];
    for (int n = 0; n < N; n++) S::load(tokens + n * d.stride + i * W * S::bytes, x[n]);
    for (int c = 0; c < C; c++)
      for (int part = 0; part < S::parts; part++) {
        vf own = get<vf>(q + c * d.width + (part * d.vectors + i) * W);
        for (int n = 0; n < N; n++) sum[n][c] += own * x[n][part];
      }
  }
  for (int n = 0; n < N; n++)
    for (int c = 0; c < C; c++) found[n * C + c] = sum[n][c];
}

// scores[c * TILE + t] = q[c] . level_t; what follows the tokens in a vector becomes 0.
template <int C, class S>
void dots(const Tile& d, const float* q, float* scores) {
  constexpr int T = C <= 2 ? 4 : 2;
  vf found[W * C];
  for (int first = 0; first < d.count; first += W) {
    int here = d.count - first < W ? d.count - first : W, t = 0;
    const char* tokens = d.tokens + first * d.stride;
    for (; t + T <= here; t += T) {
      for (int n = 0; n < T; n++) fetch(d, first + t + n);
      some_dots<C, T, S>(tokens + t * d.stride, d, q, found + t * C);
    }
    for (; t < here; t++) some_dots<C, 1, S>(tokens + t * d.stride, d, q, found + t * C);
    for (t *= C; t < W * C; t++) found[t] = vf{};
    for (int c = 0; c < C; c++) put(scores + c * TILE + first, sums<W>(found + c, C));
  }
}

// out[c] += sum of p[c * TILE + t] * level_t, N vectors from number i on.
template <int C, int N, class S>
INLINE void some_sums(const Tile& d, const float* p, int i, float* out) {
  vf sum[C][N][S::parts];
  auto at = [&](int c, int n, int part) { return out + c * d.width + (part * d.vectors + i + n) * W; };
  for (int c = 0; c < C; c++)
    for (int n = 0; n < N; n++)
      for (int part = 0; part < S::parts; part++) sum[c][n][part] = get<vf>(at(c, n, part));
  for (int t = 0; t < d.count; t++) {
    for (int at = i * W * S::bytes + 63 & ~63; at < (i + N) * W * S::bytes && at < d.lines * 64; at += 64)
      __builtin_prefetch(d.next + t * d.stride + at, 0, 2);
    vf x[N][S::parts];
    for (int n = 0; n < N; n++) S::load(d.tokens + t * d.stride + (i + n) * W * S::bytes, x[n]);
    for (int c = 0; c < C; c++) {
      vf own = all(p[c * TILE + t]);
      for (int n = 0; n < N; n++)
        for (int part = 0; part < S::parts; part++) sum[c][n][part] += own * x[n][part];
    }
  }
  for (int c = 0; c < C; c++)
    for (int n = 0; n < N; n++)
      for (int part = 0; part < S::parts; part++) put(at(c, n, part), sum[c][n][part]);
}

template <int C, class S>
void weighted_sums(const Tile& d, const float* p, float* out) {
  constexpr int N = (W < 16 || C > 4 ? 2 : 4) / S::parts;
  int i = 0;
  for (; i + N <= d.vectors; i += N) some_sums<C, N, S>(d, p, i, out);
  if constexpr (N > 1)
    for (; i < d.vectors; i++) some_sums<C, 1, S>(d, p, i, out);
}

// The two for one count of queries and one format.
struct Kernels {
  void (*dots)(const Tile&, const float*, float*);
  void (*sums)(const Tile&, const float*, float*);
  int queries, parts, bytes;
};
template <int C, class S>
Kernels kernels() {
  return {dots<C, S>, weighted_sums<C, S>, C, S::parts, S::bytes};
}
template <int C>
Kernels kernels(int32_t format) {
  switch (format) {
    case F32: return kernels<C, Stored<F32>>();
    case BF16: return kernels<C, Stored<BF16>>();
    case F16: return kernels<C, Stored<F16>>();
    case U8: return kernels<C, Stored<U8>>();
    case I8: return kernels<C, Stored<I8>>();
    default: return kernels<C, Stored<U4>>();
  }
}
// Those for up to MOST of so many queries, or a few more: what there are fewer of is filled up.
inline Kernels kernels(int64_t queries, int32_t format) {
  if constexpr (MOST == 8) {
    if (queries >= 8) return kernels<MOST>(format);
    if (queries >= 5) return kernels<MOST - 1>(format);
  }
  if (queries >= 3) return kernels<4>(format);
  if (queries == 2) return kernels<2>(format);
  return kernels<1>(format);
}

}  // namespace capsight
