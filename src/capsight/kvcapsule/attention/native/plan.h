// How a chunk of one row's tokens is attended to: which are taken together, and through which places they are seen.
// No layer and no query changes it, so a thread keeps what it has planned for the next step over the same tokens.
#pragma once
#include <deque>

#include "nodes.h"

namespace capsight {

constexpr size_t PLANS = 64;          // that a thread keeps, if they are not of more tokens than that
constexpr int64_t PLANNED = 1 << 18;
constexpr int64_t AT_HAND = 1 << 19;  // bytes of opened latents, or of folded queries, that caches hold

// What a plan is made for beside the places.
struct Asked {
  int64_t queries, block, size;  // of a KV head; coordinates opened together; bytes of one
  size_t pair;                   // see `Nodes::save`
  bool operator==(const Asked& x) const { return queries == x.queries && block == x.block && size == x.size && pair == x.pair; }
};

// Tokens that share a line: places on the first two axes, and W of them at most that end where lanes do.
struct Group {
  int first, count, time, height, columns[W];
};

// Tokens that are taken together, `first` counted from the chunk's first.
struct Part {
  int64_t first, count;
  Nodes nodes[3];
  std::vector<Group> groups;
};

class Plan {
 public:
  bool rebuild;  // keys, since hardly any tokens share places
  std::vector<Part> parts;

  Plan(const Joint& s, int64_t start, int64_t tokens, const Asked& asked) : asked(asked), channels(s.channels) {
    int64_t folded = 0;
    for (int i = 0; i < 3; i++) {
      const int32_t* own = places(s, i, start);
      axes[i] = {{own, own + tokens}, {s.spots[i], s.spots[i] + s.sizes[i]}, s.widths[i], s.pairs[i], fastest(s, i), {}};
      axes[i].seen.assign(s.sizes[i], -1);
      for (int64_t t = 0; t < tokens; t++) folded += is_new(i, t) * s.widths[i];
    }
    rebuild = (folded + 2 * tokens) * asked.queries > tokens * s.channels;
    for (int64_t first = 0; first < tokens && !rebuild; first += parts.back().count) {
      marks++;
      parts.push_back({first, together(first, tokens), {}, {}});
      for (int axis = 0; axis < 3; axis++) parts.back().nodes[axis].save(s, axis, start + first, parts.back().count, asked.pair);
      list(parts.back());
    }
    for (Axis& axis : axes) axis.seen = {};
  }

  // That of a thread for these tokens: an earlier one, where these have the same places.
  static const Plan& of(const Joint& s, int64_t start, int64_t tokens, const Asked& asked) {
    static thread_local std::deque<Plan> known;  // the oldest first
    int64_t held = tokens;
    for (const Plan& plan : known) {
      if (plan.asked == asked && plan.fits(s, start, tokens)) return plan;
      held += plan.axes[0].places.size();
    }
    for (; !known.empty() && (known.size() >= PLANS || held > PLANNED); known.pop_front()) held -= known.front().axes[0].places.size();
    return known.emplace_back(s, start, tokens, asked);
  }

 private:
  const Asked asked;
  const int64_t channels;
  // All else that it depends on, for each axis.
  struct Axis {
    std::vector<int32_t> places;
    std::vector<double> spots;
    int64_t width, pairs;
    double fastest;
    std::vector<int64_t> seen;  // of each place, the part that had it last
  };
  Axis axes[3];
  int64_t marks = 0;

  static const int32_t* places(const Joint& s, int axis, int64_t first) { return s.places + axis * s.tokens + first; }
  static double fastest(const Joint& s, int axis) { return s.pairs[axis] ? s.frequencies[axis][0] : 0; }

  bool fits(const Joint& s, int64_t start, int64_t tokens) const {
    if (channels != s.channels || int64_t(axes[0].places.size()) != tokens) return false;
    for (int i = 0; i < 3; i++) {
      const Axis& own = axes[i];
      if (own.width != s.widths[i] || own.pairs != s.pairs[i] || own.fastest != fastest(s, i) || int64_t(own.spots.size()) != s.sizes[i]) return false;
      if (std::memcmp(own.places.data(), places(s, i, start), tokens * sizeof(int32_t))) return false;
      if (std::memcmp(own.spots.data(), s.spots[i], s.sizes[i] * sizeof(double))) return false;
    }
    return true;
  }

  bool is_new(int axis, int64_t t) {
    int64_t& last = axes[axis].seen[axes[axis].places[t]];
    return last != marks && (last = marks, true);
  }

  // How many of the tokens from one on are taken together.
  int64_t together(int64_t first, int64_t tokens) {
    const int64_t each = asked.block * asked.size, most = std::max<int64_t>(TILE, AT_HAND / each);
    int64_t t = first, places = 0;
    for (bool done = false; t < tokens && t - first < most && !done; t++) {
      for (int axis = 0; axis < 3; axis++) places += is_new(axis, t);
      bool image = t + 1 < tokens && axes[0].places[t + 1] != axes[0].places[t];
      done = t - first >= TILE && ((image && t - first >= most / 2) || places * std::min<int64_t>(asked.queries, MOST) * each > AT_HAND);
    }
    return t - first;
  }

  void list(Part& part) const {
    auto slot = [&](int axis, int64_t t) {
      const Nodes& of = part.nodes[axis];
      return of.slot[axes[axis].places[part.first + t] - of.lowest];
    };
    for (int t = 0; t < part.count; t++) {
      int time = slot(0, t), height = slot(1, t);
      if (t % W == 0 || part.groups.back().time != time || part.groups.back().height != height)
        part.groups.push_back({t, 0, time, height, {}});
      Group& own = part.groups.back();
      own.columns[own.count++] = slot(2, t);
    }
  }
};

}  // namespace capsight
