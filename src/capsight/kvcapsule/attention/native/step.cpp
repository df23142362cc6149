// A new token of every row and KV head, stored and attended with all that lies before it, in one call a layer.
//
// What does not change from step to step is prepared once: a call of many arguments out of Python, with caches
// that hold a layer's weights by then, takes as long as the attention itself.
#include "chunk.h"
#include "joint.h"

namespace capsight {

struct Step {
  const Joint* joint;     // null where nothing is stored as latents
  const Source* sources;  // the token goes behind the last one's
  int64_t source_count, batch, heads, count, channels;
  int32_t format;
};

}  // namespace capsight

using namespace capsight;

EXPORT void capsight_append(const Source*, const char*, const char*, int64_t, int64_t, int64_t);
EXPORT void capsight_decode(const void*, int32_t, int64_t, int64_t, int64_t, int64_t, const Source*, int64_t, float, int64_t, void*, float*);
EXPORT void capsight_joint(const Joint*, const void*, int32_t, int64_t, int64_t, int64_t, const Source*, int64_t, float, int64_t, void*, float*);

// Of queries [B, H, C, D], keys and values [B, H, D], all in one format, to out [B, H, C, D].
EXPORT void capsight_step(
    const Step* given, const void* query, const char* keys, const char* values, float scaling, int64_t threads, void* out) {
  const Step& s = *given;
  int64_t bytes = s.channels * (s.format == F32 ? 4 : 2);
  capsight_append(s.sources + s.source_count - 1, keys, values, s.batch, s.heads, bytes);
  if (s.joint) capsight_joint(s.joint, query, s.format, s.batch, s.heads, s.count, s.sources, s.source_count, scaling, threads, out, nullptr);
  else capsight_decode(query, s.format, s.batch, s.heads, s.count, s.channels, s.sources, s.source_count, scaling, threads, out, nullptr);
}
