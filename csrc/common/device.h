// What kernels use of the GPU beyond CUDA C++ itself: tensor-core, asynchronous-copy and matrix-load instructions, 16-byte accesses
// and element conversions. Free of torch, so that a kernel header compiles alone; and everything here exists twice: as PTX,
// and for the CPU in tests/cuda_emulator, where the same kernels run under test. Kernels therefore take shared memory through
// dynamic_shared() and DK_SHARED_ARRAY, and move packs with load_pack and store_pack.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>
#elif defined(DREAMKERNELS_CUDA_EMULATOR)
#include "cuda_emulator/device.h"
#else
#error "kernel headers are compiled by nvcc, or by the emulator of tests/cuda_emulator"
#endif

namespace dreamkernels {

// kCount elements, moved in one instruction.
template <class E, int kCount>
struct alignas(sizeof(E) * kCount) Pack {
  E value[kCount];
};

}  // namespace dreamkernels

#if defined(__CUDACC__)

#define DK_SHARED_ARRAY(Type, name, count) __shared__ Type name[count]

namespace dreamkernels {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
template <class E>
__device__ E from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// The dynamic shared memory of the block, aligned to 128 bytes: all 32 banks.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char dreamkernels_dynamic_shared[];
  return reinterpret_cast<T*>(dreamkernels_dynamic_shared);
}

template <class P, class E>
__device__ __forceinline__ P load_pack(const E* from) {
  return *reinterpret_cast<const P*>(from);
}
template <class P, class E>
__device__ __forceinline__ void store_pack(E* to, const P& pack) {
  *reinterpret_cast<P*>(to) = pack;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Copies 16 bytes from global to shared memory without passing through registers; zeros when not `valid` (then nothing is read).
// The copies of a thread between two commits are a group; copy_async_wait<n> waits until at most the n newest are in flight.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kInFlight>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kInFlight) : "memory");
}

// Loads kMatrices (2 or 4) matrices of 8 x 8 16-bit values. Lane 8 m + r gives the shared address of row r of matrix m; lane l receives
// the values (l / 4, 2 (l % 4)) and (l / 4, 2 (l % 4) + 1) of each matrix, or of each matrix transposed.
template <int kMatrices>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[kMatrices], const void* row) {
  static_assert(kMatrices == 2 || kMatrices == 4);
  if constexpr (kMatrices == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(shared_address(row))
                 : "memory");
  }
}
template <int kMatrices>
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[kMatrices], const void* row) {
  static_assert(kMatrices == 2 || kMatrices == 4);
  if constexpr (kMatrices == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

// d [16, 8] += a [16, 16] b [16, 8] for a whole warp; E is __nv_bfloat16 or __half, sums are float32.
template <class E>
__device__ __forceinline__ void mma_16_8_16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(std::is_same_v<E, __nv_bfloat16> || std::is_same_v<E, __half>);
  if constexpr (std::is_same_v<E, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Two values rounded to 16 bits, in one register: an operand of mma.
template <class E>
__device__ __forceinline__ uint32_t pack_two(float low, float high) {
  uint32_t word;
  if constexpr (std::is_same_v<E, __nv_bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
}

// Relative error about 2^-22; subnormal results are flushed to zero.
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_approximate(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace dreamkernels

#endif  // __CUDACC__
