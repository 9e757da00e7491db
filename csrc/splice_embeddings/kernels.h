// The summing kernel of splice_embeddings' backward (copying rows needs none). Declared once per instruction set.
#pragma once
#include "common/elements.h"
#include "common/isa.h"

namespace dreamkernels::splice_embeddings {

// For each row r in [begin_row, end_row): out[r] = sum of grad[positions[k]] for k in [starts[r], starts[r + 1]), in that order,
// accumulated in float32. A row with no position is zero.
struct GatherSum {
  const void* grad;
  const int64_t* starts;
  const int64_t* positions;
  void* out;
  int64_t width;
};

DK_DECLARE_KERNEL(gather_sum, (Element element, const GatherSum& job, int64_t begin_row, int64_t end_row))

}  // namespace dreamkernels::splice_embeddings
