#include "splice_embeddings/kernels.h"

#include <cstring>

#include "common/vec.h"

namespace dreamkernels::splice_embeddings::DK_ISA {
namespace {

using namespace ::dreamkernels::DK_ISA;

template <class E>
void gather_sum_rows(const GatherSum& job, int64_t begin, int64_t end) {
  const int64_t width = job.width;
  const E* grad = static_cast<const E*>(job.grad);
  for (int64_t row = begin; row < end; ++row) {
    E* out = static_cast<E*>(job.out) + row * width;
    const int64_t first = job.starts[row], last = job.starts[row + 1];
    if (last == first) {
      std::memset(out, 0, width * sizeof(E));
    } else if (last == first + 1) {
      std::memcpy(out, grad + job.positions[first] * width, width * sizeof(E));
    } else {
      for_each_vector(width, [&](int64_t i, auto extent) __attribute__((always_inline)) {
        Vec total;
        for (int64_t k = first; k < last; ++k) total = total + load(grad + job.positions[k] * width + i, extent);
        store(out + i, total, extent);
      });
    }
  }
}

}  // namespace

void gather_sum(Element element, const GatherSum& job, int64_t begin_row, int64_t end_row) {
  with_element(element, [&]<class E>(E*) { gather_sum_rows<E>(job, begin_row, end_row); });
}

}  // namespace dreamkernels::splice_embeddings::DK_ISA
