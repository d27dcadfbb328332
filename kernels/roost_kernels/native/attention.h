// Causal attention straight over the blocks of the paged cache.
//
//   out = sum over j <= p of softmax_j(scale * q . K[j]) * V[j]         for the query at position p
//
// Cache, per layer:  [block][kv head][run of 16 positions] { K | V }
//
//   K  for each pair of dimensions (BF16) or each dimension (F32): 16 positions, as a panel
//   V  for each pair of positions (BF16): head_dim pairs; for each position (F32): head_dim floats
//
// so scores come out as vectors over 16 positions and the weighted sum as vectors over dimensions.
//
// Row invariance: a row's scores, its maximum, its sum and its weighted sum run over the positions
// in ascending order, runs of 16, whatever other rows are computed with it. Positions a row does
// not see have weight exactly 0. Memory of such positions may hold anything that is finite (see
// `store_kv`): 0 times it is 0.
#pragma once

#include "simd.h"

namespace roost {

constexpr int kRun = 16;         // positions in a run
constexpr int kMaxQueries = 12;  // rows of one call of `attend`
#if defined(ROOST_AVX512)
constexpr int kValueRows = 6;  // x 4 accumulators
#else
constexpr int kValueRows = 1;
#endif

// The same number of elements of T as of floats in K or V of one run.
struct CacheShape {
  int head_dim, num_kv_heads, block_size;

  size_t run_size() const { return 2 * static_cast<size_t>(kRun) * head_dim; }
  size_t head_size() const { return run_size() * (block_size / kRun); }
  size_t block_size_elements() const { return head_size() * num_kv_heads; }
};

// One layer's cache as a request sees it.
template <class T>
struct KvView {
  T* base;
  CacheShape shape;

  ROOST_INLINE T* run(int block, int kv_head, int offset) const {
    return base + block * shape.block_size_elements() + kv_head * shape.head_size() +
           offset / kRun * shape.run_size();
  }
};

// Infinite and NaN values become 0 in V (and stay in K, so whoever sees the position gets NaN):
// what a failed request leaves behind must not reach others through a weight of 0.
ROOST_INLINE float finite_or_zero(float v) { return std::fabs(v) < INFINITY ? v : 0.f; }

// Key and value of one position, (head_dim,) each.
inline void store_kv(const KvView<float>& kv, int block, int kv_head, int offset, const float* key,
                     const float* value) {
  const int head_dim = kv.shape.head_dim, lane = offset % kRun;
  float* k = kv.run(block, kv_head, offset);
  float* v = k + kRun * head_dim + lane * head_dim;
  for (int d = 0; d < head_dim; d++) {
    k[d * kRun + lane] = key[d];
    v[d] = finite_or_zero(value[d]);
  }
}

inline void store_kv(const KvView<bf16>& kv, int block, int kv_head, int offset, const float* key,
                     const float* value) {
  const int head_dim = kv.shape.head_dim, lane = offset % kRun;
  bf16* k = kv.run(block, kv_head, offset) + lane * 2;
  bf16* v = k - lane * 2 + kRun * head_dim + lane / 2 * 2 * head_dim + lane % 2;
  for (int d = 0; d < head_dim; d += kLanes, k += kLanes * kRun, v += 2 * kLanes) {
    bf16 keys[kLanes], values[kLanes];
    store_bf16(keys, load(key + d));
    store_bf16(values, load(value + d));
    for (int i = 0; i < kLanes; i += 2) memcpy(k + i * kRun, keys + i, 4);
    for (int i = 0; i < kLanes; i++) v[2 * i] = (values[i] & 0x7f80) == 0x7f80 ? 0 : values[i];
  }
}

// One query of one head.
template <class T>
struct QueryRow {
  const T* q;     // (head_dim,)
  float* out;     // (head_dim,)
  int first, end; // the positions it sees: first .. end - 1
};

template <class T>
struct Probabilities;  // scratch of one thread
template <>
struct Probabilities<float> {
  float* scores;
};
template <>
struct Probabilities<bf16> {
  float* scores;
  bf16* weights;
};

template <int kRows>
ROOST_INLINE void score_run(const float* k, int head_dim, const QueryRow<float>* rows,
                            Floats (&acc)[kRows]) {
  for (int d = 0; d < head_dim; d++) {
    const Floats keys = load(k + d * kRun);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; r++) acc[r] = fma(keys, splat(rows[r].q[d]), acc[r]);
  }
}

template <int kRows>
ROOST_INLINE void score_run(const bf16* k, int head_dim, const QueryRow<bf16>* rows,
                            Floats (&acc)[kRows]) {
  for (int d = 0; d < head_dim; d += 2) {
    const Pairs keys = pairs_of_bf16(k + d * kRun);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; r++) acc[r] = dot2(acc[r], keys, rows[r].q + d);
  }
}

// acc[r][j] += weights of a run times 64 dimensions of V from dimension `d` on.
template <int kRows>
ROOST_INLINE void weigh_run(const float* v, int head_dim, int d, int width,
                            const float* const* weights, Floats (&acc)[kRows][4]) {
  for (int i = 0; i < kRun; i++)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      if (j >= width) break;
      const Floats values = load(v + i * head_dim + d + j * kLanes);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; r++) acc[r][j] = fma(values, splat(weights[r][i]), acc[r][j]);
    }
}

template <int kRows>
ROOST_INLINE void weigh_run(const bf16* v, int head_dim, int d, int width,
                            const bf16* const* weights, Floats (&acc)[kRows][4]) {
  for (int i = 0; i < kRun; i += 2)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      if (j >= width) break;
      const Pairs values = pairs_of_bf16(v + i * head_dim + 2 * (d + j * kLanes));
#pragma GCC unroll 6
      for (int r = 0; r < kRows; r++) acc[r][j] = dot2(acc[r][j], values, weights[r] + i);
    }
}

// Where the weights of row r lie, one run after another from position `from` on.
ROOST_INLINE const float* weights_of(const Probabilities<float>& p, size_t at) {
  return p.scores + at;
}
ROOST_INLINE const bf16* weights_of(const Probabilities<bf16>& p, size_t at) {
  return p.weights + at;
}
ROOST_INLINE void put_weights(const Probabilities<float>& p, size_t at, Floats value) {
  store(p.scores + at, value);
}
ROOST_INLINE void put_weights(const Probabilities<bf16>& p, size_t at, Floats value) {
  store_bf16(p.weights + at, value);
}

template <class T, int kRows>
ROOST_INLINE void weigh(const KvView<T>& kv, const int* block_table, int kv_head, int from, int to,
                        const QueryRow<T>* rows, const Floats* totals, const Probabilities<T>& p,
                        size_t stride, int first_row) {
  const int head_dim = kv.shape.head_dim, block_size = kv.shape.block_size;
  for (int d = 0; d < head_dim; d += 4 * kLanes) {
    const int width = (head_dim - d) / kLanes;
    Floats acc[kRows][4];
#pragma GCC unroll 6
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) acc[r][j] = splat(0.f);
    for (int position = from; position < to; position += kRun) {
      const T* v = kv.run(block_table[position / block_size], kv_head, position % block_size) +
                   kRun * head_dim;
      decltype(weights_of(p, 0)) weights[kRows];
      for (int r = 0; r < kRows; r++)
        weights[r] = weights_of(p, (first_row + r) * stride + (position - from));
      if (width >= 4) weigh_run<kRows>(v, head_dim, d, 4, weights, acc);
      else weigh_run<kRows>(v, head_dim, d, width, weights, acc);
    }
    for (int r = 0; r < kRows; r++)
      for (int j = 0; j < 4 && j < width; j++)
        store(rows[r].out + d + j * kLanes, div(acc[r][j], totals[r]));
  }
}

// Attention of kRows rows that share a KV head and a request.
template <class T, int kRows>
inline void attend(const KvView<T>& kv, const int* block_table, int kv_head, float scale,
                   const QueryRow<T>* rows, const Probabilities<T>& p) {
  const int head_dim = kv.shape.head_dim, block_size = kv.shape.block_size;
  int from = rows[0].first, to = rows[0].end;
  for (int r = 1; r < kRows; r++) {
    from = rows[r].first < from ? rows[r].first : from;
    to = rows[r].end > to ? rows[r].end : to;
  }
  from = from / kRun * kRun;
  to = (to + kRun - 1) / kRun * kRun;
  const size_t stride = to - from;
  const Floats lowest = splat(-INFINITY);

  Floats most[kRows];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; r++) most[r] = lowest;
  for (int position = from; position < to; position += kRun) {
    const T* k = kv.run(block_table[position / block_size], kv_head, position % block_size);
    Floats acc[kRows];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; r++) acc[r] = splat(0.f);
    score_run<kRows>(k, head_dim, rows, acc);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; r++) {
      const Floats scores = keep(mul(acc[r], splat(scale)), rows[r].first - position,
                                 rows[r].end - position, lowest);
      most[r] = larger(most[r], scores);
      store(p.scores + r * stride + (position - from), scores);
    }
  }

  Floats totals[kRows];
  for (int r = 0; r < kRows; r++) {
    const Floats top = splat(largest(most[r]));
    Floats total = splat(0.f);
    for (int position = from; position < to; position += kRun) {
      const size_t at = r * stride + (position - from);
      const Floats weight = keep(exponential(sub(load(p.scores + at), top)),
                                 rows[r].first - position, rows[r].end - position, splat(0.f));
      total = add(total, weight);
      put_weights(p, at, weight);
    }
    totals[r] = splat(sum(total));
  }

  for (int r = 0; r + kValueRows <= kRows; r += kValueRows)
    weigh<T, kValueRows>(kv, block_table, kv_head, from, to, rows + r, totals + r, p, stride, r);
  if constexpr (kRows % kValueRows > 0) {
    constexpr int kRest = kRows / kValueRows * kValueRows;
    weigh<T, kRows % kValueRows>(kv, block_table, kv_head, from, to, rows + kRest, totals + kRest,
                                 p, stride, kRest);
  }
}

template <class T>
inline void attend(const KvView<T>& kv, const int* block_table, int kv_head, float scale,
                   const QueryRow<T>* rows, int num_rows, const Probabilities<T>& p) {
  switch (num_rows) {
#define ROOST_ROWS(R) \
  case R:             \
    return attend<T, R>(kv, block_table, kv_head, scale, rows, p);
    ROOST_ROWS(1)
    ROOST_ROWS(2)
    ROOST_ROWS(3)
    ROOST_ROWS(4)
    ROOST_ROWS(5)
    ROOST_ROWS(6)
    ROOST_ROWS(7)
    ROOST_ROWS(8)
    ROOST_ROWS(9)
    ROOST_ROWS(10)
    ROOST_ROWS(11)
    ROOST_ROWS(12)
#undef ROOST_ROWS
  }
}

}  // namespace roost
