// CPU implementation of dreamkernels::append_kv (schema: dreamkernels/ops/append_kv).
#include "append_kv/host.h"
#include "append_kv/kernels.h"

namespace dreamkernels::append_kv {
namespace {

// Before anything is written: a call that fails leaves the caches as they were.
void check_positions(const Job& job) {
  const int64_t limit = std::min(job.paging.capacity(), job.positions);
  for (int64_t b = 0; b < job.sequences && job.tokens > 0; ++b) {
    const int64_t first = job.cache_seqlens[b], last = first + job.tokens - 1;
    if (first < 0 || last >= limit) {
      fail("append_kv: sequence ", b, " writes positions ", first, " to ", last, ", but there are ", job.paging.capacity(),
           " in the cache and ", job.positions, " in cos and sin");
    }
    for (int64_t position = first; position <= last; ++position) {
      const int64_t page = job.paging.page_of(b, position);
      if (!job.paging.has_page(page)) {
        fail("append_kv: block_table[", b, ", ", position / job.paging.page_size, "] = ", page, " is not one of ", job.paging.pages, " pages");
      }
    }
  }
}

Tensor append_kv(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor cos, Tensor sin,
                 std::optional<Tensor> q_norm_weight, std::optional<Tensor> k_norm_weight, double eps,
                 std::optional<Tensor> block_table) {
  const Call call = prepare(q, k, v, k_cache, v_cache, cache_seqlens, cos, sin, q_norm_weight, k_norm_weight, eps, block_table);
  const Job& job = call.job;
  check_positions(job);
  const auto kernel = DK_FOR_ACTIVE_ISA(append_rows);
  torch::stable::parallel_for(0, job.sequences * job.tokens * job.heads(), row_grain(job.width), [&](int64_t begin, int64_t end) {
    kernel(call.element, call.float_tables, job, begin, end);
  });
  return call.rotated_q;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dreamkernels, CPU, m) { m.impl("append_kv", TORCH_BOX(&append_kv)); }

}  // namespace dreamkernels::append_kv
