// A chunk of one row's latents on machines that multiply tiles of matrices (Intel AMX): keys are rebuilt.
//
// Latents, axes and probabilities are rounded to bfloat16; sums are float.
#pragma once
#include "amx_fold.h"
#include "softmax.h"

#ifdef __AMX_BF16__
namespace capsight {

// What a chunk needs room for, kept for the next one of the same thread.
struct AmxRoom {
  Floats keys, p, query;   // [tokens, wide], [tiles, H C, TILE], [H, C, wide]
  Floats cosines, sines;   // [tokens, half], and a vector more
  Halves shares;           // p in bfloat16 [H C, tokens]
};
static thread_local AmxRoom amx_room;

class AmxChunk {
 public:
  // Queries [H, C, D], scaled.
  AmxChunk(const Joint& s, const AmxLayer& layer, const AmxAxes* axes, const float* query, int64_t heads, int64_t count)
      : s(s), layer(layer), rank(s.latents.rank()), heads(heads), count(count), all(heads * count), padded(AmxLayer::up(all, SIDE)),
        out(padded * rank), run((all + MOST - 1) / MOST), z(s.latents) {
    if (axes) folded = std::make_unique<AmxFolded>(s, *axes, query, heads, count);
    room.query.resize(all * layer.wide);
    float* to = room.query.data();
    for (int64_t c = 0; c < all; c++)
      for (int64_t channel : layer.channel) *to++ = channel < 0 ? 0 : query[c * s.channels + channel];
  }

  void attend(int64_t start, int64_t tokens) {
    const Tiles shaped;
    for (int64_t first = start, end = start + tokens, ready = start, here; first < end; first += here) {
      if (folded && first == ready) ready += folded->next(first, end);
      here = std::min(8 * int64_t(SPAN), (folded ? ready : end) - first);
      int64_t tiles = (here + TILE - 1) / TILE, spans = (here + SPAN - 1) / SPAN;
      z.open(first, here);
      grow(room.p, tiles * all * TILE), room.shares.assign(padded * spans * SPAN, 0);
      if (layer.wide) rebuild(first, here, spans);
      if (folded) {
        make_keys(spans, folded->folded(), folded->constants(), folded->wide());
        folded->add_up(first, here, room.keys.data(), room.p.data(), layer.wide > 0);
      }
      for (int64_t c = 0; c < all; c++) {
        float* p = &room.p[c * TILE];
        multiply(&out[c * rank], rank, run[c / MOST].take(c % MOST, p, here, all * TILE));
        for (int64_t i = 0; i < spans; i++) {
          const float* from = p + i * SPAN / TILE * all * TILE + i * SPAN % TILE;
          _mm512_store_si512(&room.shares[(c * spans + i) * SPAN], both(_mm512_load_ps(from), _mm512_load_ps(from + SIDE)));
        }
      }
      gather(spans);
    }
  }

  // [H, C] times [most, total, R numbers].
  void results(float* x) const {
    for (int64_t c = 0; c < all; c++, x += rank + 2) {
      x[0] = run[c / MOST].most[c % MOST], x[1] = run[c / MOST].total[c % MOST];
      for (int64_t i = 0; i < rank; i += GROUP) unmix(&out[c * rank + i], x + 2 + i);
    }
  }

 private:
  const Joint& s;
  const AmxLayer& layer;
  const int64_t rank, heads, count, all, padded;
  Floats out;  // [H C, R]
  std::vector<Softmax> run;
  AmxLatents z;
  std::unique_ptr<AmxFolded> folded;
  AmxRoom& room = amx_room;

  // Cosines and sines of tokens from one on.
  void look_up(int64_t first, int64_t tokens) {
    int64_t all = AmxLayer::up(tokens, SPAN), size = all * layer.half + SIDE;
    grow(room.cosines, size), grow(room.sines, size);
    if (layer.half == SIDE) {
      const float* rows[3][2] = {};
      __mmask16 lanes[3];
      for (int axis = 0, before = 0; axis < 3; before += layer.pairs[axis++]) lanes[axis] = ((1 << layer.pairs[axis]) - 1) << before;
      for (int64_t t = 0; t < all; t++) {
        for (int axis = 0; axis < 3; axis++) {
          int64_t at = s.places[axis * s.tokens + first + std::min(t, tokens - 1)] * s.padded(axis);
          rows[axis][0] = s.cosines[axis] + at, rows[axis][1] = s.sines[axis] + at;
        }
        for (int of : {0, 1}) {
          __m512 x = _mm512_maskz_expandloadu_ps(lanes[0], rows[0][of]);
          x = _mm512_mask_expandloadu_ps(x, lanes[1], rows[1][of]);
          put(&(of ? room.sines : room.cosines)[t * SIDE], (vf)_mm512_mask_expandloadu_ps(x, lanes[2], rows[2][of]));
        }
      }
      return;
    }
    for (int64_t t = 0; t < all; t++) {
      float *cosine = &room.cosines[t * layer.half], *sine = &room.sines[t * layer.half];
      for (int axis = 0; axis < 3; axis++) {  // what a vector leaves beyond its end is written over
        int64_t at = s.places[axis * s.tokens + first + std::min(t, tokens - 1)] * s.padded(axis), pairs = layer.pairs[axis];
        for (int64_t i = 0; i < pairs; i += SIDE) {
          _mm512_storeu_ps(cosine + i, _mm512_loadu_ps(s.cosines[axis] + at + i));
          _mm512_storeu_ps(sine + i, _mm512_loadu_ps(s.sines[axis] + at + i));
        }
        cosine += pairs, sine += pairs;
      }
    }
  }

  // Scores of opened tokens from one on over rebuilt keys.
  void rebuild(int64_t first, int64_t tokens, int64_t spans) {
    look_up(first, tokens);
    for (int64_t head = 0; head < heads; head++) {
      make_keys(spans, &layer.axes[head * layer.wide * rank / 2], &layer.means[head * layer.wide], layer.wide);
      for (int64_t i = 0; i < spans; i++) {
        float* p = &room.p[i * SPAN / TILE * all * TILE + i * SPAN % TILE];
        for (int64_t c = head * count, end = c + count, taken; c < end; c += taken) {
          taken = std::min<int64_t>(end - c, MOST);
          some_scores(taken)(*this, &room.keys[i * SPAN * layer.wide], i * SPAN, &room.query[c * layer.wide], p + c * TILE);
        }
      }
    }
  }

  // Products [spans, SPAN, wide] of latents with axes, and means: a head's keys before RoPE, or folded queries.
  void make_keys(int64_t spans, const uint32_t* axes, const float* means, int64_t wide) {
    int64_t groups = rank / GROUP;
    grow(room.keys, spans * SPAN * wide);
    settle();
    for (int64_t i = 0; i < wide; i += 2 * SIDE, axes += SIDE * rank)
      for (int64_t span = 0; span < spans; span++) {
        const uint32_t *x = z.plain(span), *y = axes, *more = axes + SIDE * rank / 2;
        _tile_loadd(0, means + i, 0);
        _tile_loadd(1, means + i + SIDE, 0);
        _tile_loadd(2, means + i, 0);
        _tile_loadd(3, means + i + SIDE, 0);
        for (int64_t k = 0; k < groups; k++, x += 2 * SIDE * SIDE, y += SIDE * SIDE, more += SIDE * SIDE) multiply_tiles(x, x + SIDE * SIDE, y, more);
        keep(&room.keys[span * SPAN * wide + i], SIDE, SIDE * wide, wide * 4);
      }
    settle();
  }

  typedef void (*Some)(const AmxChunk&, const float*, int64_t, const float*, float*);
  template <int C = MOST>
  static Some some_scores(int64_t queries) {
    if constexpr (C > 1) {
      if (queries < C) return some_scores<C - 1>(queries);
    }
    return [](const AmxChunk& own, const float* keys, int64_t first, const float* query, float* p) { own.scores<C>(keys, first, query, p); };
  }

  // Scores [C, TILE] of C queries of a head over the keys of a span, turned as tokens from one of the stretch on.
  template <int C>
  void scores(const float* keys, int64_t first, const float* query, float* p) const {
    if (layer.wide == 2 * SIDE) return scores<C>(keys, first, query, p, SIDE, 2 * SIDE);
    scores<C>(keys, first, query, p, layer.half, layer.wide);
  }
  template <int C>
  INLINE void scores(const float* keys, int64_t first, const float* query, float* p, const int64_t half, const int64_t wide) const {
    for (int t = 0; t < SPAN; t += SIDE) {
      vf found[C][SIDE];
      for (int n = 0; n < SIDE; n++) {
        const float *key = keys + (t + n) * wide, *cosine = &room.cosines[(first + t + n) * half], *sine = &room.sines[(first + t + n) * half];
        vf sum[C] = {};
        for (int64_t i = 0; i < half; i += SIDE) {
          vf a = get<vf>(key + i), b = get<vf>(key + half + i), cosines = get<vf>(cosine + i), sines = get<vf>(sine + i);
          vf x = a * cosines - b * sines, y = b * cosines + a * sines;
          for (int c = 0; c < C; c++)
            sum[c] += x * get<vf>(query + c * wide + i) + y * get<vf>(query + c * wide + half + i);
        }
        for (int64_t i = 2 * half; i < wide; i += SIDE)
          for (int c = 0; c < C; c++) sum[c] += get<vf>(key + i) * get<vf>(query + c * wide + i);
        for (int c = 0; c < C; c++) found[c][n] = sum[c];
      }
      for (int c = 0; c < C; c++) put(p + c * TILE + t, sums<SIDE>(found[c], 1));
    }
  }

  // Sums of latents by probability.
  void gather(int64_t spans) {
    settle();
    for (int64_t r = 0; r < rank; r += GROUP)
      for (int64_t c = 0; c < padded; c += SIDE) {
        float* to = &out[c * rank + r];
        _tile_loadd(0, to, rank * 4);
        _tile_loadd(1, to + SIDE, rank * 4);
        for (int64_t i = 0; i < spans; i++) {
          if (c == 0) z.put_along(i, r);
          const uint32_t* x = z.along(i);
          _tile_loadd(2, &room.shares[(c * spans + i) * SPAN], spans * SPAN * 2);
          _tile_loadd(3, x, 64);
          _tile_loadd(4, x + SIDE * SIDE, 64);
          _tile_dpbf16ps(0, 2, 3);
          _tile_dpbf16ps(1, 2, 4);
        }
        _tile_stored(0, to, rank * 4);
        _tile_stored(1, to + SIDE, rank * 4);
      }
    settle();
  }
};

}  // namespace capsight
#endif
