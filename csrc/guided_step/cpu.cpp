// CPU implementation of dreamkernels::guided_step (schema: dreamkernels/ops/guided_step/__init__.py).
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>

#include "common/tensor.h"
#include "guided_step/kernels.h"

namespace dreamkernels::guided_step {
namespace {

bool same_shape(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  return x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin());
}

// The row of the table for this step; read here, because on the CPU reading a tensor stops nobody.
Coefficients coefficients_at(const Tensor& table, int64_t step, const std::optional<Tensor>& step_tensor) {
  if (table.dim() != 2 || table.size(1) != coefficient_count || table.scalar_type() != ScalarType::Float) {
    fail("guided_step: table ", shape_of(table), " must be float32 [steps, ", coefficient_count, "]");
  }
  if (step_tensor) {
    if (step_tensor->numel() != 1) fail("guided_step: step ", shape_of(*step_tensor), " must hold one number");
    if (step_tensor->scalar_type() == ScalarType::Long) {
      step = *static_cast<const int64_t*>(step_tensor->data_ptr());
    } else if (step_tensor->scalar_type() == ScalarType::Int) {
      step = *static_cast<const int32_t*>(step_tensor->data_ptr());
    } else {
      fail("guided_step: step must be int32 or int64");
    }
  }
  if (step < 0 || step >= table.size(0)) {
    fail("guided_step: step ", step, " is out of range: the schedule has the steps 0 to ", table.size(0) - 1);
  }
  const Tensor rows = row_major(table);
  Coefficients row;
  std::memcpy(&row, static_cast<const float*>(rows.data_ptr()) + step * coefficient_count, sizeof row);
  return row;
}

// How much of the deviation of guidance is taken back, per sample: rescale * std(conditional) / std(guided) + 1 - rescale. The
// moments of blocks are joined in their order (Chan, Golub and LeVeque, 1979).
std::vector<float> rescales_of(const std::vector<Moments>& found, int64_t samples, int64_t sample_elements, double rescale) {
  struct Joined {
    double count = 0, mean = 0, squares = 0;
    void add(double n, double block_mean, double block_squares) {
      const double difference = block_mean - mean, total = count + n;
      squares += block_squares + difference * difference * count * n / total;
      mean += difference * n / total;
      count = total;
    }
  };
  const int64_t blocks = blocks_of(sample_elements);
  std::vector<float> rescales(samples);
  for (int64_t sample = 0; sample < samples; ++sample) {
    Joined conditional, guided;
    for (int64_t block = 0; block < blocks; ++block) {
      const double n = static_cast<double>(std::min(block_elements, sample_elements - block * block_elements));
      const Moments& m = found[sample * blocks + block];
      conditional.add(n, m.conditional_mean, m.conditional_squares);
      guided.add(n, m.guided_mean, m.guided_squares);
    }
    rescales[sample] = static_cast<float>(rescale * std::sqrt(conditional.squares / guided.squares) + 1.0 - rescale);
  }
  return rescales;
}

struct Inputs {
  Tensor latents, prediction;
  std::optional<Tensor> scales, noise, history;
};

void check(const Inputs& in) {
  if (in.latents.dim() < 1) fail("guided_step: latents need a batch dimension");
  const int64_t samples = in.latents.size(0), predicted = in.prediction.dim() < 1 ? -1 : in.prediction.size(0);
  if (in.prediction.dim() != in.latents.dim() || (predicted != samples && predicted != 2 * samples) ||
      (samples && in.prediction.numel() / predicted != in.latents.numel() / samples)) {
    fail("guided_step: prediction ", shape_of(in.prediction), " must be one or two batches of latents ", shape_of(in.latents));
  }
  const ScalarType latents = in.latents.scalar_type(), prediction = in.prediction.scalar_type();
  if (prediction != latents && latents != ScalarType::Float) fail("guided_step: prediction must have the dtype of latents");
  if (in.scales && (in.scales->numel() != samples || in.scales->scalar_type() != ScalarType::Float)) {
    fail("guided_step: the guidance scales must be float32, one per sample");
  }
  if (in.noise && (!same_shape(*in.noise, in.latents) || in.noise->scalar_type() != latents)) {
    fail("guided_step: noise must have the shape and dtype of latents");
  }
  if (in.history && (!same_shape(*in.history, in.latents) || in.history->scalar_type() != ScalarType::Float)) {
    fail("guided_step: history must be float32 with the shape of latents");
  }
}

std::tuple<Tensor, Tensor> guided_step(Tensor latents, Tensor prediction, Tensor table, int64_t step, std::optional<Tensor> step_tensor,
                                       std::optional<Tensor> scales, double guidance_scale, double guidance_rescale,
                                       std::optional<Tensor> noise, std::optional<Tensor> history, bool keep_x0) {
  Inputs in{latents, prediction, scales, noise, history};
  check(in);
  Step job{};
  job.coefficients = coefficients_at(table, step, step_tensor);
  Tensor next = new_like(latents);
  const auto sizes = latents.sizes();
  Tensor x0 = new_row_major(latents, keep_x0 ? std::vector<int64_t>(sizes.begin(), sizes.end()) : std::vector<int64_t>{0}, ScalarType::Float);
  const int64_t elements = latents.numel();
  if (elements == 0) return {next, x0};
  for (Tensor* each : {&in.latents, &in.prediction}) *each = row_major(*each);
  for (std::optional<Tensor>* each : {&in.scales, &in.noise, &in.history}) {
    if (*each) *each = row_major(**each);
  }
  const int64_t samples = latents.size(0);
  job.sample_elements = elements / samples;
  job.latents = in.latents.data_ptr();
  const bool guided = prediction.size(0) == 2 * samples;
  const auto* predicted = static_cast<const char*>(in.prediction.data_ptr());
  job.unconditional = guided ? predicted : nullptr;
  job.conditional = guided ? predicted + elements * static_cast<int64_t>(prediction.element_size()) : predicted;
  job.scales = in.scales ? static_cast<const float*>(in.scales->data_ptr()) : nullptr;
  job.scale = static_cast<float>(guidance_scale);
  // What has no weight is not read: in the first step of a multistep solver the history holds nothing yet.
  job.noise = in.noise && job.coefficients.from_noise != 0.0f ? in.noise->data_ptr() : nullptr;
  job.history = in.history && job.coefficients.from_history != 0.0f ? static_cast<const float*>(in.history->data_ptr()) : nullptr;
  job.next = next.data_ptr();
  job.x0 = keep_x0 ? static_cast<float*>(x0.data_ptr()) : nullptr;

  const Element latent_type = element_of(latents, "guided_step"), prediction_type = element_of(prediction, "guided_step");
  const int64_t items = samples * blocks_of(job.sample_elements);
  const int64_t grain = std::max<int64_t>(1, 4 * block_elements / std::min(job.sample_elements, block_elements));
  std::vector<float> rescales;
  if (guided && guidance_rescale != 0.0) {
    std::vector<Moments> found(items);
    const auto moments_kernel = DK_FOR_ACTIVE_ISA(moments);
    torch::stable::parallel_for(0, items, grain,
                                [&](int64_t begin, int64_t end) { moments_kernel(prediction_type, job, found.data(), begin, end); });
    rescales = rescales_of(found, samples, job.sample_elements, guidance_rescale);
    job.rescales = rescales.data();
  }
  const auto step_kernel = DK_FOR_ACTIVE_ISA(step);
  torch::stable::parallel_for(0, items, grain,
                              [&](int64_t begin, int64_t end) { step_kernel(latent_type, prediction_type, job, begin, end); });
  return {next, x0};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dreamkernels, CPU, m) { m.impl("guided_step", TORCH_BOX(&guided_step)); }

}  // namespace dreamkernels::guided_step
