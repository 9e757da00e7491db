// Products of small matrices whose right side stays in the caches: out[rows, columns] (+)= a[rows, depth] b[depth, columns].
//
// Everything is kept in 32-bit words. A word is a float (mode Plain), or a pair of bfloat16 that are neighbours along the depth
// (mode Paired, where the processor multiplies such pairs): one step along the depth takes one word of a, in every lane, and a row
// of words of b. The sums are floats in registers: a tile of kTileRows x kTileVecs vectors.
#pragma once
#include "common/vec.h"

namespace dreamkernels::cross_conditioning::DK_ISA {

using namespace ::dreamkernels::DK_ISA;

#if DK_VEC_LEVEL >= 512
constexpr int kTileRows = 6, kTileVecs = 4;  // 24 sums, 4 vectors of b and the word of a: 29 of 32 registers
#elif DK_VEC_LEVEL == 2
constexpr int kTileRows = 6, kTileVecs = 2;  // 12 + 2 + 1 of 16
#else
constexpr int kTileRows = 3, kTileVecs = 1;
#endif

struct Plain {
  static constexpr int depth_per_word = 1;
  using Words = Vec;
  static DK_INLINE Words broadcast(const float* a) { return Vec(*a); }
  static DK_INLINE Words words(const float* b) { return load(b, Full{}); }
  static DK_INLINE Vec multiply_add(Words a, Words b, Vec c) { return fma(a, b, c); }
};

struct Paired {
  static constexpr int depth_per_word = 2;
  using Words = Pairs;
  static DK_INLINE Words broadcast(const float* a) { return broadcast_pair(reinterpret_cast<const BFloat16*>(a)); }
  static DK_INLINE Words words(const float* b) { return load_pairs(reinterpret_cast<const BFloat16*>(b)); }
  static DK_INLINE Vec multiply_add(const Words& a, const Words& b, const Vec& c) { return dot(a, b, c); }
};

// Word (row, step) of a is at row * a_row + step * a_step.
struct Left {
  const float* words;
  int64_t a_row, a_step;
};

template <class Mode, int kVecs>
__attribute__((noinline)) void product_tile(Left a, const float* b, int64_t b_step, int64_t steps, float* out, int64_t out_row,
                                            bool accumulate) {
  Vec sums[kTileRows][kVecs];
  for (int64_t step = 0; step < steps; ++step) {
    typename Mode::Words right[kVecs];
#pragma GCC unroll 4
    for (int k = 0; k < kVecs; ++k) right[k] = Mode::words(b + k * Vec::width);
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; ++r) {
      const auto left = Mode::broadcast(a.words + r * a.a_row);
#pragma GCC unroll 4
      for (int k = 0; k < kVecs; ++k) sums[r][k] = Mode::multiply_add(left, right[k], sums[r][k]);
    }
    a.words += a.a_step;
    b += b_step;
  }
  // Added at the end, not summed onto: sums over thousands of positions then err like sums of blocks of sums.
#pragma GCC unroll 6
  for (int r = 0; r < kTileRows; ++r, out += out_row) {
#pragma GCC unroll 4
    for (int k = 0; k < kVecs; ++k) {
      float* to = out + k * Vec::width;
      store(to, accumulate ? load(to, Full{}) + sums[r][k] : sums[r][k], Full{});
    }
  }
}

template <class Mode, int kVecs = kTileVecs>
void product_panel(int vecs, const Left& a, int64_t rows, const float* b, int64_t b_step, int64_t steps, float* out,
                   int64_t out_row, bool accumulate) {
  if constexpr (kVecs > 1) {
    if (vecs < kVecs) return product_panel<Mode, kVecs - 1>(vecs, a, rows, b, b_step, steps, out, out_row, accumulate);
  }
  for (int64_t row = 0; row < rows; row += kTileRows) {
    product_tile<Mode, kVecs>({a.words + row * a.a_row, a.a_row, a.a_step}, b, b_step, steps, out + row * out_row, out_row,
                              accumulate);
  }
}

// `columns` is a multiple of Vec::width. Rows are computed in whole tiles: a may be read, and out is written, up to the next
// multiple of kTileRows.
template <class Mode>
void product(const Left& a, int64_t rows, const float* b, int64_t b_step, int64_t columns, int64_t steps, float* out,
             int64_t out_row, bool accumulate = false) {
  for (int64_t column = 0; column < columns; column += kTileVecs * Vec::width) {
    const int64_t left = (columns - column) / Vec::width;
    product_panel<Mode>(left < kTileVecs ? static_cast<int>(left) : kTileVecs, a, rows, b + column, b_step, steps, out + column,
                        out_row, accumulate);
  }
}

}  // namespace dreamkernels::cross_conditioning::DK_ISA
