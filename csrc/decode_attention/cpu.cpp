// CPU implementation of dreamkernels::decode_attention (schema: dreamkernels/ops/decode_attention).
#include <tuple>

#include "decode_attention/host.h"
#include "decode_attention/kernels.h"

namespace dreamkernels::decode_attention {
namespace {

// Keys are divided as if for this many cores, whatever the number of threads, so that results do not depend on that.
constexpr int64_t kCores = 8;

void check_lengths(const Job& job) {
  for (int64_t b = 0; b < job.sequences; ++b) {
    const int64_t length = job.cache_seqlens[b];
    if (length < 0 || length > job.paging.capacity()) {
      fail("decode_attention: cache_seqlens[", b, "] = ", length, ", but there are ", job.paging.capacity(), " positions in the cache");
    }
    for (int64_t position = 0; job.paging.block_table && position < length; position += job.paging.page_size) {
      const int64_t page = job.paging.page_of(b, position);
      if (!job.paging.has_page(page)) {
        fail("decode_attention: block_table[", b, ", ", position / job.paging.page_size, "] = ", page, " is not one of ", job.paging.pages,
             " pages");
      }
    }
  }
}

std::tuple<Tensor, Tensor> decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens,
                                            std::optional<Tensor> block_table, bool causal, double scale, int64_t window,
                                            double softcap, int64_t splits) {
  Call call = prepare(q, k_cache, v_cache, cache_seqlens, block_table, causal, scale, window, softcap);
  const int64_t heads = call.job.sequences * call.job.kv_heads;
  check_lengths(call.job);
  if (call.q.numel() == 0) return {call.out, call.lse};
  if (splits == 0) splits = choose_splits(heads, call.job.paging.capacity(), kTileKeys, kCores);
  const Parts parts(call, static_cast<int>(splits));
  const Job& job = call.job;
  const int64_t row_work = (job.paging.capacity() / splits + 1) * job.width;
  const auto attend = DK_FOR_ACTIVE_ISA(attend_parts);
  torch::stable::parallel_for(0, heads * splits, row_grain(row_work * job.rows()),
                              [&](int64_t begin, int64_t end) { attend(call.element, job, begin, end); });
  if (splits > 1) {
    const auto combine = DK_FOR_ACTIVE_ISA(combine_parts);
    torch::stable::parallel_for(0, heads * job.rows(), row_grain(splits * job.width),
                                [&](int64_t begin, int64_t end) { combine(call.element, job, begin, end); });
  }
  return {call.out, call.lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dreamkernels, CPU, m) { m.impl("decode_attention", TORCH_BOX(&decode_attention)); }

}  // namespace dreamkernels::decode_attention
