// The CPU kernel of decode_layers and few_rows_linear that no other operator has: products with few rows. Declared once per
// instruction set (common/isa.h).
#pragma once
#include "common/elements.h"
#include "common/isa.h"

namespace dreamkernels::decode_layers {

// y = x weight^T + bias. All rows have adjacent elements; strides in elements.
struct Product {
  const void* x;  // [rows, inputs]
  int64_t x_stride;
  const void* weight;  // [outputs, inputs], rows without gaps
  const void* bias;    // [outputs]; null: none
  void* y;             // [rows, outputs]
  int64_t y_stride;
  int64_t rows, inputs;
};

// The outputs begin_output to end_output of all rows. The order of a sum depends on `inputs` only.
DK_DECLARE_KERNEL(multiply, (Element element, const Product& job, int64_t begin_output, int64_t end_output))

}  // namespace dreamkernels::decode_layers
