// The CUDA kernel of append_kv on the CPU: for Python, and with EMULATOR_MAIN for the race checker: append_kv SEED.
#include "append_kv/kernel.cuh"

#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

using namespace dreamkernels::append_kv;

template <class E, class Table>
void run(const Job& job) {
  constexpr int vector = 16 / sizeof(E);
  const bool packs = kernels::can_use_packs<E, Table, vector>(job);
  emulator::launch(kernels::grid_of(job), kernels::kThreads, 0,
                   [=] { packs ? kernels::append_kv<E, Table, vector>(job) : kernels::append_kv<E, Table, 1>(job); });
}

template <class E>
void run_with_tables(const Job& job, bool float_tables) {
  float_tables ? run<E, float>(job) : run<E, E>(job);
}

}  // namespace

extern "C" const char* append_kv(const Job* job, int64_t element_bytes, int64_t half, int64_t float_tables) {
  return emulator::message_of([=] {
    if (element_bytes == 4) return run<float, float>(*job);
    half ? run_with_tables<__half>(*job, float_tables) : run_with_tables<__nv_bfloat16>(*job, float_tables);
  });
}
extern "C" int64_t sizeof_job() { return sizeof(Job); }

#if defined(EMULATOR_MAIN)
int main(int, char** arguments) {
  const int64_t sequences = 2, tokens = 3, heads = 2, width = 64, page_size = 4, pages = 6, positions = 12;
  const int64_t row = heads * width;
  std::vector<uint16_t> q(sequences * tokens * row, 0x3f80), k(q), v(q), out(q), k_cache(pages * page_size * row), v_cache(k_cache);
  std::vector<uint16_t> weight(width, 0x3f80);
  std::vector<float> table(positions * width, 0.5f);
  const std::vector<int32_t> lengths{3, 0}, block_table{5, 1, 0, 2, 3, 4};
  Job job{};
  job.q = q.data(), job.k = k.data(), job.v = v.data(), job.rotated_q = out.data();
  job.k_cache = k_cache.data(), job.v_cache = v_cache.data();
  job.cache_seqlens = lengths.data();
  job.cos = job.sin = table.data();
  job.q_norm_weight = job.k_norm_weight = weight.data();
  job.q_strides = job.k_strides = job.v_strides = {tokens * row, row, width};
  job.k_cache_strides = job.v_cache_strides = {page_size * row, row, width};
  job.paging = {block_table.data(), page_size, pages, 3};
  job.sequences = sequences, job.tokens = tokens, job.positions = positions;
  job.q_heads = job.kv_heads = heads, job.width = job.rotated = width, job.eps = 1e-6f;
  emulator::set_seed(static_cast<unsigned>(std::atoi(arguments[1])));
  if (const char* message = append_kv(&job, 2, 0, 1)) {
    std::printf("%s\n", message);
    return 2;
  }
  std::printf("finished\n");
}
#endif
