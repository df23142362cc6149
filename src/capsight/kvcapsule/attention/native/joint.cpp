// Attention of few queries over latents that all layers share, and over exact tokens, in one call a layer.
//
// A token's key is its latent z through a basis, turned by its place on every axis, each axis turning channels
// of its own. So its score is z . (u + v + w) + constants: the query, turned back by that place and seen
// through the basis, for each axis. These vectors are made once for all tokens of a stretch that share a
// place. What is gathered is one latent for each query; it goes through the values' basis last. Where nearly
// all tokens have places of their own (RoPE of one dimension) keys are rebuilt instead, a tile at a time.
#include "chunk.h"
#include "rebuild.h"

namespace capsight {

constexpr int64_t STRETCH = 1 << 18;  // numbers of latents, or of folded queries, that are at hand

// What a chunk needs room for, kept for the next one of the same thread.
struct Room {
  Floats z, scales, line, p;  // [tokens, R], [tokens, R / GROUP], [C, R] and [tiles, H C + MOST, TILE]
  Folded axes[3];
};
thread_local Room room;

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

constexpr int64_t JOINT_CHUNK = 128;  // tokens at least that a thread takes at a time, if there are as many

struct Stretch {
  int64_t row, first, count;
};
std::vector<Stretch> stretches(const Joint& s, int64_t batch, std::vector<int64_t>& ends) {
  std::vector<Stretch> found;
  for (int64_t row = 0; row < batch; row++) {
    int64_t end = s.starts[row] + s.counts[row];
    for (int64_t first = s.starts[row], next; first < end; first = next) {
      next = std::min(end, first + JOINT_CHUNK);  // where an image ends, if that is near
      while (next < end && next < first + 2 * JOINT_CHUNK && s.places[next] == s.places[next - 1]) next++;
      found.push_back({row, first, next - first});
    }
    ends.push_back(found.size());
  }
  return found;
}

// Values [C, D] of latents [C, R], C <= MOST.
void values_of(const Joint& s, const float* latents, int64_t count, int64_t head, float* out) {
  auto by = kernels(count, s.format);
  int64_t rank = s.latents.rank(), taken = std::min<int64_t>(count, by.queries);
  Floats q(by.queries * rank);
  std::copy_n(latents, taken * rank, q.data());
  alignas(64) float found[MOST * TILE];
  for (int64_t first = 0; first < s.channels; first += TILE) {
    int here = std::min<int64_t>(TILE, s.channels - first);
    const char* axes = s.axis(s.value_axes, head, first);
    by.dots({axes, s.channel_stride * by.bytes, here, int(rank / W), int(rank), axes, 0}, q.data(), found);
    for (int64_t c = 0; c < taken; c++)
      for (int i = 0; i < here; i++)
        out[c * s.channels + first + i] = found[c * TILE + i] + s.value_mean[head * s.channels + first + i];
  }
  if (taken < count) values_of(s, latents + taken * rank, count - taken, head, out + taken * s.channels);
}

}  // namespace capsight

using namespace capsight;

// Attention of queries [B, H, C, D] to out, likewise, and float lse [B, H, C]; 0 and -inf where nothing is seen.
extern "C" void capsight_joint(
    const Joint* given, const void* query, int32_t format, int64_t batch, int64_t heads, int64_t count,
    const Source* sources, int64_t source_count, float scaling, int64_t threads, void* out, float* lse) {
  const Joint& s = *given;
  int64_t rank = s.latents.rank(), channels = s.channels, own = count * channels, wide = count * (rank + 2);
  std::vector<int64_t> ends, near_ends;
  auto far = stretches(s, batch, ends);
  auto near = tasks_of(sources, source_count, batch * heads, near_ends);
  int64_t many = far.size(), all = many + near.size(), narrow = count * (channels + 2);
  std::vector<float> scaled(batch * heads * own), parts(many * heads * wide), near_parts(near.size() * narrow);
  read(query, format, 0, scaled.size(), scaled.data());
  for (float& x : scaled) x *= scaling;
#pragma omp parallel num_threads(threads) if (threads > 1 && all > 1)
  {
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < all; i++) {
      if (i >= many) {
        const Task& t = near[i - many];
        attend(t, &scaled[t.piece * own], count, channels, t.piece % heads, &near_parts[(i - many) * narrow]);
        continue;
      }
      JointChunk chunk(s, &scaled[far[i].row * heads * own], heads, count);
      chunk.attend(far[i].first, far[i].count);
      chunk.results(&parts[i * heads * wide]);
    }
#pragma omp for schedule(static)
    for (int64_t piece = 0; piece < batch * heads; piece++) {
      int64_t row = piece / heads, head = piece % heads;
      int64_t first = row ? ends[row - 1] : 0, near_first = piece ? near_ends[piece - 1] : 0;
      Floats latents(count * rank), found(own), of_far(count);
      for (int64_t c = 0; c < count; c++)
        of_far[c] = add_up(&parts[(first * heads + head) * wide + c * (rank + 2)], ends[row] - first, heads * wide, rank, &latents[c * rank]);
      values_of(s, latents.data(), count, head, found.data());
      for (int64_t c = 0; c < count; c++) {
        float *exact = &scaled[piece * own + c * channels], *mine = &found[c * channels];
        float other = add_up(&near_parts[near_first * narrow + c * (channels + 2)], near_ends[piece] - near_first, narrow, channels, exact);
        float top = std::max(other, of_far[c]);
        bool none = top == -INFINITY;
        float a = none ? 0 : std::exp(other - top), b = none ? 0 : std::exp(of_far[c] - top), total = none ? 1 : a + b;
        for (int64_t i = 0; i < channels; i++) mine[i] = (a * exact[i] + b * mine[i]) / total;
        lse[piece * count + c] = none ? -INFINITY : top + std::log(total);
      }
      write(found.data(), own, format, out, piece * own);
    }
  }
}
