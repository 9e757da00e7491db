// CPU implementation of dreamkernels::rotary, rotary_ and rotary_backward (schemas: dreamkernels/ops/rotary).
#include <numeric>
#include <optional>
#include <tuple>

#include "common/tensor.h"
#include "rotary/kernels.h"

namespace dreamkernels::rotary {
namespace {

// Where batch, token and head are among the dimensions; batch -1: packed, one sequence.
struct Layout {
  int64_t batch, token, head;
  Layout(const Tensor& x, bool heads_first)
      : batch(x.dim() == 3 ? -1 : 0), token(x.dim() == 3 ? 0 : heads_first ? 2 : 1), head(x.dim() == 4 && heads_first ? 1 : x.dim() - 2) {}
  int64_t sequences(const Tensor& x) const { return batch < 0 ? 1 : x.size(batch); }
  Strides strides(const Tensor& x) const { return {batch < 0 ? 0 : x.stride(batch), x.stride(token), x.stride(head)}; }
};

struct Tables {
  Tensor cos, sin;
  std::optional<Tensor> positions;
};

Tensor with_adjacent_channels(const Tensor& x) { return x.stride(x.dim() - 1) == 1 ? x : torch::stable::contiguous(x); }

// dreamkernels/ops/rotary/layout.py does the same for fake tensors.
Tensor empty_in_memory_order_of(const Tensor& x) {
  const auto sizes = x.sizes();
  const std::vector<int64_t> shape(sizes.begin(), sizes.end());
  const int64_t last = x.dim() - 1;
  std::vector<int64_t> order(last), strides(x.dim(), 1);
  std::iota(order.begin(), order.end(), 0);
  if (x.stride(last) == 1) {
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return x.stride(a) > x.stride(b); });
  }
  int64_t step = shape[last];
  for (auto d = order.rbegin(); d != order.rend(); ++d) {
    strides[*d] = step;
    step *= std::max<int64_t>(shape[*d], 1);
  }
  return new_strided(x, shape, strides, x.scalar_type());
}

void check_states(const Tensor& q, const Tensor& k, const Layout& layout) {
  if (q.dim() != 3 && q.dim() != 4) fail("rotary: q ", shape_of(q), " must have 3 or 4 dimensions");
  bool same = q.dim() == k.dim() && q.scalar_type() == k.scalar_type();
  for (int64_t d = 0; same && d < q.dim(); ++d) same = d == layout.head || q.size(d) == k.size(d);
  if (!same) fail("rotary: q ", shape_of(q), " and k ", shape_of(k), " must have one dtype and differ in heads only");
}

void check_tables(const Tensor& q, const Tables& tables, const Layout& layout) {
  const Tensor& cos = tables.cos;
  const int64_t tokens = q.size(layout.token), sequences = layout.sequences(q);
  const auto one_per_token = [&](const Tensor& x, int64_t leading) {
    return (leading == 1 && x.size(0) == tokens) ||
           (leading == 2 && x.size(1) == tokens && (x.size(0) == sequences || x.size(0) == 1));
  };
  bool same = cos.dim() >= 2 && cos.dim() == tables.sin.dim() && cos.scalar_type() == tables.sin.scalar_type();
  for (int64_t d = 0; same && d < cos.dim(); ++d) same = cos.size(d) == tables.sin.size(d);
  const int64_t rotated = same ? cos.size(cos.dim() - 1) : 0;
  if (!same || rotated < 2 || rotated % 2 != 0 || rotated > q.size(q.dim() - 1)) {
    fail("rotary: cos ", shape_of(cos), " and sin ", shape_of(tables.sin), " must be equal in shape and dtype, with an even number ",
         "of columns from 2 to the width of a head of q ", shape_of(q));
  }
  if (cos.scalar_type() != ScalarType::Float && cos.scalar_type() != q.scalar_type()) {
    fail("rotary: cos and sin must be float32 or have the dtype of q");
  }
  if (!tables.positions) {
    if (!one_per_token(cos, cos.dim() - 1)) fail("rotary: cos ", shape_of(cos), " needs one row for each token of q ", shape_of(q));
    return;
  }
  const Tensor& positions = *tables.positions;
  if (positions.scalar_type() != ScalarType::Long && positions.scalar_type() != ScalarType::Int) {
    fail("rotary: position_ids must be int32 or int64");
  }
  if (cos.dim() != 2 || !one_per_token(positions, positions.dim())) {
    fail("rotary: position_ids ", shape_of(positions), " need one entry for each token of q ", shape_of(q), " and a table [positions, R], not ",
         shape_of(cos));
  }
}

template <class Integer>
void check_positions(const Tensor& positions, int64_t rows) {
  const auto* values = static_cast<const Integer*>(positions.data_ptr());
  const bool batched = positions.dim() == 2;
  const int64_t sequences = batched ? positions.size(0) : 1, tokens = positions.size(positions.dim() - 1);
  const int64_t sequence_stride = batched ? positions.stride(0) : 0, token_stride = positions.stride(positions.dim() - 1);
  for (int64_t b = 0; b < sequences; ++b) {
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t position = values[b * sequence_stride + t * token_stride];
      if (position >= 0 && position < rows) continue;
      std::ostringstream index;
      if (batched) index << b << ", ";
      index << t;
      fail("rotary: position_ids[", index.str(), "] = ", position, " is out of range: cos and sin have the rows 0 to ", rows - 1,
           "; make longer tables");
    }
  }
}

void rotate(const Tensor (&x)[2], Tensor (&y)[2], Tables tables, const Layout& layout, bool transposed) {
  const Tensor& q = x[0];
  const int64_t tokens = q.size(layout.token), sequences = layout.sequences(q);
  if (tokens == 0 || sequences == 0) return;
  tables.cos = with_adjacent_channels(tables.cos);
  tables.sin = with_adjacent_channels(tables.sin);
  const int64_t last = tables.cos.dim() - 1;
  const auto batch_stride = [&](const Tensor& table) { return last == 2 && table.size(0) > 1 ? table.stride(0) : 0; };
  Rotate job{};
  for (int part = 0; part < 2; ++part) {
    job.parts[part] = {x[part].data_ptr(), y[part].data_ptr(), layout.strides(x[part]), layout.strides(y[part]),
                       x[part].size(layout.head)};
  }
  job.cos = tables.cos.data_ptr();
  job.sin = tables.sin.data_ptr();
  job.float32_tables = tables.cos.scalar_type() == ScalarType::Float;
  job.cos_batch = batch_stride(tables.cos);
  job.sin_batch = batch_stride(tables.sin);
  job.cos_row = tables.cos.stride(last - 1);
  job.sin_row = tables.sin.stride(last - 1);
  if (tables.positions) {
    const Tensor& positions = *tables.positions;
    job.wide_positions = positions.scalar_type() == ScalarType::Long;
    job.wide_positions ? check_positions<int64_t>(positions, tables.cos.size(0)) : check_positions<int32_t>(positions, tables.cos.size(0));
    job.positions = positions.data_ptr();
    job.position_batch = positions.dim() == 2 && positions.size(0) > 1 ? positions.stride(0) : 0;
    job.position_token = positions.stride(positions.dim() - 1);
  }
  job.tokens = tokens;
  job.width = q.size(q.dim() - 1);
  job.rotated = tables.cos.size(last);
  job.transposed = transposed;
  const Element element = element_of(q, "rotary");
  const auto kernel = DK_FOR_ACTIVE_ISA(rotate_tiles);
  const int64_t tiles = sequences * ((tokens + tokens_per_tile - 1) / tokens_per_tile);
  const int64_t elements_per_tile = std::min(tokens, tokens_per_tile) * job.width * (job.parts[0].count + job.parts[1].count);
  torch::stable::parallel_for(0, tiles, row_grain(elements_per_tile),
                              [&](int64_t begin, int64_t end) { kernel(element, job, begin, end); });
}

std::tuple<Tensor, Tensor> rotated(const Tensor& q, const Tensor& k, Tables tables, bool heads_first, bool transposed) {
  const Layout layout(q, heads_first);
  check_states(q, k, layout);
  check_tables(q, tables, layout);
  Tensor y[2] = {empty_in_memory_order_of(q), empty_in_memory_order_of(k)};
  rotate({with_adjacent_channels(q), with_adjacent_channels(k)}, y, std::move(tables), layout, transposed);
  return {y[0], y[1]};
}

std::tuple<Tensor, Tensor> rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, std::optional<Tensor> position_ids, bool heads_first) {
  return rotated(q, k, {cos, sin, position_ids}, heads_first, false);
}

std::tuple<Tensor, Tensor> rotary_backward(Tensor grad_q, Tensor grad_k, Tensor cos, Tensor sin, std::optional<Tensor> position_ids,
                                           bool heads_first) {
  return rotated(grad_q, grad_k, {cos, sin, position_ids}, heads_first, true);
}

void rotary_(Tensor q, Tensor k, Tensor cos, Tensor sin, std::optional<Tensor> position_ids, bool heads_first) {
  const Layout layout(q, heads_first);
  check_states(q, k, layout);
  Tables tables{cos, sin, position_ids};
  check_tables(q, tables, layout);
  for (const Tensor& x : {q, k}) {
    for (int64_t d = 0; d < x.dim(); ++d) {
      if (x.size(d) > 1 && (x.stride(d) == 0 || (d == x.dim() - 1 && x.stride(d) != 1))) {
        fail("rotary_: channels must be adjacent and elements distinct; rotate out of place");
      }
    }
  }
  Tensor same[2] = {q, k};
  rotate({q, k}, same, std::move(tables), layout, false);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dreamkernels, CPU, m) {
  m.impl("rotary", TORCH_BOX(&rotary));
  m.impl("rotary.inference", TORCH_BOX(&rotary));
  m.impl("rotary_", TORCH_BOX(&rotary_));
  m.impl("rotary_backward", TORCH_BOX(&rotary_backward));
}

}  // namespace dreamkernels::rotary
