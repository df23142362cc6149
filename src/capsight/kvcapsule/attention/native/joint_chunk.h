// A chunk of one row's latents, attended by queries that are seen through the basis, or by keys that are rebuilt.
#pragma once
#include "rebuild.h"
#include "softmax.h"

namespace capsight {

constexpr int64_t STRETCH = 1 << 18;  // numbers of latents, or of folded queries, that are at hand

// What a chunk needs room for, kept for the next one of the same thread.
struct Room {
  Floats z, scales, line, p;  // [tokens, R], [tokens, R / GROUP], [C, R] and [tiles, H C + MOST, TILE]
  Folded axes[3];
};
static thread_local Room room;

// Queries of all KV heads over a chunk of one row's tokens.
class JointChunk {
 public:
  // Queries [H, C, D], scaled.
  JointChunk(const Joint& s, const float* query, int64_t heads, int64_t count)
      : s(s), rank(s.latents.rank()), count(count), all(heads * count), wide((all + MOST) * TILE), query(query),
        out((all + MOST) * rank), run((all + MOST - 1) / MOST), keys(s) {
    for (int axis = 0; axis < 3; axis++) axes[axis].places.clear(), axes[axis].slot.assign(s.sizes[axis], -1);
  }

  void attend(int64_t start, int64_t tokens) {
    bool rebuild = better_rebuilt(start, tokens);
    for (int64_t first = start, end = start + tokens, here; first < end; first += here) {
      here = rebuild ? std::min<int64_t>(TILE, end - first) : stretch(first, end);
      int64_t tiles = (here + TILE - 1) / TILE;
      room.z.resize(here * rank), room.scales.resize(here * rank / GROUP), room.p.resize(tiles * wide);
      open(s.latents, first, here, room.scales.data(), room.z.data());
      if (!rebuild) list_groups(first, here);
      for (int64_t row = 0; row < all;) {  // queries of one head
        int64_t head = row / count, taken = std::min<int64_t>((head + 1) * count - row, MOST);
        const float* asked = query + row * s.channels;
        if (rebuild) {
          if (row % count == 0) keys.make(room.z.data(), first, here, head);
          keys.score(asked, taken, &room.p[row * TILE]);
        } else {
          for (int axis = 0; axis < 3; axis++) axes[axis].fold(s, axis, asked, taken, head);
          score(taken, &room.p[row * TILE]);
        }
        row += taken;
      }
      for (int64_t c = 0; c < all; c++)
        multiply(&out[c * rank], rank, run[c / MOST].take(c % MOST, &room.p[c * TILE], here, wide));
      gather(here, tiles);
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
  Rebuilt keys;
  std::vector<Group> groups;
  Folded (&axes)[3] = room.axes;

  int32_t place(int axis, int64_t token) const { return s.places[axis * s.tokens + token]; }

  bool better_rebuilt(int64_t start, int64_t tokens) {
    int64_t folded = 0;
    for (int axis = 0; axis < 3; axis++) {
      for (int64_t t = start; t < start + tokens; t++) axes[axis].add(place(axis, t));
      folded += axes[axis].places.size() * s.widths[axis];
    }
    return (folded + 2 * tokens) * count > tokens * s.channels;
  }

  // How many of the next tokens are taken together; their places are listed.
  int64_t stretch(int64_t first, int64_t end) {
    for (auto& axis : axes) axis.clear();
    int64_t most = std::max<int64_t>(TILE, STRETCH / rank), t = first, places = 0;
    for (bool done = false; t < end && t - first < most && !done; t++) {
      for (auto& axis : axes) places += axis.add(place(&axis - axes, t));
      bool image = t + 1 < end && place(0, t + 1) != place(0, t);
      done = t - first >= TILE && (image || places * std::min<int64_t>(count, MOST) * rank > STRETCH);
    }
    return t - first;
  }

  void list_groups(int64_t first, int64_t tokens) {
    groups.clear();
    for (int t = 0; t < tokens; t++) {
      int time = axes[0].slot[place(0, first + t)], height = axes[1].slot[place(1, first + t)];
      if (t % W == 0 || groups.back().time != time || groups.back().height != height)
        groups.push_back({t, 0, time, height, {}});
      Group& own = groups.back();
      own.columns[own.count++] = axes[2].slot[place(2, first + t)];
    }
  }

  // Scores of queries of one head over a stretch: p [tiles, .., TILE].
  void score(int64_t taken, float* p) {
    auto by = scores_of(taken);
    int64_t size = taken * rank;
    vf found[W * MOST];
    std::fill_n(found, W * taken, vf{});
    alignas(64) float more[W * MOST] = {};
    Floats& line = room.line;
    line.resize(size);
    int time = -1, height = -1;
    for (const Group& own : groups) {
      const float *u = &axes[0].u[own.time * size], *v = &axes[1].u[own.height * size], *columns[W];
      if (own.time != time || own.height != height)
        for (int64_t i = 0; i < size; i += W) put(&line[i], get<vf>(u + i) + get<vf>(v + i));
      time = own.time, height = own.height;
      int lane = own.first % W, last = own.first + own.count;
      for (int t = 0; t < own.count; t++) {
        columns[t] = &axes[2].u[own.columns[t] * size];
        for (int64_t c = 0; c < taken; c++)
          more[c * W + lane + t] = axes[0].constant[time * taken + c] + axes[1].constant[height * taken + c] + axes[2].constant[own.columns[t] * taken + c];
      }
      by.score(&room.z[own.first * rank], rank, own.count, line.data(), columns, found + lane * taken);
      if (last % W == 0 || &own == &groups.back())
        by.add(found, more, p + own.first / TILE * wide + own.first % TILE / W * W);
    }
  }

  void gather(int64_t tokens, int64_t tiles) {
    for (int64_t c = 0; c < all;) {
      auto by = kernels(all - c, F32);
      for (int64_t i = 0; i < tiles; i++) {
        const char* z = (const char*)&room.z[i * TILE * rank];
        int here = std::min<int64_t>(TILE, tokens - i * TILE);
        by.sums({z, rank * 4, here, int(rank / W), int(rank), z, 0}, &room.p[i * wide + c * TILE], &out[c * rank]);
      }
      c += by.queries;
    }
  }
};

}  // namespace capsight
