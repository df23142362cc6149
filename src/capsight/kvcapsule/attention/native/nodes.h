// The places that a stretch of tokens has on an axis, and fewer ones that it may be seen through.
//
// A pair of channels that turns by f a place is a cosine of places p; a polynomial through K places p_k misses it
// by f^K / K! prod |p - p_k| at most, and by nothing at these.
#pragma once
#include <algorithm>
#include <vector>

#include "joint.h"

namespace capsight {

constexpr double MISSED = 5e-4;  // what the polynomial may miss of a cosine; numbers in bfloat16 miss 2e-3
constexpr double EXACT = 1e-6;   // the same, where numbers are floats
constexpr size_t SEVERAL = 8;    // places that a polynomial may go through; else all are taken
constexpr size_t NODES = 12;     // the same, where numbers are floats

// The places of one axis that a stretch has, and those that its tokens are seen through.
struct Nodes {
  std::vector<int32_t> places, at;  // by position
  int32_t lowest;                   // place of the stretch
  std::vector<int> slot;            // of each place of the axis from the lowest on, which one of the stretch it is
  Floats shares;                    // [places of the stretch, those seen through]

  // The places of tokens from one on, and those to see them through where no pair turns faster than that.
  void take(const Joint& s, int axis, int64_t first, int64_t tokens, double fastest) {
    list(s, axis, first, tokens);
    for (size_t many = 1; many <= SEVERAL && many < places.size(); many++)
      if (see_through(many) * power(fastest, many) <= MISSED) return;
    at = places;
  }

  // The places of tokens from one on, and those to see them through where that is less work than to fold queries
  // for each, `pair` numbers at a time.
  void save(const Joint& s, int axis, int64_t first, int64_t tokens, size_t pair) {
    list(s, axis, first, tokens);
    double quarter = (spots[places.back()] - spots[places.front()]) / 4, fastest = s.pairs[axis] ? s.frequencies[axis][0] : 0;
    double width = double(s.widths[axis]) / pair, all = places.size(), missed = pair > 1 ? MISSED : EXACT;
    for (size_t many = 1; many <= NODES && many * (width + all) < width * all; many++)
      if (2 * power(quarter * fastest, many) <= missed && see_through(many) * power(fastest, many) <= missed) return share();
    at = places, share();
  }

  void list(const Joint& s, int axis, int64_t first, int64_t tokens) {
    const int32_t* own = s.places + axis * s.tokens + first;
    auto [least, most] = std::minmax_element(own, own + tokens);
    lowest = *least, slot.assign(*most - lowest + 1, -1), places.clear();
    for (int64_t t = 0; t < tokens; t++)
      if (slot[own[t] - lowest] < 0) slot[own[t] - lowest] = 0, places.push_back(own[t]);
    spots = s.spots[axis];
    if (!std::is_sorted(places.begin(), places.end())) std::sort(places.begin(), places.end());
  }

  // Takes so many, close to where Chebyshev has them; the largest product of distances to them.
  double see_through(size_t many) {
    at.clear();
    double low = spots[places.front()], high = spots[places.back()], worst = 0;
    for (size_t k = 0, i = 0; k < many; k++, i++) {
      double wanted = (low + high) / 2 - (high - low) / 2 * std::cos(M_PI * (k + .5) / many);
      while (i + many - k < places.size() && std::abs(spots[places[i + 1]] - wanted) <= std::abs(spots[places[i]] - wanted)) i++;
      at.push_back(places[i]);
    }
    for (int32_t place : places) {
      double product = 1;
      for (int32_t node : at) product *= std::abs(spots[place] - spots[node]);
      worst = std::max(worst, product);
    }
    return worst;
  }
  static double power(double x, size_t many) { return std::pow(x, many) / std::tgamma(many + 1.); }  // x^K / K!

  void share() {
    shares.resize(places.size() * at.size());
    for (size_t i = 0; i < places.size(); i++) {
      slot[places[i] - lowest] = i;
      for (size_t k = 0; k < at.size(); k++) {
        double share = at.size() < places.size() || i == k;
        for (size_t j = 0; j < at.size() && at.size() < places.size(); j++)
          if (j != k) share *= (spots[places[i]] - spots[at[j]]) / (spots[at[k]] - spots[at[j]]);
        shares[i * at.size() + k] = share;
      }
    }
  }

 private:
  const double* spots;
};

}  // namespace capsight
