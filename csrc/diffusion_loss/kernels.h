// The kernels of add_noise and diffusion_loss: samples of adjacent elements, cut into blocks. Declared once per instruction set
// (common/isa.h).
#pragma once
#include "common/elements.h"
#include "common/isa.h"
#include "common/sample_blocks.h"

namespace dreamkernels::diffusion_loss {

struct Amplitudes {
  float signal, sigma;  // sqrt(a), sqrt(1 - a)
};

struct AddNoise {
  const void* latents;
  const void* noise;
  void* noisy;
  const Amplitudes* amplitudes;  // [samples]
  int64_t sample_elements;
};

enum class Target : int { noise = 0, velocity = 1, latents = 2 };

struct Loss {
  const void* prediction;
  const void* latents;  // read for the targets velocity and latents
  const void* noise;    // read for the targets noise and velocity
  const Amplitudes* amplitudes;
  int64_t sample_elements;
  Target target;
};

// Over items, of which sample s has those from s * blocks_of(sample_elements) on. `wide` is the type of latents and noise, `narrow`
// that of the noisy latents and the prediction: the same, or anything where wide is float32.
DK_DECLARE_KERNEL(add_noise, (Element wide, Element narrow, const AddNoise& job, int64_t begin_item, int64_t end_item))
// squares[item] = the sum of squared differences between prediction and target.
DK_DECLARE_KERNEL(squares, (Element wide, Element narrow, const Loss& job, float* squares, int64_t begin_item, int64_t end_item))
// grad = factors[sample] * (prediction - target)
DK_DECLARE_KERNEL(backward, (Element wide, Element narrow, const Loss& job, const float* factors, void* grad, int64_t begin_item,
                             int64_t end_item))

}  // namespace dreamkernels::diffusion_loss
