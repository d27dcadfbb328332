// A decoder-only transformer: one step over tokens of many requests, on a team of threads.
//
//   x = embedding[tokens] * embedding_scale
//   per layer   x += [post norm](O . attention(rope([qk norm](QKV . norm(x) + bias))))
//               x += [post norm](down . (activation(gate . n) * (up . n)))       n = norm(x)
//   logits = head . norm(x)[tokens asked for]
//
// The whole network is one parallel region; threads meet at barriers between the parts. Every
// part treats rows independently (gemm.h, attention.h), so tokens of a request are the same alone,
// in a batch, in any chunking. Sums run in float32; activations are rounded to bf16 before a
// product with a matrix that is not F32.
//
// hidden_size, intermediate_size and head_dim are multiples of 16, of 32 where groups need it, and
// block_size is a multiple of 16: the Python side checks it.
#pragma once

#include <sys/mman.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "attention.h"
#include "gemm.h"
#include "threads.h"

namespace roost {

// As the Python side lays them out (roost_kernels/cpu_decoder.py).
struct DecoderConfig {
  int32_t hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim;
  int32_t vocab_size, num_blocks, block_size, num_positions, max_tokens;
  int32_t kv_is_f32, uses_gelu, sliding_window;
  float rms_norm_eps, embedding_scale, attention_scale;
  int32_t unused;
};

struct LayerWeights {
  Matrix qkv, o, gate_up, down;
  const float *attention_norm, *mlp_norm;
  const float *qkv_bias;                            // or null
  const float *q_norm, *k_norm;                     // (head_dim,) or null
  const float *post_attention_norm, *post_mlp_norm; // or null
  const float *cos, *sin;                           // (num_positions, head_dim / 2)
  int32_t slides;
  int32_t unused;
};

struct ModelWeights {
  const LayerWeights* layers;
  Matrix head;
  const float* final_norm;
  const uint8_t* embedding;  // stored rows
  int64_t embedding_row_bytes;
  Encoding embedding_encoding;
  int32_t unused;
};

// One request's share of a step: `num_tokens` consecutive rows.
struct StepChunk {
  int32_t row, start, num_tokens, wants_logits;
  const int32_t* block_table;
};

// Zeroed memory in huge pages where the system has them: 12 to 45 % more bandwidth from DRAM.
class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t num_bytes) : num_bytes_((num_bytes + kHuge - 1) / kHuge * kHuge) {
    if (num_bytes_ == 0) return;
    data_ = mmap(nullptr, num_bytes_ + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                 -1, 0);
    if (data_ == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    madvise(data_, num_bytes_ + kHuge, MADV_HUGEPAGE);
#endif
  }
  Memory(Memory&& other) noexcept : data_(other.data_), num_bytes_(other.num_bytes_) {
    other.data_ = nullptr;
    other.num_bytes_ = 0;
  }
  Memory& operator=(Memory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(num_bytes_, other.num_bytes_);
    return *this;
  }
  ~Memory() {
    if (data_ != nullptr) munmap(data_, num_bytes_ + kHuge);
  }

  template <class T>
  T* as() const {
    const uintptr_t address = reinterpret_cast<uintptr_t>(data_);
    return reinterpret_cast<T*>((address + kHuge - 1) / kHuge * kHuge);
  }

 private:
  static constexpr size_t kHuge = size_t{1} << 21;
  void* data_ = nullptr;
  size_t num_bytes_ = 0;
};

class Decoder {
 public:
  Decoder(const DecoderConfig& config, const ModelWeights& model, int num_threads)
      : config_(config),
        model_(model),
        layers_(model.layers, model.layers + config.num_layers),
        shape_{config.head_dim, config.num_kv_heads, config.block_size},
        team_(num_threads) {
    q_size_ = config.num_heads * config.head_dim;
    kv_size_ = config.num_kv_heads * config.head_dim;
    qkv_width_ = padded(q_size_ + 2 * kv_size_);
    const size_t rows = config.max_tokens;
    const size_t hidden = config.hidden_size;
    const size_t widest =
        std::max({hidden, static_cast<size_t>(config.intermediate_size), size_t(q_size_)});
    const size_t element = config.kv_is_f32 ? 4 : 2;
    x_ = Memory(rows * hidden * 4);
    normed_ = Memory(rows * hidden * 4);
    wide_ = Memory(rows * widest * 4);
    rounded_ = Memory(rows * widest * 2);
    sums_ = Memory(rows * (widest / kGroup + 1) * sizeof(GroupSum));
    qkv_ = Memory(rows * qkv_width_ * 4);
    const size_t positions = (config.num_positions + 2 * kRun) / kRun * kRun;
    for (int i = 0; i < num_threads; i++)
      scratch_.push_back(Memory(kMaxQueries * positions * sizeof(float)));
    layer_elements_ = static_cast<size_t>(config.num_blocks) * shape_.block_size_elements();
    cache_ = Memory(layer_elements_ * element * config.num_layers);
  }

  // Compute the chunks; logits: (chunks that want them, logits_width) in their order. False if it
  // was interrupted: logits, and keys and values of the chunks' own positions, are then undefined.
  bool step(const int32_t* tokens, int num_tokens, const StepChunk* chunks, int num_chunks,
            float* logits, int logits_width) {
    tokens_ = tokens;
    num_tokens_ = num_tokens;
    chunks_ = chunks;
    logits_ = logits;
    logits_width_ = logits_width;
    plan(num_chunks);
    const int num_shares = config_.num_layers * 12 + 3;  // as `compute` counts them at most
    return team_.run(num_shares, [this](int thread) {
      if (config_.kv_is_f32) compute<float>(thread);
      else compute<half>(thread);
    });
  }

  // Make the step under way return early, if there is one. From any thread.
  void interrupt() { team_.interrupt(); }

  // A block's keys and values of all layers, to or from `elements` (layers, block).
  void copy_block(int block, uint8_t* elements, bool into_cache) const {
    const size_t element = config_.kv_is_f32 ? 4 : 2;
    const size_t num_bytes = shape_.block_size_elements() * element;
    for (int layer = 0; layer < config_.num_layers; layer++, elements += num_bytes) {
      uint8_t* cached = cache_.as<uint8_t>() + layer * layer_elements_ * element +
                        static_cast<size_t>(block) * num_bytes;
      if (into_cache) memcpy(cached, elements, num_bytes);
      else memcpy(elements, cached, num_bytes);
    }
  }

 private:
  static constexpr int kActivationsAtOnce = 150000;  // bf16: 300 KB

  // Queries of one request that are attended together: rows of the step times heads.
  struct AttentionTile {
    int chunk, first_query, num_queries;
  };

  static size_t padded(size_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

  void plan(int num_chunks) {
    tiles_.clear();
    chunk_of_row_.resize(num_tokens_);
    logits_rows_.clear();
    const int group = config_.num_heads / config_.num_kv_heads;
    const int queries_a_tile = std::max(1, kMaxQueries / group);
    for (int index = 0; index < num_chunks; index++) {
      const StepChunk& chunk = chunks_[index];
      for (int i = 0; i < chunk.num_tokens; i++) chunk_of_row_[chunk.row + i] = index;
      if (chunk.wants_logits) logits_rows_.push_back(chunk.row + chunk.num_tokens - 1);
      for (int i = 0; i < chunk.num_tokens; i += queries_a_tile)
        tiles_.push_back({index, i, std::min(queries_a_tile, chunk.num_tokens - i)});
    }
    // Long ones first, so that no thread is left with one at the end.
    std::stable_sort(tiles_.begin(), tiles_.end(), [this](const auto& a, const auto& b) {
      return end_of(a) > end_of(b);
    });
  }

  int end_of(const AttentionTile& tile) const {
    return chunks_[tile.chunk].start + tile.first_query + tile.num_queries;
  }

  template <class T>
  void compute(int thread) {
    int share = 0;
    float* x = x_.as<float>();
    const size_t x_width = config_.hidden_size;
    team_.share(share++, thread, num_tokens_, [&](int row) { embed(row, x + row * x_width); });
    for (int index = 0; index < config_.num_layers; index++) {
      const LayerWeights& layer = layers_[index];
      const KvView<T> kv{cache_.as<T>() + index * layer_elements_, shape_};
      team_.share(share++, thread, num_tokens_, [&](int row) {
        prepare_normed(row, x + row * x_width, layer.attention_norm, layer.qkv);
      });
      product(share++, thread, layer.qkv, normed_.as<float>(), num_tokens_,
              {Output::Kind::kStore, qkv_.as<float>(), static_cast<int>(qkv_width_),
               layer.qkv_bias, false});
      team_.share(share++, thread, num_tokens_, [&](int row) { rotate_and_store(row, layer, kv); });
      const int num_items = static_cast<int>(tiles_.size()) * config_.num_kv_heads;
      team_.share(share++, thread, num_items, [&](int item) {
        attend_tile(tiles_[item / config_.num_kv_heads], item % config_.num_kv_heads, layer, kv,
                    thread);
      });
      team_.share(share++, thread, num_tokens_, [&](int row) {
        prepare(row, wide_.as<float>() + static_cast<size_t>(row) * q_size_, layer.o);
      });
      add_product(share, thread, layer.o, layer.post_attention_norm);
      team_.share(share++, thread, num_tokens_, [&](int row) {
        prepare_normed(row, x + row * x_width, layer.mlp_norm, layer.gate_up);
      });
      product(share++, thread, layer.gate_up, normed_.as<float>(), num_tokens_,
              {Output::Kind::kGated, wide_.as<float>(), config_.intermediate_size, nullptr,
               config_.uses_gelu != 0});
      team_.share(share++, thread, num_tokens_, [&](int row) {
        prepare(row, wide_.as<float>() + static_cast<size_t>(row) * config_.intermediate_size,
                layer.down);
      });
      add_product(share, thread, layer.down, layer.post_mlp_norm);
    }
    const int num_logits = static_cast<int>(logits_rows_.size());
    team_.share(share++, thread, num_logits, [&](int i) {
      prepare_normed(i, x + logits_rows_[i] * x_width, model_.final_norm, model_.head);
    });
    product(share++, thread, model_.head, normed_.as<float>(), num_logits,
            {Output::Kind::kStore, logits_, logits_width_, nullptr, false});
  }

  void embed(int row, float* out) const {
    const int k = config_.hidden_size;
    const uint8_t* stored = model_.embedding + tokens_[row] * model_.embedding_row_bytes;
    decode_row(model_.embedding_encoding, stored, k, out);
    if (config_.embedding_scale == 1.f) return;
    for (int i = 0; i < k; i++) out[i] *= config_.embedding_scale;
  }

  static void norm(const float* x, const float* weight, int k, float eps, float* out) {
    Floats squares = splat(0.f);
    for (int i = 0; i < k; i += kLanes) {
      const Floats v = load(x + i);
      squares = fma(v, v, squares);
    }
    const Floats scale = splat(1.f / std::sqrt(sum(squares) / k + eps));
    for (int i = 0; i < k; i += kLanes)
      store(out + i, mul(mul(load(x + i), scale), load(weight + i)));
  }

  void prepare_normed(int row, const float* x, const float* weight, const Matrix& matrix) {
    float* out = normed_.as<float>() + static_cast<size_t>(row) * config_.hidden_size;
    norm(x, weight, config_.hidden_size, config_.rms_norm_eps, out);
    prepare(row, out, matrix);
  }

  // Bring row `row` of the next product's activations into the form that `matrix` reads.
  void prepare(int row, const float* x, const Matrix& matrix) {
    if (matrix.format == Format::F32) return;  // read where they are
    const int k = matrix.k;
    bf16* out = rounded_.as<bf16>() + static_cast<size_t>(row) * k;
    for (int i = 0; i < k; i += kLanes) store_bf16(out + i, load(x + i));
    if (matrix.format != Format::INT4) return;
    GroupSum* sums = sums_.as<GroupSum>() + static_cast<size_t>(row) * (k / kGroup);
    for (int g = 0; g < k / kGroup; g++) sums[g] = sum_group(out + g * kGroup);
  }

  // Product of the rows that `prepare` left; `x` are the same rows before it.
  void product(int share, int thread, const Matrix& w, const float* x, int num_rows,
               const Output& out) {
    const Activations rows{x, rounded_.as<bf16>(), sums_.as<GroupSum>(), w.k};
    const int num_panels = w.num_panels();
    // Four panels at a time, or two where that divides the work more evenly.
    const int unit = num_panels / 4 % team_.size() == 0 || num_panels > 64 * team_.size() ? 4 : 2;
    const int num_units = (num_panels + unit - 1) / unit;
    // Equal parts of rows, whole tiles each, whose activations stay in the second-level cache
    // beside the weights.
    const int most_rows = std::max(2 * kMaxTileRows, kActivationsAtOnce / w.k);
    const int num_parts = (num_rows + most_rows - 1) / most_rows;
    const int num_tiles = (num_rows + kMaxTileRows - 1) / kMaxTileRows;
    const int rows_at_once =
        num_parts == 0 ? 0 : (num_tiles + num_parts - 1) / num_parts * kMaxTileRows;
    team_.share(share, thread, num_units * num_parts, [&](int item) {
      const int panel = item % num_units * unit, row = item / num_units * rows_at_once;
      multiply(w, panel, std::min(panel + unit, num_panels), rows, row,
               std::min(row + rows_at_once, num_rows), out);
    });
  }

  // x += [norm](matrix . activations); takes one share or two.
  void add_product(int& share, int thread, const Matrix& w, const float* post_norm) {
    const int width = config_.hidden_size;
    const float* wide = wide_.as<float>();
    if (post_norm == nullptr) {
      product(share++, thread, w, wide, num_tokens_,
              {Output::Kind::kAdd, x_.as<float>(), width, nullptr, false});
      return;
    }
    product(share++, thread, w, wide, num_tokens_,
            {Output::Kind::kStore, normed_.as<float>(), width, nullptr, false});
    team_.share(share++, thread, num_tokens_, [&](int row) {
      float* line = normed_.as<float>() + static_cast<size_t>(row) * width;
      float* x = x_.as<float>() + static_cast<size_t>(row) * width;
      norm(line, post_norm, config_.hidden_size, config_.rms_norm_eps, line);
      for (int i = 0; i < width; i += kLanes) store(x + i, add(load(x + i), load(line + i)));
    });
  }

  static void rotate(float* head, const float* cos, const float* sin, int half_dim) {
    int i = 0;
    for (; i + kLanes <= half_dim; i += kLanes) {
      const Floats a = load(head + i), b = load(head + i + half_dim);
      const Floats c = load(cos + i), s = load(sin + i);
      store(head + i, sub(mul(a, c), mul(b, s)));
      store(head + i + half_dim, add(mul(b, c), mul(a, s)));
    }
    for (; i < half_dim; i++) {
      const float a = head[i], b = head[i + half_dim];
      head[i] = a * cos[i] - b * sin[i];
      head[i + half_dim] = b * cos[i] + a * sin[i];
    }
  }

  template <class T>
  void rotate_and_store(int row, const LayerWeights& layer, const KvView<T>& kv) {
    const StepChunk& chunk = chunks_[chunk_of_row_[row]];
    const int position = chunk.start + row - chunk.row;
    const int d = config_.head_dim, half_dim = d / 2;
    float* heads = qkv_.as<float>() + row * qkv_width_;
    const float* cos = layer.cos + static_cast<size_t>(position) * half_dim;
    const float* sin = layer.sin + static_cast<size_t>(position) * half_dim;
    const int num_rotated = config_.num_heads + config_.num_kv_heads;
    for (int h = 0; h < num_rotated; h++) {
      float* head = heads + h * d;
      const float* weight = h < config_.num_heads ? layer.q_norm : layer.k_norm;
      if (weight != nullptr) norm(head, weight, d, config_.rms_norm_eps, head);
      rotate(head, cos, sin, half_dim);
    }
    const int block = chunk.block_table[position / config_.block_size];
    const int offset = position % config_.block_size;
    for (int h = 0; h < config_.num_kv_heads; h++)
      store_kv(kv, block, h, offset, heads + q_size_ + h * d, heads + q_size_ + kv_size_ + h * d);
  }

  template <class T>
  void attend_tile(const AttentionTile& tile, int kv_head, const LayerWeights& layer,
                   const KvView<T>& kv, int thread) {
    const StepChunk& chunk = chunks_[tile.chunk];
    const int d = config_.head_dim, group = config_.num_heads / config_.num_kv_heads;
    QueryRow rows[kMaxQueries];
    int num_rows = 0;
    float* scratch = scratch_[thread].as<float>();
    for (int i = 0; i < tile.num_queries; i++) {
      const int row = chunk.row + tile.first_query + i;
      const int end = chunk.start + tile.first_query + i + 1;
      const int first = layer.slides ? std::max(0, end - config_.sliding_window) : 0;
      for (int h = 0; h < group; h++) {
        const int head = (kv_head * group + h) * d;
        const float* q = qkv_.as<float>() + row * qkv_width_ + head;
        rows[num_rows++] = {q, wide_.as<float>() + row * q_size_ + head, first, end};
        if (num_rows == kMaxQueries || (h == group - 1 && i == tile.num_queries - 1)) {
          attend(kv, chunk.block_table, kv_head, config_.attention_scale, rows, num_rows, scratch);
          num_rows = 0;
        }
      }
    }
  }

  const DecoderConfig config_;
  const ModelWeights model_;
  const std::vector<LayerWeights> layers_;
  const CacheShape shape_;
  size_t q_size_, kv_size_, qkv_width_, layer_elements_;
  Memory cache_, x_, normed_, wide_, rounded_, sums_, qkv_;
  std::vector<Memory> scratch_;

  // Of the step being computed.
  const int32_t* tokens_ = nullptr;
  int num_tokens_ = 0;
  const StepChunk* chunks_ = nullptr;
  float* logits_ = nullptr;
  int logits_width_ = 0;
  std::vector<AttentionTile> tiles_;
  std::vector<int> chunk_of_row_, logits_rows_;
  Team team_;
};

}  // namespace roost
