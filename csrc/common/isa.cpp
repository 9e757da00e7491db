#include "common/isa.h"

#include <atomic>

namespace dreamkernels {
namespace {

Isa best_isa() {
  for (Isa isa : {Isa::avx512bf16, Isa::avx512, Isa::avx2}) {
    if (isa_supported(isa)) return isa;
  }
  return Isa::scalar;
}

std::atomic<int>& active() {
  static std::atomic<int> value{static_cast<int>(best_isa())};
  return value;
}

}  // namespace

bool isa_supported(Isa isa) {
  switch (isa) {
    case Isa::scalar: return true;
#if defined(DK_HAS_AVX2)
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
#if defined(DK_HAS_AVX512)
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Isa::avx512bf16: return isa_supported(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
#endif
    default: return false;
  }
}

Isa active_isa() { return static_cast<Isa>(active().load(std::memory_order_relaxed)); }

}  // namespace dreamkernels

// Called from Python through ctypes (dreamkernels/libraries.py). Levels are the values of Isa; -1 asks for the best one.
extern "C" {
__attribute__((visibility("default"))) int dreamkernels_cpu_isa() {
  return static_cast<int>(dreamkernels::active_isa());
}
__attribute__((visibility("default"))) int dreamkernels_cpu_isa_supported(int level) {
  return level >= 0 && level <= 3 && dreamkernels::isa_supported(static_cast<dreamkernels::Isa>(level));
}
__attribute__((visibility("default"))) void dreamkernels_set_cpu_isa(int level) {
  using namespace dreamkernels;
  active().store(level < 0 ? static_cast<int>(best_isa()) : level, std::memory_order_relaxed);
}
}
