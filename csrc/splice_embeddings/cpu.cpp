// CPU implementation of dreamkernels::splice_embeddings and its backward (schemas: dreamkernels/ops/splice_embeddings).
#include <cstring>
#include <numeric>

#include "common/tensor.h"
#include "splice_embeddings/kernels.h"

namespace dreamkernels::splice_embeddings {
namespace {

// index[t] as int64 from an int32 or int64 tensor.
class Index {
 public:
  explicit Index(const Tensor& index) : wide_(index.scalar_type() == ScalarType::Long), data_(index.data_ptr()) {
    if (!wide_ && index.scalar_type() != ScalarType::Int) fail("splice_embeddings: index must be int32 or int64");
  }
  int64_t operator[](int64_t t) const {
    return wide_ ? static_cast<const int64_t*>(data_)[t] : static_cast<const int32_t*>(data_)[t];
  }

 private:
  bool wide_;
  const void* data_;
};

void check_range(const Index& index, int64_t length, int64_t rows) {
  for (int64_t t = 0; t < length; ++t) {
    const int64_t row = index[t];
    if (row < -1 || row >= rows) {
      fail("splice_embeddings: index[", t, "] = ", row, " is out of range: -1 keeps the token embedding, 0 to ", rows - 1,
           " choose one of the ", rows, " source rows");
    }
  }
}

// Where each source row begins in memory: looks up the source that holds a row of the virtual concatenation.
class SourceRows {
 public:
  SourceRows(const std::vector<Tensor>& sources, int64_t row_bytes) : row_bytes_(row_bytes) {
    for (const Tensor& source : sources) {
      starts_.push_back(total_);
      data_.push_back(static_cast<const char*>(source.data_ptr()));
      total_ += source.size(0);
    }
  }
  int64_t total() const { return total_; }
  const char* operator[](int64_t row) const {
    const auto next = std::upper_bound(starts_.begin(), starts_.end(), row);
    const auto source = next - starts_.begin() - 1;
    return data_[source] + (row - starts_[source]) * row_bytes_;
  }

 private:
  int64_t row_bytes_;
  int64_t total_ = 0;
  std::vector<int64_t> starts_;
  std::vector<const char*> data_;
};

Tensor splice_embeddings(Tensor token_embeds, std::vector<Tensor> sources, Tensor index) {
  if (token_embeds.dim() != 2 || index.dim() != 1 || index.size(0) != token_embeds.size(0)) {
    fail("splice_embeddings: token_embeds ", shape_of(token_embeds), " must be [T, H] and index ", shape_of(index), " [T]");
  }
  token_embeds = row_major(token_embeds);
  index = row_major(index);
  const int64_t length = token_embeds.size(0), width = token_embeds.size(1);
  for (Tensor& source : sources) {
    if (source.dim() != 2 || source.size(1) != width || source.scalar_type() != token_embeds.scalar_type()) {
      fail("splice_embeddings: a source ", shape_of(source), " must be [N, ", width, "] with the dtype of token_embeds");
    }
    source = row_major(source);
  }
  const int64_t row_bytes = width * static_cast<int64_t>(token_embeds.element_size());
  const SourceRows rows(sources, row_bytes);
  const Index chosen(index);
  check_range(chosen, length, rows.total());
  Tensor out = new_like(token_embeds);
  const char* tokens = static_cast<const char*>(token_embeds.data_ptr());
  char* destination = static_cast<char*>(out.data_ptr());
  torch::stable::parallel_for(0, length, row_grain(width), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end;) {
      // Consecutive rows of one source (a picture's features) and runs of kept tokens are one copy each.
      const int64_t row = chosen[t];
      const char* from = row < 0 ? tokens + t * row_bytes : rows[row];
      int64_t run = 1;
      while (t + run < end && (row < 0 ? chosen[t + run] < 0
                                       : chosen[t + run] == row + run && rows[row + run] == from + run * row_bytes)) {
        ++run;
      }
      std::memcpy(destination + t * row_bytes, from, run * row_bytes);
      t += run;
    }
  });
  return out;
}

// The positions of every source row, ascending: positions[starts[r] .. starts[r + 1]) are the t with index[t] == r.
struct Occurrences {
  std::vector<int64_t> starts, positions;

  Occurrences(const Index& index, int64_t length, int64_t rows) : starts(rows + 2, 0), positions(length) {
    for (int64_t t = 0; t < length; ++t) {
      if (index[t] >= 0) ++starts[index[t] + 2];
    }
    std::partial_sum(starts.begin(), starts.end(), starts.begin());
    for (int64_t t = 0; t < length; ++t) {
      if (index[t] >= 0) positions[starts[index[t] + 1]++] = t;
    }
  }
};

Tensor token_gradient(const Tensor& grad, const Index& index) {
  Tensor out = new_like(grad);
  const int64_t row_bytes = grad.size(1) * static_cast<int64_t>(grad.element_size());
  const char* from = static_cast<const char*>(grad.data_ptr());
  char* to = static_cast<char*>(out.data_ptr());
  torch::stable::parallel_for(0, grad.size(0), row_grain(grad.size(1)), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      if (index[t] < 0) {
        std::memcpy(to + t * row_bytes, from + t * row_bytes, row_bytes);
      } else {
        std::memset(to + t * row_bytes, 0, row_bytes);
      }
    }
  });
  return out;
}

std::vector<Tensor> splice_embeddings_backward(Tensor grad, Tensor index, std::vector<int64_t> source_rows,
                                               std::vector<bool> needed) {
  grad = row_major(grad);
  index = row_major(index);
  const int64_t length = grad.size(0), width = grad.size(1);
  if (needed.size() != source_rows.size() + 1) fail("splice_embeddings_backward: needed must have one entry more than source_rows");
  const int64_t rows = std::accumulate(source_rows.begin(), source_rows.end(), int64_t{0});
  const Index chosen(index);
  check_range(chosen, length, rows);
  std::vector<Tensor> gradients;
  if (needed[0]) gradients.push_back(token_gradient(grad, chosen));
  if (std::find(needed.begin() + 1, needed.end(), true) == needed.end()) return gradients;

  const Occurrences occurrences(chosen, length, rows);
  const Element element = element_of(grad, "splice_embeddings");
  const auto kernel = DK_FOR_ACTIVE_ISA(gather_sum);
  int64_t first = 0;
  for (size_t s = 0; s < source_rows.size(); first += source_rows[s], ++s) {
    if (!needed[s + 1]) continue;
    Tensor out = new_row_major(grad, {source_rows[s], width}, grad.scalar_type());
    const GatherSum job{grad.data_ptr(), occurrences.starts.data() + first, occurrences.positions.data(), out.data_ptr(), width};
    if (width > 0) {
      torch::stable::parallel_for(0, source_rows[s], row_grain(width), [&](int64_t begin, int64_t end) {
        kernel(element, job, begin, end);
      });
    }
    gradients.push_back(out);
  }
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dreamkernels, CPU, m) {
  m.impl("splice_embeddings", TORCH_BOX(&splice_embeddings));
  m.impl("splice_embeddings.inference", TORCH_BOX(&splice_embeddings));
  m.impl("splice_embeddings_backward", TORCH_BOX(&splice_embeddings_backward));
}

}  // namespace dreamkernels::splice_embeddings
