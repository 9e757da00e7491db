// CPU implementation of dreamkernels::softmax_groups (schema: dreamkernels/ops/softmax_groups).
#include "common/tensor.h"
#include "softmax_groups/kernels.h"

namespace dreamkernels::softmax_groups {
namespace {

void softmax_groups(Tensor x, int64_t size) {
  if (size < 1 || size > kMaxSize || x.dim() < 1 || x.size(x.dim() - 1) % size != 0) {
    fail("softmax_groups: x ", shape_of(x), " has no groups of ", size, " (1 to ", kMaxSize, ", dividing the last dimension)");
  }
  if (!x.is_contiguous()) fail("softmax_groups: x must be contiguous");
  if (x.numel() == 0) return;
  const Element element = element_of(x, "softmax_groups");
  const Job job{x.data_ptr(), size};
  const auto kernel = DK_FOR_ACTIVE_ISA(softmax);
  torch::stable::parallel_for(0, x.numel() / size, row_grain(4 * size),
                              [&](int64_t begin, int64_t end) { kernel(element, job, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dreamkernels, CPU, m) { m.impl("softmax_groups", TORCH_BOX(&softmax_groups)); }

}  // namespace dreamkernels::softmax_groups
