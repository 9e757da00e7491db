#include "softmax_groups/kernels.h"

#include "common/vec.h"

namespace dreamkernels::softmax_groups::DK_ISA {
namespace {

using namespace ::dreamkernels::DK_ISA;

constexpr int64_t kVecs = (kMaxSize + Vec::width - 1) / Vec::width;

DK_INLINE Vec otherwise_beyond(Vec v, Full, float) { return v; }
DK_INLINE Vec otherwise_beyond(Vec v, Tail t, float otherwise) {
  return select_less(lane_numbers(), Vec(static_cast<float>(t.count)), v, Vec(otherwise));
}

// kCount successive groups together: a reduction is a chain of dependent steps, and those of the other groups fill the gaps.
template <class E, int kCount>
void softmax_together(E* x, int64_t size) {
  Vec values[kVecs][kCount];
  Vec largest[kCount], total[kCount];
#pragma GCC unroll 4
  for (int g = 0; g < kCount; ++g) largest[g] = Vec(-__builtin_inff());
  for_each_vector(size, [&](int64_t i, auto extent) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int g = 0; g < kCount; ++g) {
      const Vec v = otherwise_beyond(load(x + g * size + i, extent), extent, -__builtin_inff());
      values[i / Vec::width][g] = v;
      largest[g] = max(v, largest[g]);
    }
  });
#pragma GCC unroll 4
  for (int g = 0; g < kCount; ++g) largest[g] = Vec(maximum(largest[g]));
  for (int64_t i = 0; i < size; i += Vec::width) {
#pragma GCC unroll 4
    for (int g = 0; g < kCount; ++g) {
      const Vec v = exp(values[i / Vec::width][g] - largest[g]);
      values[i / Vec::width][g] = v;
      total[g] = total[g] + v;
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < kCount; ++g) total[g] = Vec(1.0f) / Vec(sum(total[g]));
  for_each_vector(size, [&](int64_t i, auto extent) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int g = 0; g < kCount; ++g) store(x + g * size + i, values[i / Vec::width][g] * total[g], extent);
  });
}

}  // namespace

void softmax(Element element, const Job& job, int64_t begin_group, int64_t end_group) {
  with_element(element, [&]<class E>(E*) {
    E* x = static_cast<E*>(job.x);
    int64_t group = begin_group;
    for (; group + 4 <= end_group; group += 4) softmax_together<E, 4>(x + group * job.size, job.size);
    for (; group < end_group; ++group) softmax_together<E, 1>(x + group * job.size, job.size);
  });
}

}  // namespace dreamkernels::softmax_groups::DK_ISA
