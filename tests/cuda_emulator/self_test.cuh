// A small kernel that uses everything the emulator emulates, and the mistakes it must catch: one per value of `mistake`.
//
// out[row] = sum over columns of (A B)[row], for A [16, 16 * tiles] and B [16 * tiles, 8] of 16-bit values. Two warps load tiles of A
// and B by cp.async into two buffers; the first warp multiplies; both add up the product through shared memory.
#pragma once
#include "common/device.h"

namespace self_test {

using namespace dreamkernels;

enum Mistake {
  none,
  missing_barrier_before_use,
  missing_barrier_after_use,
  wait_for_too_few_groups,
  lane_skips_collective,
  warp_skips_barrier,
  misaligned_copy,
  misaligned_pack,
  copy_out_of_shared_memory,
  write_past_dynamic_shared_memory,
  write_past_static_shared_array,
  shuffle_from_lane_outside_mask,
  unordered_warp_exchange,
  lane_exits_before_collective,
  blocks_write_the_same_row,
  invalid_global_address,
};

constexpr int kThreads = 64;
constexpr int kTileA = 16 * 16, kTileB = 16 * 8;
constexpr int kSharedElements = 2 * (kTileA + kTileB);

template <class E>
__device__ void copy_tile(E* to, const E* a, const E* b, int tile, int tiles, Mistake mistake) {
  // 32 + 16 pieces of 16 bytes.
  const int piece = threadIdx.x;
  if (piece < 32) {
    const int row = piece / 2, half = piece % 2;
    copy_async_16(to + row * 16 + half * 8, a + row * 16 * tiles + tile * 16 + half * 8, true);
  } else if (piece < 48) {
    const int row = piece - 32, off = mistake == misaligned_copy ? 1 : mistake == copy_out_of_shared_memory ? kSharedElements : 0;
    copy_async_16(to + kTileA + row * 8 + off, b + (tile * 16 + row) * 8, true);
  }
}

template <class E>
__global__ void __launch_bounds__(kThreads) row_sums(const E* a, const E* b, float* out, int tiles, Mistake mistake) {
  E* const shared = dynamic_shared<E>();
  DK_SHARED_ARRAY(float, product, 16 * 8);
  DK_SHARED_ARRAY(float, exchanged, 32);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  a += int64_t{blockIdx.x} * kTileA * tiles;
  if (mistake == invalid_global_address) b += int64_t{1} << 40;
  float sums[4] = {};
  copy_tile(shared, a, b, 0, tiles, mistake);
  copy_async_commit();
  for (int tile = 0; tile < tiles; ++tile) {
    const E* const held = shared + tile % 2 * (kTileA + kTileB);
    if (tile + 1 < tiles) copy_tile(shared + (tile + 1) % 2 * (kTileA + kTileB), a, b, tile + 1, tiles, mistake);
    copy_async_commit();
    mistake == wait_for_too_few_groups ? copy_async_wait<2>() : copy_async_wait<1>();
    if (mistake != missing_barrier_before_use) __syncthreads();
    if (warp == 0 && !(mistake == lane_exits_before_collective && lane == 7)) {
      uint32_t fragment[4], other[2];
      if (!(mistake == lane_skips_collective && lane == 5)) load_matrices<4>(fragment, held + lane % 16 * 16 + lane / 16 * 8);
      load_matrices_transposed<2>(other, held + kTileA + lane % 16 * 8);
      mma_16_8_16<E>(sums, fragment, other[0], other[1]);
    } else if (mistake == lane_exits_before_collective && warp == 0) {
      return;
    }
    if (mistake != missing_barrier_after_use && !(mistake == warp_skips_barrier && warp == 1)) __syncthreads();
  }
  if (warp == 0) {
    for (int i = 0; i < 4; ++i) product[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
  }
  if (mistake == write_past_static_shared_array && threadIdx.x == 3) (&product[0])[16 * 8] = 1.0f;
  if (mistake == write_past_dynamic_shared_memory && threadIdx.x == 3) shared[kSharedElements] = from_float<E>(1.0f);
  __syncthreads();
  const int row = threadIdx.x / 4, part = threadIdx.x % 4;
  using Two = Pack<float, 2>;
  const Two two = load_pack<Two>(&product[row * 8 + part * 2 + (mistake == misaligned_pack ? 1 : 0)]);
  float sum = two.value[0] + two.value[1];
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  const unsigned mask = mistake == shuffle_from_lane_outside_mask ? 1u << lane : 0xffffffffu;
  sum += __shfl_down_sync(mask, sum, 2, 4);
  // Rows 0 to 7 go through shared memory to the neighbouring lane's group and back.
  if (warp == 0) {
    exchanged[lane] = sum;
    if (mistake != unordered_warp_exchange) __syncwarp();
    const float left = exchanged[(lane + 28) % 32];
    __syncwarp();
    exchanged[lane] = left;
    __syncwarp();
    sum = exchanged[(lane + 4) % 32];
  }
  const bool all_finite = __all_sync(0xffffffffu, sum == sum);
  const int64_t block = mistake == blocks_write_the_same_row ? 0 : blockIdx.x;
  if (part == 0) out[block * 16 + row] = all_finite ? __shfl_sync(0x11111111u, sum, lane) : 1e30f;
}

}  // namespace self_test
