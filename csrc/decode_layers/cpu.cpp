// CPU implementation of dreamkernels::decode_layers and few_rows_linear (schemas: dreamkernels/ops/decode_layers).
//
// The layers are the kernels of rms_norm, append_kv, decode_attention and swiglu with products between them, as phases of one parallel
// region: at a few rows a layer takes a fraction of a millisecond, of which forks, joins and dispatch would be a large part.
#include <optional>

#include "append_kv/kernels.h"
#include "common/tensor.h"
#include "decode_attention/kernels.h"
#include "decode_layers/kernels.h"
#include "decode_layers/phases.h"
#include "rms_norm/kernels.h"
#include "swiglu/kernels.h"

// Other operators' kernels, for the processor at hand: the macro looks for the levels in its own namespace.
#define DK_KERNEL_OF(operator_, kernel)                                   \
  namespace dreamkernels::operator_ {                                     \
  static auto active_##kernel() { return DK_FOR_ACTIVE_ISA(kernel); }     \
  }
DK_KERNEL_OF(rms_norm, forward_rows)
DK_KERNEL_OF(append_kv, append_rows)
DK_KERNEL_OF(decode_attention, attend_parts)
DK_KERNEL_OF(decode_attention, combine_parts)
DK_KERNEL_OF(swiglu, forward)
DK_KERNEL_OF(decode_layers, multiply)

namespace dreamkernels::decode_layers {
namespace {

// Keys are divided as if for this many cores, whatever the number of threads, so that results do not depend on that.
constexpr int64_t kCores = 8;
constexpr int64_t kWeightsPerLayer = 9;
constexpr int64_t kPhasesPerLayer = 9;
constexpr int64_t kItemBytes = 65536;  // of a weight: 3 us at 20 GB/s

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Outputs of a product that are one item of work, a multiple of 4.
int64_t outputs_per_item(int64_t inputs, int64_t element_bytes) {
  return std::max<int64_t>(16, kItemBytes / std::max<int64_t>(1, inputs * element_bytes) / 4 * 4);
}

// The weights of a layer, in the order in which they are given.
struct Layer {
  const void *attention_norm, *q, *k, *v, *out, *mlp_norm, *gate, *up, *down;
};

struct Shape {
  int64_t rows, hidden, q_heads, kv_heads, width, intermediate, layers;
  int64_t q() const { return q_heads * width; }
  int64_t kv() const { return kv_heads * width; }
  int64_t qkv() const { return q() + 2 * kv(); }
  int64_t weights_of_layer() const { return hidden * (2 * q() + 2 * kv() + 3 * intermediate); }
};

void check(bool holds, const char* what) {
  if (!holds) fail("decode_layers: ", what);
}

void check_weight(const Tensor& weight, const Tensor& like, std::vector<int64_t> shape, const char* name, int64_t layer) {
  const auto sizes = weight.sizes();
  const bool fits = std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
  if (!fits || weight.scalar_type() != like.scalar_type() || !weight.is_contiguous()) {
    std::ostringstream wanted;
    for (size_t d = 0; d < shape.size(); ++d) wanted << (d ? ", " : "") << shape[d];
    fail("decode_layers: ", name, " ", shape_of(weight), " of layer ", layer, " must be [", wanted.str(), "], contiguous, of the dtype of x");
  }
}

Shape checked_shape(const Tensor& x, const std::vector<Tensor>& weights, const Tensor& kv_cache) {
  check(x.dim() == 2, "x must be [B, hidden]");
  check(!weights.empty() && weights.size() % kWeightsPerLayer == 0, "there must be nine weights per layer");
  check(kv_cache.dim() == 5 && kv_cache.scalar_type() == x.scalar_type(), "kv_cache must be [2 L, pages, page_size, Hk, D] of the dtype of x");
  check(kv_cache.stride(4) == 1 || kv_cache.size(4) == 1, "the channels of kv_cache must be adjacent");
  check(weights[1].dim() == 2 && weights[6].dim() == 2, "projections must have two dimensions");
  Shape s{};
  s.rows = x.size(0);
  s.hidden = x.size(1);
  s.layers = static_cast<int64_t>(weights.size()) / kWeightsPerLayer;
  s.kv_heads = kv_cache.size(3);
  s.width = kv_cache.size(4);
  check(s.hidden > 0 && s.kv_heads > 0 && s.width > 0, "x and kv_cache must not be empty");
  check(kv_cache.size(0) == 2 * s.layers, "kv_cache must hold keys and values of every layer");
  check(weights[1].size(0) % s.width == 0, "the queries must be whole heads");
  s.q_heads = weights[1].size(0) / s.width;
  s.intermediate = weights[6].size(0);
  check(s.q_heads > 0 && s.q_heads % s.kv_heads == 0, "the heads of the queries must be a multiple of those of the cache");
  for (int64_t n = 0; n < s.layers; ++n) {
    const Tensor* w = &weights[n * kWeightsPerLayer];
    check_weight(w[0], x, {s.hidden}, "attention_norm", n);
    check_weight(w[1], x, {s.q(), s.hidden}, "q", n);
    check_weight(w[2], x, {s.kv(), s.hidden}, "k", n);
    check_weight(w[3], x, {s.kv(), s.hidden}, "v", n);
    check_weight(w[4], x, {s.hidden, s.q()}, "out", n);
    check_weight(w[5], x, {s.hidden}, "mlp_norm", n);
    check_weight(w[6], x, {s.intermediate, s.hidden}, "gate", n);
    check_weight(w[7], x, {s.intermediate, s.hidden}, "up", n);
    check_weight(w[8], x, {s.hidden, s.intermediate}, "down", n);
  }
  return s;
}

// Before anything is written: a call that fails leaves the cache as it was.
void check_positions(const Paging& paging, const int32_t* positions, int64_t rows, int64_t table_rows) {
  const int64_t limit = std::min(paging.capacity(), table_rows);
  for (int64_t b = 0; b < rows; ++b) {
    if (positions[b] < 0 || positions[b] >= limit) {
      fail("decode_layers: sequence ", b, " writes position ", positions[b], ", but there are ", paging.capacity(), " in the cache and ",
           table_rows, " in cos and sin");
    }
    for (int64_t position = 0; position <= positions[b]; position += paging.page_size) {
      const int64_t page = paging.page_of(b, position);
      if (!paging.has_page(page)) {
        fail("decode_layers: block_table[", b, ", ", position / paging.page_size, "] = ", page, " is not one of ", paging.pages, " pages");
      }
    }
  }
}

// Pieces of one block of memory, 64 bytes apart. First they are counted, then handed out.
class Pieces {
 public:
  template <class T>
  T* take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += divide_up(count * static_cast<int64_t>(sizeof(T)), 64) * 64;
    return piece;
  }
  void* elements(int64_t count, int64_t bytes) { return take<char>(count * bytes); }
  void place(void* base) {
    base_ = reinterpret_cast<char*>(divide_up(reinterpret_cast<intptr_t>(base), 64) * 64);
    used_ = 0;
  }
  int64_t bytes() const { return used_ + 64; }

 private:
  char* base_ = nullptr;
  int64_t used_ = 0;
};

struct Buffers {
  void *residual, *normed, *qkv, *rotated, *attended, *out, *gate, *up, *gated;
  float *lse, *partial_out, *partial_lse;
  int32_t* lengths;

  void lay_out(Pieces& pieces, const Shape& s, int64_t bytes, int64_t splits) {
    residual = pieces.elements(s.rows * s.hidden, bytes);
    normed = pieces.elements(s.rows * s.hidden, bytes);
    qkv = pieces.elements(s.rows * s.qkv(), bytes);
    rotated = pieces.elements(s.rows * s.q(), bytes);
    attended = pieces.elements(s.rows * s.q(), bytes);
    out = pieces.elements(s.rows * s.hidden, bytes);
    gate = pieces.elements(s.rows * s.intermediate, bytes);
    up = pieces.elements(s.rows * s.intermediate, bytes);
    gated = pieces.elements(s.rows * s.intermediate, bytes);
    lse = pieces.take<float>(s.rows * s.q_heads);
    partial_out = pieces.take<float>(splits * s.rows * s.q());
    partial_lse = pieces.take<float>(splits * s.rows * s.q_heads);
    lengths = pieces.take<int32_t>(s.rows);
  }
};

struct Step {
  Shape shape;
  Element element;
  int64_t element_bytes;
  std::vector<Layer> layers;
  const void* final_norm;
  const void* x;
  void* y;
  double eps;
  Buffers buffers;
  append_kv::Job append;            // without caches
  decode_attention::Job attention;  // without caches
  char* kv_cache;
  int64_t cache_bytes;  // between the keys of a layer and its values, and between layers
  bool float_tables;

  void run(Worker& worker) const {
    add_and_norm(worker, nullptr, x, layers[0].attention_norm, buffers.normed);
    for (int64_t n = 0; n < shape.layers; ++n) {
      attend(worker, layers[n], n);
      add_and_norm(worker, buffers.out, buffers.residual, layers[n].mlp_norm, buffers.normed);
      feed_forward(worker, layers[n]);
      const bool last = n + 1 == shape.layers;
      add_and_norm(worker, buffers.out, buffers.residual, last ? final_norm : layers[n + 1].attention_norm, last ? y : buffers.normed);
    }
  }

  // to = norm(added + residual), and the sum becomes the residual. `added` null: residual is what comes in.
  void add_and_norm(Worker& worker, const void* added, const void* residual, const void* weight, void* to) const {
    const auto kernel = rms_norm::active_forward_rows();
    const rms_norm::Forward job{added ? added : residual, added ? residual : nullptr, weight, to, added ? buffers.residual : nullptr,
                                shape.hidden, eps};
    worker.phase(shape.rows, [&](int64_t row) {
      kernel(element, job, row, row + 1);
      if (!added) {
        const int64_t bytes = shape.hidden * element_bytes;
        std::copy_n(static_cast<const char*>(x) + row * bytes, bytes, static_cast<char*>(buffers.residual) + row * bytes);
      }
    });
  }

  void attend(Worker& worker, const Layer& layer, int64_t number) const {
    const int64_t outputs = outputs_per_item(shape.hidden, element_bytes);
    const int64_t q_items = divide_up(shape.q(), outputs), kv_items = divide_up(shape.kv(), outputs);
    worker.phase(q_items + 2 * kv_items, [&](int64_t item) {
      const int64_t part = item < q_items ? 0 : 1 + (item - q_items) / kv_items;
      const void* weight = part == 0 ? layer.q : part == 1 ? layer.k : layer.v;
      const int64_t first = part == 0 ? 0 : shape.q() + (part - 1) * shape.kv();
      const int64_t begin = (part == 0 ? item : (item - q_items) % kv_items) * outputs;
      multiply_part({buffers.normed, shape.hidden, weight, nullptr, at(buffers.qkv, first), shape.qkv(), shape.rows, shape.hidden}, begin,
                    std::min(begin + outputs, part == 0 ? shape.q() : shape.kv()));
    });
    append_kv::Job append_here = append;
    append_here.k_cache = kv_cache + 2 * number * cache_bytes;
    append_here.v_cache = kv_cache + (2 * number + 1) * cache_bytes;
    const auto append_rows = append_kv::active_append_rows();
    worker.phase(shape.rows, [&](int64_t row) {
      append_rows(element, float_tables, append_here, row * append.heads(), (row + 1) * append.heads());
    });
    decode_attention::Job job = attention;
    job.k_cache = append_here.k_cache;
    job.v_cache = append_here.v_cache;
    const auto attend_parts = decode_attention::active_attend_parts();
    worker.phase(shape.rows * shape.kv_heads * job.splits, [&](int64_t task) { attend_parts(element, job, task, task + 1); });
    if (job.splits > 1) {
      const auto combine_parts = decode_attention::active_combine_parts();
      worker.phase(shape.rows, [&](int64_t row) { combine_parts(element, job, row * shape.q_heads, (row + 1) * shape.q_heads); });
    }
    multiply(worker, {buffers.attended, shape.q(), layer.out, nullptr, buffers.out, shape.hidden, shape.rows, shape.q()}, shape.hidden);
  }

  void feed_forward(Worker& worker, const Layer& layer) const {
    const auto activate = swiglu::active_forward();
    const int64_t outputs = outputs_per_item(2 * shape.hidden, element_bytes), width = shape.intermediate;
    worker.phase(divide_up(width, outputs), [&](int64_t item) {
      const int64_t begin = item * outputs, end = std::min(begin + outputs, width);
      const Product job{buffers.normed, shape.hidden, layer.gate, nullptr, buffers.gate, width, shape.rows, shape.hidden};
      multiply_part(job, begin, end);
      Product other = job;
      other.weight = layer.up;
      other.y = buffers.up;
      multiply_part(other, begin, end);
      const int64_t elements = shape.rows * (end - begin);
      activate(element,
               {{at(buffers.gate, begin), width}, {at(buffers.up, begin), width}, {at(buffers.gated, begin), width}, end - begin, elements}, 0,
               divide_up(elements, swiglu::block_elements));
    });
    multiply(worker, {buffers.gated, width, layer.down, nullptr, buffers.out, shape.hidden, shape.rows, width}, shape.hidden);
  }

  void multiply(Worker& worker, const Product& job, int64_t all) const {
    const int64_t outputs = outputs_per_item(job.inputs, element_bytes);
    worker.phase(divide_up(all, outputs), [&](int64_t item) { multiply_part(job, item * outputs, std::min((item + 1) * outputs, all)); });
  }

  void multiply_part(const Product& job, int64_t begin, int64_t end) const {
    active_multiply()(element, job, begin, end);
  }

  void* at(void* buffer, int64_t elements) const { return static_cast<char*>(buffer) + elements * element_bytes; }
};

Tensor decode_layers(Tensor x, std::vector<Tensor> weights, Tensor norm_weight, Tensor kv_cache, Tensor positions, Tensor block_table,
                     Tensor cos, Tensor sin, double eps, double scale, int64_t window) {
  const Shape shape = checked_shape(x, weights, kv_cache);
  check_weight(norm_weight, x, {shape.hidden}, "norm_weight", shape.layers);
  check(positions.dim() == 1 && positions.size(0) == shape.rows && positions.scalar_type() == ScalarType::Int, "positions must be int32 [B]");
  check(block_table.dim() == 2 && block_table.size(0) == shape.rows && block_table.scalar_type() == ScalarType::Int,
        "block_table must be int32 [B, max_pages]");
  check(cos.dim() == 2 && sin.dim() == 2 && cos.size(0) == sin.size(0) && cos.size(1) == sin.size(1), "cos and sin must be [positions, R]");
  check(cos.size(1) % 2 == 0 && cos.size(1) <= shape.width, "R must be even and at most D");
  check(cos.scalar_type() == sin.scalar_type() && (cos.scalar_type() == ScalarType::Float || cos.scalar_type() == x.scalar_type()),
        "cos and sin must have the dtype of x or float32");
  x = row_major(x);
  positions = row_major(positions);
  block_table = row_major(block_table);
  cos = row_major(cos);
  sin = row_major(sin);
  Tensor y = new_like(x);
  if (shape.rows == 0) return y;

  const auto* cached = static_cast<const int32_t*>(positions.data_ptr());
  const Paging paging{static_cast<const int32_t*>(block_table.data_ptr()), kv_cache.size(2), kv_cache.size(1), block_table.size(1)};
  check_positions(paging, cached, shape.rows, cos.size(0));

  const int64_t bytes = x.element_size();
  // From what all calls of a model have in common: a sequence's result must not depend on what else is decoded with it.
  const int64_t splits = decode_attention::choose_splits(shape.kv_heads, cos.size(0), decode_attention::kTileKeys, kCores);
  Pieces pieces;
  Buffers buffers{};
  buffers.lay_out(pieces, shape, bytes, splits);
  Tensor memory = new_row_major(x, {divide_up(pieces.bytes(), static_cast<int64_t>(sizeof(float)))}, ScalarType::Float);
  pieces.place(memory.data_ptr());
  buffers.lay_out(pieces, shape, bytes, splits);
  for (int64_t b = 0; b < shape.rows; ++b) buffers.lengths[b] = cached[b] + 1;

  Step step{};
  step.shape = shape;
  step.element = element_of(x, "decode_layers");
  step.element_bytes = bytes;
  for (int64_t n = 0; n < shape.layers; ++n) {
    const Tensor* w = &weights[n * kWeightsPerLayer];
    step.layers.push_back({w[0].data_ptr(), w[1].data_ptr(), w[2].data_ptr(), w[3].data_ptr(), w[4].data_ptr(), w[5].data_ptr(),
                           w[6].data_ptr(), w[7].data_ptr(), w[8].data_ptr()});
  }
  step.final_norm = norm_weight.data_ptr();
  step.x = x.data_ptr();
  step.y = y.data_ptr();
  step.eps = eps;
  step.buffers = buffers;
  step.kv_cache = static_cast<char*>(kv_cache.data_ptr());
  step.cache_bytes = kv_cache.stride(0) * bytes;
  step.float_tables = cos.scalar_type() == ScalarType::Float;

  const CacheStrides strides{kv_cache.stride(1), kv_cache.stride(2), kv_cache.stride(3)};
  append_kv::Job& append = step.append;
  append.q = buffers.qkv;
  append.k = step.at(buffers.qkv, shape.q());
  append.v = step.at(buffers.qkv, shape.q() + shape.kv());
  append.rotated_q = buffers.rotated;
  append.cache_seqlens = cached;
  append.cos = cos.data_ptr();
  append.sin = sin.data_ptr();
  append.q_strides = append.k_strides = append.v_strides = {shape.qkv(), shape.qkv(), shape.width};
  append.k_cache_strides = append.v_cache_strides = strides;
  append.paging = paging;
  append.sequences = shape.rows;
  append.tokens = 1;
  append.positions = cos.size(0);
  append.q_heads = static_cast<int>(shape.q_heads);
  append.kv_heads = static_cast<int>(shape.kv_heads);
  append.width = static_cast<int>(shape.width);
  append.rotated = static_cast<int>(cos.size(1));

  decode_attention::Job& attention = step.attention;
  attention.q = buffers.rotated;
  attention.cache_seqlens = buffers.lengths;
  attention.out = buffers.attended;
  attention.lse = buffers.lse;
  attention.partial_out = splits > 1 ? buffers.partial_out : nullptr;
  attention.partial_lse = splits > 1 ? buffers.partial_lse : nullptr;
  attention.q_sequence = attention.q_token = shape.q();
  attention.q_head = shape.width;
  attention.k_strides = attention.v_strides = strides;
  attention.paging = paging;
  attention.sequences = shape.rows;
  attention.tokens = 1;
  attention.q_heads = append.q_heads;
  attention.kv_heads = append.kv_heads;
  attention.width = append.width;
  attention.window = static_cast<int>(std::min<int64_t>(window, 2147483647));
  attention.splits = static_cast<int>(splits);
  attention.scale = static_cast<float>(scale);
  attention.causal = true;

  Phases phases(1 + shape.layers * kPhasesPerLayer);
  const int64_t useful = shape.layers * shape.weights_of_layer() / row_grain(1);
  const int64_t threads = std::clamp<int64_t>(useful, 1, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    Worker worker(phases);
    step.run(worker);
  });
  phases.rethrow();
  return y;
}

Tensor few_rows_linear(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  if (x.dim() != 2 || weight.dim() != 2 || x.size(1) != weight.size(1) || x.scalar_type() != weight.scalar_type()) {
    fail("few_rows_linear: x ", shape_of(x), " and weight ", shape_of(weight), " must be [M, K] and [N, K] of one dtype");
  }
  if (bias && (bias->dim() != 1 || bias->size(0) != weight.size(0) || bias->scalar_type() != x.scalar_type())) {
    fail("few_rows_linear: bias ", shape_of(*bias), " must be [", weight.size(0), "] of the dtype of x");
  }
  x = row_major(x);
  weight = row_major(weight);
  if (bias) bias = row_major(*bias);
  const int64_t rows = x.size(0), inputs = x.size(1), outputs = weight.size(0);
  Tensor y = new_row_major(x, {rows, outputs}, x.scalar_type());
  const Product job{x.data_ptr(), inputs, weight.data_ptr(), bias ? bias->data_ptr() : nullptr, y.data_ptr(), outputs, rows, inputs};
  const Element element = element_of(x, "few_rows_linear");
  const auto kernel = active_multiply();
  const int64_t per_item = outputs_per_item(inputs, x.element_size());
  torch::stable::parallel_for(0, divide_up(outputs, per_item), std::max<int64_t>(1, row_grain(inputs) / per_item), [&](int64_t begin, int64_t end) {
    kernel(element, job, begin * per_item, std::min(end * per_item, outputs));
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dreamkernels, CPU, m) {
  m.impl("decode_layers", TORCH_BOX(&decode_layers));
  m.impl("few_rows_linear", TORCH_BOX(&few_rows_linear));
}

}  // namespace dreamkernels::decode_layers
