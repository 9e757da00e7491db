// The kernels of attention and its backward. Declared once per instruction set (common/isa.h).
#pragma once
#include <atomic>
#include <cstdint>

#include "common/elements.h"
#include "common/isa.h"

namespace dreamkernels::attention {

// Tasks begin at multiples of these, which are whole blocks at every instruction set.
constexpr int64_t kQueryAlignment = 48;
constexpr int64_t kKeyAlignment = 96;

// Vectors of head_dim contiguous elements, one per token and head. Strides in elements.
struct Heads {
  const void* data;
  int64_t token_stride;
  int64_t head_stride;
};

// One sequence: where its rows begin (in elements of the respective tensor) and how many there are.
struct Sequence {
  int64_t q, k, v, grad_out;
  int64_t first_query, first_key;  // rows of the row-major tensors out, grad_q and grad_k, grad_v
  int64_t lse;                     // offset of head 0
  int64_t queries, keys;
  int64_t constant_keys;  // leading keys without a gradient
};

// Query i of a sequence sees key j exactly if nearest <= i + keys - queries - j <= farthest.
struct Visibility {
  int64_t nearest, farthest;
};

struct Task {
  int64_t sequence;
  int64_t head;        // forward: query head; backward: key-value head
  int64_t begin, end;  // forward: queries; backward: keys
  int64_t part;        // backward: the partial grad_q that this task writes; -1: grad_q itself
};

struct Problem {
  Heads q, k, v;
  const Sequence* sequences;
  const Task* tasks;
  int64_t task_count;
  int64_t heads, kv_heads, head_dim;
  int64_t lse_head_stride;
  Visibility visibility;
  float scale;
  float softcap;  // 0: none
};

struct Forward {
  Problem problem;
  void* out;   // [queries, heads, head_dim] row-major
  float* lse;  // natural logarithm
};

struct Backward {
  Problem problem;
  Heads grad_out;
  const void* out;
  const float* lse;
  const float* grad_lse;  // null: none
  void* grad_q;           // row-major, as out
  void* grad_k;           // [keys, kv_heads, head_dim] row-major
  void* grad_v;
  // Where the keys of a sequence are shared out over several tasks: [parts, queries, heads, head_dim], added in order afterwards.
  float* grad_q_parts;
  int64_t part_stride;
};

// Each call takes tasks from the queue until it is empty. What a task computes does not depend on who runs it.
DK_DECLARE_KERNEL(forward_tasks, (Element element, const Forward& job, std::atomic<int64_t>& next_task))
DK_DECLARE_KERNEL(backward_tasks, (Element element, const Backward& job, std::atomic<int64_t>& next_task))
// grad_q[begin:end] = the sum of the parts, in their order.
DK_DECLARE_KERNEL(reduce_grad_q, (Element element, const Backward& job, int64_t parts, int64_t begin, int64_t end))

}  // namespace dreamkernels::attention
