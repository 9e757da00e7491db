// The CPU kernel of append_kv. Declared once per instruction set (common/isa.h).
#pragma once
#include "append_kv/job.h"
#include "common/elements.h"
#include "common/isa.h"

namespace dreamkernels::append_kv {

// Rows are (sequence, token, head) with the query heads first, then key heads, then value heads. Positions have been checked.
DK_DECLARE_KERNEL(append_rows, (Element element, bool float_tables, const Job& job, int64_t begin_row, int64_t end_row))

}  // namespace dreamkernels::append_kv
