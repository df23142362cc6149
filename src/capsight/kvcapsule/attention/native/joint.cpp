// Attention of few queries over latents that all layers share, and over exact tokens, in one call a layer.
//
// A token's key is its latent z through a basis, turned by its place on every axis, each axis turning channels
// of its own. So its score is z . (u + v + w) + constants: the query, turned back by that place and seen
// through the basis, for each axis. These vectors are made once for all tokens of a stretch that share a
// place. What is gathered is one latent for each query; it goes through the values' basis last. Where nearly
// all tokens have places of their own (RoPE of one dimension) keys are rebuilt instead, a tile at a time. Where
// the machine multiplies matrices (AMX) keys are rebuilt, or places are few (`amx_fold.h`).
#include <atomic>

#include "amx.h"
#include "chunk.h"
#include "joint_chunk.h"

namespace capsight {

constexpr int64_t LEAST = 128, LARGEST = 1024;  // tokens that one of several threads takes at a time

struct Stretch {
  int64_t row, first, count;
};
// With `whole` they are longer, and go to the end of an image where that is near.
std::vector<Stretch> stretches(const Joint& s, int64_t batch, int64_t threads, bool whole, std::vector<int64_t>& ends) {
  std::vector<Stretch> found;
  int64_t least = s.tokens, small = whole ? 2 * LEAST : LEAST;
  if (threads > 1) {  // every thread gets as many, up to four, unless they would be small
    int64_t share = (s.tokens + threads - 1) / threads, parts = std::clamp<int64_t>(share / small, 1, 4);
    least = std::clamp((share + parts - 1) / parts, small, LARGEST);
    if (!whole) least = (least + GROUP - 1) / GROUP * GROUP;
  }
  for (int64_t row = 0; row < batch; row++) {
    int64_t end = s.starts[row] + s.counts[row];
    for (int64_t first = s.starts[row], next; first < end; first = next) {
      next = std::min(end, first + least);
      while (whole && next < end && next < first + 2 * least && s.places[next] == s.places[next - 1]) next++;
      found.push_back({row, first, next - first});
    }
    ends.push_back(found.size());
  }
  return found;
}

// How chunks of one layer are attended.
class Layer {
 public:
  Layer(const Joint& s, int64_t batch, int64_t heads, int64_t count) : s(s), heads(heads) {
#ifdef __AMX_BF16__
    if (!tiles_allowed()) return;
    tiles = true, folds = planned.plan(s, batch, heads, count);
#endif
  }

  // Whether it is less work where tokens of an image are together.
  bool sees_images() const {
#ifdef __AMX_BF16__
    if (tiles) return folds;
#endif
    return true;
  }

  // Queries [H, C, D] of a row over a chunk of it: [H, C] times [most, total, R numbers].
  void attend(const Stretch& of, const float* query, int64_t count, float* results) const {
    auto run = [&](auto chunk) { chunk.attend(of.first, of.count), chunk.results(results); };
#ifdef __AMX_BF16__
    if (tiles) {
      if (amx_layer.of != number) {  // each thread has its own at hand
        if (folds) amx_axes.take(planned, s, heads);
        amx_layer.take(s, heads, planned.rebuilt, !folds), amx_layer.of = number;
      }
      return run(AmxChunk(s, amx_layer, folds ? &amx_axes : nullptr, query, heads, count));
    }
#endif
    run(JointChunk<Best>(s, query, heads, count));
  }

 private:
  const Joint& s;
  const int64_t heads;
#ifdef __AMX_BF16__
  static inline std::atomic<int64_t> numbers{0};
  const int64_t number = ++numbers;  // of the call
  bool tiles = false, folds = false;
  AmxPlan planned;
#endif
};

// Values [C, D] of latents [C, R].
void values_of(const Joint& s, const float* latents, int64_t count, int64_t head, float* out) {
  auto by = kernels(count, I8);
  int64_t rank = s.latents.rank(), taken = std::min<int64_t>(count, by.queries);
  Floats q(by.queries * rank);
  for (int64_t c = 0; c < taken; c++)
    for (int64_t i = 0; i < rank; i++) q[c * rank + i] = latents[c * rank + i] * s.value_steps[i];
  alignas(64) float found[MOST * TILE];
  for (int64_t first = 0; first < s.channels; first += TILE) {
    int here = std::min<int64_t>(TILE, s.channels - first);
    const char* axes = s.axis(s.value_axes, head, first);
    by.dots({axes, rank, here, int(rank / W), int(rank), axes, 0}, q.data(), found);
    for (int64_t c = 0; c < taken; c++)
      for (int i = 0; i < here; i++)
        out[c * s.channels + first + i] = found[c * TILE + i] + s.value_mean[head * s.channels + first + i];
  }
  if (taken < count) values_of(s, latents + taken * rank, count - taken, head, out + taken * s.channels);
}

}  // namespace capsight

using namespace capsight;

// Attention of queries [B, H, C, D] to out, likewise, and float lse [B, H, C], unless null; 0 and -inf where nothing is seen.
EXPORT void capsight_joint(
    const Joint* given, const void* query, int32_t format, int64_t batch, int64_t heads, int64_t count,
    const Source* sources, int64_t source_count, float scaling, int64_t threads, void* out, float* lse) {
  const Joint& s = *given;
  int64_t rank = s.latents.rank(), channels = s.channels, own = count * channels, wide = count * (rank + 2);
  std::vector<int64_t> ends, near_ends;
  const Layer layer(s, batch, heads, count);
  auto far = stretches(s, batch, threads, layer.sees_images(), ends);
  auto near = tasks_of(sources, source_count, batch * heads, near_ends);
  int64_t many = far.size(), all = many + near.size(), narrow = count * (channels + 2);
  Floats scaled(batch * heads * own);
  const Filled parts(new float[many * heads * wide]), near_parts(new float[near.size() * narrow]);
  read(query, format, 0, scaled.size(), scaled.data());
  for (float& x : scaled) x *= scaling;
#pragma omp parallel num_threads(threads) if (threads > 1 && all > 1)
  {
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < all; i++) {
      if (i >= many) {
        const Task& t = near[i - many];
        attend(t, &scaled[t.piece * own], count, channels, t.piece % heads, format == BF16 ? scaling : 0, &near_parts[(i - many) * narrow]);
        continue;
      }
      layer.attend(far[i], &scaled[far[i].row * heads * own], count, &parts[i * heads * wide]);
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
        if (lse) lse[piece * count + c] = none ? -INFINITY : top + std::log(total);
      }
      write(found.data(), own, format, out, piece * own);
    }
  }
}
