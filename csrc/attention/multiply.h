// Register-blocked matrix products on packed operands, and the two arithmetics they run in.
//
// An arithmetic stores its operands as `Stored`, `pack` of which (neighbours along the summed dimension) fill a 32-bit lane:
// float32 has one float per lane; bfloat16 has two, which one instruction multiplies and adds up.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

#include "common/vec.h"

namespace dreamkernels::attention::DK_ISA {

using namespace ::dreamkernels::DK_ISA;

// A tile is kRows x up to kMaxVecs vectors: with the operands it just fits the registers.
constexpr int kRows = DK_VEC_LEVEL >= 512 ? 8 : 4;
constexpr int kMaxVecs = DK_VEC_LEVEL >= 512 ? 3 : 2;
constexpr int kQueries = kMaxVecs * Vec::width;  // queries per block: they run along the lanes

struct Float32Arithmetic {
  using Stored = float;
  using Operand = Vec;
  static constexpr int pack = 1;
  static DK_INLINE Operand load(const Stored* p) { return ::dreamkernels::DK_ISA::load(p, Full{}); }
  static DK_INLINE Operand broadcast(const Stored* p) { return Vec(*p); }
  static DK_INLINE Vec dot(Operand a, Operand b, Vec c) { return fma(a, b, c); }
  // Products read a tile of probabilities in two forms, summed over its rows and summed over its lanes. In float32 they are one.
  static constexpr bool same_forms = true;
};

#if DK_VEC_LEVEL == 513
struct BFloat16Arithmetic {
  using Stored = BFloat16;
  using Operand = Pairs;
  static constexpr int pack = 2;
  static DK_INLINE Operand load(const Stored* p) { return load_pairs(p); }
  static DK_INLINE Operand broadcast(const Stored* p) { return broadcast_pair(p); }
  static DK_INLINE Vec dot(Operand a, Operand b, Vec c) { return ::dreamkernels::DK_ISA::dot(a, b, c); }
  static constexpr bool same_forms = false;
};
// Two rows of floats as bfloat16: the 16 elements of `first`, then those of `second`.
DK_INLINE __m512i rounded_rows(Vec first, Vec second) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second.v, first.v));
}
// The same as pairs: lane k holds first[k], second[k].
DK_INLINE __m512i interleaved_rows(__m512i rows) {
  const __m512i order =
      _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1,
                       16, 0);
  return _mm512_permutexvar_epi16(order, rows);
}
#endif

// tile[r][v] = sum over s of a[r, s] b[s, v], handed to `finish` in registers. Element (r, s) of a is at r * a_row + s * a_step.
template <class A, int kTileRows, int kVecs, class F>
DK_INLINE void multiply(const typename A::Stored* a, int64_t a_row, int64_t a_step, const typename A::Stored* b, int64_t b_step,
                        int64_t steps, F&& finish) {
  Vec tile[kTileRows][kVecs];
  for (int64_t s = 0; s < steps; ++s) {
    typename A::Operand column[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) column[v] = A::load(b + v * Vec::width * A::pack);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      const auto element = A::broadcast(a + r * a_row);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) tile[r][v] = A::dot(element, column[v], tile[r][v]);
    }
    a += a_step;
    b += b_step;
  }
  finish(tile);
}

// The same with rows of a whose lanes are neighbours (a_step = pack). Float32 sums up kChain products at a time, as libraries that
// spread a sum over the lanes do: one long chain would lose digits beside them. `partial` holds a tile.
constexpr int64_t kChain = DK_VEC_LEVEL == 0 ? 8 : 32;  // the plain level rounds products, too

template <class A, int kTileRows, int kVecs, class F>
DK_INLINE void multiply_rows(const typename A::Stored* a, int64_t a_row, const typename A::Stored* b, int64_t b_step, int64_t steps,
                             [[maybe_unused]] float* partial, F&& finish) {
  if constexpr (A::pack == 2) {
    multiply<A, kTileRows, kVecs>(a, a_row, A::pack, b, b_step, steps, finish);
  } else {
    for (int64_t done = 0; done < steps; done += kChain) {
      const bool last = done + kChain >= steps;
      const auto add_up = [&](Vec(&tile)[kTileRows][kVecs]) __attribute__((always_inline)) {
        if (done > 0) {
#pragma GCC unroll 16
          for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 8
            for (int v = 0; v < kVecs; ++v) tile[r][v] = tile[r][v] + load(partial + (r * kVecs + v) * Vec::width, Full{});
          }
        }
        if (last) return finish(tile);
#pragma GCC unroll 16
        for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 8
          for (int v = 0; v < kVecs; ++v) store(partial + (r * kVecs + v) * Vec::width, tile[r][v], Full{});
        }
      };
      multiply<A, kTileRows, kVecs>(a + done, a_row, A::pack, b + done * b_step, b_step, last ? steps - done : kChain, add_up);
    }
  }
}

// Calls f.template operator()<n>() for n = vectors, at most kMaxVecs.
template <class F>
DK_INLINE void with_vectors(int64_t vectors, F&& f) {
  if (vectors == 1) return f.template operator()<1>();
  if constexpr (kMaxVecs >= 3) {
    if (vectors == 3) return f.template operator()<3>();
  }
  return f.template operator()<2>();
}

// 2^v for v <= 100, to be rounded to bfloat16: relative error 3e-6. Far below zero: 0.
DK_INLINE Vec coarse_exp2(Vec v) {
  v = max(Vec(-200.0f), v);
  const Vec n = round_to_integer(v);
  const Vec r = v - n;
  Vec p(0.009570101878f);
  p = fma(p, r, Vec(0.05591786178f));
  p = fma(p, r, Vec(0.2402474484f));
  p = fma(p, r, Vec(0.6931218146f));
  return times_power_of_two(fma(p, r, Vec(0.9999992614f)), n);
}

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Hands out aligned pieces of one block. With a null base it only counts.
struct Arena {
  char* base = nullptr;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
};

// The workspace of a thread: `Buffers` is constructed with (Arena&, args...), once to count and once to place.
template <class Buffers>
class Workspace {
 public:
  template <class... Args>
  explicit Workspace(const Args&... args) {
    Arena counter;
    Buffers counted(counter, args...);
    block_ = std::aligned_alloc(64, counter.used);
    if (block_ == nullptr) throw std::bad_alloc();
    Arena arena{static_cast<char*>(block_)};
    buffers = Buffers(arena, args...);
  }
  ~Workspace() { std::free(block_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  Buffers buffers;

 private:
  void* block_;
};

}  // namespace dreamkernels::attention::DK_ISA
