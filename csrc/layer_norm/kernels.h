// The kernels of layer_norm: rows of `width` elements, row-major. Declared once per instruction set (common/isa.h).
#pragma once
#include "common/elements.h"
#include "common/isa.h"

namespace dreamkernels::layer_norm {

struct Forward {
  const void* x;
  const void* weight;
  const void* bias;
  void* y;
  int64_t width;
  double eps;
};

struct Backward {
  const void* grad_y;
  const void* x;
  const void* weight;
  void* grad_x;
  float* sums;  // [chunks, 2, width], zeroed by the caller: of the weight, then of the bias; null: neither needs a gradient
  int64_t rows;
  int64_t rows_per_chunk;
  int64_t width;
  double eps;
};

DK_DECLARE_KERNEL(forward_rows, (Element element, const Forward& job, int64_t begin_row, int64_t end_row))
DK_DECLARE_KERNEL(backward_chunks, (Element element, const Backward& job, int64_t begin_chunk, int64_t end_chunk))
// grad_weight and grad_bias = the sums over chunks, in their order.
DK_DECLARE_KERNEL(reduce_columns, (Element element, const float* sums, int64_t chunks, int64_t width, void* grad_weight,
                                   void* grad_bias))

}  // namespace dreamkernels::layer_norm
