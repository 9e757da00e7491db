// From tensors to a Job: the checks that keep the kernels inside of memory. The public function checks first, with better texts.
#pragma once
#include <optional>

#include "append_kv/job.h"
#include "common/tensor.h"

namespace dreamkernels::append_kv {

struct Call {
  Tensor q, k, v, k_cache, v_cache, cache_seqlens, cos, sin;
  std::optional<Tensor> q_norm_weight, k_norm_weight, block_table;
  Tensor rotated_q;
  Job job;
  Element element;
  bool float_tables;  // cos and sin are float32, whatever the element type
};

inline void check(bool holds, const char* what) {
  if (!holds) fail("append_kv: ", what);
}

// The tensor itself when its channels are adjacent, else a row-major copy.
inline Tensor with_adjacent_channels(const Tensor& x) {
  return x.size(3) <= 1 || x.stride(3) == 1 ? x : torch::stable::contiguous(x);
}

inline TokenStrides token_strides(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }
inline CacheStrides cache_strides(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

inline bool is_cache_of(const Tensor& cache, const Tensor& k) {
  return cache.dim() == 4 && cache.size(2) == k.size(2) && cache.size(3) == k.size(3) && cache.scalar_type() == k.scalar_type() &&
         (cache.size(3) <= 1 || cache.stride(3) == 1);
}

inline bool is_weight_of(const std::optional<Tensor>& weight, const Tensor& q) {
  return !weight || (weight->dim() == 1 && weight->size(0) == q.size(3) && weight->scalar_type() == q.scalar_type());
}

inline Call prepare(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor cos, Tensor sin,
                    std::optional<Tensor> q_norm_weight, std::optional<Tensor> k_norm_weight, double eps,
                    std::optional<Tensor> block_table) {
  check(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k and v must be [B, N, H, D]");
  for (int64_t d : {0, 1, 3}) check(q.size(d) == k.size(d) && q.size(d) == v.size(d), "q, k and v differ in B, N or D");
  check(k.size(2) == v.size(2), "k and v differ in their heads");
  check(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), "q, k and v must have the same dtype");
  check(is_cache_of(k_cache, k) && is_cache_of(v_cache, k), "a cache does not fit k");
  check(k_cache.size(0) == v_cache.size(0) && k_cache.size(1) == v_cache.size(1), "the caches differ in their sizes");
  check(cache_seqlens.dim() == 1 && cache_seqlens.size(0) == q.size(0) && cache_seqlens.scalar_type() == ScalarType::Int,
        "cache_seqlens must be int32 [B]");
  check(cos.dim() == 2 && sin.dim() == 2 && cos.size(0) == sin.size(0) && cos.size(1) == sin.size(1), "cos and sin must be [positions, R]");
  check(cos.size(1) % 2 == 0 && cos.size(1) <= q.size(3), "R must be even and at most D");
  check(cos.scalar_type() == sin.scalar_type() && (cos.scalar_type() == ScalarType::Float || cos.scalar_type() == q.scalar_type()),
        "cos and sin must have the dtype of q or float32");
  check(is_weight_of(q_norm_weight, q) && is_weight_of(k_norm_weight, q), "a norm weight does not fit q");
  if (block_table) {
    check(block_table->dim() == 2 && block_table->size(0) == q.size(0) && block_table->scalar_type() == ScalarType::Int,
          "block_table must be int32 [B, max_pages]");
    block_table = row_major(*block_table);
  } else {
    check(k_cache.size(0) == q.size(0), "the caches and q differ in B");
  }
  q = with_adjacent_channels(q);
  k = with_adjacent_channels(k);
  v = with_adjacent_channels(v);
  cache_seqlens = row_major(cache_seqlens);
  cos = row_major(cos);
  sin = row_major(sin);
  if (q_norm_weight) q_norm_weight = row_major(*q_norm_weight);
  if (k_norm_weight) k_norm_weight = row_major(*k_norm_weight);
  const auto sizes = q.sizes();
  Tensor rotated_q = new_row_major(q, std::vector<int64_t>(sizes.begin(), sizes.end()), q.scalar_type());

  Job job{};
  job.q = q.data_ptr();
  job.k = k.data_ptr();
  job.v = v.data_ptr();
  job.k_cache = k_cache.data_ptr();
  job.v_cache = v_cache.data_ptr();
  job.rotated_q = rotated_q.data_ptr();
  job.cache_seqlens = static_cast<const int32_t*>(cache_seqlens.data_ptr());
  job.cos = cos.data_ptr();
  job.sin = sin.data_ptr();
  job.q_norm_weight = q_norm_weight ? q_norm_weight->data_ptr() : nullptr;
  job.k_norm_weight = k_norm_weight ? k_norm_weight->data_ptr() : nullptr;
  job.q_strides = token_strides(q);
  job.k_strides = token_strides(k);
  job.v_strides = token_strides(v);
  job.k_cache_strides = cache_strides(k_cache);
  job.v_cache_strides = cache_strides(v_cache);
  job.paging = {block_table ? static_cast<const int32_t*>(block_table->data_ptr()) : nullptr, k_cache.size(1), k_cache.size(0),
                block_table ? block_table->size(1) : 1};
  job.sequences = q.size(0);
  job.tokens = q.size(1);
  job.positions = cos.size(0);
  job.q_heads = static_cast<int>(q.size(2));
  job.kv_heads = static_cast<int>(k.size(2));
  job.width = static_cast<int>(q.size(3));
  job.rotated = static_cast<int>(cos.size(1));
  job.eps = static_cast<float>(eps);
  const Element element = element_of(q, "append_kv");
  const bool float_tables = cos.scalar_type() == ScalarType::Float;
  return {q, k, v, k_cache, v_cache, cache_seqlens, cos, sin, q_norm_weight, k_norm_weight, block_table, rotated_q, job, element, float_tables};
}

}  // namespace dreamkernels::append_kv
