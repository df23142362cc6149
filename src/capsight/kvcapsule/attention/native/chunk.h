// One chunk of a piece of tokens, attended by the queries of its KV head.
#pragma once
#include <algorithm>
#include <optional>
#include <vector>

#include "amx_levels.h"
#include "amx_products.h"
#include "products.h"
#include "softmax.h"

namespace capsight {

// Tokens with one KV head's piece for every row; plain memory, as the caller has it.
struct Source {
  const char *keys, *values;
  int64_t token_stride, head_stride;  // bytes
  const int64_t *starts, *counts;     // [B, H], tokens
  const char *key_step, *key_low, *value_step, *value_low;  // of each token and head, or null
  int64_t step_token_stride, step_head_stride;              // numbers
  const char *size, *mean;              // [groups, H, D] of channels of keys, or null
  int64_t group, group_stride;          // tokens of a group (0: one for all), numbers from one to the next
  const float* bias;                    // added to scores, or null
  const int64_t* bias_starts;           // [B, H]
  int64_t bias_stride;                  // from one query of a KV head to the next
  int32_t format, step_format, group_format;
};

struct Task {
  int64_t piece, first, count;  // piece = row * H + head
  const Source* source;
};

// Numbers from number `at` on.
inline void read(const void* x, int32_t format, int64_t at, int64_t count, float* out) {
  if (format == F32) std::memcpy(out, (const float*)x + at, count * 4);
  else if (format == BF16)
    for (int64_t i = 0; i < count; i++) out[i] = number(x, at + i, BF16);
  else
    for (int64_t i = 0; i < count; i++) out[i] = number(x, at + i, F16);
}
inline void write(const float* x, int64_t count, int32_t format, void* out, int64_t at) {
  if (format == F32) std::memcpy((float*)out + at, x, count * 4);
  else if (format == BF16)
    for (int64_t i = 0; i < count; i++) ((uint16_t*)out)[at + i] = to_bfloat(x[i]);
  else
    for (int64_t i = 0; i < count; i++) ((uint16_t*)out)[at + i] = to_half(x[i]);
}

// Attention of up to MOST queries of one KV head over one chunk of its tokens: an online softmax.
class Chunk {
 public:
  // Queries [.., D] of a KV head from number `before` on, times a scaling; what it was if they were bfloat16, or 0.
  Chunk(const Source& source, const float* query, int64_t before, int64_t count, int64_t channels, int64_t head, float scaling)
      : kernels(capsight::kernels(count - before, source.format)),
        taken(std::min<int64_t>(count - before, kernels.queries)),
        s(source), query(query + before * channels), before(before), channels(channels), head(head), each((channels + kernels.parts - 1) / kernels.parts),
        tiled(scaling && (Products::serve(source.format, taken, channels) || Levels::serve(source.format, taken, channels))),
        scaling(Best::pair == 2 && source.format == BF16 ? scaling : 0), line(this->scaling ? 2 * W : W),
        vectors((each + line - 1) / line * line / W), width(tiled ? channels : kernels.parts * vectors * W), q(kernels.queries * width),
        out((tiled ? MOST : kernels.queries) * width) {
    if (tiled && source.format == BF16) products.emplace(taken, channels);
    else if (tiled) levels.emplace(source.format, taken, channels);
    if (each % line && !tiled) whole.resize(TILE * vectors * W * kernels.bytes);
  }

  void attend(const Task& task) {
    std::optional<Tiles> shaped;
    if (tiled) shaped.emplace();
    start = s.starts[task.piece] + task.first;
    steps = start * s.step_token_stride + head * s.step_head_stride;
    bias = s.bias ? s.bias + s.bias_starts[task.piece] + before * s.bias_stride + task.first : nullptr;
    int64_t at = head * s.head_stride + start * s.token_stride, group = -1;
    alignas(64) float p[MOST * TILE] = {}, part[MOST * TILE];
    for (int64_t first = 0; first < task.count; first += TILE, at += TILE * s.token_stride) {
      int count = std::min<int64_t>(TILE, task.count - first);
      for (int done = 0; done < count;) {
        int64_t now = s.group ? (start + first + done) / s.group : 0;
        if (now != group) take_group(group = now);
        int here = s.group ? std::min<int64_t>(count - done, (now + 1) * s.group - start - first - done) : count;
        bool all = here == count;
        dots(tile(s.keys, at + done * s.token_stride, here, s.values + at + done * s.token_stride), all ? p : part);
        for (int64_t c = 0; c < taken && !all; c++) std::copy_n(part + c * TILE, here, p + c * TILE + done);
        adjust(p, first + done, done, here);
        done += here;
      }
      for (int64_t c = 0; c < taken; c++) {
        float keep = run.take(c, p + c * TILE, count);
        lowest[c] *= keep;
        multiply(&out[c * width], width, keep);
      }
      if (s.value_step) spread(p, first, count);
      sums(tile(s.values, at, count, s.keys + at + count * s.token_stride), p);
    }
  }

  // [most, total, D numbers] of each query; how many there are.
  int64_t results(float* x) const {
    for (int64_t c = 0; c < taken; c++, x += channels + 2) {
      x[0] = run.most[c], x[1] = run.total[c];
      if (tiled) {
        products ? products->result(out.data(), c, x + 2) : levels->result(out.data(), c, x + 2);
        for (int64_t i = 0; i < channels; i++) x[2 + i] += lowest[c];
        continue;
      }
      const float* own = &out[c * width];
      for (int64_t i = 0; i < each; i++) x[2 + i] = own[i] + lowest[c];
      for (int64_t i = each; i < channels; i++) x[2 + i] = own[vectors * W + i - each] + lowest[c];
    }
    return taken;
  }

 private:
  const Kernels kernels;
  const int64_t taken;
  const Source& s;
  const float* query;  // [taken, D], scaled
  const int64_t before, channels, head, each;
  const bool tiled;  // queries are bfloat16, and the machine multiplies tiles
  const float scaling;  // of scores of products of pairs, or 0
  const int64_t line, vectors, width;
  Floats q, out;          // [queries, width]
  Numbers<Best> pairs;    // [queries, width], not scaled: as they were given
  std::optional<Products> products;  // if tiled, and tokens are bfloat16
  std::optional<Levels> levels;      // or levels
  std::vector<char> whole;    // a tile whose parts are filled up to full vectors
  Softmax run;
  float lowest[MOST] = {};      // sum of p * low
  float mean[MOST] = {}, own[MOST] = {};  // q . mean, sum(q size)
  int64_t start, steps;
  const float* bias;

  // Channels as they come to where tiles have them.
  void copy(const float* from, float* to) const {
    if (tiled) return void(std::copy_n(from, channels, to));
    std::copy_n(from, each, to);
    if (kernels.parts == 2) std::copy_n(from + each, channels - each, to + vectors * W);
  }

  void dots(const Tile& d, float* p) {
    if (products) return products->scores(d, scaling, p);
    if (levels) return levels->scores(d, p);
    if (!scaling) return kernels.dots(d, q.data(), p);
    auto by = scores_of<Best>(taken);
    alignas(64) float none[W] = {};
    vf found[W * MOST];
    for (int first = 0; first < d.count; first += W) {
      int here = std::min(W, d.count - first);
      auto at = [&](const char* of) { return (const Best::T*)(of + first * d.stride); };
      by.plain(at(d.tokens), d.stride / int(sizeof(Best::T)), width, here, pairs.data(), nullptr, found, at(d.next));
      std::fill(found + here * taken, found + W * taken, vf{});
      by.add(found, none, 0, p + first);
    }
    for (int64_t c = 0; c < taken; c++)
      for (int t = 0; t < TILE; t += W) put(p + c * TILE + t, get<vf>(p + c * TILE + t) * scaling);
  }

  void sums(const Tile& d, const float* p) {
    if (products) return products->sums(d, p, out.data());
    if (levels) return levels->sums(d, p, out.data());
    if (!scaling) return kernels.sums(d, p, out.data());
    alignas(64) Best::T shares[MOST * TILE];
    round_to<Best>(p, taken * TILE, shares);
    gather_of<Best>(taken).sums(
        (const Best::T*)d.tokens, d.stride / int(sizeof(Best::T)), width, d.count, shares, width, out.data(), (const Best::T*)d.next);
  }

  Tile tile(const char* of, int64_t at, int count, const char* next) {
    const char* tokens = of + at;
    int64_t stride = s.token_stride;
    if (each % line && !tiled) {
      stride = vectors * W * kernels.bytes;
      for (int t = 0; t < count; t++)
        std::memcpy(&whole[t * stride], tokens + t * s.token_stride, each * kernels.bytes);
      tokens = whole.data();
    }
    return {tokens, stride, count, int(vectors), int(width), next, int(each * kernels.bytes + 63) / 64};
  }

  void take_group(int64_t group) {
    int64_t at = group * s.group_stride + head * channels;
    if (!s.size && !s.mean && !s.key_low) {
      for (int64_t c = 0; c < taken; c++) copy(query + c * channels, &q[c * width]);
      std::fill_n(mean, MOST, 0.f);
      if (levels) levels->take(q.data());
      if (!scaling) return;
      for (float& x : q) x /= scaling;
      if (products) return products->take(q.data());
      pairs.resize(q.size());
      return round_to<Best>(q.data(), q.size(), pairs.data());
    }
    const int64_t wide = (channels + W - 1) / W * W;
    Floats size(wide, 1.f), middle(wide), x(wide);
    if (s.size) read(s.size, s.group_format, at, channels, size.data());
    if (s.mean) read(s.mean, s.group_format, at, channels, middle.data());
    for (int64_t c = 0; c < taken; c++) {
      std::copy_n(query + c * channels, channels, x.data());
      vf by_mean = {}, all = {};
      for (int64_t i = 0; i < wide; i += W) {
        vf given = get<vf>(&x[i]), sized = given * get<vf>(&size[i]);
        by_mean += given * get<vf>(&middle[i]), all += sized, put(&x[i], sized);
      }
      mean[c] = sum_of(by_mean), own[c] = sum_of(all);
      copy(x.data(), &q[c * width]);
    }
    if (levels) levels->take(q.data());
  }

  // Steps of tokens, or what they are offset by.
  void look_up(const char* of, int64_t first, int count, float* to) const {
    int64_t at = steps + first * s.step_token_stride;
    for (int t = 0; t < count; t++, at += s.step_token_stride) to[t] = number(of, at, s.step_format);
  }

  // From products with levels to scores.
  void adjust(float* p, int64_t first, int done, int count) {
    float step[TILE], low[TILE] = {};
    if (s.key_step) look_up(s.key_step, first, count, step);
    else std::fill_n(step, count, 1.f);
    if (s.key_low) look_up(s.key_low, first, count, low);
    for (int64_t c = 0; c < taken; c++) {
      float *x = p + c * TILE + done, by_low = own[c], constant = mean[c];
      if (s.key_step || s.key_low || s.mean)
        for (int t = 0; t < count; t++) x[t] = x[t] * step[t] + (low[t] * by_low + constant);
      if (bias)
        for (int t = 0; t < count; t++) x[t] += bias[c * s.bias_stride + first + t];
    }
  }

  // From probabilities to factors of levels, and what offsets add to every channel.
  void spread(float* p, int64_t first, int count) {
    alignas(64) float step[TILE] = {}, low[TILE] = {};
    look_up(s.value_step, first, count, step), look_up(s.value_low, first, count, low);
    for (int64_t c = 0; c < taken; c++, p += TILE) {
      vf sum = {};
      for (int t = 0; t < TILE; t += W) {
        vf own = get<vf>(p + t);
        sum += own * get<vf>(low + t), put(p + t, own * get<vf>(step + t));
      }
      lowest[c] += sum_of(sum);
    }
  }
};

inline void attend(
    const Task& task, const float* query, int64_t count, int64_t channels, int64_t head, float scaling, float* out) {
  for (int64_t done = 0; done < count;) {
    Chunk chunk(*task.source, query, done, count, channels, head, scaling);
    chunk.attend(task);
    done += chunk.results(out + done * (channels + 2));
  }
}

constexpr int64_t CHUNK = 1024;

// The pieces of all sources, cut up: piece after piece, and where the tasks of each end.
inline std::vector<Task> tasks_of(
    const Source* sources, int64_t source_count, int64_t pieces, std::vector<int64_t>& ends) {
  std::vector<Task> tasks;
  for (int64_t piece = 0; piece < pieces; piece++) {
    for (int64_t i = 0; i < source_count; i++) {
      int64_t all = sources[i].counts[piece];
      for (int64_t first = 0; first < all; first += CHUNK)
        tasks.push_back({piece, first, std::min(CHUNK, all - first), sources + i});
    }
    ends.push_back(tasks.size());
  }
  return tasks;
}

}  // namespace capsight
