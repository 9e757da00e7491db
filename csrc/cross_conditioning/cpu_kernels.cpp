#include "cross_conditioning/kernels.h"

#include <cstdlib>
#include <cstring>
#include <new>

#include "cross_conditioning/product.h"

// Per head all keys and values stay in the caches, packed for the products, while blocks of 48 positions pass by:
//
//   forward     S = Q K^T      P = softmax(scale S)      O = P V
//   backward    S, P again     dP = dO V^T      dS = scale P (dP - sum(P dP))      dQ = dS K      dK += dS^T Q      dV += P^T dO
//
// All keys of a head are in one tile, so the softmax needs one pass, and the backward needs neither the output nor a saved
// normaliser: it makes P anew at two elements per exponential, which costs less than reading what it would replace.
namespace dreamkernels::cross_conditioning::DK_ISA {
namespace {

constexpr int64_t kBlock = 48;  // positions; a multiple of the tile's rows and of two
static_assert(kBlock % kTileRows == 0 && kBlock % 2 == 0);

constexpr int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Memory for one call of a kernel, 64-byte aligned and zero at the start.
class Scratch {
 public:
  explicit Scratch(int64_t words) : memory_(static_cast<float*>(std::aligned_alloc(64, words * sizeof(float)))) {
    if (memory_ == nullptr) throw std::bad_alloc();
    std::memset(memory_, 0, words * sizeof(float));
  }
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* take(int64_t words) {
    float* taken = memory_ + used_;
    used_ += words;
    return taken;
  }

 private:
  float* memory_;
  int64_t used_ = 0;
};

// Sizes padded to vectors and tiles; the padding of every packed operand is zero.
struct Padded {
  int64_t keys, width;          // to 16
  int64_t key_row;              // words per row of S: room for whole tiles of keys
  int64_t key_rows;             // rows of the gradients of k and v, whole tiles
  explicit Padded(const Shape& shape)
      : keys(rounded_up(shape.keys, 16)),
        width(rounded_up(shape.width, 16)),
        key_row(rounded_up(shape.keys + kTileRows - 1, 16)),
        key_rows(rounded_up(shape.keys, kTileRows)) {}
};

template <class E>
const E* element_at(const Strided& x, int64_t outer, int64_t row, int64_t head) {
  return static_cast<const E*>(x.data) + outer * x.outer + row * x.row + head * x.head;
}

// How rows of tensor elements become words. `rows_to_words` keeps rows (a word: neighbours within a row, where words are pairs);
// `paired_rows` pairs each row with the next one, for products that sum over rows.
template <class E, class Mode>
struct Packing;

template <class E>
struct Packing<E, Plain> {
  static int64_t words_per_row(int64_t padded_width) { return padded_width; }

  static void rows_to_words(const E* x, int64_t stride, int64_t rows, int64_t width, float* to, int64_t to_row) {
    for (int64_t r = 0; r < rows; ++r) {
      for_each_vector(width, [&](int64_t i, auto extent) __attribute__((always_inline)) {
        store(to + r * to_row + i, load(x + r * stride + i, extent), Full{});
      });
    }
  }
};

template <>
struct Packing<BFloat16, Paired> {
  static int64_t words_per_row(int64_t padded_width) { return padded_width / 2; }

  static void rows_to_words(const BFloat16* x, int64_t stride, int64_t rows, int64_t width, float* to, int64_t to_row) {
    for (int64_t r = 0; r < rows; ++r) std::memcpy(to + r * to_row, x + r * stride, width * sizeof(BFloat16));
  }

  static void paired_rows(const BFloat16* x, int64_t stride, int64_t rows, int64_t width, float* to, int64_t to_row) {
    for (int64_t r = 0; r < rows; r += 2) {
      BFloat16* pairs = reinterpret_cast<BFloat16*>(to + r / 2 * to_row);
      for_each_vector(width, [&](int64_t i, auto extent) __attribute__((always_inline)) {
        const Vec second = r + 1 < rows ? load(x + (r + 1) * stride + i, extent) : Vec();
        store_pairs(pairs + 2 * i, pairs_of(load(x + r * stride + i, extent), second));
      });
    }
  }
};

void transpose(const float* x, int64_t x_row, int64_t rows, int64_t columns, float* to, int64_t to_row) {
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = 0; r < rows; ++r) std::memcpy(to + c * to_row + r, x + r * x_row + c, sizeof(float));
  }
}

// The keys or the values of one head: `transposed` [width, keys] for products over the width, `rows` [keys, width] for products
// over the keys; in words.
template <class E, class Mode>
struct Head {
  float *transposed, *rows, *staging;

  static int64_t words(const Padded& padded) { return 3 * (padded.keys * padded.width); }
  Head(Scratch& scratch, const Padded& padded)
      : transposed(scratch.take(padded.keys * padded.width)),
        rows(scratch.take(padded.keys * padded.width)),
        staging(scratch.take(padded.keys * padded.width)) {}

  void pack(const E* x, int64_t stride, const Shape& shape, const Padded& padded, bool want_transposed, bool want_rows) {
    using Pack = Packing<E, Mode>;
    const int64_t row = Pack::words_per_row(padded.width);
    float* plain = Mode::depth_per_word == 1 ? rows : staging;
    Pack::rows_to_words(x, stride, shape.keys, shape.width, plain, row);
    if (want_transposed) transpose(plain, row, shape.keys, row, transposed, padded.keys);
    if constexpr (Mode::depth_per_word == 2) {
      if (want_rows) Pack::paired_rows(x, stride, shape.keys, shape.width, rows, padded.width);
    }
  }
};

template <class Mode>
int64_t steps_over(int64_t depth) {
  return (depth + Mode::depth_per_word - 1) / Mode::depth_per_word;
}

// Rows of one head are far apart, which the processor's own prefetching does not follow: a block's rows are asked for one block
// ahead. kWrite: they will be written.
template <bool kWrite, class E>
DK_INLINE void prefetch_rows(const E* x, int64_t stride, int64_t rows, int64_t width) {
  constexpr int64_t line = 64 / sizeof(E);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < width; i += line) __builtin_prefetch(x + r * stride + i, kWrite, 2);
  }
}

DK_INLINE int64_t block_rows(int64_t first, int64_t last) {
  return last <= first ? 0 : last - first < kBlock ? last - first : kBlock;
}

// Where a task is.
struct Place {
  int64_t condition, head, picture, first, last;  // positions [first, last)
  Place(const Shape& shape, int64_t task) {
    const int64_t chunk = task % shape.chunks;
    const int64_t of_condition = task / shape.chunks % shape.pictures_per_condition;
    const int64_t pair = task / shape.tasks_per_head();
    head = pair % shape.heads;
    condition = pair / shape.heads;
    picture = condition * shape.pictures_per_condition + of_condition;
    first = chunk * shape.positions_per_chunk;
    last = first + shape.positions_per_chunk;
    if (last > shape.positions) last = shape.positions;
  }
};

constexpr float kMinusInfinity = -__builtin_inff();

DK_INLINE Vec minus_infinity_beyond(Vec v, Full) { return v; }
DK_INLINE Vec minus_infinity_beyond(Vec v, Tail t) {
  return select_less(lane_numbers(), Vec(static_cast<float>(t.count)), v, Vec(kMinusInfinity));
}

// Rows are taken kGroup at a time: the reductions over a row are chains of dependent steps, and those of other rows fill the gaps.
constexpr int kGroup = 4;
static_assert(kBlock % kGroup == 0);

struct Totals {
  Vec of_row[kGroup];
};

// Products at s -> exp(scale s - largest of the row), zero beyond the keys, handed to keep(row, column, value); returns the sums.
template <class Keep>
DK_INLINE Totals exponentials(float* s, int64_t row, int64_t keys, float scale, Keep&& keep) {
  const Vec factor(scale);
  Vec largest[kGroup], total[kGroup];
#pragma GCC unroll 4
  for (int r = 0; r < kGroup; ++r) largest[r] = Vec(kMinusInfinity);
  for_each_vector(keys, [&](int64_t i, auto extent) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int r = 0; r < kGroup; ++r) {
      const Vec v = minus_infinity_beyond(load(s + r * row + i, Full{}) * factor, extent);
      store(s + r * row + i, v, Full{});
      largest[r] = max(v, largest[r]);
    }
  });
#pragma GCC unroll 4
  for (int r = 0; r < kGroup; ++r) largest[r] = Vec(maximum(largest[r]));
  for (int64_t i = 0; i < keys; i += Vec::width) {
#pragma GCC unroll 4
    for (int r = 0; r < kGroup; ++r) {
      const Vec p = exp(load(s + r * row + i, Full{}) - largest[r]);
      keep(r, i, p);
      total[r] = total[r] + p;
    }
  }
  Totals totals;
#pragma GCC unroll 4
  for (int r = 0; r < kGroup; ++r) totals.of_row[r] = Vec(sum(total[r]));
  return totals;
}

template <class E>
DK_INLINE void store_scaled_row(const float* x, Vec scale, int64_t width, E* to) {
  for_each_vector(width, [&](int64_t i, auto extent) __attribute__((always_inline)) {
    store(to + i, load(x + i, Full{}) * scale, extent);
  });
}

template <class E, class Mode>
void forward(const Forward& job, int64_t begin, int64_t end) {
  using Pack = Packing<E, Mode>;
  const Shape& shape = job.shape;
  const Padded padded(shape);
  const int64_t q_row = Pack::words_per_row(padded.width);
  Scratch scratch(2 * Head<E, Mode>::words(padded) + kBlock * (2 * padded.width + 2 * padded.key_row));
  Head<E, Mode> keys(scratch, padded), values(scratch, padded);
  float* q = scratch.take(kBlock * padded.width);
  float* o = scratch.take(kBlock * padded.width);
  float* s = scratch.take(kBlock * padded.key_row);
  float* p = Mode::depth_per_word == 2 ? scratch.take(kBlock * padded.key_row) : s;  // exponentials, as words
  Vec reciprocals[kBlock];
  int64_t packed = -1;
  for (int64_t task = begin; task < end; ++task) {
    const Place at(shape, task);
    if (task / shape.tasks_per_head() != packed) {
      packed = task / shape.tasks_per_head();
      keys.pack(element_at<E>(job.k, at.condition, 0, at.head), job.k.row, shape, padded, true, false);
      values.pack(element_at<E>(job.v, at.condition, 0, at.head), job.v.row, shape, padded, false, true);
    }
    for (int64_t first = at.first; first < at.last; first += kBlock) {
      const int64_t rows = block_rows(first, at.last), next = first + kBlock, next_rows = block_rows(next, at.last);
      const int64_t out_stride = shape.heads * shape.width;
      E* out = static_cast<E*>(job.out) + ((at.picture * shape.positions + first) * shape.heads + at.head) * shape.width;
      Pack::rows_to_words(element_at<E>(job.q, at.picture, first, at.head), job.q.row, rows, shape.width, q, q_row);
      prefetch_rows<false>(element_at<E>(job.q, at.picture, next, at.head), job.q.row, next_rows, shape.width);
      prefetch_rows<true>(out, out_stride, rows, shape.width);
      product<Mode>({q, q_row, 1}, rows, keys.transposed, padded.keys, padded.keys, steps_over<Mode>(shape.width), s,
                    padded.key_row);
      for (int64_t r = 0; r < rows; r += kGroup) {
        float* to = p + r * padded.key_row;
        const Totals totals = exponentials(s + r * padded.key_row, padded.key_row, shape.keys, shape.scale,
                                           [&](int64_t row, int64_t i, Vec v) __attribute__((always_inline)) {
          if constexpr (Mode::depth_per_word == 2) {
            store(reinterpret_cast<BFloat16*>(to + row * padded.key_row) + i, v, Full{});
          } else {
            store(to + row * padded.key_row + i, v, Full{});
          }
        });
        for (int row = 0; row < kGroup; ++row) reciprocals[r + row] = Vec(1.0f) / totals.of_row[row];
      }
      product<Mode>({p, padded.key_row, 1}, rows, values.rows, padded.width, padded.width, steps_over<Mode>(shape.keys), o,
                    padded.width);
      for (int64_t r = 0; r < rows; ++r) {
        store_scaled_row(o + r * padded.width, reciprocals[r], shape.width, out + r * out_stride);
      }
    }
  }
}

// A block of rows of q or of grad_out: `along` for products over the width, `paired` for products over the rows.
template <class E, class Mode>
struct Rows {
  float *along, *paired;

  static int64_t words(const Padded& padded) { return 2 * kBlock * padded.width; }
  Rows(Scratch& scratch, const Padded& padded)
      : along(scratch.take(kBlock * padded.width)), paired(scratch.take(kBlock * padded.width)) {
    if constexpr (Mode::depth_per_word == 1) paired = along;
  }

  void pack(const E* x, int64_t stride, int64_t rows, int64_t width, const Padded& padded) {
    using Pack = Packing<E, Mode>;
    const int64_t row = Pack::words_per_row(padded.width);
    Pack::rows_to_words(x, stride, rows, width, along, row);
    // The rest of the last tile, and the partner of a last odd row, must add nothing to sums over rows.
    const int64_t whole = rounded_up(rounded_up(rows, kTileRows), 2);
    std::memset(along + rows * row, 0, (whole - rows) * row * sizeof(float));
    if constexpr (Mode::depth_per_word == 2) Pack::paired_rows(x, stride, rows, width, paired, padded.width);
  }
};

// A group of rows of s and dp -> P and dS, floats, in place.
DK_INLINE void weights_and_gradients(float* s, float* dp, int64_t row, int64_t keys, float scale) {
  const Totals totals = exponentials(s, row, keys, scale, [&](int64_t r, int64_t i, Vec v) __attribute__((always_inline)) {
    store(s + r * row + i, v, Full{});
  });
  Vec reciprocal[kGroup], delta[kGroup];
#pragma GCC unroll 4
  for (int r = 0; r < kGroup; ++r) reciprocal[r] = Vec(1.0f) / totals.of_row[r];
  for (int64_t i = 0; i < keys; i += Vec::width) {
#pragma GCC unroll 4
    for (int r = 0; r < kGroup; ++r) {
      const Vec p = load(s + r * row + i, Full{}) * reciprocal[r];
      store(s + r * row + i, p, Full{});
      delta[r] = fma(p, load(dp + r * row + i, Full{}), delta[r]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kGroup; ++r) delta[r] = Vec(sum(delta[r]));
  const Vec factor(scale);
  for (int64_t i = 0; i < keys; i += Vec::width) {
#pragma GCC unroll 4
    for (int r = 0; r < kGroup; ++r) {
      const Vec difference = load(dp + r * row + i, Full{}) - delta[r];
      store(dp + r * row + i, load(s + r * row + i, Full{}) * factor * difference, Full{});
    }
  }
}

// Two rows of floats at x and x + row, rounded: as pairs of both rows, and each row in pairs along the keys.
DK_INLINE void round_two_rows(const float* x, int64_t row, int64_t keys, float* both, float* along) {
  BFloat16* across = reinterpret_cast<BFloat16*>(both);
  BFloat16* first = reinterpret_cast<BFloat16*>(along);
  BFloat16* second = reinterpret_cast<BFloat16*>(along + row);
  for (int64_t i = 0; i < keys; i += Vec::width) {
    const Vec a = load(x + i, Full{}), b = load(x + row + i, Full{});
    store_pairs(across + 2 * i, pairs_of(a, b));
    if (along != nullptr) {
      store(first + i, a, Full{});
      store(second + i, b, Full{});
    }
  }
}

template <class E, class Mode>
struct BackwardScratch {
  Padded padded;
  Scratch scratch;
  Head<E, Mode> keys, values;
  Rows<E, Mode> q, grad_out;
  float *s, *dp;                           // P and dS, floats
  float *p_across, *ds_across, *ds_along;  // the same in pairs; where words are floats, s and dp themselves
  float *grad_q, *grad_k, *grad_v;

  explicit BackwardScratch(const Shape& shape)
      : padded(shape),
        scratch(2 * Head<E, Mode>::words(padded) + 2 * Rows<E, Mode>::words(padded) +
                kBlock * (5 * padded.key_row + padded.width) + 2 * padded.key_rows * padded.width),
        keys(scratch, padded),
        values(scratch, padded),
        q(scratch, padded),
        grad_out(scratch, padded),
        s(scratch.take(kBlock * padded.key_row)),
        dp(scratch.take(kBlock * padded.key_row)),
        p_across(scratch.take(kBlock * padded.key_row)),
        ds_across(scratch.take(kBlock * padded.key_row)),
        ds_along(scratch.take(kBlock * padded.key_row)),
        grad_q(scratch.take(kBlock * padded.width)),
        grad_k(scratch.take(padded.key_rows * padded.width)),
        grad_v(scratch.take(padded.key_rows * padded.width)) {
    if constexpr (Mode::depth_per_word == 1) p_across = s, ds_across = ds_along = dp;
  }
};

template <class E, class Mode>
void backward_block(const Backward& job, const Place& at, int64_t first, int64_t rows, BackwardScratch<E, Mode>& use) {
  const Shape& shape = job.shape;
  const Padded& padded = use.padded;
  const int64_t row = Packing<E, Mode>::words_per_row(padded.width), key_row = padded.key_row;
  const int64_t width_steps = steps_over<Mode>(shape.width);
  use.q.pack(element_at<E>(job.q, at.picture, first, at.head), job.q.row, rows, shape.width, padded);
  use.grad_out.pack(element_at<E>(job.grad_out, at.picture, first, at.head), job.grad_out.row, rows, shape.width, padded);
  const int64_t next = first + kBlock, next_rows = block_rows(next, at.last), grad_q_stride = shape.heads * shape.width;
  E* grad_q = job.grad_q == nullptr ? nullptr : static_cast<E*>(job.grad_q) + ((at.picture * shape.positions + first) * shape.heads + at.head) * shape.width;
  prefetch_rows<false>(element_at<E>(job.q, at.picture, next, at.head), job.q.row, next_rows, shape.width);
  prefetch_rows<false>(element_at<E>(job.grad_out, at.picture, next, at.head), job.grad_out.row, next_rows, shape.width);
  if (job.grad_q != nullptr) prefetch_rows<true>(grad_q, grad_q_stride, rows, shape.width);
  product<Mode>({use.q.along, row, 1}, rows, use.keys.transposed, padded.keys, padded.keys, width_steps, use.s, key_row);
  product<Mode>({use.grad_out.along, row, 1}, rows, use.values.transposed, padded.keys, padded.keys, width_steps, use.dp, key_row);
  for (int64_t r = 0; r < rows; r += kGroup) {
    weights_and_gradients(use.s + r * key_row, use.dp + r * key_row, key_row, shape.keys, shape.scale);
  }
  if constexpr (Mode::depth_per_word == 2) {
    if (rows % 2) {  // the partner of an odd last row
      std::memset(use.s + rows * key_row, 0, key_row * sizeof(float));
      std::memset(use.dp + rows * key_row, 0, key_row * sizeof(float));
    }
    for (int64_t r = 0; r < rows; r += 2) {
      if (job.kv_sums != nullptr) round_two_rows(use.s + r * key_row, key_row, padded.keys, use.p_across + r / 2 * key_row, nullptr);
      round_two_rows(use.dp + r * key_row, key_row, padded.keys, use.ds_across + r / 2 * key_row, use.ds_along + r * key_row);
    }
  }
  if (job.grad_q != nullptr) {
    product<Mode>({use.ds_along, key_row, 1}, rows, use.keys.rows, padded.width, padded.width, steps_over<Mode>(shape.keys),
                  use.grad_q, padded.width);
    for (int64_t r = 0; r < rows; ++r) {
      store_scaled_row(use.grad_q + r * padded.width, Vec(1.0f), shape.width, grad_q + r * grad_q_stride);
    }
  }
  if (job.kv_sums != nullptr) {
    const int64_t steps = steps_over<Mode>(rows);
    product<Mode>({use.p_across, 1, key_row}, shape.keys, use.grad_out.paired, padded.width, padded.width, steps, use.grad_v,
                  padded.width, true);
    product<Mode>({use.ds_across, 1, key_row}, shape.keys, use.q.paired, padded.width, padded.width, steps, use.grad_k,
                  padded.width, true);
  }
}

template <class E, class Mode>
void backward(const Backward& job, int64_t begin, int64_t end) {
  const Shape& shape = job.shape;
  BackwardScratch<E, Mode> use(shape);
  const Padded& padded = use.padded;
  int64_t packed = -1;
  for (int64_t task = begin; task < end; ++task) {
    const Place at(shape, task);
    if (task / shape.tasks_per_head() != packed) {
      packed = task / shape.tasks_per_head();
      use.keys.pack(element_at<E>(job.k, at.condition, 0, at.head), job.k.row, shape, padded, true, true);
      use.values.pack(element_at<E>(job.v, at.condition, 0, at.head), job.v.row, shape, padded, true, false);
    }
    std::memset(use.grad_k, 0, padded.key_rows * padded.width * sizeof(float));
    std::memset(use.grad_v, 0, padded.key_rows * padded.width * sizeof(float));
    for (int64_t first = at.first; first < at.last; first += kBlock) {
      backward_block(job, at, first, block_rows(first, at.last), use);
    }
    if (job.kv_sums == nullptr) continue;
    float* sums = job.kv_sums + task * 2 * shape.keys * shape.width;
    for (int64_t key = 0; key < shape.keys; ++key) {
      std::memcpy(sums + key * shape.width, use.grad_k + key * padded.width, shape.width * sizeof(float));
      std::memcpy(sums + (shape.keys + key) * shape.width, use.grad_v + key * padded.width, shape.width * sizeof(float));
    }
  }
}

template <class E>
void reduce(const Reduce& job, int64_t begin, int64_t end) {
  const Shape& shape = job.shape;
  const int64_t tasks = shape.tasks_per_head(), size = shape.keys * shape.width;
  for (int64_t pair = begin; pair < end; ++pair) {
    const int64_t condition = pair / shape.heads, head = pair % shape.heads;
    for (int64_t part = 0; part < 2; ++part) {
      E* gradients = static_cast<E*>(part == 0 ? job.grad_k : job.grad_v);
      for (int64_t key = 0; key < shape.keys; ++key) {
        const float* sums = job.kv_sums + (pair * tasks * 2 + part) * size + key * shape.width;
        E* to = gradients + ((condition * shape.keys + key) * shape.heads + head) * shape.width;
        for_each_vector(shape.width, [&](int64_t i, auto extent) __attribute__((always_inline)) {
          Vec total;
          for (int64_t task = 0; task < tasks; ++task) total = total + load(sums + task * 2 * size + i, extent);
          store(to + i, total, extent);
        });
      }
    }
  }
}

// Pairs only where one instruction multiplies them; elsewhere unpacking them for every product would cost more than float32.
template <class E>
struct ModeOf {
  using type = Plain;
};
#if DK_VEC_LEVEL == 513
template <>
struct ModeOf<BFloat16> {
  using type = Paired;
};
#endif

}  // namespace

void forward_tasks(Element element, const Forward& job, int64_t begin_task, int64_t end_task) {
  with_element(element, [&]<class E>(E*) { forward<E, typename ModeOf<E>::type>(job, begin_task, end_task); });
}

void backward_tasks(Element element, const Backward& job, int64_t begin_task, int64_t end_task) {
  with_element(element, [&]<class E>(E*) { backward<E, typename ModeOf<E>::type>(job, begin_task, end_task); });
}

void reduce_heads(Element element, const Reduce& job, int64_t begin, int64_t end) {
  with_element(element, [&]<class E>(E*) { reduce<E>(job, begin, end); });
}

}  // namespace dreamkernels::cross_conditioning::DK_ISA
