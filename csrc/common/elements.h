// Element types of tensors, without any torch header, so that kernels compile quickly and once per instruction set.
#pragma once
#include <cstdint>

namespace dreamkernels {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

enum class Element { float32, bfloat16, float16 };

// Calls `f` with a null pointer to the element type, so that a template can be instantiated for it.
template <class F>
void with_element(Element element, F&& f) {
  switch (element) {
    case Element::float32: return f(static_cast<float*>(nullptr));
    case Element::bfloat16: return f(static_cast<BFloat16*>(nullptr));
    case Element::float16: return f(static_cast<Half*>(nullptr));
  }
}

}  // namespace dreamkernels
