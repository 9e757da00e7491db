// CUDA C++ implementation of rms_norm's forward, chosen by implementation="cuda" (Triton is the default on CUDA).
//
// One block per row. Thread t holds packs t, t + kThreads, t + 2 kThreads ... of the row in registers (kPacks of them), so the row
// is read from memory once and written once:
//
//   row:  | pack 0 | pack 1 | ... | pack kThreads-1 | pack kThreads | ...        a pack is 16 bytes: 4 float32 or 8 16-bit elements
//           thread 0 thread 1                          thread 0
#include <tuple>

#include "common/cuda.h"

namespace dreamkernels::rms_norm {
namespace kernels {  // not anonymous: nvcc would put the number of its process into their names

template <int kThreads>
__device__ float block_sum(float value) {
  constexpr int kWarps = kThreads / 32;
  __shared__ float warp_sums[kWarps];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0.0f;
  for (int warp = 0; warp < kWarps; ++warp) total += warp_sums[warp];
  return total;
}

template <class E, int kVector, int kPacks, int kThreads, bool kResidual>
__global__ void __launch_bounds__(kThreads)
rms_norm_forward(const E* __restrict__ x, const E* __restrict__ residual, const E* __restrict__ weight, E* __restrict__ y,
                 E* __restrict__ new_residual, int width, float eps) {
  using P = Pack<E, kVector>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * width;
  const int packs = width / kVector;
  P held[kPacks];
  float squares = 0.0f;
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int pack = threadIdx.x + k * kThreads;
    if (pack >= packs) continue;
    held[k] = reinterpret_cast<const P*>(x + row)[pack];
    if constexpr (kResidual) {
      const P add = reinterpret_cast<const P*>(residual + row)[pack];
#pragma unroll
      for (int i = 0; i < kVector; ++i) held[k].value[i] = from_float<E>(to_float(held[k].value[i]) + to_float(add.value[i]));
      reinterpret_cast<P*>(new_residual + row)[pack] = held[k];
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float v = to_float(held[k].value[i]);
      squares = fmaf(v, v, squares);
    }
  }
  const float rstd = rsqrtf(block_sum<kThreads>(squares) / static_cast<float>(width) + eps);
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int pack = threadIdx.x + k * kThreads;
    if (pack >= packs) continue;
    const P scale = reinterpret_cast<const P*>(weight)[pack];
    P out;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float normalised = to_float(from_float<E>(to_float(held[k].value[i]) * rstd));
      out.value[i] = from_float<E>(normalised * to_float(scale.value[i]));
    }
    reinterpret_cast<P*>(y + row)[pack] = out;
  }
}

}  // namespace kernels

namespace {

struct Job {
  const void *x, *residual, *weight;
  void *y, *new_residual;
  int64_t rows, width;
  float eps;
  cudaStream_t stream;
};

template <class E, int kVector, int kPacks, int kThreads>
void launch(const Job& job) {
  const auto kernel = job.residual ? kernels::rms_norm_forward<E, kVector, kPacks, kThreads, true>
                                   : kernels::rms_norm_forward<E, kVector, kPacks, kThreads, false>;
  kernel<<<static_cast<unsigned>(job.rows), kThreads, 0, job.stream>>>(
      static_cast<const E*>(job.x), static_cast<const E*>(job.residual), static_cast<const E*>(job.weight), static_cast<E*>(job.y),
      static_cast<E*>(job.new_residual), static_cast<int>(job.width), job.eps);
  check_launch("rms_norm");
}

// The smallest block that holds a row in registers.
template <class E, int kVector>
void launch_for_width(const Job& job) {
  if (job.width <= 1 * 256 * kVector) return launch<E, kVector, 1, 256>(job);
  if (job.width <= 2 * 256 * kVector) return launch<E, kVector, 2, 256>(job);
  if (job.width <= 4 * 256 * kVector) return launch<E, kVector, 4, 256>(job);
  if (job.width <= 2 * 1024 * kVector) return launch<E, kVector, 2, 1024>(job);
  if (job.width <= 4 * 1024 * kVector) return launch<E, kVector, 4, 1024>(job);
  fail("rms_norm: width ", job.width, " is not supported by implementation=\"cuda\" (at most ", 4 * 1024 * kVector,
       " at this dtype and alignment); choose implementation=\"triton\"");
}

void run(const Tensor& x, Job job) {
  if (x.numel() == 0) return;
  job.rows = x.numel() / job.width;
  job.stream = current_stream(x);
  if (job.rows > 2147483647) fail("rms_norm: ", job.rows, " rows are more than a CUDA grid holds (2147483647)");
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  with_cuda_element(element_of(x, "rms_norm"), [&]<class E>(E*) {
    constexpr int vector = 16 / sizeof(E);
    bool vectorised = job.width % vector == 0;
    for (const void* p : {job.x, job.residual, job.weight, static_cast<const void*>(job.y), static_cast<const void*>(job.new_residual)}) {
      vectorised = vectorised && aligned_to(p, 16);
    }
    vectorised ? launch_for_width<E, vector>(job) : launch_for_width<E, 1>(job);
  });
}

Tensor rms_norm(Tensor x, Tensor weight, double eps) {
  x = row_major(x);
  weight = row_major(weight);
  Tensor y = new_like(x);
  run(x, {x.data_ptr(), nullptr, weight.data_ptr(), y.data_ptr(), nullptr, 0, weight.numel(), static_cast<float>(eps), nullptr});
  return y;
}

std::tuple<Tensor, Tensor> add_rms_norm(Tensor x, Tensor residual, Tensor weight, double eps) {
  x = row_major(x);
  residual = row_major(residual);
  weight = row_major(weight);
  Tensor y = new_like(x);
  Tensor new_residual = new_like(x);
  run(x, {x.data_ptr(), residual.data_ptr(), weight.data_ptr(), y.data_ptr(), new_residual.data_ptr(), 0, weight.numel(),
          static_cast<float>(eps), nullptr});
  return {y, new_residual};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dreamkernels, CUDA, m) {
  m.impl("rms_norm.cuda", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm.cuda", TORCH_BOX(&add_rms_norm));
}

}  // namespace dreamkernels::rms_norm
