// CPU implementation of dreamkernels::rms_norm, add_rms_norm and rms_norm_backward (schemas: dreamkernels/ops/rms_norm).
#include <cstring>
#include <optional>
#include <tuple>

#include "common/tensor.h"
#include "rms_norm/kernels.h"

namespace dreamkernels::rms_norm {
namespace {

int64_t checked_width(const Tensor& x, const Tensor& weight) {
  const int64_t width = weight.numel();
  if (x.dim() < 1 || weight.dim() != 1 || x.size(x.dim() - 1) != width) {
    fail("rms_norm: x ", shape_of(x), " needs a weight [", x.dim() ? x.size(x.dim() - 1) : 0, "], not ", shape_of(weight));
  }
  if (weight.scalar_type() != x.scalar_type()) fail("rms_norm: x and weight must have the same dtype");
  return width;
}

void check_same(const Tensor& x, const Tensor& other, const char* name) {
  const auto a = x.sizes(), b = other.sizes();
  if (a.size() != b.size() || !std::equal(a.begin(), a.end(), b.begin()) || x.scalar_type() != other.scalar_type()) {
    fail("rms_norm: ", name, " ", shape_of(other), " must have the shape ", shape_of(x), " and dtype of x");
  }
}

void run_forward(const Tensor& x, const Forward& job) {
  if (x.numel() == 0) return;
  const Element element = element_of(x, "rms_norm");
  const auto kernel = DK_FOR_ACTIVE_ISA(forward_rows);
  torch::stable::parallel_for(0, x.numel() / job.width, row_grain(job.width), [&](int64_t begin, int64_t end) {
    kernel(element, job, begin, end);
  });
}

Tensor rms_norm(Tensor x, Tensor weight, double eps) {
  const int64_t width = checked_width(x, weight);
  x = row_major(x);
  weight = row_major(weight);
  Tensor y = new_like(x);
  run_forward(x, {x.data_ptr(), nullptr, weight.data_ptr(), y.data_ptr(), nullptr, width, eps});
  return y;
}

std::tuple<Tensor, Tensor> add_rms_norm(Tensor x, Tensor residual, Tensor weight, double eps) {
  const int64_t width = checked_width(x, weight);
  check_same(x, residual, "residual");
  x = row_major(x);
  residual = row_major(residual);
  weight = row_major(weight);
  Tensor y = new_like(x);
  Tensor new_residual = new_like(x);
  run_forward(x, {x.data_ptr(), residual.data_ptr(), weight.data_ptr(), y.data_ptr(), new_residual.data_ptr(), width,
                  eps});
  return {y, new_residual};
}

std::tuple<Tensor, Tensor> rms_norm_backward(Tensor grad_y, std::optional<Tensor> grad_residual, Tensor x, Tensor weight,
                                             double eps, bool weight_grad) {
  const int64_t width = checked_width(x, weight);
  check_same(x, grad_y, "grad_y");
  grad_y = row_major(grad_y);
  x = row_major(x);
  weight = row_major(weight);
  if (grad_residual) {
    check_same(x, *grad_residual, "grad_residual");
    grad_residual = row_major(*grad_residual);
  }
  Tensor grad_x = new_like(x);
  Tensor grad_weight = new_row_major(weight, {weight_grad ? width : 0}, weight.scalar_type());
  if (width == 0) return {grad_x, grad_weight};

  // The weight gradient: each chunk of rows sums into its own row of `sums`, then the chunks are added in order. The chunks
  // depend on the number of rows only, so the result does not depend on the number of threads.
  constexpr int64_t max_chunks = 64, min_rows_per_chunk = 16;
  const int64_t rows = x.numel() / width;
  const int64_t rows_per_chunk = std::max(min_rows_per_chunk, (rows + max_chunks - 1) / max_chunks);
  const int64_t chunks = (rows + rows_per_chunk - 1) / rows_per_chunk;
  std::optional<Tensor> sums;
  if (weight_grad) {
    sums = new_row_major(x, {chunks, width}, ScalarType::Float);
    std::memset(sums->data_ptr(), 0, chunks * width * sizeof(float));
  }
  float* weight_sums = sums ? static_cast<float*>(sums->data_ptr()) : nullptr;
  const Backward job{grad_y.data_ptr(), grad_residual ? grad_residual->data_ptr() : nullptr, x.data_ptr(), weight.data_ptr(),
                     grad_x.data_ptr(), weight_sums, rows, rows_per_chunk, width, eps};
  const Element element = element_of(x, "rms_norm");
  const auto kernel = DK_FOR_ACTIVE_ISA(backward_chunks);
  const int64_t chunk_grain = std::max<int64_t>(1, row_grain(width) / rows_per_chunk);
  torch::stable::parallel_for(0, chunks, chunk_grain, [&](int64_t begin, int64_t end) { kernel(element, job, begin, end); });
  if (weight_grad) {
    const auto reduce = DK_FOR_ACTIVE_ISA(reduce_columns);
    constexpr int64_t columns_per_task = 64;
    const int64_t tasks = (width + columns_per_task - 1) / columns_per_task;
    torch::stable::parallel_for(0, tasks, std::max<int64_t>(1, row_grain(chunks * columns_per_task)), [&](int64_t begin, int64_t end) {
      reduce(element, weight_sums, chunks, width, grad_weight.data_ptr(), begin * columns_per_task,
             std::min(end * columns_per_task, width));
    });
  }
  return {grad_x, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dreamkernels, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm.inference", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("add_rms_norm.inference", TORCH_BOX(&add_rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace dreamkernels::rms_norm
