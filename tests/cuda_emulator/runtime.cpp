// The scheduler of the emulator. Never built with a sanitizer: what it tells the race checker, it tells by hand.
#include <algorithm>
#include <csignal>
#include <cstdlib>

#include "machine.h"

namespace emulator {
namespace {

void switch_to_scheduler() {
  Thread& thread = *machine.running;
  machine.running = nullptr;
  RaceChecker::switch_to(machine.scheduler_fiber);
  switch_context(thread.context, machine.scheduler);
}

void run(Thread& thread) {
  machine.running = &thread;
  RaceChecker::switch_to(thread.fiber);
  switch_context(machine.scheduler, thread.context);
}

[[noreturn]] void fail_in_thread(const std::string& message) {
  machine.failure = message;
  switch_to_scheduler();
  abort();  // a failed block is never resumed
}

void fail(const std::string& message) {
  if (machine.running) fail_in_thread(message);
  if (machine.failure.empty()) machine.failure = message;
}

// A thread exited, or the last one arrived.
void open_barrier_if_complete() {
  Block& block = *machine.block;
  if (block.at_barrier == 0 || block.at_barrier + block.exited < block.threads.size()) return;
  const Site first = std::find_if(block.threads.begin(), block.threads.end(), [](const Thread& t) {
                       return t.state == Thread::at_barrier;
                     })->site;
  for (const Thread& thread : block.threads) {
    if (thread.state != Thread::at_barrier || thread.site.line != first.line) return fail("divergent barrier" + where_block());
  }
  block.at_barrier = 0;
  ++machine.counters.barriers;
  for (Thread& thread : block.threads) thread.state = Thread::ready;
}

void land(const Copy& copy) {
  // By words and by hand: memcpy would be seen by the race checker as an access of the thread.
  auto* to = reinterpret_cast<volatile uint32_t*>(copy.shared);
  const auto* from = reinterpret_cast<const volatile uint32_t*>(copy.global);
  for (size_t i = 0; i < copy.bytes / 4; ++i) to[i] = copy.valid ? from[i] : 0;
}

void thread_main() {
  RaceChecker::acquire(&machine.start_tag);
  (*machine.kernel)();
  Thread& self = *machine.running;
  RaceChecker::release(&machine.end_tag);
  RaceChecker::switch_to(self.copier);  // the end of a kernel also ends the copies it has not waited for
  RaceChecker::release(&machine.end_tag);
  RaceChecker::switch_to(self.fiber);
  self.state = Thread::exited;
  Block& block = *machine.block;
  ++block.exited;
  for (const Thread& other : block.threads) {
    const bool same_warp = number_of(other) / 32 == number_of(self) / 32;
    if (same_warp && other.state == Thread::in_collective && other.mask >> self.position.lane & 1) {
      fail("a lane that others wait for has exited" + where_block());
    }
  }
  open_barrier_if_complete();
  switch_to_scheduler();
  abort();
}

struct IgnoreFrees {
  IgnoreFrees() { RaceChecker::ignore_begin(); }
  ~IgnoreFrees() { RaceChecker::ignore_end(); }
};

void prepare_block(Block& block, dim3 id, dim3 grid, dim3 size, size_t dynamic_bytes) {
  if (block.threads.empty()) block.threads = std::vector<Thread>(size_t{size.x} * size.y * size.z);
  // The race checker forgets what it knows of unmapped memory, so that the next block's use of it is no race.
  if (!block.dynamic || RaceChecker::enabled) {
    block.dynamic = std::make_unique<GuardedMemory>(dynamic_bytes);
    block.fixed = std::make_unique<GuardedMemory>(kStaticSharedBytes);
  }
  block.dynamic_bytes = dynamic_bytes;
  for (const GuardedMemory* memory : {block.dynamic.get(), block.fixed.get()}) {
    std::fill(memory->data(), memory->end(), static_cast<char>(kPoison));
  }
  block.arrays.clear();
  block.fixed_used = block.at_barrier = block.exited = 0;
  for (size_t n = 0; n < block.threads.size(); ++n) {
    Thread& thread = block.threads[n];
    if (!thread.stack || RaceChecker::enabled) thread.stack = std::make_unique<GuardedMemory>(kStackBytes);
    const unsigned i = static_cast<unsigned>(n);
    thread.position = {dim3(i % size.x, i / size.x % size.y, i / (size.x * size.y)), id, size, grid, i % 32};
    thread.state = Thread::ready;
    thread.site = {};
    thread.groups.assign(1, {});
    thread.groups_done = 0;
    prepare(thread.context, thread.stack->data(), kStackBytes, thread_main);
    if (RaceChecker::enabled) {
      const std::string name = "block " + triple(id) + " thread " + std::to_string(n);
      thread.fiber = RaceChecker::create(name.c_str());
      thread.copier = RaceChecker::create((name + " cp.async").c_str());
    }
  }
  RaceChecker::release(&machine.start_tag);
}

void check_padding(const Block& block) {
  auto damaged = [](const char* from, const char* to) {
    return std::any_of(from, to, [](char c) { return static_cast<uint8_t>(c) != kPoison; });
  };
  const char* dynamic_end = block.dynamic->data() + block.dynamic_bytes;
  if (damaged(dynamic_end, block.dynamic->end())) fail("a write past the end of dynamic shared memory" + where_block());
  for (const auto& [key, array] : block.arrays) {
    const char* end = array.first + array.second;
    if (damaged(end, end + 128)) fail("a write past the end of a static shared array" + where_block());
  }
}

// Seed 0: every thread in turn, to its next wait. Otherwise one warp at random runs, in a random order of its lanes, until it
// cannot go on or chance interrupts it.
bool run_some(Block& block) {
  bool any = false;
  auto run_ready = [&](size_t n) {
    Thread& thread = block.threads[n];
    if (thread.state != Thread::ready || !machine.failure.empty()) return false;
    run(thread);
    return true;
  };
  if (machine.seed == 0) {
    for (size_t n = 0; n < block.threads.size(); ++n) any |= run_ready(n);
    return any;
  }
  const size_t warps = (block.threads.size() + 31) / 32, first = machine.random() % warps;
  for (size_t k = 0; k < warps && !any; ++k) {
    std::vector<size_t> lanes;
    const size_t begin = (first + k) % warps * 32;
    for (size_t n = begin; n < std::min(begin + 32, block.threads.size()); ++n) lanes.push_back(n);
    for (bool more = true; more && !(any && chance(64));) {
      std::shuffle(lanes.begin(), lanes.end(), machine.random);
      more = false;
      for (size_t n : lanes) more |= run_ready(n);
      any |= more;
    }
  }
  return any;
}

void run_block(Block& block) {
  machine.block = &block;
  while (block.exited < block.threads.size() && machine.failure.empty()) {
    if (!run_some(block)) fail("deadlock" + where_block());
  }
  if (machine.failure.empty()) check_padding(block);
  for (Thread& thread : block.threads) {
    if (!RaceChecker::enabled) break;
    RaceChecker::destroy(thread.fiber);
    RaceChecker::destroy(thread.copier);
  }
  machine.block = nullptr;
}

// An invalid access of a CUDA thread ends the launch, not the process. Others are passed on.
class CatchInvalidAccesses {
 public:
  CatchInvalidAccesses() {
    stack_t mine{};
    mine.ss_sp = memory_;
    mine.ss_size = sizeof memory_;
    sigaltstack(&mine, &previous_stack_);
    struct sigaction action{};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &previous_);
  }
  ~CatchInvalidAccesses() {
    sigaction(SIGSEGV, &previous_, nullptr);
    sigaltstack(&previous_stack_, nullptr);
  }

 private:
  static void handle(int, siginfo_t* information, void*) {
    if (machine.running == nullptr) {
      sigaction(SIGSEGV, &previous_, nullptr);  // on return the access is repeated, and reaches the handler before us
      return;
    }
    const Thread& thread = *machine.running;
    const char* address = static_cast<const char*>(information->si_addr);
    const Block& block = *machine.block;
    std::string what = "an access to an invalid address";
    if (address >= block.dynamic->end() && address < block.dynamic->end() + 4096) what = "an access past the end of dynamic shared memory";
    if (address < thread.stack->data() && address >= thread.stack->data() - 4096) what = "a stack overflow";
    fail_in_thread(what + where(thread) + (thread.site.line ? ", after " + at(thread.site) : ", before any barrier or collective"));
  }
  alignas(16) static inline char memory_[128 * 1024];
  static inline struct sigaction previous_;
  stack_t previous_stack_{};
};

}  // namespace

void set_seed(unsigned seed) { machine.seed = seed; }
Counters& counters() { return machine.counters; }

void launch(dim3 grid, dim3 size, size_t dynamic_shared_bytes, const std::function<void()>& kernel) {
  machine.kernel = &kernel;
  machine.failure.clear();
  machine.random.seed(machine.seed);
  machine.scheduler_fiber = RaceChecker::current();
  std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z);
  for (uint64_t i = 0; i < order.size(); ++i) order[i] = i;
  if (machine.seed) std::shuffle(order.begin(), order.end(), machine.random);
  {
    CatchInvalidAccesses catching;
    IgnoreFrees ignoring;
    Block block;
    for (uint64_t i : order) {
      const dim3 id(static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                    static_cast<unsigned>(i / grid.x / grid.y));
      prepare_block(block, id, grid, size, dynamic_shared_bytes);
      run_block(block);
      if (!machine.failure.empty()) break;
    }
  }
  RaceChecker::acquire(&machine.end_tag);
  if (!machine.failure.empty()) throw Misuse(machine.failure);
}

const Position& position() { return machine.running->position; }

void misuse(const std::string& what, Site site) { fail_in_thread(what + where(*machine.running) + ", at " + at(site)); }

void block_barrier(Site site) {
  Thread& self = *machine.running;
  self.site = site;
  self.state = Thread::at_barrier;
  RaceChecker::release(&machine.block->barrier_tag);
  ++machine.block->at_barrier;
  open_barrier_if_complete();
  switch_to_scheduler();
  RaceChecker::acquire(&machine.block->barrier_tag);
}

void collective(Collective kind, uint32_t mask, const void* in, void* out, int argument, Site site) {
  Thread& self = *machine.running;
  Block& block = *machine.block;
  const size_t warp = number_of(self) / 32 * 32;
  const size_t lanes = std::min<size_t>(32, block.threads.size() - warp);
  if (lanes < 32) mask &= (1u << lanes) - 1;
  if (!(mask >> self.position.lane & 1)) misuse(std::string(name_of(kind)) + ": the mask does not name the calling lane", site);
  if (kind >= Collective::ldmatrix && mask != 0xffffffffu) misuse(std::string(name_of(kind)) + " needs a warp of 32 threads", site);
  self.site = site;
  self.kind = kind;
  self.mask = mask;
  self.operands = {in, out, argument};
  self.state = Thread::in_collective;
  if (kind == Collective::syncwarp) RaceChecker::release(&block.threads[warp].warp_tag);

  Thread* const threads = &block.threads[warp];
  bool complete = true;
  for (size_t l = 0; l < lanes && complete; ++l) {
    if (!(mask >> l & 1)) continue;
    const Thread& other = threads[l];
    if (other.state == Thread::exited) fail("a lane named in the mask has exited" + where_block());
    complete = other.state == Thread::in_collective;
    if (complete && (other.kind != kind || other.site.line != site.line || other.mask != mask)) {
      fail("lanes of one warp are at different collectives" + where_block());
    }
  }
  if (complete) {
    ++machine.counters.collectives;
    Operands operands[32] = {};
    for (size_t l = 0; l < lanes; ++l) operands[l] = threads[l].operands;
    switch (kind) {
      case Collective::syncwarp: break;
      case Collective::shuffle: run_shuffle(operands, mask); break;
      case Collective::ballot: run_ballot(operands, mask); break;
      case Collective::ldmatrix:
      case Collective::ldmatrix_trans:
        ++machine.counters.ldmatrix;
        machine.counters.ldmatrix_wavefronts += run_ldmatrix(operands, kind == Collective::ldmatrix_trans);
        break;
      case Collective::mma_bf16: ++machine.counters.mma; run_mma(operands, from_bf16); break;
      case Collective::mma_f16: ++machine.counters.mma; run_mma(operands, from_f16); break;
    }
    for (size_t l = 0; l < lanes; ++l) {
      if (mask >> l & 1) threads[l].state = Thread::ready;
    }
  } else {
    switch_to_scheduler();
  }
  if (kind == Collective::syncwarp) RaceChecker::acquire(&block.threads[warp].warp_tag);
}

void* dynamic_shared() { return machine.block->dynamic->data(); }

void* static_shared(const void* key, size_t bytes) {
  Block& block = *machine.block;
  auto [entry, is_new] = block.arrays.try_emplace(key);
  if (is_new) {
    const size_t taken = (bytes + 127) / 128 * 128 + 128;  // and padding behind it
    if (block.fixed_used + taken > kStaticSharedBytes) misuse("more than 48 KiB of static shared memory", {});
    entry->second = {block.fixed->data() + block.fixed_used, bytes};
    block.fixed_used += taken;
  }
  return entry->second.first;
}

void check_aligned(const void* address, size_t bytes, const char* what, Site site) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    misuse(std::string(what) + ": address not aligned to " + std::to_string(bytes) + " bytes", site);
  }
}

void check_shared(const void* address, size_t bytes, const char* what, Site site) {
  check_aligned(address, bytes, what, site);
  const Block& block = *machine.block;
  const char* p = static_cast<const char*>(address);
  if (p >= block.dynamic->data() && p + bytes <= block.dynamic->data() + block.dynamic_bytes) return;
  for (const auto& [key, array] : block.arrays) {
    if (p >= array.first && p + bytes <= array.first + array.second) return;
  }
  const auto offset = std::to_string(p - block.dynamic->data());
  misuse(std::string(what) + ": out of shared memory (byte " + offset + " of " + std::to_string(block.dynamic_bytes) + ")", site);
}

void check_shared_read(const void* address, size_t bytes, const char* what, Site site) {
  check_shared(address, bytes, what, site);
  RaceChecker::reads(address, bytes, __builtin_return_address(0));
}

void copy_async(void* shared, const void* global, size_t bytes, bool valid, Site site) {
  check_shared(shared, bytes, "cp.async", site);
  check_aligned(global, bytes, "cp.async", site);
  Thread& self = *machine.running;
  self.site = site;
  ++machine.counters.copies;
  if (RaceChecker::enabled) {
    RaceChecker::release(&self.issue_tag);
    RaceChecker::switch_to(self.copier);
    RaceChecker::acquire(&self.issue_tag);
    if (valid) RaceChecker::reads(global, bytes, __builtin_return_address(0));
    RaceChecker::writes(shared, bytes, __builtin_return_address(0));
    RaceChecker::switch_to(self.fiber);
  }
  const Copy copy{static_cast<char*>(shared), static_cast<const char*>(global), bytes, valid};
  if (chance(2)) {
    land(copy);
  } else {
    self.groups.back().push_back(copy);
  }
}

void copy_async_commit() {
  Thread& self = *machine.running;
  const size_t group = self.groups_done + self.groups.size() - 1;
  if (RaceChecker::enabled) {
    RaceChecker::switch_to(self.copier);
    RaceChecker::release(&self.group_tags[group % sizeof self.group_tags]);
    RaceChecker::switch_to(self.fiber);
  }
  self.groups.emplace_back();
}

void copy_async_wait(int groups_in_flight, Site site) {
  Thread& self = *machine.running;
  self.site = site;
  while (self.groups.size() - 1 > static_cast<size_t>(groups_in_flight)) {
    for (const Copy& copy : self.groups.front()) land(copy);
    self.groups.erase(self.groups.begin());
    RaceChecker::acquire(&self.group_tags[self.groups_done++ % sizeof self.group_tags]);
  }
  if (chance(4)) switch_to_scheduler();  // others may run between the wait and the barrier after it
}

}  // namespace emulator

extern "C" {
void emulator_set_seed(unsigned seed) { emulator::set_seed(seed); }
void emulator_counters(emulator::Counters* to) { *to = emulator::counters(); }
}
