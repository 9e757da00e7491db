// What CUDA operators need besides common/tensor.h: the current stream and launch checks.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "common/device.h"
#include "common/tensor.h"

// Only CUDA builds of torch export this symbol. Weak, so that the library also loads (for tests, and for `dreamkernels info`) on a
// CPU-only torch, where no operator in it can be reached.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace dreamkernels {

inline cudaStream_t current_stream(const Tensor& x) {
  if (aoti_torch_get_current_cuda_stream == nullptr) fail("this build of torch has no CUDA support");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* op) {
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) fail(op, ": kernel launch failed: ", cudaGetErrorString(status));
}

inline bool aligned_to(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Calls f with a null pointer to the CUDA element type.
template <class F>
void with_cuda_element(Element element, F&& f) {
  switch (element) {
    case Element::float32: return f(static_cast<float*>(nullptr));
    case Element::bfloat16: return f(static_cast<__nv_bfloat16*>(nullptr));
    case Element::float16: return f(static_cast<__half*>(nullptr));
  }
}

}  // namespace dreamkernels
