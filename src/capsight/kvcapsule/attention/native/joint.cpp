// Attention of few queries over latents that all layers share, under rotary positions of three axes.
//
// A token's key is its latent z through a basis, turned by its place on every axis, each axis turning channels
// of its own. So its score is z . (u + v + w) + constants: the query, turned back by that place and seen
// through the basis, for each axis. These vectors are made once for all tokens that share a place.
#include <algorithm>
#include <vector>

#include "softmax.h"

namespace capsight {

struct Joint {
  const float* latents;             // [T, R], R full vectors
  int64_t rank;
  const int64_t *starts, *counts;   // [B], tokens of each row
  const int32_t* places;            // [3, T], which of an axis' places
  int64_t tokens, sizes[3];         // T, places of each axis
  const float *cosines[3], *sines[3];  // [places, pairs] of each axis
  int64_t pairs[3], fixed;          // channels that are turned, axis by axis, first halves first; then others
  const float *key_axes, *key_mean;  // [H, D, R], [H, D], channels in that order
  const float *value_axes, *value_mean;  // [H, R, V], [H, V], V full vectors
  int64_t channels, value_channels;
};

// found[c] = lanes of z . (u[c] + w[c]).
template <int C>
void score(const float* z, const float* u, const float* w, int64_t rank, vf* found) {
  vf sum[C] = {};
  for (int64_t i = 0; i < rank; i += W) {
    vf x = get<vf>(z + i);
    for (int c = 0; c < C; c++) sum[c] += x * (get<vf>(u + c * rank + i) + get<vf>(w + c * rank + i));
  }
  for (int c = 0; c < C; c++) found[c] = sum[c];
}
template <int C>
void add_lanes(const vf* found, int first, float* p) {
  for (int c = 0; c < C; c++) put(p + c * TILE + first, sums<W>(found + c, C));
}
struct Scores {
  void (*score)(const float*, const float*, const float*, int64_t, vf*);
  void (*add)(const vf*, int, float*);
};
Scores scores(int queries) {
  switch (queries) {
    case 1: return {score<1>, add_lanes<1>};
    case 2: return {score<2>, add_lanes<2>};
    case 4: return {score<4>, add_lanes<4>};
    case MOST - 1: return {score<MOST - 1>, add_lanes<MOST - 1>};
    default: return {score<MOST>, add_lanes<MOST>};
  }
}

// Queries of one KV head through the basis, turned back by a place.
struct Folded {
  std::vector<float> u;  // [C, R]
  float constant[MOST];
};

class JointChunk {
 public:
  JointChunk(const Joint& s, const float* query, int64_t count, int64_t head)
      : s(s), kernels(capsight::kernels(count, F32)), by(scores(kernels.queries)),
        taken(std::min<int64_t>(count, kernels.queries)), query(query), head(head),
        out(kernels.queries * s.rank), columns(s.sizes[2]), lines(2) {}

  void attend(int64_t start, int64_t count) {
    alignas(64) float p[MOST * TILE] = {}, more[MOST * TILE];
    std::vector<vf> found(W * kernels.queries);
    for (int64_t first = start; first < start + count; first += TILE) {
      int here = std::min<int64_t>(TILE, start + count - first);
      for (int t = 0; t < here; t++) {
        const float* z = s.latents + (first + t) * s.rank;
        const Folded &u = line(s.places[first + t], s.places[s.tokens + first + t]);
        const Folded &w = column(s.places[2 * s.tokens + first + t]);
        by.score(z, u.u.data(), w.u.data(), s.rank, &found[t % W * kernels.queries]);
        for (int64_t c = 0; c < taken; c++) more[c * TILE + t] = u.constant[c] + w.constant[c];
        if (t % W == W - 1 || t == here - 1) by.add(found.data(), t / W * W, p);
      }
      for (int64_t c = 0; c < taken; c++) {
        for (int t = 0; t < here; t++) p[c * TILE + t] += more[c * TILE + t];
        multiply(&out[c * s.rank], s.rank, run.take(c, p + c * TILE, here));
      }
      kernels.sums(rows(s.latents + first * s.rank, s.rank, here), p, out.data());
    }
  }

  // [most, total, R numbers] of each query; how many there are.
  int64_t results(float* x) const {
    for (int64_t c = 0; c < taken; c++, x += s.rank + 2) {
      x[0] = run.most[c], x[1] = run.total[c];
      std::copy_n(&out[c * s.rank], s.rank, x + 2);
    }
    return taken;
  }

 private:
  const Joint& s;
  const Kernels kernels;
  const Scores by;
  const int64_t taken;
  const float* query;  // [taken, D], scaled
  const int64_t head;
  std::vector<float> out;  // [queries, R]
  std::vector<Folded> columns, lines;  // by place of the third axis; of the first axis, and of it with the second
  int64_t time = -1, height = -1;
  Softmax run;

  Tile rows(const float* x, int64_t width, int count) const {
    return {(const char*)x, width * 4, count, int(width / W), int(width), (const char*)x, 0};
  }

  const Folded& line(int64_t t, int64_t h) {
    if (t != time) fold(0, t, lines[0]);
    if (t != time || h != height) {
      Folded& both = lines[1];
      fold(1, h, both);
      for (size_t i = 0; i < both.u.size(); i++) both.u[i] += lines[0].u[i];
      for (int64_t c = 0; c < taken; c++) both.constant[c] += lines[0].constant[c];
      time = t, height = h;
    }
    return lines[1];
  }
  const Folded& column(int64_t w) {
    if (columns[w].u.empty()) fold(2, w, columns[w]);
    return columns[w];
  }

  void fold(int axis, int64_t place, Folded& to) {
    to.u.assign(kernels.queries * s.rank, 0.f);
    std::fill_n(to.constant, MOST, 0.f);
    int64_t pairs = s.pairs[axis], base = 0;
    for (int a = 0; a < axis; a++) base += 2 * s.pairs[a];
    const float *cosine = s.cosines[axis] + place * pairs, *sine = s.sines[axis] + place * pairs;
    add(base, 2 * pairs, to, [&](const float* q, int64_t i) {
      const float *a = q + base, *b = a + pairs;
      return i < pairs ? a[i] * cosine[i] + b[i] * sine[i] : b[i - pairs] * cosine[i - pairs] - a[i - pairs] * sine[i - pairs];
    });
    int64_t rest = s.channels - s.fixed;
    if (axis == 0) add(rest, s.fixed, to, [&](const float* q, int64_t i) { return q[rest + i]; });
  }

  template <class X>
  void add(int64_t base, int64_t count, Folded& to, X channel) {
    alignas(64) float x[MOST * TILE] = {};
    for (int64_t first = 0; first < count; first += TILE) {
      int here = std::min<int64_t>(TILE, count - first);
      int64_t at = head * s.channels + base + first;
      for (int64_t c = 0; c < taken; c++)
        for (int i = 0; i < here; i++) {
          float own = channel(query + c * s.channels, first + i);
          x[c * TILE + i] = own, to.constant[c] += own * s.key_mean[at + i];
        }
      kernels.sums(rows(s.key_axes + at * s.rank, s.rank, here), x, to.u.data());
    }
  }
};

constexpr int64_t JOINT_CHUNK = 1024;

}  // namespace capsight

using namespace capsight;

// Attention of scaled queries [B, H, C, D] to out [B, H, C, V] and lse [B, H, C].
extern "C" void capsight_joint(
    const Joint* given, const float* query, int64_t batch, int64_t heads, int64_t count, int64_t threads,
    float* out, float* lse) {
  const Joint& s = *given;
  struct Task {
    int64_t piece, first, count;
  };
  std::vector<Task> tasks;
  std::vector<int64_t> ends;
  for (int64_t piece = 0; piece < batch * heads; piece++) {
    int64_t start = s.starts[piece / heads], all = s.counts[piece / heads];
    for (int64_t first = 0; first < all; first += JOINT_CHUNK)
      tasks.push_back({piece, start + first, std::min(JOINT_CHUNK, all - first)});
    ends.push_back(tasks.size());
  }
  int64_t part = count * (s.rank + 2), many = tasks.size();
  std::vector<float> parts(many * part);
#pragma omp parallel num_threads(threads) if (threads > 1 && many > 1)
  {
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < many; i++) {
      const Task& t = tasks[i];
      for (int64_t done = 0; done < count;) {
        JointChunk chunk(s, query + (t.piece * count + done) * s.channels, count - done, t.piece % heads);
        chunk.attend(t.first, t.count);
        done += chunk.results(&parts[i * part + done * (s.rank + 2)]);
      }
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < batch * heads * count; row++) {
      int64_t piece = row / count, head = piece % heads, first = piece ? ends[piece - 1] : 0;
      std::vector<float> sum(s.rank);
      lse[row] = add_up(
          &parts[first * part + row % count * (s.rank + 2)], ends[piece] - first, part, s.rank, sum.data());
      float* own = out + row * s.value_channels;
      std::copy_n(s.value_mean + head * s.value_channels, s.value_channels, own);
      if (lse[row] == -INFINITY) std::fill_n(own, s.value_channels, 0.f);
      auto k = kernels(1, F32);
      for (int64_t r = 0; r < s.rank; r += TILE) {
        const float* axes = s.value_axes + (head * s.rank + r) * s.value_channels;
        int here = std::min<int64_t>(TILE, s.rank - r);
        k.sums({(const char*)axes, s.value_channels * 4, here, int(s.value_channels / W), int(s.value_channels), (const char*)axes, 0},
               &sum[r], own);
      }
    }
  }
}
