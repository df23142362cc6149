// Queries seen through a layer's basis, and their products with latents.
#pragma once
#include "nodes.h"
#include "products.h"

namespace capsight {

constexpr int BLOCK = W == 16 ? 4 : 2;  // vectors of coordinates at a time; GROUP is a multiple of two of them or of half
constexpr int PANEL = BLOCK * W;
constexpr int ROWS = 6;                 // sums of each that registers hold

// to[m] = sum of weights[m, i] * x[i], M rows of L vectors, as O has numbers; times `steps`, if there are.
template <class N, class O, int M, int L>
INLINE void some_folds(
    const typename N::T* weights, int64_t stride, int64_t count, const typename N::T* x, int64_t apart, const float* steps,
    typename O::T* to, int64_t wide) {
  vf sum[M][L] = {};
  for (int64_t i = 0; i < count; i++) {
    typename N::V own[L];
    for (int n = 0; n < L; n++) own[n] = get<typename N::V>(x + i * apart + n * N::width);
    for (int m = 0; m < M; m++) {
      auto weight = N::repeat(weights + m * stride + i * N::pair);
      for (int n = 0; n < L; n++) sum[m][n] = N::add(sum[m][n], own[n], weight);
    }
  }
  for (int m = 0; m < M; m++) {
    if (steps)
      for (int n = 0; n < L; n++) sum[m][n] *= get<vf>(steps + n * W);
    for (int n = 0; n < L; n += O::pair) {
      auto made = O::vector(&sum[m][n]);
      std::memcpy(to + m * wide + n * W, &made, sizeof made);
    }
  }
}
template <class N, class O, int L>
void folds(
    const typename N::T* weights, int64_t rows, int64_t stride, int64_t count, const typename N::T* x, int64_t apart,
    const float* steps, typename O::T* to, int64_t wide) {
  int64_t m = 0;
  auto some = [&](auto by, int64_t step) {
    for (; m + step <= rows; m += step) by(weights + m * stride, stride, count, x, apart, steps, to + m * wide, wide);
  };
  some(some_folds<N, O, ROWS, L>, ROWS), some(some_folds<N, O, 2, L>, 2), some(some_folds<N, O, 1, L>, 1);
}

// Queries of one KV head, turned back by places of one axis, seen through its channels, as O has numbers.
template <class N, class O>
struct Folded {
  Numbers<O> u;     // [places, C, coordinates]
  Floats constant;  // [places, C]

  // Of queries [C, D], for `count` coordinates from one on.
  void fold(const Joint& s, const Nodes& nodes, int axis, const float* query, int64_t taken, int64_t head, int64_t from, int64_t count) {
    const int64_t width = s.widths[axis], padded = s.padded(axis), many = nodes.at.size(), all = nodes.places.size();
    u.resize(all * taken * count);
    if (!width) return std::fill(u.begin(), u.end(), 0), constant.assign(all * taken, 0.f);
    weigh(s, nodes, axis, query, taken, head, from == 0);
    const bool through = many < all;
    const int64_t rows = many * taken, steps = (width + N::pair - 1) / N::pair;
    part.resize(steps * BLOCK * N::width), folded.resize(rows * PANEL);
    for (int64_t first = 0; first < count; first += PANEL) {
      const int64_t here = std::min<int64_t>(PANEL, count - first);
      typename N::T* x = part.data();
      for (int64_t i = 0; i < width; i += N::pair, x += BLOCK * N::width) {
        auto own = [&](int64_t channel) { return s.axis(s.key_axes, head, s.order[axis][std::min(channel, width - 1)]) + from + first; };
        const char *a = own(i), *b = own(i + N::pair - 1);
        for (int64_t r = 0; r < here; r += W) {
          auto both = N::integers(a + r, b + r);
          std::memcpy(x + r * N::pair, &both, sizeof both);
        }
      }
      auto fold = [&](auto run, auto* to, int64_t wide) {
        run(weights.data(), rows, padded, steps, part.data(), BLOCK * N::width, s.key_steps + from + first, to, wide);
      };
      const bool whole = here == PANEL;
      if (!through) fold(whole ? folds<N, O, BLOCK> : folds<N, O, 2>, &u[first], count);
      else {
        fold(whole ? folds<N, Single, BLOCK> : folds<N, Single, 2>, folded.data(), PANEL);
        auto see_through = whole ? folds<Single, O, BLOCK> : folds<Single, O, 2>;
        for (int64_t c = 0; c < taken; c++)
          see_through(nodes.shares.data(), all, many, many, &folded[c * PANEL], taken * PANEL, nullptr, &u[c * count + first], taken * count);
      }
    }
  }

 private:
  Floats asked, turned, mean, of_nodes;     // twice [C, channels], [channels], [nodes, C]
  Numbers<N> weights, part;                 // [nodes, C, channels]; [channels, PANEL], side by side as lanes add them up
  Floats folded;                            // [nodes, C, PANEL]

  // What channels count for each node, and the constants of all places.
  void weigh(const Joint& s, const Nodes& nodes, int axis, const float* query, int64_t taken, int64_t head, bool constants) {
    const int64_t width = s.widths[axis], padded = s.padded(axis), many = nodes.at.size(), all = nodes.places.size(), rows = many * taken;
    weights.resize(rows * padded + GROUP);
    asked.assign(taken * padded + GROUP, 0.f), turned.assign(taken * padded + GROUP, 0.f);
    for (int64_t i = 0; i < width; i++)
      for (int64_t c = 0; c < taken; c++) {
        asked[c * padded + i] = query[c * s.channels + s.order[axis][i]];
        turned[c * padded + i] = query[c * s.channels + s.order[axis][s.partner(axis, i)]];
      }
    auto turn = [&](int64_t row, int64_t i) {
      const int64_t from = nodes.at[row / taken] * padded + i, c = row % taken * padded + i;
      return get<vf>(&asked[c]) * get<vf>(s.cosines[axis] + from) + get<vf>(&turned[c]) * get<vf>(s.sines[axis] + from);
    };
    for (int64_t row = 0; row < rows; row++)
      for (int64_t i = 0; i < padded; i += N::width) {  // the last may write beyond, where the next row follows
        vf x[N::pair] = {};
        for (int n = 0; n < N::pair && i + n * W < padded; n++) x[n] = turn(row, i + n * W);
        auto made = N::vector(x);
        std::memcpy(&weights[row * padded + i], &made, sizeof made);
      }
    if (!constants) return;
    mean.assign(padded, 0.f), constant.assign(all * taken, 0.f), of_nodes.resize(rows + W);
    for (int64_t i = 0; i < width; i++) mean[i] = s.key_mean[head * s.channels + s.order[axis][i]];
    for (int64_t row = 0; row < rows; row += W) {
      vf sum[W] = {};
      for (int m = 0; m < W; m++)
        for (int64_t i = 0; i < padded; i += W) sum[m] += turn(std::min(row + m, rows - 1), i) * get<vf>(&mean[i]);
      put(&of_nodes[row], sums<W>(sum, 1));
    }
    if (many == all) std::copy_n(of_nodes.begin(), rows, constant.begin());
    else
      for (int64_t i = 0; i < all; i++)
        for (int64_t k = 0; k < many; k++)
          for (int64_t c = 0; c < taken; c++) constant[i * taken + c] += nodes.shares[i * many + k] * of_nodes[k * taken + c];
  }
};

}  // namespace capsight
