// The kernels of rotary. Declared once per instruction set (common/isa.h). Strides are in elements; channels are adjacent.
#pragma once
#include "common/elements.h"
#include "common/isa.h"

namespace dreamkernels::rotary {

struct Strides {
  int64_t batch, token, head;
};

// The queries or the keys. In place: y is x, with the same strides.
struct Heads {
  const void* x;
  void* y;
  Strides from, to;
  int64_t count;
};

struct Rotate {
  Heads parts[2];
  const void* cos;
  const void* sin;
  bool float32_tables;  // else of the element type
  // Row of the tables for token t of batch b: positions[b, t] where there are positions, else [b, t].
  const void* positions;
  bool wide_positions;  // int64, else int32
  int64_t position_batch, position_token;
  int64_t cos_batch, cos_row;  // strides in elements
  int64_t sin_batch, sin_row;
  int64_t tokens, width, rotated;  // per sequence; D; R
  bool transposed;                 // the transposed map: the backward
};

// A tile is tokens_per_tile tokens of one sequence, all heads.
constexpr int64_t tokens_per_tile = 32;

DK_DECLARE_KERNEL(rotate_tiles, (Element element, const Rotate& job, int64_t begin_tile, int64_t end_tile))

}  // namespace dreamkernels::rotary
