// softmax_groups: softmax of every group of `size` successive elements, in place. Declared once per instruction set (common/isa.h).
#pragma once
#include "common/elements.h"
#include "common/isa.h"

namespace dreamkernels::softmax_groups {

constexpr int64_t kMaxSize = 128;

struct Job {
  void* x;
  int64_t size;  // 1 to kMaxSize
};

DK_DECLARE_KERNEL(softmax, (Element element, const Job& job, int64_t begin_group, int64_t end_group))

}  // namespace dreamkernels::softmax_groups
