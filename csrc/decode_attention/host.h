// From tensors to a Job: the checks that keep the kernels inside of memory. The public function checks first, with better texts.
#pragma once
#include <optional>

#include "common/tensor.h"
#include "decode_attention/job.h"

namespace dreamkernels::decode_attention {

struct Call {
  Tensor q, k_cache, v_cache, cache_seqlens;
  std::optional<Tensor> block_table;
  Tensor out, lse;
  Job job;
  Element element;
};

inline void check(bool holds, const char* what) {
  if (!holds) fail("decode_attention: ", what);
}

inline CacheStrides cache_strides(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

inline Call prepare(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, std::optional<Tensor> block_table, bool causal,
                    double scale, int64_t window, double softcap) {
  check(q.dim() == 4 && k_cache.dim() == 4 && v_cache.dim() == 4, "q and the caches must have four dimensions");
  for (int64_t d = 0; d < 4; ++d) check(k_cache.size(d) == v_cache.size(d), "k_cache and v_cache differ in their sizes");
  check(q.size(3) == k_cache.size(3) && q.size(3) > 0, "q and the caches differ in the width of a head");
  check(q.size(2) > 0 && k_cache.size(2) > 0 && q.size(2) % k_cache.size(2) == 0, "the heads of q must be a multiple of those of the caches");
  check(q.size(1) <= 128, "q has more than 128 tokens per sequence");
  check(k_cache.scalar_type() == q.scalar_type() && v_cache.scalar_type() == q.scalar_type(), "q and the caches must have the same dtype");
  check(q.size(3) == 1 || (k_cache.stride(3) == 1 && v_cache.stride(3) == 1), "the channels of the caches must be adjacent");
  check(cache_seqlens.dim() == 1 && cache_seqlens.size(0) == q.size(0) && cache_seqlens.scalar_type() == ScalarType::Int,
        "cache_seqlens must be int32 [B]");
  if (block_table) {
    check(block_table->dim() == 2 && block_table->size(0) == q.size(0) && block_table->scalar_type() == ScalarType::Int,
          "block_table must be int32 [B, max_pages]");
    block_table = row_major(*block_table);
  } else {
    check(k_cache.size(0) == q.size(0), "the caches and q differ in B");
  }
  if (q.size(3) > 1 && q.stride(3) != 1) q = torch::stable::contiguous(q);
  cache_seqlens = row_major(cache_seqlens);
  const auto sizes = q.sizes();
  Tensor out = new_row_major(q, std::vector<int64_t>(sizes.begin(), sizes.end()), q.scalar_type());
  Tensor lse = new_row_major(q, {q.size(0), q.size(2), q.size(1)}, ScalarType::Float);

  Job job{};
  job.q = q.data_ptr();
  job.k_cache = k_cache.data_ptr();
  job.v_cache = v_cache.data_ptr();
  job.cache_seqlens = static_cast<const int32_t*>(cache_seqlens.data_ptr());
  job.out = out.data_ptr();
  job.lse = static_cast<float*>(lse.data_ptr());
  job.q_sequence = q.stride(0);
  job.q_token = q.stride(1);
  job.q_head = q.stride(2);
  job.k_strides = cache_strides(k_cache);
  job.v_strides = cache_strides(v_cache);
  job.paging = {block_table ? static_cast<const int32_t*>(block_table->data_ptr()) : nullptr, k_cache.size(1), k_cache.size(0),
                block_table ? block_table->size(1) : 1};
  job.sequences = q.size(0);
  job.tokens = static_cast<int>(q.size(1));
  job.q_heads = static_cast<int>(q.size(2));
  job.kv_heads = static_cast<int>(k_cache.size(2));
  job.width = static_cast<int>(q.size(3));
  job.window = static_cast<int>(std::min<int64_t>(window, 2147483647));
  job.splits = 1;
  job.scale = static_cast<float>(scale);
  job.softcap = static_cast<float>(softcap);
  job.causal = causal;
  const Element element = element_of(q, "decode_attention");
  return {q, k_cache, v_cache, cache_seqlens, block_table, out, lse, job, element};
}

// The results of the parts, where there are several; the caller keeps them until the kernels are done.
struct Parts {
  std::optional<Tensor> out, lse;

  Parts(Call& call, int splits) {
    Job& job = call.job;
    job.splits = splits;
    if (splits == 1) return;
    const int64_t heads = job.sequences * job.kv_heads;
    out = new_row_major(call.q, {splits, heads, job.rows(), job.width}, ScalarType::Float);
    lse = new_row_major(call.q, {splits, heads, job.rows()}, ScalarType::Float);
    job.partial_out = static_cast<float*>(out->data_ptr());
    job.partial_lse = static_cast<float*>(lse->data_ptr());
  }
};

}  // namespace dreamkernels::decode_attention
