// The kernels of swiglu: rows of `width` adjacent elements at distances in elements. Declared once per instruction set (common/isa.h).
#pragma once
#include "common/elements.h"
#include "common/isa.h"

namespace dreamkernels::swiglu {

struct Rows {
  void* data;  // const where it is read
  int64_t stride;
};

struct Forward {
  Rows gate, up, y;
  int64_t width, elements;
};

struct Backward {
  Rows grad_y, gate, up, grad_gate, grad_up;
  int64_t width, elements;
};

// The elements of all rows, counted row by row, are cut into blocks.
constexpr int64_t block_elements = 8192;

DK_DECLARE_KERNEL(forward, (Element element, const Forward& job, int64_t begin_block, int64_t end_block))
DK_DECLARE_KERNEL(backward, (Element element, const Backward& job, int64_t begin_block, int64_t end_block))

}  // namespace dreamkernels::swiglu
