// The CUDA kernel of append_kv. Compiled by nvcc, and for the CPU by the emulator of the tests.
//
// A block handles one token and kRows of its heads (query heads, then key heads, then value heads), kLanes threads per head. A
// thread holds the packs of kVector channels that rotate into each other:
//
//   head:  | first half of the rotated channels | second half | channels that are not rotated |
//            pack j  <------------------------->  pack j         thread j % kLanes
#pragma once
#include "append_kv/job.h"
#include "common/device.h"

namespace dreamkernels::append_kv::kernels {

constexpr int kLanes = 8;
constexpr int kThreads = 128;
constexpr int kRows = kThreads / kLanes;

template <class E, int kVector>
struct Norm {
  const E* weight;  // null: not normalised
  float rstd;

  __device__ Pack<float, kVector> operator()(const Pack<E, kVector>& x, int at) const {
    Pack<float, kVector> y;
    Pack<E, kVector> scale;
    if (weight) scale = load_pack<Pack<E, kVector>>(weight + at);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      y.value[i] = to_float(x.value[i]);
      // Rounded where rms_norm rounds.
      if (weight) {
        const float normalised = to_float(from_float<E>(y.value[i] * rstd));
        y.value[i] = to_float(from_float<E>(normalised * to_float(scale.value[i])));
      }
    }
    return y;
  }
};

template <class E, class Table, int kVector>
__device__ void rotate_head(const E* x, E* y, const Norm<E, kVector>& norm, const Table* cos, const Table* sin, int width, int rotated,
                            int lane) {
  using P = Pack<E, kVector>;
  using T = Pack<Table, kVector>;
  const int half = rotated / 2;
#pragma unroll 1  // one turn at most head widths
  for (int at = lane * kVector; at < half; at += kLanes * kVector) {
    const auto first = norm(load_pack<P>(x + at), at), second = norm(load_pack<P>(x + half + at), half + at);
    const T cos_first = load_pack<T>(cos + at), cos_second = load_pack<T>(cos + half + at);
    const T sin_first = load_pack<T>(sin + at), sin_second = load_pack<T>(sin + half + at);
    P turned_first, turned_second;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float a = first.value[i], b = second.value[i];
      turned_first.value[i] = from_float<E>(a * to_float(cos_first.value[i]) - b * to_float(sin_first.value[i]));
      turned_second.value[i] = from_float<E>(b * to_float(cos_second.value[i]) + a * to_float(sin_second.value[i]));
    }
    store_pack(y + at, turned_first);
    store_pack(y + half + at, turned_second);
  }
#pragma unroll 1
  for (int at = rotated + lane * kVector; at < width; at += kLanes * kVector) {
    const auto kept = norm(load_pack<P>(x + at), at);
    P out;
#pragma unroll
    for (int i = 0; i < kVector; ++i) out.value[i] = from_float<E>(kept.value[i]);
    store_pack(y + at, out);
  }
}

template <class E, class Table, int kVector>
__global__ void __launch_bounds__(kThreads) append_kv(const Job job) {
  using P = Pack<E, kVector>;
  const int lane = threadIdx.x % kLanes;
  const int row = blockIdx.y * kRows + threadIdx.x / kLanes;
  const unsigned tokens = static_cast<unsigned>(job.tokens);
  const int64_t sequence = blockIdx.x / tokens, token = blockIdx.x % tokens;
  const int64_t position = job.cache_seqlens[sequence] + token;

  enum { query, key, value, nothing } kind = row < job.q_heads                    ? query
                                             : row < job.q_heads + job.kv_heads   ? key
                                             : row < job.q_heads + 2 * job.kv_heads ? value
                                                                                  : nothing;
  const int head = kind == query ? row : kind == key ? row - job.q_heads : row - job.q_heads - job.kv_heads;
  const TokenStrides& strides = kind == query ? job.q_strides : kind == key ? job.k_strides : job.v_strides;
  const E* x = static_cast<const E*>(kind == query ? job.q : kind == key ? job.k : job.v) + sequence * strides.sequence +
               token * strides.token + head * strides.head;

  // A position outside of the cache is not written, and one outside of the tables turns as the nearest one: nothing is ever accessed out
  // of bounds, and the host does not wait for a check.
  E* y = nullptr;
  if (kind == query) {
    y = static_cast<E*>(job.rotated_q) + (static_cast<int64_t>(blockIdx.x) * job.q_heads + head) * job.width;
  } else if (kind != nothing && position >= 0 && position < job.paging.capacity()) {
    const int64_t page = job.paging.page_of(sequence, position);
    const CacheStrides& to = kind == key ? job.k_cache_strides : job.v_cache_strides;
    if (job.paging.has_page(page)) {
      y = static_cast<E*>(kind == key ? job.k_cache : job.v_cache) + to.offset(page, job.paging.slot_of(position), head);
    }
  }

  Norm<E, kVector> norm{nullptr, 1.0f};
  if (job.q_norm_weight || job.k_norm_weight) {  // the same for all threads: they exchange sums
    float squares = 0.0f;
#pragma unroll 1
    for (int at = lane * kVector; at < job.width && y; at += kLanes * kVector) {
      const P pack = load_pack<P>(x + at);
#pragma unroll
      for (int i = 0; i < kVector; ++i) squares = fmaf(to_float(pack.value[i]), to_float(pack.value[i]), squares);
    }
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, offset);
    norm.rstd = rsqrtf(squares / static_cast<float>(job.width) + job.eps);
    if (kind == query) norm.weight = static_cast<const E*>(job.q_norm_weight);
    if (kind == key) norm.weight = static_cast<const E*>(job.k_norm_weight);
  }
  if (y == nullptr) return;
  if (kind == value) {
#pragma unroll 1
    for (int at = lane * kVector; at < job.width; at += kLanes * kVector) store_pack(y + at, load_pack<P>(x + at));
    return;
  }
  const int64_t nearest = position < 0 ? 0 : position < job.positions ? position : job.positions - 1;
  const Table* cos = static_cast<const Table*>(job.cos) + nearest * job.rotated;
  const Table* sin = static_cast<const Table*>(job.sin) + nearest * job.rotated;
  rotate_head<E, Table, kVector>(x, y, norm, cos, sin, job.width, job.rotated, lane);
}

// Whether accesses of kVector channels are aligned everywhere.
template <class E, class Table, int kVector>
bool can_use_packs(const Job& job) {
  bool aligned = job.width % kVector == 0 && job.rotated / 2 % kVector == 0;
  for (const TokenStrides& s : {job.q_strides, job.k_strides, job.v_strides}) {
    aligned = aligned && s.sequence % kVector == 0 && s.token % kVector == 0 && s.head % kVector == 0;
  }
  for (const CacheStrides& s : {job.k_cache_strides, job.v_cache_strides}) {
    aligned = aligned && s.page % kVector == 0 && s.position % kVector == 0 && s.head % kVector == 0;
  }
  for (const void* p : {job.q, job.k, job.v, static_cast<const void*>(job.k_cache), static_cast<const void*>(job.v_cache),
                        static_cast<const void*>(job.rotated_q), job.q_norm_weight, job.k_norm_weight}) {
    aligned = aligned && reinterpret_cast<uintptr_t>(p) % (kVector * sizeof(E)) == 0;
  }
  for (const void* p : {job.cos, job.sin}) aligned = aligned && reinterpret_cast<uintptr_t>(p) % (kVector * sizeof(Table)) == 0;
  return aligned;
}

inline dim3 grid_of(const Job& job) {
  return dim3(static_cast<unsigned>(job.sequences * job.tokens), static_cast<unsigned>((job.heads() + kRows - 1) / kRows));
}

}  // namespace dreamkernels::append_kv::kernels
