// The CUDA kernel of cross_conditioning on the CPU: for Python, and with EMULATOR_MAIN for the race checker: cross_conditioning SEED.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cross_conditioning/kernel.cuh"

namespace {

using namespace dreamkernels::cross_conditioning::kernels;

template <class E, int kKeys>
void run(const Job& job) {
  emulator::launch(static_cast<int>(job.blocks()), kThreads, shared_elements<kKeys>() * sizeof(E),
                   [=] { cross_conditioning_forward<E, kKeys>(job); });
}

template <class E>
void run(const Job& job) {
  job.keys <= 64 ? run<E, 64>(job) : run<E, 128>(job);
}

}  // namespace

extern "C" const char* cross_conditioning(const Job* job, int64_t half) {
  return emulator::message_of([=] { half ? run<__half>(*job) : run<__nv_bfloat16>(*job); });
}
extern "C" int64_t sizeof_job() { return sizeof(Job); }

#if defined(EMULATOR_MAIN)
int main(int count, char** arguments) {
  const int64_t positions = 150, heads = 2, keys = 64, width = 64, row = heads * width;
  std::vector<uint16_t> q(positions * row, 0x3f80), k(keys * row, 0x3f80), v(k), out(q);
  const Source rows{q.data(), positions * row, row, width}, few{k.data(), keys * row, row, width}, values{v.data(), keys * row, row, width};
  const Job job{rows, few, values, out.data(), 1, 1, positions, heads, keys, width, 2, 0.125f};
  emulator::set_seed(count > 1 ? static_cast<unsigned>(atoi(arguments[1])) : 0);
  if (const char* message = cross_conditioning(&job, 0)) {
    std::printf("%s\n", message);
    return 2;
  }
  std::printf("finished\n");
}
#endif
