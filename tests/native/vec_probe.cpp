// Exposes the vector functions of csrc/common/vec.h, at the instruction set this file is compiled for, to the test beside it.
#include "common/vec.h"

namespace {

using namespace dreamkernels;
using namespace dreamkernels::DK_ISA;

template <class F>
void map(const float* from, float* to, int64_t count, F&& f) {
  for_each_vector(count, [&](int64_t i, auto extent) { store(to + i, f(load(from + i, extent)), extent); });
}

}  // namespace

extern "C" {

int width() { return Vec::width; }
void exp_all(const float* from, float* to, int64_t count) {
  map(from, to, count, [](Vec v) { return exp(v); });
}
void tanh_all(const float* from, float* to, int64_t count) {
  map(from, to, count, [](Vec v) { return tanh(v); });
}
void sigmoid_all(const float* from, float* to, int64_t count) {
  map(from, to, count, [](Vec v) { return sigmoid(v); });
}
void sigmoid_for_floats_all(const float* from, float* to, int64_t count) {
  map(from, to, count, [](Vec v) { return sigmoid_for<float>(v); });
}
void sigmoid_for_halves_all(const float* from, float* to, int64_t count) {
  map(from, to, count, [](Vec v) { return sigmoid_for<Half>(v); });
}
void normal_cdf_all(const float* from, float* to, int64_t count) {
  map(from, to, count, [](Vec v) { return standard_normal<float>(v).cdf; });
}
void normal_density_all(const float* from, float* to, int64_t count) {
  map(from, to, count, [](Vec v) { return standard_normal<float>(v).density; });
}
void coarse_normal_cdf_all(const float* from, float* to, int64_t count) {
  map(from, to, count, [](Vec v) { return standard_normal<Half>(v).cdf; });
}
void coarse_normal_density_all(const float* from, float* to, int64_t count) {
  map(from, to, count, [](Vec v) { return standard_normal<Half>(v).density; });
}
float maximum_of(const float* from) { return maximum(load(from, Full{})); }
void larger_and_smaller(const float* a, const float* b, float* larger, float* smaller, float* where_less) {
  const Vec x = load(a, Full{}), y = load(b, Full{});
  store(larger, max(x, y), Full{});
  store(smaller, min(x, y), Full{});
  store(where_less, select_less(x, y, lane_numbers(), Vec(-1.0f)), Full{});
}
// to[k] = c[k] + a[2k] b[2k] + a[2k+1] b[2k+1] after rounding a (given as two rows of first and second elements) to bfloat16.
void dot_of(const float* first, const float* second, const BFloat16* b, const float* c, float* to) {
  BFloat16 stored[2 * Vec::width];
  store_pairs(stored, pairs_of(load(first, Full{}), load(second, Full{})));
  store(to, dot(load_pairs(stored), load_pairs(b), load(c, Full{})), Full{});
}
void dot_with_one_pair(const BFloat16* a, const BFloat16* pair, float* to) {
  store(to, dot(load_pairs(a), broadcast_pair(pair), Vec(0.0f)), Full{});
}

}  // extern "C"
