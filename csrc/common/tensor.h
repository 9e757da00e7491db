// What operators need of a torch tensor, on LibTorch's stable ABI.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/elements.h"

namespace dreamkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Raises a Python RuntimeError. The public functions check what they can before this is reached.
template <class... Args>
[[noreturn]] void fail(const Args&... args) {
  std::ostringstream message;
  (message << ... << args);
  throw std::runtime_error(message.str());
}

inline Element element_of(const Tensor& x, const char* op) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Element::float32;
    case ScalarType::BFloat16: return Element::bfloat16;
    case ScalarType::Half: return Element::float16;
    default: fail(op, ": dtype is not supported (float32, bfloat16 or float16)");
  }
}

inline std::string shape_of(const Tensor& x) {
  std::ostringstream text;
  text << "[";
  for (int64_t d = 0; d < x.dim(); ++d) text << (d ? ", " : "") << x.size(d);
  text << "]";
  return text.str();
}

// The tensor itself when it is row-major, else a row-major copy.
inline Tensor row_major(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// An uninitialised tensor on the device of `like`. Calls the allocator directly: going through the dispatcher by operator name,
// as torch::stable::new_empty does, costs more than the kernels of small shapes.
inline Tensor new_strided(const Tensor& like, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                          ScalarType dtype) {
  int32_t device_type = 0;
  int32_t device_index = 0;
  int32_t dtype_code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                         dtype_code, device_type, device_index, &made));
  return Tensor(made);
}

inline Tensor new_row_major(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (int64_t d = static_cast<int64_t>(sizes.size()) - 2; d >= 0; --d) {
    strides[d] = strides[d + 1] * std::max<int64_t>(sizes[d + 1], 1);
  }
  return new_strided(like, sizes, strides, dtype);
}

inline Tensor new_like(const Tensor& x) {
  const auto sizes = x.sizes();
  return new_row_major(x, std::vector<int64_t>(sizes.begin(), sizes.end()), x.scalar_type());
}

// Rows per thread such that a thread has enough to do to be worth waking.
inline int64_t row_grain(int64_t width) {
  constexpr int64_t elements_per_thread = 65536;  // 10 us of work; waking a thread that sleeps costs 20
  return std::max<int64_t>(1, elements_per_thread / std::max<int64_t>(1, width));
}

}  // namespace dreamkernels
