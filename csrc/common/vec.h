// A vector of floats of the instruction set this file is compiled for (namespace DK_ISA), with conversions from and to tensor
// elements. All arithmetic is float32; bfloat16 and float16 round to nearest even when stored. Every level has this interface:
//
//   Vec::width                  floats per vector                    Vec(float)          the same float in every lane
//   load(p, Full{})             width elements at p                  store(p, v, Full{})
//   load(p, Tail{n})            the first n < width, others zero     store(p, v, Tail{n})
//   round_to<E>(v)              v at the precision of element type E
//   v + w, v * w, fma(a, b, c) = a * b + c, sum(v)
#pragma once
#include "common/elements.h"

#define DK_INLINE inline __attribute__((always_inline))

namespace dreamkernels {
struct Full {};
struct Tail {
  int count;
};
}  // namespace dreamkernels

#if DK_VEC_LEVEL == 512
#include "common/vec_avx512.h"
#elif DK_VEC_LEVEL == 2
#include "common/vec_avx2.h"
#else
#include "common/vec_scalar.h"
#endif

namespace dreamkernels::DK_ISA {

// Calls f(i, Full{}) for every full vector of `count` elements and f(i, Tail{n}) for a remainder.
template <class F>
DK_INLINE void for_each_vector(int64_t count, F&& f) {
  int64_t i = 0;
  for (; i + Vec::width <= count; i += Vec::width) f(i, Full{});
  if (i < count) f(i, Tail{static_cast<int>(count - i)});
}

}  // namespace dreamkernels::DK_ISA
