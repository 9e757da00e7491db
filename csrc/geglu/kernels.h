// The kernels of geglu: rows of 2 * width (hidden, then gate) and of width, row-major.
#pragma once
#include "common/elements.h"
#include "common/isa.h"

namespace dreamkernels::geglu {

DK_DECLARE_KERNEL(forward_rows, (Element element, const void* x, void* y, int64_t width, int64_t begin_row, int64_t end_row))
DK_DECLARE_KERNEL(backward_rows, (Element element, const void* grad_y, const void* x, void* grad_x, int64_t width,
                                  int64_t begin_row, int64_t end_row))

}  // namespace dreamkernels::geglu
