// Runs CUDA kernels on the CPU: one fiber per CUDA thread, blocks one after another. Kernels are the shipped sources, compiled by
// g++ with this header in place of the CUDA toolkit (csrc/common/device.h chooses). It proves logic, never performance.
//
// What it is strict about, each with the block, the thread and the line:
//   barriers      every thread of the block arrives, none has exited, all at the same __syncthreads
//   collectives   every lane named in the mask arrives, at the same instruction of the same line
//   shared memory starts as NaN; out-of-bounds and misaligned accesses are errors
//   cp.async      data is there after the right cp_async_wait and, with a seed, for a random half of the copies before it
//   schedules     seed 0: all threads in turn; other seeds: a random warp, lanes in random order, runs as far ahead as it can
// Built with -fsanitize=thread (kernels only, not runtime.cpp) it reports data races, in shared and in global memory: only
// __syncthreads and __syncwarp order memory, and cp.async writes as a thread of its own.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulator {

// Where a kernel calls something: a default argument, so that it names the caller's line.
struct Site {
  const char* file = "";
  int line = 0;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

enum class Collective { syncwarp, shuffle, ballot, ldmatrix, ldmatrix_trans, mma_bf16, mma_f16 };

// What a kernel did wrong. Raised by launch().
struct Misuse : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Position {
  dim3 thread, block, block_size, grid_size;
  unsigned lane;
};

struct Counters {
  uint64_t barriers, collectives, mma, ldmatrix, ldmatrix_wavefronts, copies;
};

// --- for tests ------------------------------------------------------------------------------------------------------------------
void set_seed(unsigned seed);
Counters& counters();
void launch(dim3 grid, dim3 block, size_t dynamic_shared_bytes, const std::function<void()>& kernel);

// Runs f; the message of a misuse, or null. For functions called from Python.
template <class F>
const char* message_of(F&& f) {
  static std::string message;
  try {
    f();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

// --- for device.h ---------------------------------------------------------------------------------------------------------------
const Position& position();
[[noreturn]] void misuse(const std::string& what, Site site);
void block_barrier(Site site);
// Every lane of `mask` calls it with its operands; the last one to arrive computes the results of all.
void collective(Collective kind, uint32_t mask, const void* in, void* out, int argument, Site site);
void* dynamic_shared();
// The address, in this block, of the shared array that `key` stands for.
void* static_shared(const void* key, size_t bytes);
// Shared-memory accesses of instructions that take an address: bounds and alignment.
void check_shared(const void* address, size_t bytes, const char* what, Site site);
void check_shared_read(const void* address, size_t bytes, const char* what, Site site);  // and the race checker sees a read
void check_aligned(const void* address, size_t bytes, const char* what, Site site);
void copy_async(void* shared, const void* global, size_t bytes, bool valid, Site site);
void copy_async_commit();
void copy_async_wait(int groups_in_flight, Site site);

}  // namespace emulator
