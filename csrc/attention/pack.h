// Between rows of tensors (one token of one head: head_dim elements) and the packed operands of multiply.h.
#pragma once
#include <cstring>

#include "attention/multiply.h"

namespace dreamkernels::attention::DK_ISA {

// Vec::width rows of Vec::width lanes become columns.
DK_INLINE void transpose(Vec (&rows)[Vec::width]) {
#if DK_VEC_LEVEL >= 512
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  __m512 u[16];
  for (int i = 0; i < 16; i += 4) {
    for (int half = 0; half < 2; ++half) {
      const __m512d a = _mm512_castps_pd(t[i + half]), b = _mm512_castps_pd(t[i + half + 2]);
      u[i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      u[i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  // u[4 g + c] holds, in 128-bit lane l, column 4 l + c of rows 4 g to 4 g + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512 even01 = _mm512_shuffle_f32x4(u[c], u[4 + c], 0x88), odd01 = _mm512_shuffle_f32x4(u[c], u[4 + c], 0xdd);
    const __m512 even23 = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0x88), odd23 = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0xdd);
    rows[c].v = _mm512_shuffle_f32x4(even01, even23, 0x88);
    rows[8 + c].v = _mm512_shuffle_f32x4(even01, even23, 0xdd);
    rows[4 + c].v = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
    rows[12 + c].v = _mm512_shuffle_f32x4(odd01, odd23, 0xdd);
  }
#else
  constexpr int w = Vec::width;
  float from[w][w], to[w][w];
  for (int i = 0; i < w; ++i) store(from[i], rows[i], Full{});
  for (int i = 0; i < w; ++i) {
    for (int j = 0; j < w; ++j) to[i][j] = from[j][i];
  }
  for (int i = 0; i < w; ++i) rows[i] = load(to[i], Full{});
#endif
}

// Up to width elements; fewer when count is smaller, the others zero.
template <class E>
DK_INLINE Vec load_upto(const E* p, int64_t count) {
  if (count >= Vec::width) return load(p, Full{});
  return count > 0 ? load(p, Tail{static_cast<int>(count)}) : Vec();
}

// Lanes of the arithmetic: `pack` elements each, beginning at element `d` of a row of head_dim elements; zero beyond.
template <class A, class E>
DK_INLINE Vec load_lanes(const E* row, int64_t d, int64_t head_dim) {
#if DK_VEC_LEVEL == 513
  if constexpr (A::pack == 2) {
    const int64_t count = head_dim - d;
    if (count >= 32) return Vec(_mm512_castsi512_ps(_mm512_loadu_si512(row + d)));
    const __mmask32 mask = count > 0 ? (1u << count) - 1u : 0u;
    return Vec(_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, row + d)));
  } else
#endif
    return load_upto(row + d, head_dim - d);
}

// to[s][lane] = element group s of row `lane`: [ceil(head_dim / pack), lanes] for count <= lanes rows; lanes beyond are zero.
template <class A, class E>
void pack_transposed(const E* rows, int64_t stride, int64_t count, int64_t head_dim, typename A::Stored* to, int64_t lanes) {
  constexpr int w = Vec::width;
  const int64_t steps = (head_dim + A::pack - 1) / A::pack;
  for (int64_t lane = 0; lane < lanes; lane += w) {
    for (int64_t s = 0; s < steps; s += w) {
      Vec block[w];
      for (int i = 0; i < w; ++i) {
        if (lane + i < count) block[i] = load_lanes<A>(rows + (lane + i) * stride, s * A::pack, head_dim);
      }
      transpose(block);
      for (int64_t i = 0; i < w && s + i < steps; ++i) {
        float bits[w];
        store(bits, block[i], Full{});
        std::memcpy(to + ((s + i) * lanes + lane) * A::pack, bits, sizeof bits);
      }
    }
  }
}

// to[s][d] = elements d of rows s * pack ... s * pack + pack - 1: [ceil(count / pack), width], zero beyond count and head_dim.
template <class A, class E>
void pack_rows(const E* rows, int64_t stride, int64_t count, int64_t head_dim, typename A::Stored* to, int64_t width) {
  for (int64_t r = 0; r < count; r += A::pack) {
    const E* row = rows + r * stride;
    typename A::Stored* line = to + r * width;
    for (int64_t d = 0; d < width; d += Vec::width) {
#if DK_VEC_LEVEL == 513
      if constexpr (A::pack == 2) {
        const int64_t left = head_dim - d;
        const __mmask16 mask = left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1u : 0u;
        const __m512i first = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row + d));
        const __m512i second =
            r + 1 < count ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row + stride + d)) : _mm512_setzero_si512();
        _mm512_storeu_si512(line + d * 2, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
        continue;
      }
#endif
      if constexpr (A::pack == 1) store(line + d, load_upto(row + d, head_dim - d), Full{});
    }
  }
}

// Rows of keys or values as the left operand of a product over head_dim: in place where the tensor allows it, else a copy. The last
// incomplete group of kRows rows is always a copy, with rows of zeros.
template <class A>
class LeftRows {
 public:
  using Stored = typename A::Stored;

  static int64_t elements(int64_t rows, int64_t head_dim) { return round_up(rows, kRows) * round_up(head_dim, A::pack); }

  // `copies` holds elements(count, head_dim).
  template <class E>
  void prepare(const E* rows, int64_t stride, int64_t count, int64_t head_dim, Stored* copies) {
    copies_ = copies;
    copy_stride_ = round_up(head_dim, A::pack);
    in_place_ = 0;
    if constexpr (sizeof(E) == sizeof(Stored)) {
      if (head_dim % A::pack == 0) {
        in_place_ = count / kRows * kRows;
        rows_ = reinterpret_cast<const Stored*>(rows);
        stride_ = stride;
      }
    }
    for (int64_t r = in_place_; r < round_up(count, kRows); ++r) {
      Stored* to = copies + r * copy_stride_;
      if (r >= count) {
        std::memset(to, 0, copy_stride_ * sizeof(Stored));
      } else {
        copy_row(rows + r * stride, head_dim, to);
      }
    }
  }
  const Stored* row(int64_t r) const { return r < in_place_ ? rows_ + r * stride_ : copies_ + r * copy_stride_; }
  int64_t stride(int64_t r) const { return r < in_place_ ? stride_ : copy_stride_; }

 private:
  template <class E>
  void copy_row(const E* from, int64_t head_dim, Stored* to) {
    if constexpr (A::pack == 2) {
      if (head_dim % 2) to[head_dim] = Stored{0};
      std::memcpy(to, from, head_dim * sizeof(E));
    } else {
      for_each_vector(head_dim, [&](int64_t d, auto extent) __attribute__((always_inline)) {
        store(to + d, load(from + d, extent), extent);
      });
    }
  }
  const Stored* rows_ = nullptr;
  Stored* copies_ = nullptr;
  int64_t stride_ = 0, copy_stride_ = 0, in_place_ = 0;
};

// to row `lane` = column `lane` of from [head_dim, lanes] times factors[lane], for lane < count.
template <class E>
void store_transposed(const float* from, int64_t lanes, const float* factors, int64_t count, int64_t head_dim, E* to, int64_t stride) {
  constexpr int w = Vec::width;
  for (int64_t lane = 0; lane < count; lane += w) {
    const Vec factor = load(factors + lane, Full{});
    for (int64_t d = 0; d < head_dim; d += w) {
      Vec block[w];
      for (int64_t i = 0; i < w && d + i < head_dim; ++i) block[i] = load(from + (d + i) * lanes + lane, Full{}) * factor;
      transpose(block);
      for (int64_t i = 0; i < w && lane + i < count; ++i) {
        E* row = to + (lane + i) * stride + d;
        if (d + w <= head_dim) {
          store(row, block[i], Full{});
        } else {
          store(row, block[i], Tail{static_cast<int>(head_dim - d)});
        }
      }
    }
  }
}

}  // namespace dreamkernels::attention::DK_ISA
