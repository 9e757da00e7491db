// CUDA C++ implementation of append_kv, chosen by implementation="cuda" (Triton is the default on CUDA).
#include "append_kv/host.h"
#include "append_kv/kernel.cuh"
#include "common/cuda.h"

namespace dreamkernels::append_kv {
namespace {

template <class E, class Table>
void launch(const Job& job, cudaStream_t stream) {
  constexpr int vector = 16 / sizeof(E);
  const auto kernel = kernels::can_use_packs<E, Table, vector>(job) ? kernels::append_kv<E, Table, vector> : kernels::append_kv<E, Table, 1>;
  kernel<<<kernels::grid_of(job), kernels::kThreads, 0, stream>>>(job);
  check_launch("append_kv");
}

Tensor append_kv(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor cos, Tensor sin,
                 std::optional<Tensor> q_norm_weight, std::optional<Tensor> k_norm_weight, double eps,
                 std::optional<Tensor> block_table) {
  const Call call = prepare(q, k, v, k_cache, v_cache, cache_seqlens, cos, sin, q_norm_weight, k_norm_weight, eps, block_table);
  const Job& job = call.job;
  check(job.sequences * job.tokens <= 2147483647 && job.heads() <= 65535 * kernels::kRows, "more tokens or heads than a CUDA grid holds");
  if (job.sequences * job.tokens * job.heads() * job.width == 0) return call.rotated_q;
  check(job.positions > 0 || job.rotated == 0, "cos and sin have no rows");
  torch::stable::accelerator::DeviceGuard guard(call.q.get_device_index());
  const auto stream = current_stream(call.q);
  with_cuda_element(call.element, [&]<class E>(E*) { call.float_tables ? launch<E, float>(job, stream) : launch<E, E>(job, stream); });
  return call.rotated_q;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dreamkernels, CUDA, m) { m.impl("append_kv.cuda", TORCH_BOX(&append_kv)); }

}  // namespace dreamkernels::append_kv
