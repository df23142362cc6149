// A chunk of one row's latents, attended by queries that are seen through the basis, or by keys that are rebuilt.
#pragma once
#include "rebuild.h"
#include "softmax.h"

namespace capsight {

constexpr int64_t COORDINATES = 256;  // that a stretch of tokens is opened in at a time, or twice as many for few queries
constexpr int64_t AT_HAND = 1 << 19;  // bytes of opened latents, or of folded queries, that caches hold

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
        out((all + MOST) * rank), run((all + MOST - 1) / MOST), keys(s) {
    for (int axis = 0; axis < 3; axis++) seen[axis].assign(s.sizes[axis], -1);
  }

  void attend(int64_t start, int64_t tokens) {
    const bool rebuild = better_rebuilt(start, tokens);
    const int64_t most = count <= MOST / 2 ? 2 * COORDINATES : COORDINATES, blocks = (rank + most - 1) / most;
    const int64_t block = rebuild ? rank : (rank / GROUP + blocks - 1) / blocks * GROUP;
    for (int64_t first = start, end = start + tokens, here; first < end; first += here) {
      here = rebuild ? std::min<int64_t>(TILE, end - first) : stretch(first, end, block);
      int64_t tiles = (here + TILE - 1) / TILE, last = (rank - 1) / block * block;
      room.p.resize(tiles * wide);
      if (!rebuild) list_groups(first, here);
      for (int64_t from = 0; from < rank; from += block) {
        int64_t own = opened(first, here, from, block);
        for (int64_t row = 0; row < all;) {  // queries of one head
          int64_t head = row / count, taken = std::min<int64_t>((head + 1) * count - row, MOST);
          const float* asked = query + row * s.channels;
          if (rebuild) {
            if (row % count == 0) keys.make(room.z.data(), first, here, head);
            keys.score(asked, taken, &room.p[row * TILE]);
          } else {
            for (int axis = 0; axis < 2; axis++) lines[axis].fold(s, axis, asked, taken, head, from, own);
            of_columns.fold(s, 2, asked, taken, head, from, own);
            score(taken, own, from == 0, &room.p[row * TILE]);
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
  // Tokens that share a line: places on the first two axes, and W of them at most that end where lanes do.
  struct Group {
    int first, count, time, height, columns[W];
  };
  const Joint& s;
  const int64_t rank, count, all, wide;
  const float* query;
  Floats out;  // [H C, R]
  std::vector<Softmax> run;
  Rebuilt<N> keys;
  std::vector<Group> groups;
  std::vector<int64_t> seen[3];  // of each place, the stretch that had it last
  int64_t stretches = 0;
  Room<N>& room = room_of<N>;
  Folded<N, Single> (&lines)[2] = room.lines;
  Folded<N, N>& of_columns = room.columns;

  int32_t place(int axis, int64_t token) const { return s.places[axis * s.tokens + token]; }
  bool is_new(int axis, int64_t token) {
    int64_t& last = seen[axis][place(axis, token)];
    return last != stretches && (last = stretches, true);
  }

  bool better_rebuilt(int64_t start, int64_t tokens) {
    int64_t folded = 0;
    for (int axis = 0; axis < 3; axis++)
      for (int64_t t = start; t < start + tokens; t++) folded += is_new(axis, t) * s.widths[axis];
    stretches++;
    return (folded + 2 * tokens) * count > tokens * s.channels;
  }

  // How many of the next tokens are taken together.
  int64_t stretch(int64_t first, int64_t end, int64_t block) {
    const int64_t each = block * sizeof(typename N::T), most = std::max<int64_t>(TILE, AT_HAND / each);
    int64_t t = first, places = 0;
    for (bool done = false; t < end && t - first < most && !done; t++) {
      for (int axis = 0; axis < 3; axis++) places += is_new(axis, t);
      bool image = t + 1 < end && place(0, t + 1) != place(0, t);
      done = t - first >= TILE && ((image && t - first >= most / 2) || places * std::min<int64_t>(count, MOST) * each > AT_HAND);
    }
    stretches++;
    for (int axis = 0; axis < 3; axis++) (axis < 2 ? lines[axis].nodes : of_columns.nodes).save(s, axis, first, t - first, N::pair);
    return t - first;
  }

  // Opens coordinates from one on, up to `block`; how many.
  int64_t opened(int64_t first, int64_t tokens, int64_t from, int64_t block) {
    int64_t own = std::min(block, rank - from);
    room.z.resize(tokens * own), room.scales.resize(own / GROUP + W);
    open<N>(s.latents, s.tokens, first, tokens, from, own, room.scales.data(), room.z.data());
    return own;
  }

  void list_groups(int64_t first, int64_t tokens) {
    groups.clear();
    for (int t = 0; t < tokens; t++) {
      int time = lines[0].slot(place(0, first + t)), height = lines[1].slot(place(1, first + t));
      if (t % W == 0 || groups.back().time != time || groups.back().height != height)
        groups.push_back({t, 0, time, height, {}});
      Group& own = groups.back();
      own.columns[own.count++] = of_columns.slot(place(2, first + t));
    }
  }

  // Scores of queries of one head over a stretch, in some coordinates: p [tiles, .., TILE].
  void score(int64_t taken, int64_t own, bool first, float* p) {
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
