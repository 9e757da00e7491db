// The CPU instruction set in use. Kernels (`cpu_kernels.cpp`) are compiled once per level, each into a namespace named
// after the level; DK_FOR_ACTIVE_ISA(rms_norm::forward_rows)(...) calls the one for the processor at hand, or the one a test forced.
#pragma once

namespace dreamkernels {

enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3 };

bool isa_supported(Isa isa);  // compiled in, and this processor has it
Isa active_isa();

// Declares a kernel of the same signature in the namespace of every level.
#define DK_DECLARE_KERNEL(name, arguments)      \
  namespace scalar { void name arguments; }     \
  namespace avx2 { void name arguments; }       \
  namespace avx512 { void name arguments; }     \
  namespace avx512bf16 { void name arguments; }

#if defined(DK_HAS_AVX512)
#define DK_FOR_ACTIVE_ISA(kernel)                                                       \
  (::dreamkernels::active_isa() == ::dreamkernels::Isa::avx512bf16 ? avx512bf16::kernel \
   : ::dreamkernels::active_isa() == ::dreamkernels::Isa::avx512   ? avx512::kernel     \
   : ::dreamkernels::active_isa() == ::dreamkernels::Isa::avx2     ? avx2::kernel       \
                                                                   : scalar::kernel)
#else
#define DK_FOR_ACTIVE_ISA(kernel) (scalar::kernel)
#endif

}  // namespace dreamkernels
