// The emulation half of csrc/common/device.h: CUDA's own names first, then the wrappers that kernels use.
#pragma once
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cuda_emulator/emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define threadIdx (::emulator::position().thread)
#define blockIdx (::emulator::position().block)
#define blockDim (::emulator::position().block_size)
#define gridDim (::emulator::position().grid_size)

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

using std::fmaf;
using std::fmaxf;
using std::fminf;
inline float rsqrtf(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline int __float_as_int(float x) {
  int bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline void __syncthreads(emulator::Site site = emulator::Site::here()) { emulator::block_barrier(site); }
inline void __syncwarp(unsigned mask = 0xffffffffu, emulator::Site site = emulator::Site::here()) {
  emulator::collective(emulator::Collective::syncwarp, mask, nullptr, nullptr, 0, site);
}
inline void __threadfence() {}

namespace emulator {
template <class T>
T shuffle(unsigned mask, T value, int source, Site site) {
  static_assert(sizeof(T) == 4);
  T received;
  if (!(mask >> source & 1)) misuse("shuffle from a lane that the mask does not name", site);
  collective(Collective::shuffle, mask, &value, &received, source, site);
  return received;
}
// The lane `to` of the calling lane's group of `width` lanes; outside of the group, the calling lane itself.
inline int lane_in_group(int to, int width) {
  const int lane = static_cast<int>(position().lane), first = lane / width * width;
  return to >= first && to < first + width ? to : lane;
}
}  // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, emulator::Site site = emulator::Site::here()) {
  const int lane = static_cast<int>(emulator::position().lane);
  return emulator::shuffle(mask, value, lane / width * width + source % width, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, emulator::Site site = emulator::Site::here()) {
  return emulator::shuffle(mask, value, emulator::lane_in_group(static_cast<int>(emulator::position().lane) ^ bits, width), site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int by, int width = 32, emulator::Site site = emulator::Site::here()) {
  return emulator::shuffle(mask, value, emulator::lane_in_group(static_cast<int>(emulator::position().lane) + by, width), site);
}
inline unsigned __ballot_sync(unsigned mask, int vote, emulator::Site site = emulator::Site::here()) {
  unsigned votes;
  emulator::collective(emulator::Collective::ballot, mask, &vote, &votes, 0, site);
  return votes;
}
inline int __any_sync(unsigned mask, int vote, emulator::Site site = emulator::Site::here()) {
  return __ballot_sync(mask, vote, site) != 0;
}
inline int __all_sync(unsigned mask, int vote, emulator::Site site = emulator::Site::here()) {
  return __ballot_sync(mask, !vote, site) == 0;
}

// One address per place in the source and per template instance, as a __shared__ variable has.
#define DK_SHARED_ARRAY(Type, name, count) \
  static char name##_key;                  \
  Type(&name)[count] = *static_cast<Type(*)[count]>(::emulator::static_shared(&name##_key, sizeof(Type) * (count)))

namespace dreamkernels {

inline float to_float(float x) { return x; }
inline float to_float(__nv_bfloat16 x) {
  const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float value;
  __builtin_memcpy(&value, &wide, sizeof value);
  return value;
}
inline float to_float(__half x) {
  _Float16 value;
  __builtin_memcpy(&value, &x, sizeof value);
  return static_cast<float>(value);
}
template <class E>
E from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline __half from_float<__half>(float x) {
  const _Float16 value = static_cast<_Float16>(x);
  __half half;
  __builtin_memcpy(&half, &value, sizeof half);
  return half;
}

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(emulator::dynamic_shared());
}

template <class P, class E>
P load_pack(const E* from, emulator::Site site = emulator::Site::here()) {
  emulator::check_aligned(from, sizeof(P), "load_pack", site);
  return *reinterpret_cast<const P*>(from);
}
template <class P, class E>
void store_pack(E* to, const P& pack, emulator::Site site = emulator::Site::here()) {
  emulator::check_aligned(to, sizeof(P), "store_pack", site);
  *reinterpret_cast<P*>(to) = pack;
}

inline void copy_async_16(void* shared, const void* global, bool valid, emulator::Site site = emulator::Site::here()) {
  emulator::copy_async(shared, global, 16, valid, site);
}
inline void copy_async_commit() { emulator::copy_async_commit(); }
template <int kInFlight>
void copy_async_wait(emulator::Site site = emulator::Site::here()) {
  emulator::copy_async_wait(kInFlight, site);
}

namespace emulated {
template <int kMatrices>
void ldmatrix(emulator::Collective kind, uint32_t (&to)[kMatrices], const void* row, emulator::Site site) {
  // Only the first 8 kMatrices lanes' addresses are used.
  if (emulator::position().lane < 8 * kMatrices) emulator::check_shared_read(row, 16, "ldmatrix", site);
  emulator::collective(kind, 0xffffffffu, row, to, kMatrices, site);
}
}  // namespace emulated

template <int kMatrices>
void load_matrices(uint32_t (&to)[kMatrices], const void* row, emulator::Site site = emulator::Site::here()) {
  emulated::ldmatrix(emulator::Collective::ldmatrix, to, row, site);
}
template <int kMatrices>
void load_matrices_transposed(uint32_t (&to)[kMatrices], const void* row, emulator::Site site = emulator::Site::here()) {
  emulated::ldmatrix(emulator::Collective::ldmatrix_trans, to, row, site);
}

template <class E>
void mma_16_8_16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, emulator::Site site = emulator::Site::here()) {
  constexpr auto kind = std::is_same_v<E, __half> ? emulator::Collective::mma_f16 : emulator::Collective::mma_bf16;
  const uint32_t operands[6] = {a[0], a[1], a[2], a[3], b0, b1};
  emulator::collective(kind, 0xffffffffu, operands, d, 0, site);
}

template <class E>
uint32_t pack_two(float low, float high) {
  const E pair[2] = {from_float<E>(low), from_float<E>(high)};
  uint32_t word;
  __builtin_memcpy(&word, pair, sizeof word);
  return word;
}

inline float exp2_approximate(float x) { return std::exp2(x); }
inline float log2_approximate(float x) { return std::log2(x); }

}  // namespace dreamkernels
