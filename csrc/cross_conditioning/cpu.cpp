// CPU implementation of dreamkernels::cross_conditioning and its backward (schemas: dreamkernels/ops/cross_conditioning).
#include <tuple>

#include "common/tensor.h"
#include "cross_conditioning/kernels.h"

namespace dreamkernels::cross_conditioning {
namespace {

constexpr int64_t kMaxKeys = 128, kMaxWidth = 160;

// Positions of a picture are cut into chunks of about this many: enough work for a thread, few enough partial sums.
constexpr int64_t kChunk = 1024, kBlock = 48;

Tensor dense_rows(const Tensor& x) { return x.stride(3) == 1 || x.size(3) == 1 ? x : torch::stable::contiguous(x); }

Strided strided(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

Shape checked_shape(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  if (q.dim() != 4 || k.dim() != 4 || v.dim() != 4) fail("cross_conditioning: q, k and v must have 4 dimensions");
  const int64_t pictures = q.size(0), conditions = k.size(0);
  bool fits = k.size(2) == q.size(2) && k.size(3) == q.size(3);
  for (int64_t d = 0; d < 4; ++d) fits = fits && k.size(d) == v.size(d);
  if (!fits || (conditions == 0 ? pictures != 0 : pictures % conditions != 0)) {
    fail("cross_conditioning: q ", shape_of(q), ", k ", shape_of(k), " and v ", shape_of(v), " do not fit");
  }
  if (k.scalar_type() != q.scalar_type() || v.scalar_type() != q.scalar_type()) {
    fail("cross_conditioning: q, k and v must have the same dtype");
  }
  if (k.size(1) < 1 || k.size(1) > kMaxKeys || q.size(3) < 1 || q.size(3) > kMaxWidth) {
    fail("cross_conditioning: ", k.size(1), " keys of width ", q.size(3), " are not supported");
  }
  const int64_t positions = q.size(1);
  const int64_t chunks = std::max<int64_t>(1, (positions + kChunk - 1) / kChunk);
  const int64_t per_chunk = ((positions + chunks - 1) / chunks + kBlock - 1) / kBlock * kBlock;
  return {conditions, conditions ? pictures / conditions : 0, positions, q.size(2), k.size(1), q.size(3),
          chunks,     per_chunk,                              static_cast<float>(scale)};
}

Tensor forward(Tensor q, Tensor k, Tensor v, double scale) {
  const Shape shape = checked_shape(q, k, v, scale);
  q = dense_rows(q);
  k = dense_rows(k);
  v = dense_rows(v);
  Tensor out = new_like(q);
  if (q.numel() == 0) return out;
  const Forward job{strided(q), strided(k), strided(v), out.data_ptr(), shape};
  const Element element = element_of(q, "cross_conditioning");
  const auto kernel = DK_FOR_ACTIVE_ISA(forward_tasks);
  torch::stable::parallel_for(0, shape.tasks(), 1, [&](int64_t begin, int64_t end) { kernel(element, job, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, double scale, bool q_grad,
                                            bool kv_grad) {
  const Shape shape = checked_shape(q, k, v, scale);
  for (int64_t d = 0; d < 4; ++d) {
    if (grad_out.dim() != 4 || grad_out.size(d) != q.size(d) || grad_out.scalar_type() != q.scalar_type()) {
      fail("cross_conditioning: grad_out ", shape_of(grad_out), " must have the shape ", shape_of(q), " and dtype of q");
    }
  }
  grad_out = dense_rows(grad_out);
  q = dense_rows(q);
  k = dense_rows(k);
  v = dense_rows(v);
  Tensor grad_q = q_grad ? new_like(q) : new_row_major(q, {0}, q.scalar_type());
  Tensor grad_k = kv_grad ? new_like(k) : new_row_major(k, {0}, k.scalar_type());
  Tensor grad_v = kv_grad ? new_like(v) : new_row_major(v, {0}, v.scalar_type());
  const int64_t tasks = q.numel() ? shape.tasks() : 0;
  Tensor kv_sums = new_row_major(q, {kv_grad ? tasks : 0, 2, shape.keys, shape.width}, ScalarType::Float);
  float* sums = kv_grad ? static_cast<float*>(kv_sums.data_ptr()) : nullptr;
  const Element element = element_of(q, "cross_conditioning");
  if (tasks > 0 && (q_grad || kv_grad)) {
    const Backward job{strided(grad_out), strided(q), strided(k), strided(v), q_grad ? grad_q.data_ptr() : nullptr, sums, shape};
    const auto kernel = DK_FOR_ACTIVE_ISA(backward_tasks);
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { kernel(element, job, begin, end); });
  }
  if (kv_grad && k.numel()) {
    Reduce job{sums, grad_k.data_ptr(), grad_v.data_ptr(), shape};
    if (tasks == 0) job.shape.pictures_per_condition = 0;  // no positions: the gradients are zero
    const auto reduce = DK_FOR_ACTIVE_ISA(reduce_heads);
    torch::stable::parallel_for(0, shape.conditions * shape.heads, 4,
                                [&](int64_t begin, int64_t end) { reduce(element, job, begin, end); });
  }
  return {grad_q, grad_k, grad_v};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dreamkernels, CPU, m) {
  m.impl("cross_conditioning", TORCH_BOX(&forward));
  m.impl("cross_conditioning.inference", TORCH_BOX(&forward));
  m.impl("cross_conditioning_backward", TORCH_BOX(&backward));
}

}  // namespace dreamkernels::cross_conditioning
