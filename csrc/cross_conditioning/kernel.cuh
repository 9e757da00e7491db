// The CUDA kernel of cross_conditioning for bfloat16 and float16, heads up to 64 wide and up to 128 keys, on tensor cores.
//
// A block of four warps keeps the keys and values of one (picture, head) in shared memory and walks over tiles of 64 positions,
// 16 for each warp, which a warp fetches for itself, one tile ahead:
//
//   S [16, keys] = Q K^T in registers -> softmax, all keys at once -> as operand of O [16, 64] = P V -> through shared memory, so
//   that lines are written whole
//
// Rows in shared memory are 64 elements: eight pieces of 16 bytes, of which piece p of row r is kept at p ^ (r % 8), so that
// reading a column of pieces touches all banks.
#pragma once
#include "common/device.h"

namespace dreamkernels::cross_conditioning::kernels {

constexpr int kThreads = 128, kWarps = 4, kWarpRows = 16, kTile = kWarps * kWarpRows, kWidth = 64, kPieces = kWidth / 8;
constexpr float kLog2E = 1.44269504f;

struct Source {
  const void* data;
  int64_t outer, row, head;  // strides in elements, multiples of eight
};

struct Job {
  Source q, k, v;
  void* out;  // row-major
  int64_t pictures, pictures_per_condition, positions, heads, keys, width, tiles_per_block;
  float scale;

  __host__ __device__ int64_t blocks_per_head() const {
    const int64_t tiles = (positions + kTile - 1) / kTile;
    return (tiles + tiles_per_block - 1) / tiles_per_block;
  }
  __host__ __device__ int64_t blocks() const { return pictures * heads * blocks_per_head(); }
};

// Shared memory in elements: two tiles of q, then keys and values.
template <int kKeys>
constexpr int shared_elements() {
  return (2 * kTile + 2 * kKeys) * kWidth;
}

__device__ __forceinline__ int piece_at(int row, int piece) { return row * kWidth + (piece ^ (row % 8)) * 8; }

// Rows [0, rows) of `to` from rows `first` on of x; zeros beyond row `count` and column `width`. By the threads numbered `thread` of
// `threads`.
template <class E>
__device__ __forceinline__ void copy_rows(E* to, int rows, const E* x, int64_t stride, int64_t first, int64_t count, int64_t width,
                                          int thread, int threads) {
  for (int i = thread; i < rows * kPieces; i += threads) {
    const int row = i / kPieces, piece = i % kPieces;
    const bool inside = first + row < count && piece * 8 < width;
    copy_async_16(to + piece_at(row, piece), inside ? x + (first + row) * stride + piece * 8 : x, inside);
  }
}

// s [16, kKeys], as mma leaves it: values 0 and 1 of tile t are keys 8 t + 2 (lane % 4) and the next, of row lane / 4; values 2 and 3 those
// of the row eight further.
template <class E, int kKeys>
__device__ __forceinline__ void multiply_keys(float (&s)[kKeys / 8][4], const E* q, const E* k, int lane) {
#pragma unroll
  for (int step = 0; step < kWidth / 16; ++step) {
    uint32_t rows[4];
    load_matrices<4>(rows, q + piece_at(lane % 16, 2 * step + lane / 16));
#pragma unroll
    for (int pair = 0; pair < kKeys / 16; ++pair) {
      uint32_t columns[4];
      load_matrices<4>(columns, k + piece_at(16 * pair + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
      mma_16_8_16<E>(s[2 * pair], rows, columns[0], columns[1]);
      mma_16_8_16<E>(s[2 * pair + 1], rows, columns[2], columns[3]);
    }
  }
}

__device__ __forceinline__ float maximum_of_four_lanes(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float sum_of_four_lanes(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Products -> exponentials; `reciprocals` of the sums of both rows of this lane.
template <int kKeys>
__device__ __forceinline__ void exponentials(float (&s)[kKeys / 8][4], float (&reciprocals)[2], int64_t keys, float log2_scale,
                                             int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float largest = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int tile = 0; tile < kKeys / 8; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& value = s[tile][2 * half + i];
        value = 8 * tile + lane % 4 * 2 + i < keys ? value * log2_scale : -INFINITY;
        largest = fmaxf(largest, value);
      }
    }
    largest = maximum_of_four_lanes(largest);
#pragma unroll
    for (int tile = 0; tile < kKeys / 8; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& value = s[tile][2 * half + i];
        value = exp2_approximate(value - largest);
        sum += value;
      }
    }
    reciprocals[half] = 1.0f / sum_of_four_lanes(sum);
  }
}

template <class E, int kKeys>
__device__ __forceinline__ void multiply_values(float (&o)[kWidth / 8][4], const float (&s)[kKeys / 8][4], const E* v, int lane) {
#pragma unroll
  for (int step = 0; step < kKeys / 16; ++step) {
    const auto& low = s[2 * step];
    const auto& high = s[2 * step + 1];
    const uint32_t rows[4] = {pack_two<E>(low[0], low[1]), pack_two<E>(low[2], low[3]), pack_two<E>(high[0], high[1]),
                              pack_two<E>(high[2], high[3])};
#pragma unroll
    for (int pair = 0; pair < kWidth / 16; ++pair) {
      uint32_t columns[4];
      load_matrices_transposed<4>(columns, v + piece_at(16 * step + lane / 8 % 2 * 8 + lane % 8, 2 * pair + lane / 16));
      mma_16_8_16<E>(o[2 * pair], rows, columns[0], columns[1]);
      mma_16_8_16<E>(o[2 * pair + 1], rows, columns[2], columns[3]);
    }
  }
}

// A warp's 16 rows of results, through its own rows of shared memory, to positions [first, positions).
template <class E>
__device__ __forceinline__ void write_rows(E* staged, const float (&o)[kWidth / 8][4], const float (&reciprocals)[2], const Job& job,
                                           E* out, int64_t first, int lane) {
#pragma unroll
  for (int tile = 0; tile < kWidth / 8; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Pack<E, 2> two;
      two.value[0] = from_float<E>(o[tile][2 * half] * reciprocals[half]);
      two.value[1] = from_float<E>(o[tile][2 * half + 1] * reciprocals[half]);
      store_pack(staged + piece_at(lane / 4 + 8 * half, tile) + lane % 4 * 2, two);
    }
  }
  __syncwarp();
  for (int i = lane; i < kWarpRows * kPieces; i += 32) {
    const int row = i / kPieces, piece = i % kPieces;
    if (first + row < job.positions && piece * 8 < job.width) {
      store_pack(out + (first + row) * job.heads * job.width + piece * 8, load_pack<Pack<E, 8>>(staged + piece_at(row, piece)));
    }
  }
}

// Three blocks per multiprocessor are enough; left alone, the compiler spills 128 keys for a fourth.
template <class E, int kKeys>
__global__ void __launch_bounds__(kThreads, 3) cross_conditioning_forward(Job job) {
  E* const shared = dynamic_shared<E>();
  E* const k = shared + 2 * kTile * kWidth;
  E* const v = k + kKeys * kWidth;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t per_head = job.blocks_per_head();
  const int64_t block = blockIdx.x % per_head, pair = blockIdx.x / per_head;
  const int64_t head = pair % job.heads, picture = pair / job.heads, condition = picture / job.pictures_per_condition;
  const E* const q = static_cast<const E*>(job.q.data) + picture * job.q.outer + head * job.q.head;
  E* const out = static_cast<E*>(job.out) + (picture * job.positions * job.heads + head) * job.width;
  const int64_t tiles = (job.positions + kTile - 1) / kTile, begin = block * job.tiles_per_block;
  const int64_t end = begin + job.tiles_per_block < tiles ? begin + job.tiles_per_block : tiles;

  const auto fetch = [&](int64_t tile) {
    copy_rows(shared + (tile % 2 * kTile + warp * kWarpRows) * kWidth, kWarpRows, q, job.q.row, tile * kTile + warp * kWarpRows,
              job.positions, job.width, lane, 32);
  };
  copy_rows(k, kKeys, static_cast<const E*>(job.k.data) + condition * job.k.outer + head * job.k.head, job.k.row, 0, job.keys, job.width,
            threadIdx.x, kThreads);
  copy_rows(v, kKeys, static_cast<const E*>(job.v.data) + condition * job.v.outer + head * job.v.head, job.v.row, 0, job.keys, job.width,
            threadIdx.x, kThreads);
  fetch(begin);
  copy_async_commit();
  for (int64_t tile = begin; tile < end; ++tile) {
    if (tile + 1 < end) fetch(tile + 1);
    copy_async_commit();
    copy_async_wait<1>();
    if (tile == begin) {
      __syncthreads();  // the keys and values of all threads
    } else {
      __syncwarp();
    }
    E* const rows = shared + (tile % 2 * kTile + warp * kWarpRows) * kWidth;
    float s[kKeys / 8][4] = {}, o[kWidth / 8][4] = {}, reciprocals[2];
    multiply_keys<E, kKeys>(s, rows, k, lane);
    exponentials<kKeys>(s, reciprocals, job.keys, job.scale * kLog2E, lane);
    multiply_values<E, kKeys>(o, s, v, lane);
    __syncwarp();  // all lanes have read the rows that the results replace
    write_rows(rows, o, reciprocals, job, out, tile * kTile + warp * kWarpRows, lane);
    __syncwarp();  // before the tile after the next is fetched to here
  }
}

}  // namespace dreamkernels::cross_conditioning::kernels
