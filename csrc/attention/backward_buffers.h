// The workspace of a backward task. It grows with the queries of the longest sequence: their packed forms and dQ^T are kept while
// the keys pass by.
#pragma once
#include "attention/kernels.h"
#include "attention/multiply.h"

namespace dreamkernels::attention::DK_ISA {

constexpr int64_t kKeys = kKeyAlignment;  // keys per block

// One block of queries of one head, packed.
template <class A>
struct BackwardBlock {
  using Stored = typename A::Stored;
  Stored *q_lanes, *grad_lanes;  // [ceil(head_dim / pack), lanes]
  Stored *q_rows, *grad_rows;    // [lanes / pack, width]
  float *lse, *delta;            // [lanes]
  float* minus_grad_lse;         // [lanes]
  float* total;                  // [lanes], the sum of the probabilities over the keys so far
  float* grad_q;                 // [depth, lanes]
};

template <class A>
struct BackwardBuffers {
  using Stored = typename A::Stored;
  Stored *q_lanes, *grad_lanes, *q_rows, *grad_rows;
  float *lse, *delta, *minus_grad_lse, *total, *grad_q;
  float* probabilities;          // [kRows, lanes] of a group of keys
  float* partial;                // the same for unfinished sums
  float* slopes;                 // [kKeys or kRows, lanes], the derivative of the soft cap
  Stored *p_rows, *ds_rows;      // [kKeys, lanes]
  Stored* ds_lanes;              // [kKeys / pack, lanes]
  float *grad_k, *grad_v;        // [kKeys, width]
  float* factors;                // [lanes]
  Stored* out_lanes;             // as q_lanes, of one block
  Stored *key_copies, *value_copies;
  Stored* keys;                  // [kKeys / pack, width]
  int64_t lanes_size, rows_size, grad_q_size;

  BackwardBuffers() = default;
  BackwardBuffers(Arena& arena, int64_t blocks, int64_t head_dim) {
    const int64_t width = round_up(head_dim, Vec::width);
    lanes_size = round_up(head_dim, A::pack) * kQueries;
    rows_size = width * kQueries;
    grad_q_size = round_up(head_dim, kRows) * kQueries;
    q_lanes = arena.take<Stored>(blocks * lanes_size);
    grad_lanes = arena.take<Stored>(blocks * lanes_size);
    q_rows = arena.take<Stored>(blocks * rows_size);
    grad_rows = arena.take<Stored>(blocks * rows_size);
    lse = arena.take<float>(blocks * kQueries);
    delta = arena.take<float>(blocks * kQueries);
    minus_grad_lse = arena.take<float>(blocks * kQueries);
    total = arena.take<float>(blocks * kQueries);
    grad_q = arena.take<float>(blocks * grad_q_size);
    probabilities = arena.take<float>(kRows * kQueries);
    partial = arena.take<float>(kRows * kQueries);
    slopes = arena.take<float>((A::pack == 1 ? kKeys : kRows) * kQueries);
    p_rows = arena.take<Stored>(kKeys * kQueries);
    ds_rows = arena.take<Stored>(kKeys * kQueries);
    ds_lanes = A::same_forms ? ds_rows : arena.take<Stored>(kKeys * kQueries);
    grad_k = arena.take<float>(kKeys * width);
    grad_v = arena.take<float>(kKeys * width);
    factors = arena.take<float>(kQueries);
    out_lanes = arena.take<Stored>(lanes_size);
    key_copies = arena.take<Stored>(kKeys * round_up(head_dim, A::pack));
    value_copies = arena.take<Stored>(kKeys * round_up(head_dim, A::pack));
    keys = arena.take<Stored>(kKeys * width);
  }
  BackwardBlock<A> block(int64_t n) const {
    return {q_lanes + n * lanes_size, grad_lanes + n * lanes_size, q_rows + n * rows_size,      grad_rows + n * rows_size,
            lse + n * kQueries,       delta + n * kQueries,        minus_grad_lse + n * kQueries, total + n * kQueries,
            grad_q + n * grad_q_size};
  }
};

}  // namespace dreamkernels::attention::DK_ISA
