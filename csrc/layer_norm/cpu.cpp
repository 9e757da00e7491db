// CPU implementation of dreamkernels::layer_norm and layer_norm_backward (schemas: dreamkernels/ops/layer_norm).
#include <cstring>
#include <optional>
#include <tuple>

#include "common/tensor.h"
#include "layer_norm/kernels.h"

namespace dreamkernels::layer_norm {
namespace {

int64_t checked_width(const Tensor& x) {
  if (x.dim() < 1) fail("layer_norm: x ", shape_of(x), " needs at least one dimension");
  return x.size(x.dim() - 1);
}

// The parameter row-major; where it is absent, a row of `value`, so that the kernels have one form.
Tensor parameter(const std::optional<Tensor>& given, const Tensor& x, int64_t width, double value, const char* name) {
  if (!given) {
    Tensor row = new_row_major(x, {width}, x.scalar_type());
    return torch::stable::fill_(row, value);
  }
  if (given->dim() != 1 || given->numel() != width || given->scalar_type() != x.scalar_type()) {
    fail("layer_norm: x ", shape_of(x), " needs a ", name, " [", width, "] of its dtype, not ", shape_of(*given));
  }
  return row_major(*given);
}

Tensor layer_norm(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias, double eps) {
  const int64_t width = checked_width(x);
  const Element element = element_of(x, "layer_norm");
  const Tensor w = parameter(weight, x, width, 1.0, "weight"), b = parameter(bias, x, width, 0.0, "bias");
  x = row_major(x);
  Tensor y = new_like(x);
  if (x.numel() == 0) return y;
  const Forward job{x.data_ptr(), w.data_ptr(), b.data_ptr(), y.data_ptr(), width, eps};
  const auto kernel = DK_FOR_ACTIVE_ISA(forward_rows);
  torch::stable::parallel_for(0, x.numel() / width, row_grain(width),
                              [&](int64_t begin, int64_t end) { kernel(element, job, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(Tensor grad_y, Tensor x, std::optional<Tensor> weight, double eps,
                                                       bool affine_grad) {
  const int64_t width = checked_width(x);
  const Element element = element_of(x, "layer_norm");
  const auto a = x.sizes(), b = grad_y.sizes();
  if (a.size() != b.size() || !std::equal(a.begin(), a.end(), b.begin()) || x.scalar_type() != grad_y.scalar_type()) {
    fail("layer_norm: grad_y ", shape_of(grad_y), " must have the shape ", shape_of(x), " and dtype of x");
  }
  const Tensor w = parameter(weight, x, width, 1.0, "weight");
  grad_y = row_major(grad_y);
  x = row_major(x);
  Tensor grad_x = new_like(x);
  Tensor grad_weight = new_row_major(x, {affine_grad ? width : 0}, x.scalar_type());
  Tensor grad_bias = new_row_major(x, {affine_grad ? width : 0}, x.scalar_type());
  if (width == 0) return {grad_x, grad_weight, grad_bias};

  // The chunks of rows depend on the shape only, and their sums are added in order: no dependence on the number of threads.
  constexpr int64_t max_chunks = 64, min_rows_per_chunk = 16;
  const int64_t rows = x.numel() / width;
  const int64_t rows_per_chunk = std::max(min_rows_per_chunk, (rows + max_chunks - 1) / max_chunks);
  const int64_t chunks = (rows + rows_per_chunk - 1) / rows_per_chunk;
  std::optional<Tensor> workspace;
  if (affine_grad) {
    workspace = new_row_major(x, {chunks, 2, width}, ScalarType::Float);
    std::memset(workspace->data_ptr(), 0, chunks * 2 * width * sizeof(float));
  }
  float* sums = workspace ? static_cast<float*>(workspace->data_ptr()) : nullptr;
  const Backward job{grad_y.data_ptr(), x.data_ptr(), w.data_ptr(), grad_x.data_ptr(), sums, rows, rows_per_chunk, width, eps};
  const auto kernel = DK_FOR_ACTIVE_ISA(backward_chunks);
  const int64_t chunk_grain = std::max<int64_t>(1, row_grain(width) / rows_per_chunk);
  torch::stable::parallel_for(0, chunks, chunk_grain, [&](int64_t begin, int64_t end) { kernel(element, job, begin, end); });
  if (affine_grad) {
    // One thread: at most 128 rows of float sums, a few microseconds.
    DK_FOR_ACTIVE_ISA(reduce_columns)(element, sums, chunks, width, grad_weight.data_ptr(), grad_bias.data_ptr());
  }
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dreamkernels, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("layer_norm.inference", TORCH_BOX(&layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
}

}  // namespace dreamkernels::layer_norm
