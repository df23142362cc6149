// Attention of few queries over ragged pieces of keys and values, one call for all rows and KV heads.
//
// Every (row, KV head) has a piece in each of several sources (kept tokens, exact tokens). A piece is cut
// into chunks, so that threads share them; chunks are attended with an online softmax and added up by the
// logs of their normalisers (Flash-Decoding). Numbers are read as they are stored: 32 or 16 bits, or 8 or 4
// with steps and offsets, which are applied to queries, scores and probabilities instead of to channels:
//   q . (mean + size * (step_t * level_t + low_t)) = q . mean + step_t * (q size . level_t) + low_t * sum(q size)
#include "chunk.h"

namespace capsight {

constexpr int64_t FEW = 1 << 15;  // numbers that are not worth a second thread

}  // namespace capsight

using namespace capsight;

// Attention of queries [B, H, C, D] to out, likewise, and float lse [B, H, C], unless null; 0 and -inf where nothing is seen.
EXPORT void capsight_decode(
    const void* query, int32_t format, int64_t batch, int64_t heads, int64_t count, int64_t channels,
    const Source* sources, int64_t source_count, float scaling, int64_t threads, void* out, float* lse) {
  int64_t pieces = batch * heads, own = count * channels, part = count * (channels + 2), tokens = 0;
  std::vector<int64_t> ends;  // [B, H]
  auto tasks = tasks_of(sources, source_count, pieces, ends);
  for (const Task& t : tasks) tokens += t.count;
  const Filled parts(new float[tasks.size() * part]);
  Floats scaled(pieces * own);
  read(query, format, 0, pieces * own, scaled.data());
  for (float& x : scaled) x *= scaling;
  int64_t done = tasks.size();
  std::vector<int32_t> order;  // source by source, as tokens lie in memory: what follows a chunk is fetched with its end
  for (int64_t n = 0; n < source_count; n++)
    for (int64_t i = 0; i < done; i++)
      if (tasks[i].source == sources + n) order.push_back(i);
#pragma omp parallel num_threads(threads) if (threads > 1 && tokens * channels > FEW)
  {
#pragma omp for schedule(dynamic)
    for (int64_t n = 0; n < done; n++) {
      const int64_t i = order[n];
      const Task& t = tasks[i];
      attend(t, &scaled[t.piece * own], count, channels, t.piece % heads, format == BF16 ? scaling : 0, &parts[i * part]);
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < pieces * count; row++) {
      int64_t piece = row / count, c = row % count, first = piece ? ends[piece - 1] : 0;
      float* sum = &scaled[row * channels];
      float total = add_up(&parts[first * part + c * (channels + 2)], ends[piece] - first, part, channels, sum);
      if (lse) lse[row] = total;
      write(sum, channels, format, out, row * channels);
    }
  }
}

// Puts a new token of every row and KV head, keys and values [B, H, D], behind those of a source; counts grow.
EXPORT void capsight_append(
    const Source* to, const char* keys, const char* values, int64_t batch, int64_t heads, int64_t bytes) {
  for (int64_t piece = 0; piece < batch * heads; piece++) {
    int64_t token = to->starts[piece] + const_cast<int64_t*>(to->counts)[piece]++;
    int64_t at = token * to->token_stride + piece % heads * to->head_stride;
    std::memcpy(const_cast<char*>(to->keys) + at, keys + piece * bytes, bytes);
    std::memcpy(const_cast<char*>(to->values) + at, values + piece * bytes, bytes);
  }
}

EXPORT int32_t capsight_interface() { return 9; }
