// What layers of joint latents project: keys turned back and values, less their means, weighed.
#include "chunk.h"

using namespace capsight;

// Of keys and values [T, H, D] to out [T, 2, H, D] in one of the formats, and its sum of squares. Pairs of channels
// are turned by cosines and sines [T, pairs]; mean is [2, H, D], weight [2].
EXPORT void capsight_centre(
    const void* keys, const void* values, int32_t format, int64_t tokens, int64_t heads, int64_t channels,
    const float* cosines, const float* sines, int64_t pairs, int32_t interleaved, const float* mean, const float* weight,
    int64_t threads, void* out, int32_t to, double* energy) {
  int64_t size = heads * channels, step = interleaved ? 2 : 1, other = interleaved ? 1 : pairs;
  double total = 0;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(+ : total)
  {
    Floats room(2 * size);
    float* x = room.data();
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
      read(keys, format, t * size, size, x);
      read(values, format, t * size, size, x + size);
      const float *cosine = cosines + t * pairs, *sine = sines + t * pairs;
      for (float* head = x; head < x + size; head += channels)
        for (int64_t i = 0; i < pairs; i++) {
          float a = head[i * step], b = head[i * step + other];
          head[i * step] = a * cosine[i] - b * sine[i], head[i * step + other] = b * cosine[i] + a * sine[i];
        }
      vf sum = {};
      for (int kind = 0; kind < 2; kind++) {
        float *own = x + kind * size, rest = 0;
        const float* middle = mean + kind * size;
        int64_t i = 0;
        for (; i + W <= size; i += W) {
          vf y = (get<vf>(own + i) - get<vf>(middle + i)) * weight[kind];
          put(own + i, y), sum += y * y;
        }
        for (; i < size; i++) own[i] = (own[i] - middle[i]) * weight[kind], rest += own[i] * own[i];
        total += rest;
      }
      total += sum_of(sum);
      write(x, 2 * size, to, out, t * 2 * size);
    }
  }
  *energy = total;
}
