// CPU implementation of dreamkernels::swiglu, swiglu_packed and their backwards (schemas: dreamkernels/ops/swiglu).
#include <optional>
#include <tuple>

#include "common/tensor.h"
#include "swiglu/kernels.h"

namespace dreamkernels::swiglu {
namespace {

// The distance between rows when columns are adjacent and the leading dimensions form rows at one distance; else nothing.
std::optional<int64_t> row_stride(const Tensor& x) {
  int64_t d = x.dim() - 1;
  const int64_t width = x.size(d);
  if (width > 1 && x.stride(d) != 1) return std::nullopt;
  std::optional<int64_t> stride;
  int64_t expected = 0;
  for (--d; d >= 0; --d) {
    if (x.size(d) == 1) continue;
    if (!stride) {
      stride = x.stride(d);
    } else if (x.stride(d) != expected) {
      return std::nullopt;
    }
    expected = x.stride(d) * x.size(d);
  }
  return stride.value_or(width);
}

// Rows of a tensor, which becomes a row-major copy where it has none.
Rows rows_of(Tensor& x) {
  std::optional<int64_t> stride = row_stride(x);
  if (!stride) {
    x = torch::stable::contiguous(x);
    stride = x.size(x.dim() - 1);
  }
  return {x.data_ptr(), *stride};
}

// The second half of packed rows.
Rows second_half(const Rows& rows, const Tensor& packed) {
  const int64_t half_bytes = packed.size(packed.dim() - 1) / 2 * static_cast<int64_t>(packed.element_size());
  return {static_cast<char*>(rows.data) + half_bytes, rows.stride};
}

std::vector<int64_t> unpacked_shape(const Tensor& gate_up) {
  if (gate_up.dim() < 1 || gate_up.size(gate_up.dim() - 1) % 2 != 0) {
    fail("swiglu_packed: gate_up ", shape_of(gate_up), " must have an even last dimension");
  }
  const auto sizes = gate_up.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() /= 2;
  return shape;
}

void check_same(const Tensor& x, const std::vector<int64_t>& shape, ScalarType dtype, const char* what) {
  const auto sizes = x.sizes();
  if (!std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()) || x.scalar_type() != dtype) {
    fail("swiglu: ", what, " ", shape_of(x), " does not fit: all must have one shape and dtype");
  }
}

std::vector<int64_t> checked_shape(const Tensor& gate, const Tensor& up) {
  if (gate.dim() < 1) fail("swiglu: gate needs at least one dimension");
  const auto sizes = gate.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  check_same(up, shape, gate.scalar_type(), "up");
  return shape;
}

// Rows that follow each other without gaps are one long row.
template <class Job>
void as_one_row_if_adjacent(Job& job, std::initializer_list<const Rows*> all) {
  for (const Rows* rows : all) {
    if (rows->stride != job.width) return;
  }
  job.width = job.elements;
}

// 65536 elements are 20 us of work, which is what waking a thread that sleeps costs.
constexpr int64_t blocks_per_thread = 65536 / block_elements;

template <class Job, class Kernel>
void run(const Job& job, const Tensor& like, Kernel kernel) {
  if (job.elements == 0) return;
  const Element element = element_of(like, "swiglu");
  const int64_t blocks = (job.elements + block_elements - 1) / block_elements;
  torch::stable::parallel_for(0, blocks, blocks_per_thread, [&](int64_t begin, int64_t end) { kernel(element, job, begin, end); });
}

void run_forward(Forward job, const Tensor& like) {
  as_one_row_if_adjacent(job, {&job.gate, &job.up, &job.y});
  run(job, like, DK_FOR_ACTIVE_ISA(forward));
}

void run_backward(Backward job, const Tensor& like) {
  as_one_row_if_adjacent(job, {&job.grad_y, &job.gate, &job.up, &job.grad_gate, &job.grad_up});
  run(job, like, DK_FOR_ACTIVE_ISA(backward));
}

Tensor swiglu(Tensor gate, Tensor up) {
  const auto shape = checked_shape(gate, up);
  Tensor y = new_row_major(gate, shape, gate.scalar_type());
  run_forward({rows_of(gate), rows_of(up), {y.data_ptr(), shape.back()}, shape.back(), gate.numel()}, gate);
  return y;
}

std::tuple<Tensor, Tensor> swiglu_backward(Tensor grad_y, Tensor gate, Tensor up) {
  const auto shape = checked_shape(gate, up);
  check_same(grad_y, shape, gate.scalar_type(), "grad_y");
  Tensor grad_gate = new_row_major(gate, shape, gate.scalar_type());
  Tensor grad_up = new_row_major(gate, shape, gate.scalar_type());
  run_backward({rows_of(grad_y), rows_of(gate), rows_of(up), {grad_gate.data_ptr(), shape.back()},
                {grad_up.data_ptr(), shape.back()}, shape.back(), gate.numel()},
               gate);
  return {grad_gate, grad_up};
}

Tensor swiglu_packed(Tensor gate_up) {
  const auto shape = unpacked_shape(gate_up);
  Tensor y = new_row_major(gate_up, shape, gate_up.scalar_type());
  const Rows gate = rows_of(gate_up);
  run_forward({gate, second_half(gate, gate_up), {y.data_ptr(), shape.back()}, shape.back(), y.numel()}, gate_up);
  return y;
}

Tensor swiglu_packed_backward(Tensor grad_y, Tensor gate_up) {
  const auto shape = unpacked_shape(gate_up);
  check_same(grad_y, shape, gate_up.scalar_type(), "grad_y");
  Tensor grad = new_like(gate_up);
  const Rows gate = rows_of(gate_up), grad_gate{grad.data_ptr(), 2 * shape.back()};
  run_backward({rows_of(grad_y), gate, second_half(gate, gate_up), grad_gate, second_half(grad_gate, gate_up), shape.back(),
                grad_y.numel()},
               gate_up);
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dreamkernels, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu.inference", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
  m.impl("swiglu_packed", TORCH_BOX(&swiglu_packed));
  m.impl("swiglu_packed.inference", TORCH_BOX(&swiglu_packed));
  m.impl("swiglu_packed_backward", TORCH_BOX(&swiglu_packed_backward));
}

}  // namespace dreamkernels::swiglu
