// Channels as matrices for the places that queries are turned back by (`nodes.h`), and when these are few enough.
#pragma once
#include "amx_open.h"
#include "nodes.h"

#ifdef __AMX_BF16__
namespace capsight {

constexpr int64_t PREPARED = 50;  // tokens whose rebuilt keys are as much work as to fold queries
constexpr int64_t FOLDS = 1 << 19;  // pairs of numbers of folded queries that are soon at hand again
constexpr int64_t APART = 48;  // lanes that are as much work as to look at a head's keys at all
constexpr int64_t FOLDED = 1 << 10;  // tokens of a stretch, or up to the end of an image

// What is folded, and what is rebuilt; the same for all chunks.
struct AmxPlan {
  int64_t rank, tiles, lanes, columns;  // R; of GROUP channels; a KV head's queries, and all, filled up
  int64_t rebuilt[3];                   // pairs of each axis that keys are rebuilt of

  bool is_rebuilt(const Joint& s, int axis, int64_t i) const { return i < 2 * s.pairs[axis] && i % s.pairs[axis] < rebuilt[axis]; }
  double fastest(const Joint& s, int axis) const { return rebuilt[axis] < s.pairs[axis] ? s.frequencies[axis][rebuilt[axis]] : 0; }

  // Finds what is least work; whether anything is not rebuilt then.
  bool plan(const Joint& s, int64_t batch, int64_t heads, int64_t count) {
    std::copy_n(s.pairs, 3, rebuilt);
    if (count < 3) return false;
    rank = s.latents.rank(), tiles = AmxLayer::up(s.padded(0) + s.padded(1) + s.padded(2), GROUP) / GROUP;
    for (lanes = 4; lanes < std::min<int64_t>(count, SIDE);) lanes *= 2;
    if (count > SIDE) lanes = AmxLayer::up(count, 2 * SIDE);
    columns = AmxLayer::up(heads * lanes, SIDE);
    int64_t fast[3][SEVERAL + 1] = {}, tokens = 0, stretches = 0, groups = rank / GROUP;  // fast: too fast for K places
    for (int64_t row = 0; row < batch; row++) {
      if (!s.counts[row]) continue;
      int64_t first = s.starts[row], here = stretch(s, first, first + s.counts[row]);  // other stretches are alike
      tokens += here, stretches++;
      Nodes own;
      for (int axis = 0; axis < 3; axis++) {
        own.list(s, axis, first, here);
        for (size_t k = 1; k <= SEVERAL && k < own.places.size(); k++) {
          double worst = own.see_through(k);
          int64_t& found = fast[axis][k];
          while (found < s.pairs[axis] && worst * Nodes::power(s.frequencies[axis][found], k) > MISSED) found++;
        }
      }
    }
    auto keys = [&](int64_t pairs, int64_t rest) {
      return pairs + rest ? heads * (AmxLayer::up(2 * AmxLayer::up(pairs, SIDE) + rest, 2 * SIDE) + APART) : 0;
    };
    auto work = [&](int64_t keys, int64_t folded) {
      int64_t prepared = folded ? PREPARED * stretches * heads * s.channels * (groups + 2) : 0;
      return tokens * (keys * (groups + 2 + count * 2 / 3) + AmxLayer::up(folded, 2 * SIDE) * (groups + 6)) + prepared;
    };
    int64_t all = s.pairs[0] + s.pairs[1] + s.pairs[2], least = work(keys(all, s.channels - 2 * all), 0) * 7 / 8;
    bool some = false;
    for (size_t n = 0; n < SEVERAL * SEVERAL * SEVERAL; n++) {
      size_t i = n / SEVERAL / SEVERAL + 1, j = n / SEVERAL % SEVERAL + 1, k = n % SEVERAL + 1;
      if ((i > 1 && fast[0][i] == fast[0][i - 1]) || (j > 1 && fast[1][j] == fast[1][j - 1]) || (k > 1 && fast[2][k] == fast[2][k - 1])) continue;
      int64_t pairs[3] = {fast[0][i], fast[1][j], fast[2][k]}, found = work(keys(pairs[0] + pairs[1] + pairs[2], 0), (i + j + k - 2) * columns);
      if (found < least) least = found, some = true, std::copy_n(pairs, 3, rebuilt);
    }
    return some;
  }

  static int64_t stretch(const Joint& s, int64_t first, int64_t end) {
    int64_t t = first + 1;
    while (t < end && t - first < FOLDED && (t - first < 8 * SPAN || s.places[t] == s.places[t - 1])) t++;
    return t - first;
  }
};

// Channels as rows of matrices, but for pairs that turn too fast, of which keys are rebuilt.
struct AmxAxes : AmxPlan {
  Words axes;  // [H, R / GROUP, tiles, 2 SIDE, SIDE], two channels each

  void take(const AmxPlan& plan, const Joint& s, int64_t heads) {
    static_cast<AmxPlan&>(*this) = plan;
    std::vector<int64_t> channel(tiles * GROUP, -1);
    for (int64_t axis = 0, at = 0; axis < 3; at += s.padded(axis++)) std::copy_n(s.order[axis], s.widths[axis], &channel[at]);
    axes.resize(heads * rank * tiles * SIDE);
    uint32_t* to = axes.data();
    for (int64_t head = 0; head < heads; head++)
      for (int64_t r = 0; r < rank; r += GROUP)
        for (int64_t i = 0; i < tiles; i++, to += GROUP * SIDE) {
          __m512i x[SIDE], y[SIDE];
          for (int n = 0; n < SIDE; n++) {
            const int64_t* own = &channel[i * GROUP + 2 * n];
            __m512i a = AmxLayer::row(s, head, own[0], r), b = AmxLayer::row(s, head, own[1], r);
            x[n] = _mm512_unpacklo_epi16(a, b), y[n] = _mm512_unpackhi_epi16(a, b);
          }
          transpose(x), transpose(y);
          for (int n = 0; n < SIDE; n++) {  // coordinates in their order again
            _mm512_store_si512(to + (n / 4 * 8 + n % 4) * SIDE, x[n]);
            _mm512_store_si512(to + (n / 4 * 8 + 4 + n % 4) * SIDE, y[n]);
          }
        }
  }
};

static thread_local AmxAxes amx_axes;

}  // namespace capsight
#endif
