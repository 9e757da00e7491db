// The kernels of cross_conditioning. Declared once per instruction set (common/isa.h).
//
// q, out and their gradients are [pictures, positions, heads, width]; k and v are [conditions, keys, heads, width]; the last
// dimension is dense. Picture p attends to condition p / pictures_per_condition.
//
// A task is one (condition, head, picture of that condition, chunk of positions), numbered in that order, the chunk fastest. The
// chunks depend on the shapes only, so results do not depend on the number of threads.
#pragma once
#include "common/elements.h"
#include "common/isa.h"

namespace dreamkernels::cross_conditioning {

struct Strided {
  const void* data;
  int64_t outer, row, head;  // strides in elements
};

struct Shape {
  int64_t conditions, pictures_per_condition, positions, heads, keys, width;
  int64_t chunks, positions_per_chunk;
  float scale;

  __attribute__((always_inline)) int64_t tasks_per_head() const { return pictures_per_condition * chunks; }
  __attribute__((always_inline)) int64_t tasks() const { return conditions * heads * tasks_per_head(); }
};

struct Forward {
  Strided q, k, v;
  void* out;  // row-major
  Shape shape;
};

struct Backward {
  Strided grad_out, q, k, v;
  void* grad_q;    // row-major; null: not wanted
  float* kv_sums;  // [tasks, 2, keys, width], the gradients of k and v of each task; null: not wanted
  Shape shape;
};

struct Reduce {
  const float* kv_sums;
  void* grad_k;  // row-major
  void* grad_v;
  Shape shape;
};

DK_DECLARE_KERNEL(forward_tasks, (Element element, const Forward& job, int64_t begin_task, int64_t end_task))
DK_DECLARE_KERNEL(backward_tasks, (Element element, const Backward& job, int64_t begin_task, int64_t end_task))
// Adds the tasks of each head in their order; `begin` and `end` count heads of conditions.
DK_DECLARE_KERNEL(reduce_heads, (Element element, const Reduce& job, int64_t begin, int64_t end))

}  // namespace dreamkernels::cross_conditioning
