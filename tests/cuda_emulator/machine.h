// The state of the emulated machine, and how messages describe it.
#pragma once
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "collectives.h"
#include "context.h"
#include "emulator.h"

namespace emulator {
namespace {  // of each library its own: inline variables would be shared by all that are loaded

constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kStaticSharedBytes = 48 * 1024;
constexpr uint8_t kPoison = 0xff;  // NaN in float32, bfloat16 and float16: shared memory at the start, and what lies behind it

struct Copy {
  char* shared;
  const char* global;
  size_t bytes;
  bool valid;
};

struct Thread {
  enum State { ready, in_collective, at_barrier, exited };
  Context context;
  Position position;
  State state = ready;
  Site site;  // where it waits; else, its last barrier, collective or copy
  Collective kind;
  uint32_t mask;
  Operands operands;
  std::vector<std::vector<Copy>> groups;  // of cp.async; the last one is open
  std::unique_ptr<GuardedMemory> stack;
  RaceChecker::Fiber fiber{}, copier{};
  size_t groups_done = 0;
  char issue_tag, warp_tag, group_tags[16];  // addresses for the race checker; warp_tag of a warp's first lane
};

struct Block {
  std::vector<Thread> threads;
  std::unique_ptr<GuardedMemory> dynamic, fixed;
  size_t dynamic_bytes = 0, fixed_used = 0;
  std::map<const void*, std::pair<char*, size_t>> arrays;
  size_t at_barrier = 0, exited = 0;
  char barrier_tag;
};

struct Machine {
  unsigned seed = 0;
  std::mt19937 random;
  Counters counters{};
  Block* block = nullptr;
  Thread* running = nullptr;  // null: the scheduler
  const std::function<void()>* kernel = nullptr;
  Context scheduler;
  RaceChecker::Fiber scheduler_fiber{};
  std::string failure;
  char start_tag, end_tag;
} machine;

bool chance(unsigned one_in) { return machine.seed != 0 && machine.random() % one_in == 0; }

std::string at(Site site) {
  const std::string file = site.file;
  const size_t slash = file.rfind('/');
  return file.substr(slash == std::string::npos ? 0 : slash + 1) + ":" + std::to_string(site.line);
}

std::string triple(dim3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

size_t number_of(const Thread& thread) { return static_cast<size_t>(&thread - machine.block->threads.data()); }

const char* name_of(Collective kind) {
  constexpr const char* names[] = {"__syncwarp", "shuffle", "ballot", "ldmatrix", "ldmatrix.trans", "mma.bf16", "mma.f16"};
  return names[static_cast<int>(kind)];
}

std::string waiting_at(const Thread& thread) {
  if (thread.state == Thread::exited) return "have exited";
  if (thread.state == Thread::at_barrier) return "wait at __syncthreads (" + at(thread.site) + ")";
  if (thread.state == Thread::in_collective) return std::string("wait at ") + name_of(thread.kind) + " (" + at(thread.site) + ")";
  return "have not arrived";
}

// "threads 0-31 wait at __syncthreads (x.cuh:40); threads 32-63 have exited"
std::string whereabouts() {
  std::string text;
  const auto& threads = machine.block->threads;
  for (size_t first = 0, last; first < threads.size(); first = last) {
    const std::string what = waiting_at(threads[first]);
    for (last = first + 1; last < threads.size() && waiting_at(threads[last]) == what;) ++last;
    text += (first ? "; " : "") + std::string("threads ") + std::to_string(first) + "-" + std::to_string(last - 1) + " " + what;
  }
  return text;
}

std::string where(const Thread& thread) {
  return " in block " + triple(thread.position.block) + ", thread " + std::to_string(number_of(thread));
}

std::string where_block() { return " in block " + triple(machine.block->threads[0].position.block) + ": " + whereabouts(); }

}  // namespace
}  // namespace emulator
