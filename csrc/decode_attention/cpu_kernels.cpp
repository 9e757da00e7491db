// gcc 12 takes the undefined operands inside its own AVX-512 header for mistakes.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include "decode_attention/kernels.h"

#include <algorithm>
#include <cmath>

#include "decode_attention/few_rows.h"
#include "decode_attention/many_rows.h"

namespace dreamkernels::decode_attention::DK_ISA {
namespace {

template <class E>
void attend(const Job& job, int64_t begin, int64_t end) {
  const bool few = job.rows() <= kFewRows;
  const int64_t bytes = few ? Workspace::bytes_of<float>(2 * kFewRows * job.width) : Buffers<ProductsOf<E>>::bytes(job);
  for (int64_t index = begin; index < end; ++index) {
    Workspace workspace(bytes);
    const Task task(job, index);
    few ? attend_few_rows<E>(task, workspace.take<float>(2 * kFewRows * job.width)) : attend_many_rows<E>(task, workspace);
  }
}

template <class E>
void combine(const Job& job, int64_t begin, int64_t end) {
  const int64_t all_rows = job.sequences * job.kv_heads * job.rows();
  for (int64_t at = begin; at < end; ++at) {
    float maximum = kMinusInfinity;
    for (int s = 0; s < job.splits; ++s) maximum = std::max(maximum, job.partial_lse[s * all_rows + at]);
    const int64_t head_and_sequence = at / job.rows(), row = at % job.rows();
    const int64_t sequence = head_and_sequence / job.kv_heads, token = row / job.group();
    const int64_t head = head_and_sequence % job.kv_heads * job.group() + row % job.group();
    E* out = static_cast<E*>(job.out) + ((sequence * job.tokens + token) * job.q_heads + head) * job.width;
    float* lse = job.lse + (sequence * job.q_heads + head) * job.tokens + token;
    float factors[64], total = 0.0f;
    for (int s = 0; s < job.splits; ++s) {
      factors[s] = maximum == kMinusInfinity ? 0.0f : std::exp(job.partial_lse[s * all_rows + at] - maximum);
      total += factors[s];
    }
    *lse = total > 0.0f ? maximum + std::log(total) : kMinusInfinity;
    const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
    for_each_vector(job.width, [&](int64_t d, auto extent) __attribute__((always_inline)) {
      Vec sums;
      for (int s = 0; s < job.splits; ++s) {
        sums = fma(Vec(factors[s] * inverse), load(job.partial_out + (s * all_rows + at) * job.width + d, extent), sums);
      }
      store(out + d, sums, extent);
    });
  }
}

}  // namespace

void attend_parts(Element element, const Job& job, int64_t begin_task, int64_t end_task) {
  with_element(element, [&]<class E>(E*) { attend<E>(job, begin_task, end_task); });
}

void combine_parts(Element element, const Job& job, int64_t begin_row, int64_t end_row) {
  with_element(element, [&]<class E>(E*) { combine<E>(job, begin_row, end_row); });
}

}  // namespace dreamkernels::decode_attention::DK_ISA
