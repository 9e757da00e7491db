// CPU implementation of dreamkernels::geglu and geglu_backward (schemas: dreamkernels/ops/geglu).
#include "common/tensor.h"
#include "geglu/kernels.h"

namespace dreamkernels::geglu {
namespace {

// Few rows of many columns are shared among the threads as well as many rows of few: the kernels cost about eight times a copy.
constexpr int64_t kElementsPerThread = 4096;

std::vector<int64_t> half_shape(const Tensor& x) {
  if (x.dim() < 1 || x.size(x.dim() - 1) % 2 != 0) fail("geglu: x ", shape_of(x), " needs an even last dimension");
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() /= 2;
  return sizes;
}

template <class F>
void for_rows(int64_t rows, int64_t width, F&& f) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kElementsPerThread / width), f);
}

Tensor geglu(Tensor x) {
  const std::vector<int64_t> sizes = half_shape(x);
  const Element element = element_of(x, "geglu");
  x = row_major(x);
  Tensor y = new_row_major(x, sizes, x.scalar_type());
  if (y.numel() == 0) return y;
  const int64_t width = sizes.back();
  const void* from = x.data_ptr();
  void* to = y.data_ptr();
  const auto kernel = DK_FOR_ACTIVE_ISA(forward_rows);
  for_rows(y.numel() / width, width, [&](int64_t begin, int64_t end) { kernel(element, from, to, width, begin, end); });
  return y;
}

Tensor geglu_backward(Tensor grad_y, Tensor x) {
  const std::vector<int64_t> sizes = half_shape(x);
  const auto given = grad_y.sizes();
  if (given.size() != sizes.size() || !std::equal(sizes.begin(), sizes.end(), given.begin()) ||
      grad_y.scalar_type() != x.scalar_type()) {
    fail("geglu: grad_y ", shape_of(grad_y), " must have half the columns of x ", shape_of(x), " and its dtype");
  }
  const Element element = element_of(x, "geglu");
  grad_y = row_major(grad_y);
  x = row_major(x);
  Tensor grad_x = new_like(x);
  if (x.numel() == 0) return grad_x;
  const int64_t width = sizes.back();
  const void *grad = grad_y.data_ptr(), *from = x.data_ptr();
  void* to = grad_x.data_ptr();
  const auto kernel = DK_FOR_ACTIVE_ISA(backward_rows);
  for_rows(grad_y.numel() / width, width,
           [&](int64_t begin, int64_t end) { kernel(element, grad, from, to, width, begin, end); });
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dreamkernels, CPU, m) {
  m.impl("geglu", TORCH_BOX(&geglu));
  m.impl("geglu.inference", TORCH_BOX(&geglu));
  m.impl("geglu_backward", TORCH_BOX(&geglu_backward));
}

}  // namespace dreamkernels::geglu
