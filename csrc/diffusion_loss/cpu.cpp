// CPU implementation of dreamkernels::add_noise, diffusion_loss and its backward (schemas: dreamkernels/ops/diffusion_loss).
#include <cmath>
#include <optional>

#include "common/tensor.h"
#include "diffusion_loss/kernels.h"

namespace dreamkernels::diffusion_loss {
namespace {

void check_same(const Tensor& x, const Tensor& like, const char* what) {
  const auto a = x.sizes(), b = like.sizes();
  if (a.size() != b.size() || !std::equal(a.begin(), a.end(), b.begin())) {
    fail("diffusion_loss: ", what, " ", shape_of(x), " must have the shape ", shape_of(like));
  }
}

// Latents and noise have one dtype: that of the result or prediction, or float32.
void check_dtypes(const Tensor& latents, const Tensor& noise, ScalarType narrow) {
  if (noise.scalar_type() != latents.scalar_type()) fail("diffusion_loss: noise must have the dtype of latents");
  if (latents.scalar_type() != ScalarType::Float && latents.scalar_type() != narrow) {
    fail("diffusion_loss: latents must be float32, or have the dtype of the prediction");
  }
}

// The cumulative product of alphas at the timestep of every sample.
std::vector<float> alphas_at(const Tensor& timesteps, const Tensor& alphas_cumprod, int64_t samples) {
  if (timesteps.dim() != 1 || timesteps.size(0) != samples || timesteps.scalar_type() != ScalarType::Long) {
    fail("diffusion_loss: timesteps ", shape_of(timesteps), " must be int64 [", samples, "]");
  }
  if (alphas_cumprod.dim() != 1 || alphas_cumprod.scalar_type() != ScalarType::Float) {
    fail("diffusion_loss: alphas_cumprod ", shape_of(alphas_cumprod), " must be float32 [T]");
  }
  const Tensor steps = row_major(timesteps), table = row_major(alphas_cumprod);
  const auto* at = static_cast<const int64_t*>(steps.data_ptr());
  const auto* alphas = static_cast<const float*>(table.data_ptr());
  std::vector<float> found(samples);
  for (int64_t k = 0; k < samples; ++k) {
    if (at[k] < 0 || at[k] >= table.size(0)) {
      fail("diffusion_loss: timesteps[", k, "] = ", at[k], " is out of range: the schedule has the steps 0 to ", table.size(0) - 1);
    }
    found[k] = alphas[at[k]];
  }
  return found;
}

std::vector<Amplitudes> amplitudes_of(const std::vector<float>& alphas) {
  std::vector<Amplitudes> made;
  for (const float a : alphas) made.push_back({std::sqrt(a), std::sqrt(1.0f - a)});
  return made;
}

// Hang et al., 2023; written without a quotient that is 0 / 0 where a is 0 or 1.
double weight_of(double a, Target target, std::optional<double> gamma) {
  if (!gamma) return 1.0;
  switch (target) {
    case Target::noise: return std::min(1.0, *gamma * (1.0 - a) / a);
    case Target::velocity: return std::min(a, *gamma * (1.0 - a));
    default: return std::min(a / (1.0 - a), *gamma);
  }
}

int64_t samples_of(const Tensor& x) {
  if (x.dim() < 1) fail("diffusion_loss: a batch dimension is needed");
  return x.size(0);
}

int64_t grain_of(int64_t sample_elements) { return std::max<int64_t>(1, 4 * block_elements / std::min(sample_elements, block_elements)); }

Tensor add_noise(Tensor latents, Tensor noise, Tensor timesteps, Tensor alphas_cumprod, ScalarType dtype) {
  check_same(noise, latents, "noise");
  check_dtypes(latents, noise, dtype);
  const int64_t samples = samples_of(latents), elements = latents.numel();
  const auto amplitudes = amplitudes_of(alphas_at(timesteps, alphas_cumprod, samples));
  const auto sizes = latents.sizes();
  Tensor noisy = new_row_major(latents, std::vector<int64_t>(sizes.begin(), sizes.end()), dtype);
  if (elements == 0) return noisy;
  const Tensor x = row_major(latents), e = row_major(noise);
  const AddNoise job{x.data_ptr(), e.data_ptr(), noisy.data_ptr(), amplitudes.data(), elements / samples};
  const Element wide = element_of(latents, "add_noise"), narrow = element_of(noisy, "add_noise");
  const auto kernel = DK_FOR_ACTIVE_ISA(add_noise);
  torch::stable::parallel_for(0, samples * blocks_of(job.sample_elements), grain_of(job.sample_elements),
                              [&](int64_t begin, int64_t end) { kernel(wide, narrow, job, begin, end); });
  return noisy;
}

// What forward and backward share: checked, row-major inputs and the weight of every sample.
struct Prepared {
  Tensor prediction, latents, noise;
  std::vector<float> alphas;
  std::vector<Amplitudes> amplitudes;
  std::optional<double> snr_gamma;
  Loss job;

  Prepared(const Tensor& predicted, const Tensor& x, const Tensor& e, const Tensor& timesteps, const Tensor& alphas_cumprod,
           int64_t target, std::optional<double> gamma)
      : prediction(row_major(predicted)), latents(row_major(x)), noise(row_major(e)), snr_gamma(gamma) {
    check_same(x, predicted, "latents");
    check_same(e, predicted, "noise");
    check_dtypes(x, e, predicted.scalar_type());
    if (target < 0 || target > 2) fail("diffusion_loss: target ", target, " must be 0, 1 or 2");
    const int64_t samples = samples_of(predicted);
    alphas = alphas_at(timesteps, alphas_cumprod, samples);
    amplitudes = amplitudes_of(alphas);
    job = {prediction.data_ptr(), latents.data_ptr(), noise.data_ptr(), amplitudes.data(),
           samples ? predicted.numel() / samples : 0, static_cast<Target>(target)};
  }
  int64_t samples() const { return static_cast<int64_t>(alphas.size()); }
  double weight(int64_t sample) const { return weight_of(alphas[sample], job.target, snr_gamma); }
  Element wide() const { return element_of(latents, "diffusion_loss"); }
  Element narrow() const { return element_of(prediction, "diffusion_loss"); }
};

Tensor diffusion_loss(Tensor prediction, Tensor latents, Tensor noise, Tensor timesteps, Tensor alphas_cumprod, int64_t target,
                      std::optional<double> snr_gamma, bool mean) {
  const Prepared in(prediction, latents, noise, timesteps, alphas_cumprod, target, snr_gamma);
  const int64_t samples = in.samples(), n = in.job.sample_elements, blocks = blocks_of(n);
  Tensor loss = new_row_major(prediction, mean ? std::vector<int64_t>{} : std::vector<int64_t>{samples}, ScalarType::Float);
  auto* out = static_cast<float*>(loss.data_ptr());
  std::vector<float> sums(samples * blocks);
  if (!sums.empty()) {
    const auto kernel = DK_FOR_ACTIVE_ISA(squares);
    torch::stable::parallel_for(0, samples * blocks, grain_of(n), [&](int64_t begin, int64_t end) {
      kernel(in.wide(), in.narrow(), in.job, sums.data(), begin, end);
    });
  }
  double total = 0.0;
  for (int64_t sample = 0; sample < samples; ++sample) {
    double sum = 0.0;
    for (int64_t block = 0; block < blocks; ++block) sum += sums[sample * blocks + block];
    const double of_sample = in.weight(sample) * (sum / static_cast<double>(n));  // no elements: NaN, as the mean of nothing
    total += of_sample;
    if (!mean) out[sample] = static_cast<float>(of_sample);
  }
  if (mean) *out = static_cast<float>(total / static_cast<double>(samples));
  return loss;
}

Tensor diffusion_loss_backward(Tensor grad, Tensor prediction, Tensor latents, Tensor noise, Tensor timesteps, Tensor alphas_cumprod,
                               int64_t target, std::optional<double> snr_gamma, bool mean) {
  const Prepared in(prediction, latents, noise, timesteps, alphas_cumprod, target, snr_gamma);
  const int64_t samples = in.samples(), n = in.job.sample_elements;
  if (grad.scalar_type() != ScalarType::Float || grad.numel() != (mean ? 1 : samples)) {
    fail("diffusion_loss_backward: the gradient must be float32, of the shape of the loss");
  }
  Tensor grad_prediction = new_like(prediction);
  if (prediction.numel() == 0) return grad_prediction;
  const Tensor of_loss = row_major(grad);
  const auto* g = static_cast<const float*>(of_loss.data_ptr());
  std::vector<float> factors(samples);
  for (int64_t sample = 0; sample < samples; ++sample) {
    const double of_sample = mean ? static_cast<double>(g[0]) / static_cast<double>(samples) : static_cast<double>(g[sample]);
    factors[sample] = static_cast<float>(of_sample * in.weight(sample) * 2.0 / static_cast<double>(n));
  }
  const auto kernel = DK_FOR_ACTIVE_ISA(backward);
  torch::stable::parallel_for(0, samples * blocks_of(n), grain_of(n), [&](int64_t begin, int64_t end) {
    kernel(in.wide(), in.narrow(), in.job, factors.data(), grad_prediction.data_ptr(), begin, end);
  });
  return grad_prediction;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dreamkernels, CPU, m) {
  m.impl("add_noise", TORCH_BOX(&add_noise));
  m.impl("diffusion_loss", TORCH_BOX(&diffusion_loss));
  m.impl("diffusion_loss.inference", TORCH_BOX(&diffusion_loss));
  m.impl("diffusion_loss_backward", TORCH_BOX(&diffusion_loss_backward));
}

}  // namespace dreamkernels::diffusion_loss
