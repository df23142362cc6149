// Scores without a rebuilt key, on machines that multiply tiles of matrices, where places of a stretch differ
// little: queries are turned back by a few of its places and seen through the axes, and what a token adds up of
// their products is what a polynomial through these places gives at its own (`amx_nodes.h`). Folded queries are
// rounded to bfloat16.
#pragma once
#include "amx_nodes.h"

#ifdef __AMX_BF16__
namespace capsight {

// A stretch of tokens, and what they are seen through: of the axis that has most nodes all, of others what they
// differ by from their first.
struct Seen {
  int64_t tokens, first = 0, many;  // first: of its nodes among those of all stretches
  int order[3] = {0, 1, 2};         // axes as their nodes follow each other
  Nodes nodes[3];

  Seen(const Joint& s, const AmxAxes& axes, int64_t start, int64_t end) {
    for (tokens = axes.stretch(s, start, end);; tokens = (tokens + 1) / 2) {  // less where places differ more than elsewhere
      many = 1;
      for (int axis = 0; axis < 3; axis++) nodes[axis].take(s, axis, start, tokens, axes.fastest(s, axis)), many += nodes[axis].at.size() - 1;
      if (many <= 3 * int64_t(SEVERAL) || tokens <= SPAN) break;
    }
    for (int axis = 1; axis < 3; axis++)
      if (nodes[axis].at.size() > nodes[order[0]].at.size()) std::swap(order[0], order[axis]);
    for (Nodes& each : nodes) each.share();
  }
};

// What scores need room for, kept for the next ones of the same thread.
struct AmxFoldRoom {
  std::vector<Seen> stretches;  // that queries are folded for
  Floats asked, turned, mean, constants;  // [H C, channels], twice, [H, channels], [nodes, columns]
  Words weights, folded;  // [H, tiles of columns, tiles of channels, SIDE, SIDE]; [nodes, columns / SIDE, R / GROUP, SIDE, SIDE]
};
static thread_local AmxFoldRoom amx_fold_room;

class AmxFolded {
 public:
  // Queries [H, C, D], scaled.
  AmxFolded(const Joint& s, const AmxAxes& axes, const float* query, int64_t heads, int64_t count)
      : s(s), axes(axes), heads(heads), count(count), groups(axes.rank / GROUP), columns(axes.columns), stride(axes.tiles * GROUP), each(columns * axes.rank / 2) {
    room.stretches.clear();
    room.asked.assign(heads * count * stride, 0.f), room.turned = room.asked, room.mean.assign(heads * stride, 0.f);
    for (int64_t head = 0; head < heads; head++)
      for (int64_t axis = 0, at = 0; axis < 3; at += s.padded(axis++))
        for (int64_t i = 0; i < s.widths[axis]; i++) {
          if (axes.is_rebuilt(s, axis, i)) continue;
          int64_t own = s.order[axis][i], other = s.order[axis][s.partner(axis, i)];
          room.mean[head * stride + at + i] = s.key_mean[head * s.channels + own];
          for (int64_t c = head * count; c < (head + 1) * count; c++)
            room.asked[c * stride + at + i] = query[c * s.channels + own], room.turned[c * stride + at + i] = query[c * s.channels + other];
        }
  }

  // Goes on to the next tokens, for which queries are folded, together with those of some more; how many they are.
  int64_t next(int64_t first, int64_t end) {
    if (++now >= room.stretches.size()) prepare(first, end);
    return room.stretches[now].tokens;
  }

  // Lanes of the products of a token, a multiple of two tiles; what they are made with, as an `AmxLayer` has it.
  int64_t wide() const { return AmxLayer::up(room.stretches[now].many * columns, 2 * SIDE); }
  const uint32_t* folded() const { return &room.folded[room.stretches[now].first * each]; }
  const float* constants() const { return &room.constants[room.stretches[now].first * columns]; }

  // Scores p [tiles, H C, TILE] of tokens from one on of their products [tokens, wide], or more of them.
  void add_up(int64_t first, int64_t tokens, const float* products, float* p, bool more) const {
    const Seen& seen = room.stretches[now];
    const int64_t many = seen.many;
    Floats shares(SIDE * many);
    for (int64_t t = 0; t < tokens; t += SIDE) {
      for (int axis = 0, at = 0; axis < 3; axis++) {
        const Nodes& of = seen.nodes[seen.order[axis]];
        const int32_t* places = s.places + seen.order[axis] * s.tokens + first;
        const size_t all = of.at.size(), left_out = axis > 0;
        for (int n = 0; n < SIDE; n++) {
          const float* own = &of.shares[of.slot[places[std::min(t + n, tokens - 1)] - of.lowest] * all];
          for (size_t k = left_out; k < all; k++) shares[n * many + at + k - left_out] = own[k];
        }
        at += all - left_out;
      }
      for (int64_t i = 0; i < columns; i += SIDE) {
        __m512i x[SIDE];
        for (int n = 0; n < SIDE; n++) {
          const float* own = products + (t + n) * wide() + i;
          vf sum = {};
          for (int64_t k = 0; k < many; k++) sum += shares[n * many + k] * get<vf>(own + k * columns);
          x[n] = (__m512i)sum;
        }
        transpose(x);
        for (int64_t n = 0, head = i / axes.lanes, c = i % axes.lanes; n < SIDE && head < heads; n++) {
          float* to = p + (t / TILE * heads * count + head * count + c) * TILE + t % TILE;
          if (c < count) put(to, more ? get<vf>(to) + (vf)x[n] : (vf)x[n]);
          if (++c == axes.lanes) c = 0, head++;
        }
      }
    }
  }

 private:
  const Joint& s;
  const AmxAxes& axes;
  const int64_t heads, count, groups, columns, stride, each;  // each: words of a node
  size_t now = 0;
  AmxFoldRoom& room = amx_fold_room;

  void prepare(int64_t first, int64_t end) {
    room.stretches.clear(), now = 0;
    int64_t many = 0;
    for (; first < end && (!many || many * each < FOLDS); first += room.stretches.back().tokens) {
      room.stretches.emplace_back(s, axes, first, end);
      room.stretches.back().first = many, many += room.stretches.back().many;
    }
    int64_t filled = AmxLayer::up(many * axes.lanes, 2 * SIDE) / axes.lanes + 1;
    room.folded.resize(filled * each), room.constants.resize(filled * columns);
    weigh(many);
    if (axes.lanes == 4) fold<4>(many);
    else if (axes.lanes == 8) fold<8>(many);
    else fold<SIDE>(many);
  }

  // Queries, turned back by places, as matrices; their products with the means.
  void weigh(int64_t many) {
    int64_t pairs = AmxLayer::up(many * axes.lanes, 2 * SIDE) / SIDE;
    room.weights.resize(heads * pairs * axes.tiles * SIDE * SIDE);
    uint32_t* to = room.weights.data();
    struct Node {
      const Seen* seen;
      int axis;
      size_t k;
    };
    std::vector<Node> nodes;
    for (const Seen& seen : room.stretches)
      for (int i = 0; i < 3; i++)
        for (size_t k = i > 0; k < seen.nodes[seen.order[i]].at.size(); k++) nodes.push_back({&seen, i, k});
    Floats rows(SIDE * stride);
    for (int64_t head = 0; head < heads; head++)
      for (int64_t tile = 0; tile < pairs; tile++) {
        vf sum[SIDE] = {};
        std::fill(rows.begin(), rows.end(), 0.f);
        for (int n = 0; n < SIDE; n++) {
          int64_t node = (tile * SIDE + n) / axes.lanes, c = (tile * SIDE + n) % axes.lanes;
          if (node >= many || c >= count) continue;
          auto [seen, of, k] = nodes[node];
          for (int axis = 0, at = 0; axis < 3; at += s.padded(axis++)) {
            const std::vector<int32_t>& places = seen->nodes[axis].at;
            bool own = axis == seen->order[of];
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

  // These, seen through the axes.
  template <int L>
  void fold(int64_t many) {
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
          if (before) spread<L>(found[turn ^ 1], before);  // while tiles are multiplied
          keep(found[turn][0][0], SIDE * SIDE, 2 * SIDE * SIDE, 64);
          settle();
          int64_t at = tile * SIDE, column = head * axes.lanes + at % axes.lanes;
          before = &room.folded[at / axes.lanes * each + (column / SIDE * groups + g) * SIDE * SIDE + column % SIDE];
        }
    spread<L>(found[turn ^ 1], before);
  }

  // Two tiles by two of sums, in bfloat16, to where each node of L columns has them.
  template <int L>
  INLINE void spread(const float (*found)[SIDE][SIDE], uint32_t* to) const {
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
