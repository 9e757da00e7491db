// The kernels of linear_cross_entropy around its matrix products. Declared once per instruction set (common/isa.h).
#pragma once
#include "common/elements.h"
#include "common/isa.h"

namespace dreamkernels::linear_cross_entropy {

// A chunk of logits; row r belongs to the target targets[r].
struct Rows {
  void* logits;  // [rows, vocabulary], row-major; overwritten by the gradient of the logits where `factors` is given
  const int64_t* targets;
  const float* factors;  // derivative of the result with respect to the loss of each row; null: no gradient
  float* losses;         // null: not wanted
  int64_t vocabulary;
  float softcap;  // 0: none
  float z_loss;
};

// The sum of a gradient over the chunks. A bfloat16 gradient is summed in float32 without a float32 tensor: the tensor that
// becomes the result holds the upper half of each sum, `low` the lower half. float16 has its sums in `low` as float32.
struct Accumulate {
  const void* part;  // what this chunk contributes
  void* total;
  void* low;
  bool first;  // total holds the contribution of the first chunk, low nothing yet
  bool last;   // round the sums to the element type; low is done with
};

DK_DECLARE_KERNEL(loss_rows, (Element element, const Rows& job, int64_t begin_row, int64_t end_row))
DK_DECLARE_KERNEL(accumulate, (Element element, const Accumulate& job, int64_t begin, int64_t end))
// x[begin:end] *= factor
DK_DECLARE_KERNEL(scale, (Element element, void* x, float factor, int64_t begin, int64_t end))

}  // namespace dreamkernels::linear_cross_entropy
