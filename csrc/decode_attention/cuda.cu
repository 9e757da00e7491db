// CUDA C++ implementation of decode_attention, chosen by implementation="cuda" (Triton is the default on CUDA).
#include <tuple>

#include "common/cuda.h"
#include "decode_attention/host.h"
#include "decode_attention/kernel.cuh"

namespace dreamkernels::decode_attention {
namespace {

int64_t multiprocessors_of(int device) {
  int count = 0;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) fail("decode_attention: no device");
  return count;
}

template <class E, int kWidth, int kRowWarps>
void launch_tiles(const Job& job, cudaStream_t stream) {
  const auto kernel = kernels::decode_attention<E, kWidth, kRowWarps>;
  constexpr int bytes = kernels::Layout<kWidth, kRowWarps>::kBytes;
  if (bytes > 48 * 1024) {
    const auto status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status != cudaSuccess) fail("decode_attention: ", bytes, " bytes of shared memory: ", cudaGetErrorString(status));
  }
  kernel<<<kernels::grid_of(job), kernels::kThreads, bytes, stream>>>(job);
  check_launch("decode_attention");
}

template <class E>
void launch(const Job& job, cudaStream_t stream) {
  kernels::with_width(job.width, [&]<int kWidth>() {
    kernels::rows_per_block(job) == 16 ? launch_tiles<E, kWidth, 1>(job, stream) : launch_tiles<E, kWidth, 4>(job, stream);
  });
  if (job.splits == 1) return;
  kernels::combine_splits<E><<<kernels::combine_grid_of(job), kernels::kThreads, 0, stream>>>(job);
  check_launch("decode_attention");
}

// cp.async moves 16 bytes of adjacent channels.
void check_alignment(const Call& call) {
  const Job& job = call.job;
  bool aligned = job.width % 8 == 0 && job.width <= 128;
  for (int64_t stride : {job.q_sequence, job.q_token, job.q_head, job.k_strides.page, job.k_strides.position, job.k_strides.head,
                         job.v_strides.page, job.v_strides.position, job.v_strides.head}) {
    aligned = aligned && stride % 8 == 0;
  }
  for (const void* p : {job.q, job.k_cache, job.v_cache}) aligned = aligned && aligned_to(p, 16);
  if (call.element == Element::float32 || !aligned) {
    fail("decode_attention: implementation=\"cuda\" takes bfloat16 and float16 with heads of at most 128 channels, a multiple of 8, and "
         "16-byte aligned rows; q ", shape_of(call.q), " or its caches are not like that; choose implementation=\"triton\"");
  }
}

std::tuple<Tensor, Tensor> decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens,
                                            std::optional<Tensor> block_table, bool causal, double scale, int64_t window,
                                            double softcap, int64_t splits) {
  Call call = prepare(q, k_cache, v_cache, cache_seqlens, block_table, causal, scale, window, softcap);
  if (call.q.numel() == 0) return {call.out, call.lse};
  check_alignment(call);
  check(call.job.sequences * call.job.kv_heads <= 65535, "more sequences and heads than a CUDA grid holds");
  torch::stable::accelerator::DeviceGuard guard(call.q.get_device_index());
  if (splits == 0) {
    const dim3 grid = kernels::grid_of(call.job);
    splits = choose_splits(int64_t{grid.y} * grid.z, call.job.paging.capacity(), kernels::kKeys,
                           multiprocessors_of(call.q.get_device_index()));
  }
  const Parts parts(call, static_cast<int>(splits));
  const auto stream = current_stream(call.q);
  call.element == Element::float16 ? launch<__half>(call.job, stream) : launch<__nv_bfloat16>(call.job, stream);
  return {call.out, call.lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dreamkernels, CUDA, m) { m.impl("decode_attention.cuda", TORCH_BOX(&decode_attention)); }

}  // namespace dreamkernels::decode_attention
