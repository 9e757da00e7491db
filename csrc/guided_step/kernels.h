// The kernels of guided_step: samples of adjacent elements, cut into blocks. Declared once per instruction set (common/isa.h).
#pragma once
#include "common/elements.h"
#include "common/isa.h"
#include "common/sample_blocks.h"

namespace dreamkernels::guided_step {

// One row of the schedule's table (dreamkernels/ops/guided_step/schedule.py):
//   x0 = clip(x0_from_latents * x + x0_from_prediction * m, -limit, limit)
//   x' = from_x0 * x0 + from_latents * x + from_prediction * m + from_history * history + from_noise * noise
struct Coefficients {
  float x0_from_latents, x0_from_prediction, limit, from_x0, from_latents, from_prediction, from_history, from_noise;
};
constexpr int64_t coefficient_count = 8;

// Mean, and sum of squared differences to it, of a block of the conditional and of the guided prediction.
struct Moments {
  float conditional_mean, conditional_squares, guided_mean, guided_squares;
};

struct Step {
  const void* latents;        // [samples, sample_elements]
  const void* unconditional;  // null: no guidance
  const void* conditional;    // the prediction, where there is no guidance
  const float* scales;        // [samples]; null: scale for all
  const float* rescales;      // [samples], factors on the guided prediction; null: none
  const void* noise;          // null where it is not read; the type of latents
  const float* history;       // null where it is not read
  void* next;
  float* x0;  // null: not kept
  int64_t sample_elements;
  float scale;
  Coefficients coefficients;
};

// Over items, of which sample s has those from s * blocks_of(sample_elements) on. The prediction has the type of latents, or a
// narrower one where those are float32.
DK_DECLARE_KERNEL(step, (Element latents, Element prediction, const Step& job, int64_t begin_item, int64_t end_item))
DK_DECLARE_KERNEL(moments, (Element prediction, const Step& job, Moments* found, int64_t begin_item, int64_t end_item))

}  // namespace dreamkernels::guided_step
