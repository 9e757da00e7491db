// What the warp-wide instructions compute, for all lanes at once. Fragment layouts: PTX ISA, "Warp-level matrix instructions".
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

namespace emulator {

struct Operands {
  const void* in;
  void* out;
  int argument;
};

inline float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  __builtin_memcpy(&value, &wide, sizeof value);
  return value;
}
inline float from_f16(uint16_t bits) {
  _Float16 value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return static_cast<float>(value);
}

// Lane l receives the word of lane `argument`, which the caller worked out.
inline void run_shuffle(const Operands* lanes, uint32_t mask) {
  uint32_t words[32] = {};
  for (int l = 0; l < 32; ++l) {
    if (mask >> l & 1) words[l] = *static_cast<const uint32_t*>(lanes[l].in);
  }
  for (int l = 0; l < 32; ++l) {
    if (mask >> l & 1) *static_cast<uint32_t*>(lanes[l].out) = words[lanes[l].argument];
  }
}

inline void run_ballot(const Operands* lanes, uint32_t mask) {
  uint32_t votes = 0;
  for (int l = 0; l < 32; ++l) {
    if (mask >> l & 1 && *static_cast<const int*>(lanes[l].in) != 0) votes |= 1u << l;
  }
  for (int l = 0; l < 32; ++l) {
    if (mask >> l & 1) *static_cast<uint32_t*>(lanes[l].out) = votes;
  }
}

// `argument` matrices (1, 2 or 4) of 8 x 8 16-bit values: lane 8 m + r gives the address of row r of matrix m; lane l receives
// values (l / 4, 2 (l % 4)) and the next one of each matrix, or of each transposed matrix. Returns the number of times
// shared memory is read: 8 rows of 16 bytes are one read when they fall into the 8 different groups of 4 banks.
inline int run_ldmatrix(const Operands* lanes, bool transposed) {
  const int matrices = lanes[0].argument;
  int reads = 0;
  for (int m = 0; m < matrices; ++m) {
    const uint16_t* rows[8];
    int in_group[8] = {}, most = 0;
    for (int r = 0; r < 8; ++r) {
      rows[r] = static_cast<const uint16_t*>(lanes[8 * m + r].in);
      most = std::max(most, ++in_group[reinterpret_cast<uintptr_t>(rows[r]) / 16 % 8]);
    }
    reads += most;
    for (int l = 0; l < 32; ++l) {
      uint32_t value[2];
      for (int i = 0; i < 2; ++i) value[i] = transposed ? rows[l % 4 * 2 + i][l / 4] : rows[l / 4][l % 4 * 2 + i];
      static_cast<uint32_t*>(lanes[l].out)[m] = value[0] | value[1] << 16;
    }
  }
  return reads;
}

// d += a b with a [16, 16] (four words per lane), b [16, 8] (two words), d [16, 8] (four floats).
template <class ToFloat>
void run_mma(const Operands* lanes, ToFloat to_float) {
  float a[16][16], b[16][8], d[16][8];
  for (int l = 0; l < 32; ++l) {
    const uint32_t* words = static_cast<const uint32_t*>(lanes[l].in);
    const float* sums = static_cast<const float*>(lanes[l].out);
    const int row = l / 4, column = l % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      const int shift = 16 * half;
      for (int i = 0; i < 4; ++i) a[row + i % 2 * 8][column + half + i / 2 * 8] = to_float(static_cast<uint16_t>(words[i] >> shift));
      for (int i = 0; i < 2; ++i) b[column + half + i * 8][row] = to_float(static_cast<uint16_t>(words[4 + i] >> shift));
      for (int i = 0; i < 2; ++i) d[row + i * 8][column + half] = sums[2 * i + half];
    }
  }
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int l = 0; l < 32; ++l) {
    float* sums = static_cast<float*>(lanes[l].out);
    for (int i = 0; i < 4; ++i) sums[i] = d[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
  }
}

}  // namespace emulator
