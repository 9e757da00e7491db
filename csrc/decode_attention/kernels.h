// The CPU kernels of decode_attention. Declared once per instruction set (common/isa.h).
#pragma once
#include "common/elements.h"
#include "common/isa.h"
#include "decode_attention/job.h"

namespace dreamkernels::decode_attention {

constexpr int kTileKeys = 64;  // keys at a time; the unit in which keys are divided into parts

// Tasks are (part, sequence, head of the cache), the head running fastest. Lengths and pages have been checked.
DK_DECLARE_KERNEL(attend_parts, (Element element, const Job& job, int64_t begin_task, int64_t end_task))
// Joins the parts of rows (sequence, head of the cache, row), in their order.
DK_DECLARE_KERNEL(combine_parts, (Element element, const Job& job, int64_t begin_row, int64_t end_row))

}  // namespace dreamkernels::decode_attention
