#include "resize.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <vector>

#define DK_INLINE inline __attribute__((always_inline))

namespace dreamkernels {
namespace {

constexpr int kFractionBits = 22;  // 255 times the weights of one output, of which some are negative, fit in int32
constexpr int32_t kHalf = 1 << (kFractionBits - 1);
constexpr int64_t kBlock = 64;

// What the outputs `from` to `to` - 1 of one direction are sums of: inputs first[i] to first[i] + count[i] - 1.
struct Taps {
  std::vector<int64_t> first, count;
  std::vector<int32_t> weights;  // `size` per output
  int64_t size;
};

double weight(Filter filter, double x) {
  x = std::fabs(x);
  if (filter == Filter::bilinear) return x < 1.0 ? 1.0 - x : 0.0;
  constexpr double a = -0.5;
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

Taps make_taps(int64_t inputs, int64_t outputs, int64_t from, int64_t to, Filter filter) {
  const double scale = static_cast<double>(inputs) / static_cast<double>(outputs);
  const double stretch = std::max(scale, 1.0);
  const double support = (filter == Filter::bilinear ? 1.0 : 2.0) * stretch;
  Taps taps{{}, {}, {}, static_cast<int64_t>(std::ceil(support)) * 2 + 1};
  taps.weights.assign((to - from) * taps.size, 0);
  std::vector<double> exact(taps.size);
  for (int64_t output = from; output < to; ++output) {
    const double centre = (static_cast<double>(output) + 0.5) * scale;
    const int64_t first = std::max<int64_t>(static_cast<int64_t>(centre - support + 0.5), 0);
    const int64_t count = std::min<int64_t>(static_cast<int64_t>(centre + support + 0.5), inputs) - first;
    double total = 0.0;
    for (int64_t k = 0; k < count; ++k) {
      exact[k] = weight(filter, (static_cast<double>(k + first) - centre + 0.5) * (1.0 / stretch));
      total += exact[k];
    }
    int32_t* row = taps.weights.data() + (output - from) * taps.size;
    for (int64_t k = 0; k < count; ++k) {
      const double scaled = (total != 0.0 ? exact[k] / total : exact[k]) * (1 << kFractionBits);
      row[k] = static_cast<int32_t>(scaled + (scaled < 0 ? -0.5 : 0.5));
    }
    taps.first.push_back(first);
    taps.count.push_back(count);
  }
  return taps;
}

DK_INLINE uint8_t to_byte(int32_t sum) {
  return static_cast<uint8_t>(std::clamp(sum >> kFractionBits, 0, 255));
}

template <int kRows>
struct PixelsOf;
template <>
struct PixelsOf<1> {
  typedef int32_t type __attribute__((vector_size(16)));
};
template <>
struct PixelsOf<2> {
  typedef int32_t type __attribute__((vector_size(32)));
};
template <>
struct PixelsOf<4> {
  typedef int32_t type __attribute__((vector_size(64)));
};

// `height` rows of `width` pixels, the first of which has the number `left`, -> [height, outputs, 3]. kRows rows at a time: their
// pixels, red, green, blue and nothing as int32, fill a vector.
template <int kRows>
DK_INLINE void across_rows(const uint8_t* picture, int64_t height, int64_t width, int64_t left, const Taps& taps, uint8_t* to) {
  using Pixels = typename PixelsOf<kRows>::type;
  const int64_t outputs = static_cast<int64_t>(taps.first.size());
  std::vector<int32_t> spread(static_cast<std::size_t>(width) * 4 * kRows);
  for (int64_t top = 0; top < height; top += kRows) {
    const int rows = static_cast<int>(std::min<int64_t>(kRows, height - top));
    for (int r = 0; r < rows; ++r) {
      const uint8_t* row = picture + (top + r) * width * 3;
      for (int64_t x = 0; x < width; ++x) {
        for (int c = 0; c < 3; ++c) spread[x * 4 * kRows + r * 4 + c] = row[x * 3 + c];
      }
    }
    for (int64_t output = 0; output < outputs; ++output) {
      const int32_t* weights = taps.weights.data() + output * taps.size;
      const int32_t* pixels = spread.data() + (taps.first[output] - left) * 4 * kRows;
      Pixels sum = Pixels{} + kHalf;
      for (int64_t k = 0; k < taps.count[output]; ++k) {
        Pixels at;
        std::memcpy(&at, pixels + k * 4 * kRows, sizeof at);
        sum += at * weights[k];
      }
      for (int r = 0; r < rows; ++r) {
        for (int c = 0; c < 3; ++c) to[((top + r) * outputs + output) * 3 + c] = to_byte(sum[r * 4 + c]);
      }
    }
  }
}

// Rows of `bytes` bytes every `stride` bytes, the first of which has the number `top`, -> one row per output.
DK_INLINE void down_rows(const uint8_t* picture, int64_t stride, int64_t top, int64_t bytes, const Taps& taps, uint8_t* to) {
  const int64_t outputs = static_cast<int64_t>(taps.first.size());
  for (int64_t output = 0; output < outputs; ++output) {
    const int32_t* weights = taps.weights.data() + output * taps.size;
    const uint8_t* rows = picture + (taps.first[output] - top) * stride;
    uint8_t* row = to + output * bytes;
    int64_t i = 0;
    for (; i + kBlock <= bytes; i += kBlock) {
      int32_t sums[kBlock];
      for (int64_t j = 0; j < kBlock; ++j) sums[j] = kHalf;
      for (int64_t k = 0; k < taps.count[output]; ++k) {
        const uint8_t* from = rows + k * stride + i;
        for (int64_t j = 0; j < kBlock; ++j) sums[j] += weights[k] * from[j];
      }
      for (int64_t j = 0; j < kBlock; ++j) row[i + j] = to_byte(sums[j]);
    }
    for (; i < bytes; ++i) {
      int32_t sum = kHalf;
      for (int64_t k = 0; k < taps.count[output]; ++k) sum += weights[k] * rows[k * stride + i];
      row[i] = to_byte(sum);
    }
  }
}

using Pass = void(const uint8_t* picture, int64_t a, int64_t b, int64_t c, const Taps& taps, uint8_t* to);
struct Passes {
  Pass *across, *down;
};

void across_scalar(const uint8_t* p, int64_t a, int64_t b, int64_t c, const Taps& t, uint8_t* to) { across_rows<1>(p, a, b, c, t, to); }
void down_scalar(const uint8_t* p, int64_t a, int64_t b, int64_t c, const Taps& t, uint8_t* to) { down_rows(p, a, b, c, t, to); }

#if defined(__x86_64__)
#define DK_FOR(isa) __attribute__((target(isa)))
DK_FOR("avx2") void across_avx2(const uint8_t* p, int64_t a, int64_t b, int64_t c, const Taps& t, uint8_t* to) {
  across_rows<2>(p, a, b, c, t, to);
}
DK_FOR("avx2") void down_avx2(const uint8_t* p, int64_t a, int64_t b, int64_t c, const Taps& t, uint8_t* to) {
  down_rows(p, a, b, c, t, to);
}
DK_FOR("avx512f") void across_avx512(const uint8_t* p, int64_t a, int64_t b, int64_t c, const Taps& t, uint8_t* to) {
  across_rows<4>(p, a, b, c, t, to);
}
DK_FOR("avx512f") void down_avx512(const uint8_t* p, int64_t a, int64_t b, int64_t c, const Taps& t, uint8_t* to) {
  down_rows(p, a, b, c, t, to);
}
#endif

// Those for this processor, of the levels up to `most`. The sums are of integers: all give the same bits.
Passes passes([[maybe_unused]] Level most) {
#if defined(__x86_64__)
  if (most >= Level::avx512 && __builtin_cpu_supports("avx512f")) return {across_avx512, down_avx512};
  if (most >= Level::avx2 && __builtin_cpu_supports("avx2")) return {across_avx2, down_avx2};
#endif
  return {across_scalar, down_scalar};
}

// The first input that any output needs, and the one behind the last.
struct Needed {
  int64_t first, stop;
};
Needed needed(const Taps& taps) { return {taps.first.front(), taps.first.back() + taps.count.back()}; }

}  // namespace

void resize_crop(const uint8_t* picture, int64_t height, int64_t width, int64_t columns, int64_t rows, const Window& window,
                 Filter filter, bool down_first, uint8_t* to, Level most) {
  const auto [across, down] = passes(most);
  const Taps columns_of = make_taps(width, columns, window.left, window.left + window.width, filter);
  const Taps rows_of = make_taps(height, rows, window.top, window.top + window.height, filter);
  if (down_first) {
    const auto [left, stop] = needed(columns_of);
    std::vector<uint8_t> between(static_cast<std::size_t>(window.height * (stop - left) * 3));
    down(picture + left * 3, width * 3, 0, (stop - left) * 3, rows_of, between.data());
    across(between.data(), window.height, stop - left, left, columns_of, to);
  } else {
    const auto [top, stop] = needed(rows_of);
    std::vector<uint8_t> between(static_cast<std::size_t>((stop - top) * window.width * 3));
    across(picture + top * width * 3, stop - top, width, 0, columns_of, between.data());
    down(between.data(), window.width * 3, top, window.width * 3, rows_of, to);
  }
}

}  // namespace dreamkernels
