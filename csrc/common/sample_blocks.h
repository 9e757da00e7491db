// Samples cut into blocks that do not depend on the number of threads: an item of work is a block of one sample.
#pragma once

#include <cstdint>

namespace dreamkernels {

constexpr int64_t block_elements = 8192;
constexpr int64_t blocks_of(int64_t sample_elements) { return (sample_elements + block_elements - 1) / block_elements; }

struct SampleRange {
  int64_t sample, begin, count;  // begin: of the block, from the first element of all samples
};

// f(item, range) for the items from begin_item to end_item. Inlined into each instruction set's own kernels.
template <class F>
[[gnu::always_inline]] inline void for_each_block(int64_t sample_elements, int64_t begin_item, int64_t end_item, F&& f) {
  const int64_t blocks = blocks_of(sample_elements);
  for (int64_t item = begin_item; item < end_item; ++item) {
    const int64_t sample = item / blocks, first = item % blocks * block_elements;
    const int64_t left = sample_elements - first;
    f(item, SampleRange{sample, sample * sample_elements + first, left < block_elements ? left : block_elements});
  }
}

}  // namespace dreamkernels
