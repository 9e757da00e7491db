// CPU implementation of dreamkernels::attention and attention_backward (schemas: dreamkernels/ops/attention).
#include <atomic>
#include <functional>
#include <optional>
#include <tuple>

#include "attention/kernels.h"
#include "common/tensor.h"

namespace dreamkernels::attention {
namespace {

constexpr int64_t kUnlimited = int64_t{1} << 40;

// The same tensor, or a copy if the elements of a head are not neighbours in memory.
Tensor with_contiguous_heads(const Tensor& x) {
  return x.size(x.dim() - 1) == 1 || x.stride(x.dim() - 1) == 1 ? x : torch::stable::contiguous(x);
}

Heads heads_of(const Tensor& x) { return {x.data_ptr(), x.stride(x.dim() - 3), x.stride(x.dim() - 2)}; }

void check_shapes(const Tensor& q, const Tensor& k, const Tensor& v) {
  const int64_t dims = q.dim();
  const auto keys = k.sizes(), values = v.sizes();
  if ((dims != 3 && dims != 4) || k.dim() != dims || v.dim() != dims || !std::equal(keys.begin(), keys.end(), values.begin())) {
    fail("attention: q ", shape_of(q), ", k ", shape_of(k), " and v ", shape_of(v), " must be [T, H, D] or [B, T, H, D]");
  }
  const int64_t heads = q.size(dims - 2), kv_heads = k.size(dims - 2);
  if (q.size(dims - 1) != k.size(dims - 1) || q.size(dims - 1) < 1 || kv_heads < 1 || heads < 1 || heads % kv_heads != 0 ||
      (dims == 4 && q.size(0) != k.size(0))) {
    fail("attention: q ", shape_of(q), " and k ", shape_of(k), " do not fit (batch and D equal, H a multiple of the heads of k)");
  }
  if (q.scalar_type() != k.scalar_type() || q.scalar_type() != v.scalar_type()) fail("attention: q, k and v must have the same dtype");
}

std::vector<int64_t> read_integers(const Tensor& given, const char* name) {
  if (given.dim() != 1 || given.scalar_type() != ScalarType::Int) fail("attention: ", name, " must be int32 with one dimension");
  const int64_t stride = given.stride(0);
  std::vector<int64_t> values(given.size(0));
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<const int32_t*>(given.data_ptr())[static_cast<int64_t>(i) * stride];
  return values;
}

std::vector<int64_t> read_boundaries(const Tensor& given, const char* name, int64_t tokens) {
  const std::vector<int64_t> values = read_integers(given, name);
  if (values.empty() || values.front() != 0 || values.back() != tokens || !std::is_sorted(values.begin(), values.end())) {
    fail("attention: ", name, " must ascend from 0 to the number of tokens, ", tokens);
  }
  return values;
}

// Where each sequence lies; lse is [heads, tokens], in dense batches [batch, heads, tokens].
std::vector<Sequence> sequences_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor* grad_out,
                                   const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
                                   const std::optional<Tensor>& constant_kv_prefix) {
  const bool packed = cu_seqlens_q.has_value();
  if (packed != cu_seqlens_k.has_value() || packed != (q.dim() == 3)) {
    fail("attention: q ", shape_of(q), " needs ", q.dim() == 3 ? "both" : "neither", " of cu_seqlens_q and cu_seqlens_k");
  }
  std::vector<int64_t> queries, keys;
  if (packed) {
    queries = read_boundaries(*cu_seqlens_q, "cu_seqlens_q", q.size(0));
    keys = read_boundaries(*cu_seqlens_k, "cu_seqlens_k", k.size(0));
    if (queries.size() != keys.size()) fail("attention: cu_seqlens_q and cu_seqlens_k must have the same length");
  }
  const int64_t count = packed ? static_cast<int64_t>(queries.size()) - 1 : q.size(0);
  std::vector<int64_t> constant(count, 0);
  if (constant_kv_prefix) {
    constant = read_integers(*constant_kv_prefix, "constant_kv_prefix");
    if (static_cast<int64_t>(constant.size()) != count) fail("attention: constant_kv_prefix must have one entry per sequence, ", count);
  }
  std::vector<Sequence> sequences(count);
  for (int64_t n = 0; n < count; ++n) {
    Sequence& s = sequences[n];
    const int64_t index_q = packed ? queries[n] : n, index_k = packed ? keys[n] : n;
    s.q = index_q * q.stride(0);
    s.k = index_k * k.stride(0);
    s.v = index_k * v.stride(0);
    s.grad_out = grad_out ? index_q * grad_out->stride(0) : 0;
    s.queries = packed ? queries[n + 1] - queries[n] : q.size(1);
    s.keys = packed ? keys[n + 1] - keys[n] : k.size(1);
    s.first_query = packed ? queries[n] : n * s.queries;
    s.first_key = packed ? keys[n] : n * s.keys;
    s.lse = packed ? queries[n] : n * s.queries * q.size(2);
    s.constant_keys = constant[n];
  }
  return sequences;
}

Visibility visibility_of(bool causal, int64_t window) {
  const int64_t farthest = window < 0 ? kUnlimited : window - 1;
  return {causal ? 0 : -farthest, farthest};
}

Problem problem_of(const Tensor& q, const Tensor& k, const Tensor& v, const std::vector<Sequence>& sequences, bool causal, double scale,
                   int64_t window, double softcap) {
  const int64_t dims = q.dim();
  Problem p{};
  p.q = heads_of(q);
  p.k = heads_of(k);
  p.v = heads_of(v);
  p.sequences = sequences.data();
  p.heads = q.size(dims - 2);
  p.kv_heads = k.size(dims - 2);
  p.head_dim = q.size(dims - 1);
  p.lse_head_stride = q.size(dims - 3);
  p.visibility = visibility_of(causal, window);
  p.scale = static_cast<float>(scale);
  p.softcap = softcap > 0 ? static_cast<float>(softcap) : 0.0f;
  return p;
}

// Dearest first, so that the last ones to finish are small.
void sort_by_cost(std::vector<Task>& tasks, const std::function<int64_t(const Task&)>& cost) {
  std::vector<std::pair<int64_t, size_t>> order(tasks.size());
  for (size_t t = 0; t < tasks.size(); ++t) order[t] = {-cost(tasks[t]), t};
  std::sort(order.begin(), order.end());
  std::vector<Task> sorted(tasks.size());
  for (size_t t = 0; t < tasks.size(); ++t) sorted[t] = tasks[order[t].second];
  tasks = std::move(sorted);
}

// Starts a worker per thread, or fewer where there is little to do; each takes tasks until none is left.
template <class F>
void run_workers(int64_t tasks, int64_t products, const F& worker) {
  constexpr int64_t products_per_thread = 200'000;
  const int64_t workers = std::min({tasks, static_cast<int64_t>(torch::stable::get_num_threads()), products / products_per_thread + 1});
  if (workers <= 1) return worker();
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) { worker(); });
}

// About how many of the pairs of queries [begin, end) and all keys are visible.
int64_t visible_pairs(const Sequence& s, const Visibility& visibility, int64_t begin, int64_t end) {
  const int64_t offset = s.keys - s.queries, middle = (begin + end) / 2;
  const int64_t first = std::max<int64_t>(0, middle + offset - visibility.farthest);
  const int64_t last = std::min(s.keys - 1, middle + offset - visibility.nearest);
  return (end - begin) * std::max<int64_t>(0, last - first + 1);
}

std::vector<Task> forward_tasks_of(const Problem& p, const std::vector<Sequence>& sequences) {
  int64_t blocks = 0;
  for (const Sequence& s : sequences) blocks += (s.queries + kQueryAlignment - 1) / kQueryAlignment * p.heads;
  // Several blocks per task share the packing of keys and values; several tasks per thread even out.
  const int64_t per_task = std::clamp<int64_t>(blocks / (4 * torch::stable::get_num_threads()), 1, 8) * kQueryAlignment;
  std::vector<Task> tasks;
  for (size_t n = 0; n < sequences.size(); ++n) {
    for (int64_t head = 0; head < p.heads; ++head) {
      for (int64_t begin = 0; begin < sequences[n].queries; begin += per_task) {
        tasks.push_back({static_cast<int64_t>(n), head, begin, std::min(begin + per_task, sequences[n].queries), 0});
      }
    }
  }
  return tasks;
}

std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> cu_seqlens_k,
                                     std::optional<Tensor> constant_kv_prefix, int64_t, int64_t, bool causal, double scale,
                                     int64_t window, double softcap) {
  check_shapes(q, k, v);
  q = with_contiguous_heads(q);
  k = with_contiguous_heads(k);
  v = with_contiguous_heads(v);
  const std::vector<Sequence> sequences = sequences_of(q, k, v, nullptr, cu_seqlens_q, cu_seqlens_k, constant_kv_prefix);
  Forward job{problem_of(q, k, v, sequences, causal, scale, window, softcap), nullptr, nullptr};
  const int64_t dims = q.dim();
  Tensor out = new_like(q);
  const std::vector<int64_t> lse_shape =
      dims == 3 ? std::vector{q.size(1), q.size(0)} : std::vector{q.size(0), q.size(2), q.size(1)};
  Tensor lse = new_row_major(q, lse_shape, ScalarType::Float);
  if (q.numel() == 0) return {out, lse};
  job.out = out.data_ptr();
  job.lse = static_cast<float*>(lse.data_ptr());
  Problem& p = job.problem;
  std::vector<Task> tasks = forward_tasks_of(p, sequences);
  int64_t pairs = 0;
  sort_by_cost(tasks, [&](const Task& task) {
    const int64_t visible = visible_pairs(sequences[task.sequence], p.visibility, task.begin, task.end);
    pairs += visible;
    return visible;
  });
  p.tasks = tasks.data();
  p.task_count = static_cast<int64_t>(tasks.size());
  const Element element = element_of(q, "attention");
  const auto kernel = DK_FOR_ACTIVE_ISA(forward_tasks);
  std::atomic<int64_t> next_task{0};
  run_workers(p.task_count, pairs * p.head_dim, [&] { kernel(element, job, next_task); });
  return {out, lse};
}

// Few long sequences of few heads are shared out by ranges of keys, each with a partial grad_q of its own. How many depends on the
// shapes only, and so do the results.
int64_t parts_of(const Sequence& s, int64_t tasks) {
  constexpr int64_t wanted_tasks = 16, least_keys = 384;
  return std::clamp<int64_t>((wanted_tasks + tasks - 1) / tasks, 1, std::max<int64_t>(1, s.keys / least_keys));
}

std::vector<Task> backward_tasks_of(const Problem& p, const std::vector<Sequence>& sequences) {
  const int64_t wholes = static_cast<int64_t>(sequences.size()) * p.kv_heads;
  std::vector<Task> tasks;
  for (size_t n = 0; n < sequences.size(); ++n) {
    const int64_t parts = parts_of(sequences[n], wholes);
    const int64_t keys_per_part = ((sequences[n].keys + parts - 1) / parts + kKeyAlignment - 1) / kKeyAlignment * kKeyAlignment;
    for (int64_t head = 0; head < p.kv_heads; ++head) {
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t begin = std::min(part * keys_per_part, sequences[n].keys), end = std::min(begin + keys_per_part, sequences[n].keys);
        tasks.push_back({static_cast<int64_t>(n), head, begin, end, parts > 1 ? part : -1});
      }
    }
  }
  return tasks;
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor grad_out, std::optional<Tensor> grad_lse, Tensor q, Tensor k, Tensor v,
                                                      Tensor out, Tensor lse, std::optional<Tensor> cu_seqlens_q,
                                                      std::optional<Tensor> cu_seqlens_k, std::optional<Tensor> constant_kv_prefix,
                                                      int64_t, int64_t, bool causal, double scale, int64_t window, double softcap) {
  check_shapes(q, k, v);
  const auto expected = q.sizes(), given = grad_out.sizes();
  if (given.size() != expected.size() || !std::equal(given.begin(), given.end(), expected.begin()) ||
      grad_out.scalar_type() != q.scalar_type() || out.numel() != q.numel() || out.scalar_type() != q.scalar_type()) {
    fail("attention_backward: grad_out ", shape_of(grad_out), " and out ", shape_of(out), " must have the shape ", shape_of(q),
         " and dtype of q");
  }
  q = with_contiguous_heads(q);
  k = with_contiguous_heads(k);
  v = with_contiguous_heads(v);
  grad_out = with_contiguous_heads(grad_out);
  out = row_major(out);
  lse = row_major(lse);
  if (grad_lse) grad_lse = row_major(*grad_lse);
  if (lse.scalar_type() != ScalarType::Float || lse.numel() * q.size(q.dim() - 1) != q.numel() ||
      (grad_lse && (grad_lse->scalar_type() != ScalarType::Float || grad_lse->numel() != lse.numel()))) {
    fail("attention_backward: lse and grad_lse must be float32 with one entry per query and head of q ", shape_of(q));
  }
  const std::vector<Sequence> sequences = sequences_of(q, k, v, &grad_out, cu_seqlens_q, cu_seqlens_k, constant_kv_prefix);
  Tensor grad_q = new_like(q), grad_k = new_like(k), grad_v = new_like(v);
  if (q.numel() == 0 && k.numel() == 0) return {grad_q, grad_k, grad_v};

  Backward job{};
  job.problem = problem_of(q, k, v, sequences, causal, scale, window, softcap);
  job.grad_out = heads_of(grad_out);
  job.out = out.data_ptr();
  job.lse = static_cast<const float*>(lse.data_ptr());
  job.grad_lse = grad_lse ? static_cast<const float*>(grad_lse->data_ptr()) : nullptr;
  job.grad_q = grad_q.data_ptr();
  job.grad_k = grad_k.data_ptr();
  job.grad_v = grad_v.data_ptr();
  Problem& p = job.problem;
  std::vector<Task> tasks = backward_tasks_of(p, sequences);
  int64_t pairs = 0, parts = 0;
  sort_by_cost(tasks, [&](const Task& task) {
    const Sequence& s = sequences[task.sequence];
    parts = std::max(parts, task.part + 1);
    const int64_t visible = s.keys == 0 ? 0 : visible_pairs(s, p.visibility, 0, s.queries) * (task.end - task.begin) / s.keys;
    pairs += visible;
    return p.visibility.nearest == 0 ? visible * 2 * s.keys / std::max<int64_t>(1, s.keys + task.begin) : visible;
  });
  p.tasks = tasks.data();
  p.task_count = static_cast<int64_t>(tasks.size());
  std::optional<Tensor> grad_q_parts;
  if (parts > 1) {
    grad_q_parts = new_row_major(q, {parts, q.numel()}, ScalarType::Float);
    job.grad_q_parts = static_cast<float*>(grad_q_parts->data_ptr());
    job.part_stride = q.numel();
  }
  const Element element = element_of(q, "attention_backward");
  const auto kernel = DK_FOR_ACTIVE_ISA(backward_tasks);
  std::atomic<int64_t> next_task{0};
  run_workers(p.task_count, 2 * pairs * p.heads * p.head_dim, [&] { kernel(element, job, next_task); });

  if (parts > 1) {
    const auto reduce = DK_FOR_ACTIVE_ISA(reduce_grad_q);
    const int64_t wholes = static_cast<int64_t>(sequences.size()) * p.kv_heads, row = p.heads * p.head_dim;
    for (const Sequence& s : sequences) {
      const int64_t own_parts = parts_of(s, wholes);
      if (own_parts == 1) continue;
      torch::stable::parallel_for(s.first_query, s.first_query + s.queries, row_grain(row), [&](int64_t begin, int64_t end) {
        reduce(element, job, own_parts, begin * row, end * row);
      });
    }
  }
  return {grad_q, grad_k, grad_v};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dreamkernels, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention.inference", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace dreamkernels::attention
