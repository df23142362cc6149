// A chunk of one row's latents, attended by queries that are seen through the basis, or by keys that are rebuilt.
#pragma once
#include "plan.h"
#include "rebuild.h"
#include "softmax.h"

namespace capsight {

constexpr int64_t COORDINATES = 256;  // that a stretch of tokens is opened in at a time, or twice as many for few queries

// What a chunk needs room for, kept for the next one of the same thread.
template <class N>
struct Room {
  Numbers<N> z, line, shares;  // [tokens, coordinates], [C, coordinates], p as N has it
  Floats scales, p;            // [tokens, groups], [tiles, H C + MOST, TILE]
  Folded<N, Single> lines[2];  // of axes that tokens of a line share
  Folded<N, N> columns;
};
template <class N>
static thread_local Room<N> room_of;

// Queries of all KV heads over a chunk of one row's tokens.
template <class N>
class JointChunk {
 public:
  // Queries [H, C, D], scaled.
  JointChunk(const Joint& s, const float* query, int64_t heads, int64_t count)
      : s(s), rank(s.latents.rank()), count(count), all(heads * count), wide((all + MOST) * TILE), query(query),
        out((all + MOST) * rank), run((all + MOST - 1) / MOST), keys(s) {}

  void attend(int64_t start, int64_t tokens) {
    const int64_t most = count <= MOST / 2 ? 2 * COORDINATES : COORDINATES, blocks = (rank + most - 1) / most;
    int64_t block = (rank / GROUP + blocks - 1) / blocks * GROUP;
    const Plan& plan = Plan::of(s, start, tokens, {count, block, sizeof(typename N::T), N::pair});
    const bool rebuild = plan.rebuild;
    const Part* part = plan.parts.data();
    if (rebuild) block = rank;
    for (int64_t first = start, end = start + tokens, here; first < end; first += here, part++) {
      here = rebuild ? std::min<int64_t>(TILE, end - first) : part->count;
      int64_t tiles = (here + TILE - 1) / TILE, last = (rank - 1) / block * block;
      room.p.resize(tiles * wide);
      for (int64_t from = 0; from < rank; from += block) {
        int64_t own = opened(first, here, from, block);
        for (int64_t row = 0; row < all;) {  // queries of one head
          int64_t head = row / count, taken = std::min<int64_t>((head + 1) * count - row, MOST);
          const float* asked = query + row * s.channels;
          if (rebuild) {
            if (row % count == 0) keys.make(room.z.data(), first, here, head);
            keys.score(asked, taken, &room.p[row * TILE]);
          } else {
            for (int axis = 0; axis < 2; axis++) lines[axis].fold(s, part->nodes[axis], axis, asked, taken, head, from, own);
            of_columns.fold(s, part->nodes[2], 2, asked, taken, head, from, own);
            score(part->groups, taken, own, from == 0, &room.p[row * TILE]);
          }
          row += taken;
        }
      }
      for (int64_t c = 0; c < all; c++)
        multiply(&out[c * rank], rank, run[c / MOST].take(c % MOST, &room.p[c * TILE], here, wide));
      const typename N::T* shares = as_numbers(tiles * wide);
      for (int64_t from = last; from >= 0; from -= block) {
        int64_t own = from == last ? rank - last : opened(first, here, from, block);
        gather(here, tiles, own, shares, &out[from]);
      }
    }
  }

  // [H, C] times [most, total, R numbers].
  void results(float* x) const {
    for (int64_t c = 0; c < all; c++, x += rank + 2) {
      x[0] = run[c / MOST].most[c % MOST], x[1] = run[c / MOST].total[c % MOST];
      std::copy_n(&out[c * rank], rank, x + 2);
    }
  }

 private:
  const Joint& s;
  const int64_t rank, count, all, wide;
  const float* query;
  Floats out;  // [H C, R]
  std::vector<Softmax> run;
  Rebuilt<N> keys;
  Room<N>& room = room_of<N>;
  Folded<N, Single> (&lines)[2] = room.lines;
  Folded<N, N>& of_columns = room.columns;

  // Opens coordinates from one on, up to `block`; how many.
  int64_t opened(int64_t first, int64_t tokens, int64_t from, int64_t block) {
    int64_t own = std::min(block, rank - from);
    room.z.resize(tokens * own), room.scales.resize(own / GROUP + W);
    open<N>(s.latents, s.tokens, first, tokens, from, own, room.scales.data(), room.z.data());
    return own;
  }

  // Scores of queries of one head over a part, in some coordinates: p [tiles, .., TILE].
  void score(const std::vector<Group>& groups, int64_t taken, int64_t own, bool first, float* p) {
    auto by = scores_of<N>(taken);
    int64_t size = taken * own;
    vf found[W * MOST];
    std::fill_n(found, W * taken, vf{});
    alignas(64) float more[W * MOST] = {};
    room.line.resize(size);
    auto* line = room.line.data();
    int time = -1, height = -1;
    for (const Group& g : groups) {
      const float *u = &lines[0].u[g.time * size], *v = &lines[1].u[g.height * size];
      const typename N::T* columns[W];
      if (g.time != time || g.height != height)
        for (int64_t i = 0; i < size; i += N::width) {
          vf x[N::pair];
          for (int n = 0; n < N::pair; n++) x[n] = get<vf>(u + i + n * W) + get<vf>(v + i + n * W);
          auto made = N::vector(x);
          std::memcpy(line + i, &made, sizeof made);
        }
      time = g.time, height = g.height;
      int lane = g.first % W, last = g.first + g.count;
      for (int t = 0; t < g.count; t++) {
        columns[t] = &of_columns.u[g.columns[t] * size];
        for (int64_t c = 0; first && c < taken; c++)
          more[c * W + lane + t] = lines[0].constant[time * taken + c] + lines[1].constant[height * taken + c] + of_columns.constant[g.columns[t] * taken + c];
      }
      by.placed(&room.z[g.first * own], own, own, g.count, line, columns, found + lane * taken, nullptr);
      if (last % W == 0 || &g == &groups.back()) {
        float* to = p + g.first / TILE * wide + g.first % TILE / W * W;
        by.add(found, first ? more : to, first ? W : TILE, to);
      }
    }
  }

  // p as N has it.
  const typename N::T* as_numbers(int64_t size) {
    if constexpr (N::pair == 1) return room.p.data();
    else return room.shares.resize(size), round_to<N>(room.p.data(), size, room.shares.data()), room.shares.data();
  }

  void gather(int64_t tokens, int64_t tiles, int64_t own, const typename N::T* shares, float* to) {
    for (int64_t c = 0; c < all;) {
      auto by = gather_of<N>(all - c);
      for (int64_t i = 0; i < tiles; i++)
        by.sums(&room.z[i * TILE * own], own, own, std::min<int64_t>(TILE, tokens - i * TILE), shares + i * wide + c * TILE, rank, to + c * rank, nullptr);
      c += by.queries;
    }
  }
};

}  // namespace capsight
