// Causal attention straight over the blocks of the paged cache.
//
//   out = sum over j <= p of softmax_j(scale * q . K[j]) * V[j]         for the query at position p
//
// Cache, per layer:  [block][kv head][run of 16 positions] { K | V }
//
//   K  for each dimension: 16 positions
//   V  for each position: head_dim numbers
//
// so scores come out as vectors over 16 positions and the weighted sum as vectors over dimensions.
//
// Numbers are float32, or half: as small as bfloat16 and eight times finer. With keys and values
// in bfloat16 (and such weights), 1.3 % of SmolLM2's most likely tokens differed from float32's,
// with half 0.6 %. All arithmetic is in float32.
//
// Row invariance: a row's scores, its maximum, its sum and its weighted sum run over the positions
// in ascending order, runs of 16, whatever other rows are computed with it. Positions a row does
// not see have weight exactly 0. Memory of such positions may hold anything that is finite (see
// `store_kv`): 0 times it is 0.
#pragma once

#include <algorithm>

#include "simd.h"

namespace roost {

constexpr int kRun = 16;         // positions in a run
constexpr int kMaxQueries = 12;  // rows of one call of `attend`
#if defined(ROOST_AVX512)
constexpr int kValueRows = 6;  // x 4 accumulators
constexpr int kMaxTileScores = 12;
#else
constexpr int kValueRows = 1;
constexpr int kMaxTileScores = 3;
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

// NaN becomes 0 in V (and stays in K, so whoever sees the position gets NaN): what a failed request
// leaves behind must not reach others through a weight of 0. Infinite becomes 0 in V, too, and in
// half the largest number.
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

inline void store_kv(const KvView<half>& kv, int block, int kv_head, int offset, const float* key,
                     const float* value) {
  const int head_dim = kv.shape.head_dim, lane = offset % kRun;
  half* k = kv.run(block, kv_head, offset);
  half* v = k + kRun * head_dim + lane * head_dim;
  for (int d = 0; d < head_dim; d += kLanes) {
    half keys[kLanes];
    store_half(keys, load(key + d));
    store_half(v + d, load(value + d));
    for (int i = 0; i < kLanes; i++) {
      k[(d + i) * kRun + lane] = keys[i];
      if ((v[d + i] & 0x7c00) == 0x7c00) v[d + i] = 0;
    }
  }
}

ROOST_INLINE Floats load_kv(const float* p) { return load(p); }
ROOST_INLINE Floats load_kv(const half* p) { return load_half(p); }

// One query of one head.
struct QueryRow {
  const float* q;  // (head_dim,)
  float* out;      // (head_dim,)
  int first, end;  // the positions it sees: first .. end - 1
};

// out[r] = weights times V over the positions from .. to - 1, divided by totals[r]. Row r's weights
// are at weights + r * stride.
template <class T, int kRows>
ROOST_INLINE void weigh(const KvView<T>& kv, const int* block_table, int kv_head, int from, int to,
                        const QueryRow* rows, const Floats* totals, const float* weights,
                        size_t stride) {
  const int head_dim = kv.shape.head_dim, block_size = kv.shape.block_size;
  for (int d = 0; d < head_dim; d += 4 * kLanes) {
    const int width = std::min(4, (head_dim - d) / kLanes);
    Floats acc[kRows][4];
#pragma GCC unroll 6
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) acc[r][j] = splat(0.f);
    for (int position = from; position < to; position += kRun) {
      const T* v = kv.run(block_table[position / block_size], kv_head, position % block_size) +
                   kRun * head_dim + d;
      const float* at = weights + (position - from);
      if (width == 4) {
        for (int i = 0; i < kRun; i++, v += head_dim)
#pragma GCC unroll 4
          for (int j = 0; j < 4; j++) {
            const Floats values = load_kv(v + j * kLanes);
#pragma GCC unroll 6
            for (int r = 0; r < kRows; r++)
              acc[r][j] = fma(values, splat(at[r * stride + i]), acc[r][j]);
          }
      } else {
        for (int i = 0; i < kRun; i++, v += head_dim)
#pragma GCC unroll 3
          for (int j = 0; j < 3; j++) {
            if (j >= width) break;
            const Floats values = load_kv(v + j * kLanes);
#pragma GCC unroll 6
            for (int r = 0; r < kRows; r++)
              acc[r][j] = fma(values, splat(at[r * stride + i]), acc[r][j]);
          }
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++)
        if (j < width) store(rows[r].out + d + j * kLanes, div(acc[r][j], totals[r]));
  }
}

// Runs scored together: few rows alone would wait for each addition before the next.
template <int kRows>
constexpr int kRunsAtOnce = kRows <= 3 && kMaxTileScores >= 12 ? 4
                            : kRows <= 6 && kMaxTileScores >= 12 ? 2
                                                                 : 1;

// Scores of kRuns runs from `position` on, to out + r * stride; most: the largest so far.
template <class T, int kRows, int kRuns>
ROOST_INLINE void score(const KvView<T>& kv, const int* block_table, int kv_head, float scale,
                        const QueryRow* rows, int position, float* out, size_t stride,
                        Floats (&most)[kRows]) {
  const int head_dim = kv.shape.head_dim, block_size = kv.shape.block_size;
  const T* k[kRuns];
  Floats acc[kRuns][kRows];
#pragma GCC unroll 4
  for (int i = 0; i < kRuns; i++) {
    const int at = position + i * kRun;
    k[i] = kv.run(block_table[at / block_size], kv_head, at % block_size);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; r++) acc[i][r] = splat(0.f);
  }
  for (int d = 0; d < head_dim; d++) {
    Floats keys[kRuns];
#pragma GCC unroll 4
    for (int i = 0; i < kRuns; i++) keys[i] = load_kv(k[i] + d * kRun);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; r++) {
      const Floats q = splat(rows[r].q[d]);
#pragma GCC unroll 4
      for (int i = 0; i < kRuns; i++) acc[i][r] = fma(keys[i], q, acc[i][r]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRuns; i++)
#pragma GCC unroll 12
    for (int r = 0; r < kRows; r++) {
      const int at = position + i * kRun;
      const Floats scores =
          keep(mul(acc[i][r], splat(scale)), rows[r].first - at, rows[r].end - at, splat(-INFINITY));
      most[r] = larger(most[r], scores);
      store(out + r * stride + i * kRun, scores);
    }
}

// Attention of kRows rows that share a KV head and a request. `scratch`: a float for each row and
// position.
template <class T, int kRows>
inline void attend(const KvView<T>& kv, const int* block_table, int kv_head, float scale,
                   const QueryRow* rows, float* scratch) {
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
  int position = from;
  if constexpr (kRunsAtOnce<kRows> > 1) {
    for (; position + kRunsAtOnce<kRows> * kRun <= to; position += kRunsAtOnce<kRows> * kRun)
      score<T, kRows, kRunsAtOnce<kRows>>(kv, block_table, kv_head, scale, rows, position,
                                          scratch + (position - from), stride, most);
  }
  for (; position < to; position += kRun)
    score<T, kRows, 1>(kv, block_table, kv_head, scale, rows, position,
                       scratch + (position - from), stride, most);

  Floats totals[kRows];
  for (int r = 0; r < kRows; r++) {
    const Floats top = splat(largest(most[r]));
    Floats total = splat(0.f);
    for (int position = from; position < to; position += kRun) {
      float* at = scratch + r * stride + (position - from);
      const Floats weight = keep(exponential(sub(load(at), top)),
                                 rows[r].first - position, rows[r].end - position, splat(0.f));
      total = add(total, weight);
      store(at, weight);
    }
    totals[r] = splat(sum(total));
  }

  for (int r = 0; r + kValueRows <= kRows; r += kValueRows)
    weigh<T, kValueRows>(kv, block_table, kv_head, from, to, rows + r, totals + r,
                         scratch + r * stride, stride);
  if constexpr (kRows % kValueRows > 0) {
    constexpr int kRest = kRows / kValueRows * kValueRows;
    weigh<T, kRows % kValueRows>(kv, block_table, kv_head, from, to, rows + kRest, totals + kRest,
                                 scratch + kRest * stride, stride);
  }
}

template <class T>
inline void attend(const KvView<T>& kv, const int* block_table, int kv_head, float scale,
                   const QueryRow* rows, int num_rows, float* scratch) {
  switch (num_rows) {
#define ROOST_ROWS(R) \
  case R:             \
    return attend<T, R>(kv, block_table, kv_head, scale, rows, scratch);
    ROOST_FOR_1_TO_12(ROOST_ROWS)
#undef ROOST_ROWS
  }
}

}  // namespace roost
