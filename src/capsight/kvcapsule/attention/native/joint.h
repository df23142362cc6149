// What one layer's attention over latents is asked for, as `joint.py` hands it over.
#pragma once
#include "latents.h"

namespace capsight {

constexpr int PAD = 16;  // channels of tables are a multiple of it

struct Joint {
  Latents latents;
  const int64_t *starts, *counts;   // [B], tokens of each row
  const int32_t* places;            // [3, T], which of an axis' places
  int64_t tokens, sizes[3];         // T, places of each axis
  // Channels that an axis turns, first halves of its pairs first; the first axis has those not turned, too.
  const int64_t* order[3];
  int64_t pairs[3], widths[3];
  const float *cosines[3], *sines[3];  // [places, widths, filled up with 0 to PAD]; of second halves -sines
  const int8_t *key_axes, *value_axes;   // [H, D, R], in steps
  const float *key_steps, *value_steps;  // [R], of each coordinate
  const float *key_mean, *value_mean;    // [H, D]
  int64_t channels;                      // D
  const double* spots[3];        // [places], positions, rising
  const double* frequencies[3];  // [pairs], none below 0, falling

  const char* axis(const int8_t* of, int64_t head, int64_t channel) const {
    return (const char*)of + (head * channels + channel) * latents.rank();
  }
  int64_t padded(int axis) const { return (widths[axis] + PAD - 1) / PAD * PAD; }
  int64_t partner(int axis, int64_t i) const {
    return i < pairs[axis] ? i + pairs[axis] : i < 2 * pairs[axis] ? i - pairs[axis] : i;
  }
};

}  // namespace capsight
