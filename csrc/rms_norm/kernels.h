// The kernels of rms_norm: rows of `width` elements, row-major. Declared once per instruction set (common/isa.h).
#pragma once
#include "common/elements.h"
#include "common/isa.h"

namespace dreamkernels::rms_norm {

struct Forward {
  const void* x;
  const void* residual;  // null: no residual
  const void* weight;
  void* y;
  void* new_residual;  // null exactly when residual is
  int64_t width;
  double eps;
};

struct Backward {
  const void* grad_y;
  const void* grad_residual;  // gradient of new_residual, added to grad_x; null: none
  const void* x;              // what was normalised (new_residual, where there was a residual)
  const void* weight;
  void* grad_x;
  float* weight_sums;  // [chunks, width], zeroed by the caller; null: the weight needs no gradient
  int64_t rows;
  int64_t rows_per_chunk;
  int64_t width;
  double eps;
};

DK_DECLARE_KERNEL(forward_rows, (Element element, const Forward& job, int64_t begin_row, int64_t end_row))
DK_DECLARE_KERNEL(backward_chunks, (Element element, const Backward& job, int64_t begin_chunk, int64_t end_chunk))
// grad_weight[begin:end] = the sum over chunks, in their order.
DK_DECLARE_KERNEL(reduce_columns, (Element element, const float* sums, int64_t chunks, int64_t width, void* grad_weight,
                                   int64_t begin, int64_t end))

}  // namespace dreamkernels::rms_norm
