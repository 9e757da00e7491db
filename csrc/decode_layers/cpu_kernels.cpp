// A product with few rows is limited by reading the weight, once, in the layout that it has: neighbours along the sum. Some outputs by
// some rows are summed at a time in registers, every lane a part of the sum.
//
//   weight  [outputs, inputs]   kOutputs rows at a time, streamed from memory; the next ones are fetched ahead
//   x       [rows, inputs]      kRows rows at a time, from the first-level cache
#include "decode_layers/kernels.h"

#include "common/vec.h"

namespace dreamkernels::decode_layers::DK_ISA {
namespace {

using namespace ::dreamkernels::DK_ISA;

constexpr int kOutputs = 4;  // as many as sums_of_four takes
constexpr int kRows = DK_VEC_LEVEL >= 512 ? 4 : 2;  // with the operands, what fits the registers

// What one load takes, and how it is multiplied.
template <class E>
struct Arithmetic {
  using Operand = Vec;
  static constexpr int step = Vec::width;
  static DK_INLINE Operand load_step(const E* p) { return load(p, Full{}); }
  static DK_INLINE Vec multiply_add(Operand a, Operand b, Vec c) { return fma(a, b, c); }
};
template <>
struct Arithmetic<BFloat16> {
  using Operand = Pairs;
  static constexpr int step = 2 * Vec::width;
  static DK_INLINE Operand load_step(const BFloat16* p) { return load_pairs(p); }
  static DK_INLINE Vec multiply_add(Operand a, Operand b, Vec c) { return dot(a, b, c); }
};

// The sums over the lanes of four vectors, in the first four lanes. With K of some hundreds, sums one by one take as long as the products.
DK_INLINE Vec sums_of_four(Vec a, Vec b, Vec c, Vec d) {
#if DK_VEC_LEVEL >= 512
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
  const __m512 quarters = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
  return Vec(_mm512_zextps128_ps512(_mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1))));
#else
  float sums[Vec::width < 4 ? 4 : Vec::width] = {sum(a), sum(b), sum(c), sum(d)};
  return load(sums, Full{});
#endif
}

template <class E, int kTileOutputs, int kTileRows, bool kFetch>
DK_INLINE void tile(const Product& job, int64_t output, int64_t row) {
  using A = Arithmetic<E>;
  const int64_t inputs = job.inputs;
  const E* weight = static_cast<const E*>(job.weight) + output * inputs;
  const E* x = static_cast<const E*>(job.x) + row * job.x_stride;
  Vec sums[kTileOutputs][kTileRows];
  int64_t k = 0;
  for (; k + A::step <= inputs; k += A::step) {
    typename A::Operand w[kTileOutputs];
#pragma GCC unroll 8
    for (int o = 0; o < kTileOutputs; ++o) {
      w[o] = A::load_step(weight + o * inputs + k);
      // Beyond the end of the weight a prefetch does nothing.
      if constexpr (kFetch) __builtin_prefetch(weight + (o + kTileOutputs) * inputs + k);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const auto element = A::load_step(x + r * job.x_stride + k);
#pragma GCC unroll 8
      for (int o = 0; o < kTileOutputs; ++o) sums[o][r] = A::multiply_add(w[o], element, sums[o][r]);
    }
  }
  for_each_vector(inputs - k, [&](int64_t offset, auto extent) __attribute__((always_inline)) {
    for (int o = 0; o < kTileOutputs; ++o) {
      const Vec w = load(weight + o * inputs + k + offset, extent);
      for (int r = 0; r < kTileRows; ++r) sums[o][r] = fma(w, load(x + r * job.x_stride + k + offset, extent), sums[o][r]);
    }
  });
  const Tail outputs{kTileOutputs};
  for (int r = 0; r < kTileRows; ++r) {
    Vec total;
    if constexpr (kTileOutputs == 4) {
      total = sums_of_four(sums[0][r], sums[1][r], sums[2][r], sums[3][r]);
    } else {
      total = Vec(sum(sums[0][r]));
    }
    if (job.bias) total = total + load(static_cast<const E*>(job.bias) + output, outputs);
    store(static_cast<E*>(job.y) + (row + r) * job.y_stride + output, total, outputs);
  }
}

template <class E, int kTileOutputs>
DK_INLINE void all_rows(const Product& job, int64_t output) {
  int64_t row = 0;
  if (job.rows >= kRows) {
    tile<E, kTileOutputs, kRows, true>(job, output, 0);
    for (row = kRows; row + kRows <= job.rows; row += kRows) tile<E, kTileOutputs, kRows, false>(job, output, row);
  }
  if constexpr (kRows > 2) {
    if (row + 2 <= job.rows) {
      row ? tile<E, kTileOutputs, 2, false>(job, output, row) : tile<E, kTileOutputs, 2, true>(job, output, row);
      row += 2;
    }
  }
  if (row < job.rows) {
    row ? tile<E, kTileOutputs, 1, false>(job, output, row) : tile<E, kTileOutputs, 1, true>(job, output, row);
  }
}

}  // namespace

void multiply(Element element, const Product& job, int64_t begin_output, int64_t end_output) {
  with_element(element, [&]<class E>(E*) {
    int64_t output = begin_output;
    for (; output + kOutputs <= end_output; output += kOutputs) all_rows<E, kOutputs>(job, output);
    for (; output < end_output; ++output) all_rows<E, 1>(job, output);
  });
}

}  // namespace dreamkernels::decode_layers::DK_ISA
