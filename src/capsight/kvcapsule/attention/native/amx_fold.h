// Scores without a rebuilt key, on machines that multiply tiles of matrices, where places of a stretch differ
// little: queries are turned back by a few of its places and seen through the axes, and what a token adds up of
// their products is what a polynomial through these places gives at its own.
//
// A pair of channels that turns by f a place is a cosine of places p; through K places p_k the polynomial misses
// it by f^K / K! prod |p - p_k| at most, and by nothing at these. Folded queries are rounded to bfloat16.
#pragma once
#include <memory>

#include "amx_open.h"

#ifdef __AMX_BF16__
namespace capsight {

constexpr double MISSED = 5e-4;  // what the polynomial may miss of a cosine; numbers in bfloat16 miss 2e-3
constexpr size_t SEVERAL = 8;  // places that a polynomial may go through; else all are taken
constexpr int64_t FOLDED = 1 << 10;  // tokens of a stretch, or up to the end of an image

// The places of one axis that a stretch has, and those that its tokens are seen through.
struct Nodes {
  std::vector<int32_t> places, at;  // by position
  std::vector<int> slot;            // of each place of the axis, which one of the stretch it is; or -1
  Floats shares;                    // [places of the stretch, those seen through]

  void take(const Joint& s, int axis, int64_t first, int64_t tokens) {
    slot.assign(s.sizes[axis], -1), places.clear();
    for (int64_t t = first; t < first + tokens; t++) {
      int32_t place = s.places[axis * s.tokens + t];
      if (slot[place] < 0) slot[place] = 0, places.push_back(place);
    }
    spots = s.spots[axis];
    std::sort(places.begin(), places.end(), [&](int32_t a, int32_t b) { return spots[a] < spots[b]; });
    double factor = 1;
    for (size_t many = 1; many <= SEVERAL && many < places.size(); many++)
      if (see_through(many) * (factor *= s.fastest[axis] / many) <= MISSED) return;
    at = places;
  }

  void share() {
    shares.resize(places.size() * at.size());
    for (size_t i = 0; i < places.size(); i++) {
      slot[places[i]] = i;
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
};

// Channels as rows of matrices; the same for all chunks.
struct AmxAxes {
  int64_t rank, tiles, lanes, columns;  // R; of GROUP channels; a KV head's queries, and all, filled up
  Words axes;                           // [H, R / GROUP, tiles, 2 SIDE, SIDE], two channels each

  // Whether that is less work than to rebuild `keys` lanes of all heads.
  bool pays(const Joint& s, int64_t batch, int64_t heads, int64_t count, int64_t keys) {
    if (count < 3) return false;
    rank = s.latents.rank(), tiles = AmxLayer::up(s.padded(0) + s.padded(1) + s.padded(2), GROUP) / GROUP;
    for (lanes = 4; lanes < std::min<int64_t>(count, SIDE);) lanes *= 2;
    if (count > SIDE) lanes = AmxLayer::up(count, 2 * SIDE);
    columns = AmxLayer::up(heads * lanes, SIDE);
    int64_t work = 0, tokens = 0, groups = rank / GROUP;
    for (int64_t row = 0; row < batch; row++)
      if (s.counts[row]) {  // other stretches are alike
        int64_t here = stretch(s, s.starts[row], s.starts[row] + s.counts[row]);
        tokens += here, work += AmxLayer::up(nodes(s, s.starts[row], here) * columns, 2 * SIDE) * (here + 128);
      }
    return work * (groups + 2) < tokens * keys * (groups + 2 + count * 2 / 3);
  }

  static int64_t stretch(const Joint& s, int64_t first, int64_t end) {
    int64_t t = first + 1;
    while (t < end && t - first < FOLDED && (t - first < 8 * SPAN || s.places[t] == s.places[t - 1])) t++;
    return t - first;
  }

  static int64_t nodes(const Joint& s, int64_t first, int64_t tokens) {
    int64_t all = 1;
    Nodes own;
    for (int axis = 0; axis < 3; axis++) own.take(s, axis, first, tokens), all += own.at.size() - 1;
    return all;
  }

  void take(const Joint& s, int64_t heads) {
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

// What scores need room for, kept for the next ones of the same thread.
struct AmxFoldRoom {
  Nodes nodes[3];
  Floats asked, turned, mean, constants;  // [H C, channels], twice, [H, channels], [nodes, columns]
  Words weights, folded;  // [H, tiles of columns, tiles of channels, SIDE, SIDE]; [nodes, columns / SIDE, R / GROUP, SIDE, SIDE]
};
static thread_local AmxFoldRoom amx_fold_room;

class AmxFolded {
 public:
  // Queries [H, C, D], scaled.
  AmxFolded(const Joint& s, const AmxAxes& axes, const float* query, int64_t heads, int64_t count)
      : s(s), axes(axes), heads(heads), count(count), groups(axes.rank / GROUP), columns(axes.columns), stride(axes.tiles * GROUP) {
    room.asked.assign(heads * count * stride, 0.f), room.turned = room.asked, room.mean.assign(heads * stride, 0.f);
    for (int64_t head = 0; head < heads; head++)
      for (int64_t axis = 0, at = 0; axis < 3; at += s.padded(axis++))
        for (int64_t i = 0; i < s.widths[axis]; i++) {
          int64_t own = s.order[axis][i], other = s.order[axis][s.partner(axis, i)];
          room.mean[head * stride + at + i] = s.key_mean[head * s.channels + own];
          for (int64_t c = head * count; c < (head + 1) * count; c++)
            room.asked[c * stride + at + i] = query[c * s.channels + own], room.turned[c * stride + at + i] = query[c * s.channels + other];
        }
  }

  // Folds queries for the next tokens; for how many.
  int64_t prepare(int64_t first, int64_t end) {
    int64_t tokens = axes.stretch(s, first, end);
    for (;; tokens = (tokens + 1) / 2) {  // where places differ more than elsewhere
      many = 1, main = 0;
      for (int axis = 0; axis < 3; axis++) {
        room.nodes[axis].take(s, axis, first, tokens), many += room.nodes[axis].at.size() - 1;
        if (room.nodes[axis].at.size() > room.nodes[main].at.size()) main = axis;
      }
      if (many <= 3 * int64_t(SEVERAL) || tokens <= SPAN) break;
    }
    for (Nodes& nodes : room.nodes) nodes.share();
    int64_t each = columns / SIDE * groups * SIDE * SIDE;
    room.folded.resize((AmxLayer::up(many * axes.lanes, 2 * SIDE) / axes.lanes + 1) * each);
    room.constants.resize((AmxLayer::up(many * axes.lanes, 2 * SIDE) / axes.lanes + 1) * columns);
    weigh();
    if (axes.lanes == 4) fold<4>(each);
    else if (axes.lanes == 8) fold<8>(each);
    else fold<SIDE>(each);
    return tokens;
  }

  // Lanes of the products of a token, a multiple of two tiles; what they are made with, as an `AmxLayer` has it.
  int64_t wide() const { return AmxLayer::up(many * columns, 2 * SIDE); }
  const uint32_t* folded() const { return room.folded.data(); }
  const float* constants() const { return room.constants.data(); }

  // Scores p [tiles, H C, TILE] of tokens from one on of their products [tokens, wide].
  void add_up(int64_t first, int64_t tokens, const float* products, float* p) const {
    for (int64_t t = 0; t < tokens; t += SIDE)
      for (int64_t i = 0; i < columns; i += SIDE) {
        __m512i x[SIDE];
        for (int n = 0; n < SIDE; n++) {
          const float* own = products + (t + n) * wide() + i;
          int64_t token = first + std::min(t + n, tokens - 1);
          vf sum = {};
          for (int axis = 0; axis < 3; axis++) {
            const Nodes& of = room.nodes[ordered(axis)];
            const float* shares = &of.shares[of.slot[s.places[ordered(axis) * s.tokens + token]] * of.at.size()];
            for (size_t k = axis > 0; k < of.at.size(); k++, own += columns) sum += shares[k] * get<vf>(own);
          }
          x[n] = (__m512i)sum;
        }
        transpose(x);
        for (int n = 0; n < SIDE; n++) {
          int64_t head = (i + n) / axes.lanes, c = (i + n) % axes.lanes;
          if (head < heads && c < count) _mm512_store_si512(p + (t / TILE * heads * count + head * count + c) * TILE + t % TILE, x[n]);
        }
      }
  }

 private:
  const Joint& s;
  const AmxAxes& axes;
  const int64_t heads, count, groups, columns, stride;
  int64_t many, main;  // nodes of all axes; the axis that has most
  AmxFoldRoom& room = amx_fold_room;

  // The axis with most nodes comes first, with all of them; of others what they differ by from their first.
  int ordered(int axis) const { return axis == 0 ? main : axis <= main ? axis - 1 : axis; }

  // Queries, turned back by places, as matrices; their products with the means.
  void weigh() {
    int64_t pairs = AmxLayer::up(many * axes.lanes, 2 * SIDE) / SIDE;
    room.weights.resize(heads * pairs * axes.tiles * SIDE * SIDE);
    uint32_t* to = room.weights.data();
    std::vector<std::pair<int, size_t>> nodes;
    for (int axis = 0; axis < 3; axis++)
      for (size_t k = axis > 0; k < room.nodes[ordered(axis)].at.size(); k++) nodes.push_back({axis, k});
    Floats rows(SIDE * stride);
    for (int64_t head = 0; head < heads; head++)
      for (int64_t tile = 0; tile < pairs; tile++) {
        vf sum[SIDE] = {};
        std::fill(rows.begin(), rows.end(), 0.f);
        for (int n = 0; n < SIDE; n++) {
          int64_t node = (tile * SIDE + n) / axes.lanes, c = (tile * SIDE + n) % axes.lanes;
          if (node >= many || c >= count) continue;
          for (int64_t axis = 0, at = 0; axis < 3; at += s.padded(axis++)) {
            const std::vector<int32_t>& places = room.nodes[axis].at;
            auto [of, k] = nodes[node];
            bool own = axis == ordered(of);
            if (own || of == 0) turn(axis, places[own ? k : 0], 1, head, c, at, &rows[n * stride + at]);
            if (own && of != 0) turn(axis, places[0], -1, head, c, at, &rows[n * stride + at]);
          }
          for (int64_t i = 0; i < stride; i += SIDE) sum[n] += get<vf>(&rows[n * stride + i]) * get<vf>(&room.mean[head * stride + i]);
        }
        alignas(64) float constant[SIDE];
        put(constant, sums<SIDE>(sum, 1));
        int64_t some = std::min<int64_t>(SIDE, axes.lanes), at = tile * SIDE;
        for (int n = 0; n < SIDE; n += some, at += some)
          std::copy_n(constant + n, some, &room.constants[at / axes.lanes * columns + head * axes.lanes + at % axes.lanes]);
        for (int64_t k = 0; k < axes.tiles; k++, to += SIDE * SIDE) {
          __m512i x[SIDE];
          for (int n = 0; n < SIDE; n++) x[n] = both(_mm512_load_ps(&rows[n * stride + k * GROUP]), _mm512_load_ps(&rows[n * stride + k * GROUP + SIDE]));
          transpose(x);
          for (int n = 0; n < SIDE; n++) _mm512_store_si512(to + n * SIDE, x[n]);
        }
      }
  }

  // Adds a query's channels of an axis, turned back by a place.
  void turn(int axis, int64_t place, float sign, int64_t head, int64_t c, int64_t at, float* x) const {
    const float *asked = &room.asked[(head * count + c) * stride + at], *turned = &room.turned[(head * count + c) * stride + at];
    const float *cosine = s.cosines[axis] + place * s.padded(axis), *sine = s.sines[axis] + place * s.padded(axis);
    for (int64_t i = 0; i < s.padded(axis); i += SIDE)
      put(x + i, get<vf>(x + i) + sign * (get<vf>(asked + i) * get<vf>(cosine + i) + get<vf>(turned + i) * get<vf>(sine + i)));
  }

  // These, seen through the axes; numbers from one node to the next are given.
  template <int L>
  void fold(int64_t each) {
    int64_t pairs = AmxLayer::up(many * axes.lanes, 2 * SIDE) / SIDE, steps = axes.tiles;
    alignas(64) float found[2][4][SIDE][SIDE];
    uint32_t* before = nullptr;
    int turn = 0;
    settle();
    for (int64_t g = 0; g < groups; g++)
      for (int64_t tile = 0; tile < pairs; tile += 2)
        for (int64_t head = 0; head < heads; head++, turn ^= 1) {
          const uint32_t *x = &axes.axes[(head * groups + g) * steps * GROUP * SIDE], *y = &room.weights[(head * pairs + tile) * steps * SIDE * SIDE], *more = y + steps * SIDE * SIDE;
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
          for (int64_t k = 0; k < steps; k++, x += 2 * SIDE * SIDE, y += SIDE * SIDE, more += SIDE * SIDE) multiply_tiles(x, x + SIDE * SIDE, y, more);
          if (before) spread<L>(found[turn ^ 1], before, each);  // while tiles are multiplied
          keep(found[turn][0][0], SIDE * SIDE, 2 * SIDE * SIDE, 64);
          settle();
          int64_t at = tile * SIDE, column = head * axes.lanes + at % axes.lanes;
          before = &room.folded[at / axes.lanes * each + (column / SIDE * groups + g) * SIDE * SIDE + column % SIDE];
        }
    spread<L>(found[turn ^ 1], before, each);
  }

  // Two tiles by two of sums, in bfloat16, to where each node of L columns has them.
  template <int L>
  INLINE void spread(const float (*found)[SIDE][SIDE], uint32_t* to, int64_t each) const {
    const __m512i mixed = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    int64_t next = axes.lanes > SIDE ? groups * SIDE * SIDE : SIDE / L * each;
    for (int n = 0; n < 2; n++)
      for (int half = 0; half < 2; half++) {
        const float* pair = found[half * 2 + n][0];
        uint32_t* at = to + n * next + half * SIDE / 2 * SIDE;
        for (int r = 0; r < SIDE; r += 2, pair += 2 * SIDE, at += SIDE) {
          __m512i x = _mm512_permutexvar_epi16(mixed, both(_mm512_load_ps(pair), _mm512_load_ps(pair + SIDE)));
          if constexpr (L == SIDE) _mm512_storeu_si512(at, x);
          else if constexpr (L == 8) {
            _mm256_storeu_si256((__m256i*)at, _mm512_castsi512_si256(x));
            _mm256_storeu_si256((__m256i*)(at + each), _mm512_extracti64x4_epi64(x, 1));
          } else {
            _mm_storeu_si128((__m128i*)at, _mm512_castsi512_si128(x));
            _mm_storeu_si128((__m128i*)(at + each), _mm512_extracti32x4_epi32(x, 1));
            _mm_storeu_si128((__m128i*)(at + 2 * each), _mm512_extracti32x4_epi32(x, 2));
            _mm_storeu_si128((__m128i*)(at + 3 * each), _mm512_extracti32x4_epi32(x, 3));
          }
        }
      }
  }
};

}  // namespace capsight
#endif
