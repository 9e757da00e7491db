// The kernels of group_norm_silu. A sample is C channels of S positions, channels first (C x S) or last (S x C); a group is
// C / groups neighbouring channels. Declared once per instruction set (common/isa.h).
#pragma once
#include "common/elements.h"
#include "common/isa.h"

namespace dreamkernels::group_norm_silu {

struct Job {
  const void* x;
  const void* shift;   // [N, C], added to every position before the norm; null: none
  const void* weight;  // [C]; null: ones
  const void* bias;    // [C]; null: zeros
  float* mean;         // [N, groups], of x + shift; written by the forward, read by the backward
  float* rstd;         // [N, groups]
  int64_t channels, positions, groups;
  double eps;
  bool silu;
  void* y;               // forward
  const void* grad_y;    // backward
  void* grad_x;          // null: not needed
  void* grad_shift;      // [N, C]; null: not needed
  float* affine_sums;    // [N, 2, C]: of the weight, then of the bias; null: not needed
  float* partial;        // channels last: [N, blocks, 3, C], the sums of each block of positions; channels first: [N, C, 3], backward
  float* coefficients;   // channels last: [N, 5, C]
  int64_t positions_per_block;
  int64_t blocks() const { return (positions + positions_per_block - 1) / positions_per_block; }
};

// Channels first: one task per sample and group. The backward of 16-bit elements takes room for one group of floats
// where it is worth it, or null.
DK_DECLARE_KERNEL(forward_first, (Element element, const Job& job, int64_t begin_task, int64_t end_task))
DK_DECLARE_KERNEL(backward_first, (Element element, const Job& job, float* room, int64_t begin_task, int64_t end_task))

// Channels last: a sample is summed in blocks of positions, its sums become coefficients per channel, and these are applied.
// start_last prepares the coefficients that the sums of the backward need.
DK_DECLARE_KERNEL(start_last, (Element element, const Job& job, int64_t sample))
DK_DECLARE_KERNEL(sum_last, (Element element, const Job& job, int64_t sample, int64_t begin_block, int64_t end_block))
DK_DECLARE_KERNEL(finish_last, (Element element, const Job& job, int64_t sample))
DK_DECLARE_KERNEL(apply_last, (Element element, const Job& job, int64_t sample, int64_t begin_block, int64_t end_block))

// grad_weight and grad_bias = the sums over samples, in their order.
DK_DECLARE_KERNEL(reduce_affine, (Element element, const Job& job, int64_t samples, void* grad_weight, void* grad_bias))

}  // namespace dreamkernels::group_norm_silu
