// CPU implementation of dreamkernels::group_norm_silu and group_norm_silu_backward (schemas: dreamkernels/ops/group_norm_silu).
#include <memory>
#include <optional>
#include <tuple>

#include "common/tensor.h"
#include "group_norm_silu/kernels.h"

namespace dreamkernels::group_norm_silu {
namespace {

using torch::headeronly::MemoryFormat;

// Whether x lies channels last (torch.channels_last or channels_last_3d), with or without gaps, and not row-major. layout_of in
// dreamkernels/ops/group_norm_silu decides alike.
bool channels_last(const Tensor& x) {
  if (x.is_contiguous() || (x.dim() != 4 && x.dim() != 5) || x.size(1) == 1 || x.stride(1) != 1) return false;
  int64_t inner = x.size(1);  // least stride of the next dimension, from the innermost to the outermost
  const auto fits = [&](int64_t d) {
    if (x.size(d) == 1) return true;
    const bool fitting = x.stride(d) >= inner;
    inner = x.stride(d);
    return fitting;
  };
  for (int64_t d = x.dim() - 1; d >= 2; --d) {
    if (!fits(d)) return false;
  }
  return fits(0);
}

// x itself where it lies so without gaps.
Tensor in_format(const Tensor& x, bool last) {
  if (!last) return row_major(x);
  return torch::stable::contiguous(x, x.dim() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d);
}

Tensor new_in_format(const Tensor& x, bool last) {
  if (!last) return new_like(x);
  const std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = sizes[1];
  strides[1] = 1;
  for (int64_t d = x.dim() - 1; d >= 2; --d) {
    strides[d] = stride;
    stride *= sizes[d];
  }
  strides[0] = stride;
  return new_strided(x, sizes, strides, x.scalar_type());
}

std::optional<Tensor> parameter(const std::optional<Tensor>& given, const Tensor& x, const std::vector<int64_t>& sizes,
                                const char* name) {
  if (!given) return std::nullopt;
  const auto found = given->sizes();
  if (found.size() != sizes.size() || !std::equal(sizes.begin(), sizes.end(), found.begin()) ||
      given->scalar_type() != x.scalar_type()) {
    fail("group_norm_silu: ", name, " ", shape_of(*given), " does not fit x ", shape_of(x), " or has another dtype");
  }
  return row_major(*given);
}

const void* data_of(const std::optional<Tensor>& x) { return x ? x->data_ptr() : nullptr; }

float* floats(const Tensor& x) { return static_cast<float*>(x.data_ptr()); }

struct Inputs {
  Tensor x;
  std::optional<Tensor> shift, weight, bias;
  bool last;
  int64_t samples;
};

Inputs checked(const Tensor& x, const std::optional<Tensor>& shift, const std::optional<Tensor>& weight,
               const std::optional<Tensor>& bias, int64_t groups) {
  if (x.dim() < 2) fail("group_norm_silu: x ", shape_of(x), " must be [N, C, ...]");
  const int64_t channels = x.size(1);
  if (groups < 1 || channels % groups != 0) {
    fail("group_norm_silu: ", channels, " channels cannot be divided into ", groups, " groups");
  }
  const bool last = channels_last(x);
  return {in_format(x, last),
          parameter(shift, x, {x.size(0), channels}, "shift"),
          parameter(weight, x, {channels}, "weight"),
          parameter(bias, x, {channels}, "bias"),
          last,
          x.size(0)};
}

Job job_of(const Inputs& inputs, const Tensor& mean, const Tensor& rstd, int64_t groups, double eps, bool silu) {
  Job job{};
  job.x = inputs.x.data_ptr();
  job.shift = data_of(inputs.shift);
  job.weight = data_of(inputs.weight);
  job.bias = data_of(inputs.bias);
  job.mean = floats(mean);
  job.rstd = floats(rstd);
  job.channels = inputs.x.size(1);
  job.positions = inputs.x.numel() / (inputs.samples * job.channels);
  job.groups = groups;
  job.eps = eps;
  job.silu = silu;
  constexpr int64_t elements_per_block = 65536;  // a quarter of a megabyte of floats: the sums of a block cost little beside it
  job.positions_per_block = std::max<int64_t>(16, elements_per_block / job.channels);
  return job;
}

// All phases of channels last. Blocks depend on the shape only. Where the samples divide evenly among the threads, a thread takes a
// sample through all phases, with its cache; otherwise each phase is shared out by blocks. Both give the same bits.
void run_last(Element element, const Job& job, int64_t samples, bool backward, bool apply) {
  const auto start = DK_FOR_ACTIVE_ISA(start_last);
  const auto sums = DK_FOR_ACTIVE_ISA(sum_last);
  const auto finish = DK_FOR_ACTIVE_ISA(finish_last);
  const auto finally = DK_FOR_ACTIVE_ISA(apply_last);
  const int64_t blocks = job.blocks();
  if (samples % static_cast<int64_t>(torch::stable::get_num_threads()) == 0 || blocks == 1) {
    const int64_t grain = row_grain(4 * job.channels * job.positions);
    torch::stable::parallel_for(0, samples, grain, [&](int64_t begin, int64_t end) {
      for (int64_t sample = begin; sample < end; ++sample) {
        if (backward) start(element, job, sample);
        sums(element, job, sample, 0, blocks);
        finish(element, job, sample);
        if (apply) finally(element, job, sample, 0, blocks);
      }
    });
    return;
  }
  const auto for_blocks = [&](auto kernel) {
    torch::stable::parallel_for(0, samples * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        kernel(element, job, task / blocks, task % blocks, task % blocks + 1);
      }
    });
  };
  if (backward) {
    for (int64_t sample = 0; sample < samples; ++sample) start(element, job, sample);
  }
  for_blocks(sums);
  torch::stable::parallel_for(0, samples, 1, [&](int64_t begin, int64_t end) {
    for (int64_t sample = begin; sample < end; ++sample) finish(element, job, sample);
  });
  if (apply) for_blocks(finally);
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu(Tensor x, std::optional<Tensor> shift, std::optional<Tensor> weight,
                                                   std::optional<Tensor> bias, int64_t groups, double eps, bool silu) {
  const Element element = element_of(x, "group_norm_silu");
  const Inputs inputs = checked(x, shift, weight, bias, groups);
  Tensor y = new_in_format(inputs.x, inputs.last);
  Tensor mean = new_row_major(x, {inputs.samples, groups}, ScalarType::Float);
  Tensor rstd = new_row_major(x, {inputs.samples, groups}, ScalarType::Float);
  if (x.numel() == 0) {
    torch::stable::fill_(mean, 0.0);
    torch::stable::fill_(rstd, 0.0);
    return {y, mean, rstd};
  }
  Job job = job_of(inputs, mean, rstd, groups, eps, silu);
  job.y = y.data_ptr();
  if (inputs.last) {
    const Tensor partial = new_row_major(x, {inputs.samples, job.blocks(), 3, job.channels}, ScalarType::Float);
    const Tensor coefficients = new_row_major(x, {inputs.samples, 5, job.channels}, ScalarType::Float);
    job.partial = floats(partial);
    job.coefficients = floats(coefficients);
    run_last(element, job, inputs.samples, false, true);
  } else {
    const auto kernel = DK_FOR_ACTIVE_ISA(forward_first);
    torch::stable::parallel_for(0, inputs.samples * groups, row_grain(4 * job.channels / groups * job.positions),
                                [&](int64_t begin, int64_t end) { kernel(element, job, begin, end); });
  }
  return {y, mean, rstd};
}

// Room for the gradient before the activation, one group of floats per thread, where that stays in the second-level cache. float32 has
// it in grad_x.
void run_backward_first(Element element, const Job& job, int64_t samples) {
  constexpr int64_t largest_room = 131072;
  const int64_t elements = job.channels / job.groups * job.positions;
  const auto kernel = DK_FOR_ACTIVE_ISA(backward_first);
  torch::stable::parallel_for(0, samples * job.groups, row_grain(4 * elements), [&](int64_t begin, int64_t end) {
    std::unique_ptr<float[]> room;
    if (element != Element::float32 && job.silu && job.grad_x && elements <= largest_room) room.reset(new float[elements]);
    kernel(element, job, room.get(), begin, end);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_silu_backward(Tensor grad_y, Tensor x, std::optional<Tensor> shift,
                                                                    std::optional<Tensor> weight, std::optional<Tensor> bias,
                                                                    Tensor mean, Tensor rstd, int64_t groups, bool silu,
                                                                    bool x_grad, bool affine_grad, bool shift_grad) {
  const Element element = element_of(x, "group_norm_silu");
  const Inputs inputs = checked(x, shift, weight, bias, groups);
  const auto a = x.sizes(), b = grad_y.sizes();
  if (a.size() != b.size() || !std::equal(a.begin(), a.end(), b.begin()) || x.scalar_type() != grad_y.scalar_type()) {
    fail("group_norm_silu: grad_y ", shape_of(grad_y), " must have the shape ", shape_of(x), " and dtype of x");
  }
  for (const Tensor* statistic : {&mean, &rstd}) {
    if (statistic->numel() != inputs.samples * groups || statistic->scalar_type() != ScalarType::Float) {
      fail("group_norm_silu: mean and rstd must be float32 [", inputs.samples, ", ", groups, "]");
    }
  }
  grad_y = in_format(grad_y, inputs.last);
  mean = row_major(mean);
  rstd = row_major(rstd);
  const int64_t channels = x.size(1);
  Tensor grad_x = x_grad ? new_in_format(inputs.x, inputs.last) : new_row_major(x, {0}, x.scalar_type());
  Tensor grad_weight = new_row_major(x, {affine_grad ? channels : 0}, x.scalar_type());
  Tensor grad_bias = new_row_major(x, {affine_grad ? channels : 0}, x.scalar_type());
  Tensor grad_shift = new_row_major(x, {shift_grad ? inputs.samples : 0, channels}, x.scalar_type());
  if (x.numel() == 0) {
    for (Tensor* grad : {&grad_weight, &grad_bias, &grad_shift}) torch::stable::fill_(*grad, 0.0);
    return {grad_x, grad_weight, grad_bias, grad_shift};
  }
  Job job = job_of(inputs, mean, rstd, groups, 0.0, silu);
  job.grad_y = grad_y.data_ptr();
  job.grad_x = x_grad ? grad_x.data_ptr() : nullptr;
  job.grad_shift = shift_grad ? grad_shift.data_ptr() : nullptr;
  const int64_t blocks = inputs.last ? job.blocks() : 1;
  const Tensor partial = new_row_major(x, {inputs.samples, blocks, 3, channels}, ScalarType::Float);
  const Tensor coefficients = new_row_major(x, {inputs.last ? inputs.samples : 0, 5, channels}, ScalarType::Float);
  const Tensor affine_sums = new_row_major(x, {affine_grad ? inputs.samples : 0, 2, channels}, ScalarType::Float);
  job.partial = floats(partial);
  job.coefficients = floats(coefficients);
  job.affine_sums = affine_grad ? floats(affine_sums) : nullptr;
  if (inputs.last) {
    run_last(element, job, inputs.samples, true, x_grad);
  } else {
    run_backward_first(element, job, inputs.samples);
  }
  if (affine_grad) {
    DK_FOR_ACTIVE_ISA(reduce_affine)(element, job, inputs.samples, grad_weight.data_ptr(), grad_bias.data_ptr());
  }
  return {grad_x, grad_weight, grad_bias, grad_shift};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dreamkernels, CPU, m) {
  m.impl("group_norm_silu", TORCH_BOX(&group_norm_silu));
  m.impl("group_norm_silu.inference", TORCH_BOX(&group_norm_silu));
  m.impl("group_norm_silu_backward", TORCH_BOX(&group_norm_silu_backward));
}

}  // namespace dreamkernels::group_norm_silu
