// CUDA C++ implementation of the forward of cross_conditioning, chosen by implementation="cuda" (Triton is the default on CUDA).
#include "common/cuda.h"
#include "cross_conditioning/kernel.cuh"

namespace dreamkernels::cross_conditioning {
namespace {

using kernels::Job;

// Rows that 16-byte copies can read; else a row-major copy, which has them because the width is a multiple of eight.
Tensor with_packs(const Tensor& x) {
  bool fits = x.stride(3) == 1 && aligned_to(x.data_ptr(), 16);
  for (int64_t d = 0; d < 3; ++d) fits = fits && x.stride(d) % 8 == 0;
  if (fits) return x;
  Tensor copy = torch::stable::contiguous(x);
  return copy.data_ptr() != x.data_ptr() ? copy : torch::stable::clone(x);
}

kernels::Source source(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

template <class E, int kKeys>
void launch(const Job& job, cudaStream_t stream) {
  constexpr int bytes = kernels::shared_elements<kKeys>() * sizeof(E);
  const auto kernel = kernels::cross_conditioning_forward<E, kKeys>;
  if constexpr (bytes > 48 * 1024) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  kernel<<<static_cast<unsigned>(job.blocks()), kernels::kThreads, bytes, stream>>>(job);
  check_launch("cross_conditioning");
}

template <class E>
void launch(const Job& job, cudaStream_t stream) {
  job.keys <= 64 ? launch<E, 64>(job, stream) : launch<E, 128>(job, stream);
}

Tensor forward(Tensor q, Tensor k, Tensor v, double scale) {
  bool fits = q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && k.size(2) == q.size(2) && k.size(3) == q.size(3);
  for (int64_t d = 0; fits && d < 4; ++d) fits = k.size(d) == v.size(d);
  if (!fits || (k.size(0) == 0 ? q.size(0) != 0 : q.size(0) % k.size(0) != 0)) {
    fail("cross_conditioning: q ", shape_of(q), ", k ", shape_of(k), " and v ", shape_of(v), " do not fit");
  }
  if (k.scalar_type() != q.scalar_type() || v.scalar_type() != q.scalar_type()) {
    fail("cross_conditioning: q, k and v must have the same dtype");
  }
  const Element element = element_of(q, "cross_conditioning");
  if (element == Element::float32 || k.size(1) < 1 || k.size(1) > 128 || q.size(3) > kernels::kWidth || q.size(3) % 8 != 0) {
    fail("cross_conditioning in CUDA C++ takes bfloat16 or float16, 1 to 128 keys and a head width of at most 64 that is a multiple of 8, "
         "not ", k.size(1), " keys of width ", q.size(3), "; choose implementation=\"triton\"");
  }
  Tensor out = new_like(q);
  if (q.numel() == 0) return out;
  torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  q = with_packs(q);
  k = with_packs(k);
  v = with_packs(v);
  // Four tiles for each block amortise its keys and values, unless that leaves multiprocessors without blocks.
  const int64_t tiles = (q.size(1) + kernels::kTile - 1) / kernels::kTile, pairs = q.size(0) * q.size(2);
  constexpr int64_t enough_blocks = 432;
  const int64_t per_block = std::min<int64_t>(4, std::max<int64_t>(1, tiles * pairs / enough_blocks));
  const Job job{source(q),  source(k),  source(v),           out.data_ptr(), q.size(0), q.size(0) / k.size(0),
                q.size(1), q.size(2), k.size(1), q.size(3), per_block,      static_cast<float>(scale)};
  if (job.blocks() > 2147483647) fail("cross_conditioning: more blocks than a CUDA grid holds");
  const auto stream = current_stream(q);
  element == Element::bfloat16 ? launch<__nv_bfloat16>(job, stream) : launch<__half>(job, stream);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dreamkernels, CUDA, m) { m.impl("cross_conditioning.cuda", TORCH_BOX(&forward)); }

}  // namespace dreamkernels::cross_conditioning
