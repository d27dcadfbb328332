// Products of a few rows of activations with a matrix in panels.
//
//   out[m][n] = sum over k of x[m][k] * W[n][k]
//
// Row invariance: whatever number of rows is computed together, out[m][n] is one chain of the same
// operations over k in the same order, in one accumulator (INT8 and INT4: one per group of 32 and
// one over the groups; INT4's of a group starts at `GroupSum::unbias`). So a row's result is the
// same alone, in a batch and in any chunk. This is why a matrix has one kernel for all sizes, and
// k is never split between threads.
//
// A tile is `rows` x `panels` accumulators that stay in registers. Few rows take several panels at
// once, because a single chain of dependent additions would not keep up with memory.
#pragma once

#include <algorithm>

#include "weights.h"

namespace roost {

// Of 32 activations: their sum, and what takes off the bias that nibbles have as pairs. Both kept,
// because a tile that derived one from the other would hold them in registers that it lacks.
struct GroupSum {
  float sum;
  float unbias;  // -kNibbleBias * sum
};

ROOST_INLINE GroupSum sum_group(const bf16* x) {
  const float total = sum(add(load_bf16(x), load_bf16(x + kLanes)));
  return {total, -kNibbleBias * total};
}

// Rows of activations in the forms that the formats read.
struct Activations {
  const float* f32;      // (rows, k); Format::F32
  const bf16* b16;       // (rows, k); the others
  const GroupSum* sums;  // (rows, k / 32), of b16; Format::INT4
  int k;
};

#if defined(ROOST_AVX512)
constexpr int kMaxTileRows = 12;
constexpr int kTileRegisters = 24;  // of 32; the rest for weights and scales
#else
constexpr int kMaxTileRows = 4;
constexpr int kTileRegisters = 4;  // of sixteen half as wide, or unknown
#endif

// Panels of a tile: as many as fit the registers, at most four.
constexpr int tile_panels(Format format, int rows) {
  const bool has_groups = format == Format::INT8 || format == Format::INT4;
  const int fit = kTileRegisters / (rows * (has_groups ? 2 : 1));
  return fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
}

template <Format kFormat, int kRows, int kPanels>
struct Tile {
  Floats acc[kRows][kPanels];

  // `ahead`: bytes from a weight to one that will be read soon.
  ROOST_INLINE void compute(const Matrix& w, int panel, const Activations& x, int row,
                            size_t ahead) {
    const size_t stride = panel_bytes(kFormat, w.k);
    ahead_ = ahead;
    const uint8_t* weights[kPanels];
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; p++) weights[p] = w.data + (panel + p) * stride;
#pragma GCC unroll 12
    for (int m = 0; m < kRows; m++)
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; p++) acc[m][p] = splat(0.f);
    if constexpr (kFormat == Format::F32) compute_f32(weights, w.k, x, row);
    else if constexpr (kFormat == Format::BF16) compute_bf16(weights, w.k, x, row);
    else compute_groups(weights, w.k, x, row);
  }

 private:
  size_t ahead_;

  // A few rows of floats read memory in one stream, which the processor prefetches by itself
  // better; everything else computes for so long that it would stop looking ahead.
  static constexpr bool kPrefetches =
      kRows > 6 || kFormat == Format::INT4 || kFormat == Format::INT8;

  ROOST_INLINE const uint8_t* read(const uint8_t* p) const {
    if constexpr (kPrefetches) __builtin_prefetch(p + ahead_, 0, 2);
    return p;
  }

  ROOST_INLINE void compute_f32(const uint8_t* const* weights, int k, const Activations& x,
                                int row) {
    const float* in = x.f32 + static_cast<size_t>(row) * x.k;
    for (int i = 0; i < k; i++) {
      Floats w[kPanels];
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; p++)
        w[p] = load(reinterpret_cast<const float*>(read(weights[p] + 64 * size_t(i))));
#pragma GCC unroll 12
      for (int m = 0; m < kRows; m++) {
        const Floats value = splat(in[m * x.k + i]);
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; p++) acc[m][p] = fma(w[p], value, acc[m][p]);
      }
    }
  }

  ROOST_INLINE void compute_bf16(const uint8_t* const* weights, int k, const Activations& x,
                                 int row) {
    const bf16* in = x.b16 + static_cast<size_t>(row) * x.k;
    for (int i = 0; i < k; i += 2) {
      Pairs w[kPanels];
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; p++) w[p] = pairs_of_bf16(read(weights[p] + 32 * size_t(i)));
      accumulate(acc, w, in + i, x.k);
    }
  }

  ROOST_INLINE void compute_groups(const uint8_t* const* weights, int k, const Activations& x,
                                   int row) {
    const bf16* in = x.b16 + static_cast<size_t>(row) * x.k;
    const int num_groups = k / kGroup;
    constexpr size_t kBytes = kFormat == Format::INT8 ? kInt8GroupBytes : kInt4GroupBytes;
    for (int g = 0; g < num_groups; g++) {
      const uint8_t* group[kPanels];
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; p++) group[p] = weights[p] + g * kBytes;
      const GroupSum* sums = x.sums + static_cast<size_t>(row) * num_groups + g;
      Floats part[kRows][kPanels];
#pragma GCC unroll 12
      for (int m = 0; m < kRows; m++) {
        const bool is_biased = kFormat == Format::INT4 && kNibbleBias != 0;
        const Floats first = splat(is_biased ? sums[m * num_groups].unbias : 0.f);
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; p++) part[m][p] = first;
      }
      if constexpr (kFormat == Format::INT8) {
        for (int i = 0; i < kGroup; i += 2) {
          Pairs w[kPanels];
#pragma GCC unroll 4
          for (int p = 0; p < kPanels; p++)
            w[p] = pairs_of_int8(reinterpret_cast<const int8_t*>(read(group[p] + 32 + 16 * i)));
          accumulate(part, w, in + g * kGroup + i, x.k);
        }
      } else {
        for (int z = 0; z < 4; z++) {
          Nibbles nibbles[kPanels];
#pragma GCC unroll 4
          for (int p = 0; p < kPanels; p++) nibbles[p] = load_nibbles(read(group[p] + 64 + 64 * z));
          const bf16* at = in + g * kGroup + z * 8;
          step_nibbles<0>(part, nibbles, at, x.k);
          step_nibbles<1>(part, nibbles, at + 2, x.k);
          step_nibbles<2>(part, nibbles, at + 4, x.k);
          step_nibbles<3>(part, nibbles, at + 6, x.k);
        }
      }
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; p++) {
        const Floats scale = load_half(reinterpret_cast<const half*>(read(group[p])));
#pragma GCC unroll 12
        for (int m = 0; m < kRows; m++) acc[m][p] = fma(part[m][p], scale, acc[m][p]);
        if constexpr (kFormat == Format::INT4) {
          const Floats minimum = load_half(reinterpret_cast<const half*>(group[p] + 32));
#pragma GCC unroll 12
          for (int m = 0; m < kRows; m++)
            acc[m][p] = fma(minimum, splat(sums[m * num_groups].sum), acc[m][p]);
        }
      }
    }
  }

  template <int kNibble>
  ROOST_INLINE void step_nibbles(Floats (&into)[kRows][kPanels], const Nibbles* nibbles,
                                 const bf16* in, int stride) {
    Pairs w[kPanels];
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; p++) w[p] = pairs_of_nibbles<kNibble>(nibbles[p]);
    accumulate(into, w, in, stride);
  }

  ROOST_INLINE void accumulate(Floats (&into)[kRows][kPanels], const Pairs* w, const bf16* in,
                               int stride) {
#pragma GCC unroll 12
    for (int m = 0; m < kRows; m++)
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; p++) into[m][p] = dot2(into[m][p], w[p], in + m * stride);
  }
};

// What becomes of a product. One kernel for all uses: the choice costs nothing beside a tile, a
// kernel for each would make the library five times as large.
struct Output {
  enum class Kind { kStore, kAdd, kGated };
  Kind kind;
  float* data;       // (rows, width)
  int width;         // floats a row; at least n, rounded up to panels
  const float* bias; // (n,) or null; kStore only
  bool uses_gelu;    // kGated: panels come in twos, gate then up; data gets activation(gate) * up

  template <int kRows, int kPanels>
  ROOST_INLINE void put(int row, int panel, const Floats (&acc)[kRows][kPanels]) const {
    float* line = data + static_cast<size_t>(row) * width;
    switch (kind) {
      case Kind::kStore:
        return each<kRows, kPanels>([&](int m, int p) {
          Floats value = acc[m][p];
          if (bias != nullptr) value = add(value, load(bias + (panel + p) * kLanes));
          store(line + static_cast<size_t>(m) * width + (panel + p) * kLanes, value);
        });
      case Kind::kAdd:
        return each<kRows, kPanels>([&](int m, int p) {
          float* at = line + static_cast<size_t>(m) * width + (panel + p) * kLanes;
          store(at, add(load(at), acc[m][p]));
        });
      case Kind::kGated:
        return each<kRows, kPanels>([&](int m, int p) {
          float* at = line + static_cast<size_t>(m) * width + (panel + p) / 2 * kLanes;
          const bool is_gate = (panel + p) % 2 == 0;
          store(at, is_gate ? acc[m][p] : mul(activate(load(at)), acc[m][p]));
        });
    }
  }

 private:
  template <int kRows, int kPanels, class Body>
  static ROOST_INLINE void each(Body&& body) {
#pragma GCC unroll 12
    for (int m = 0; m < kRows; m++)
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; p++) body(m, p);
  }

  ROOST_INLINE Floats activate(Floats g) const {
    // silu(g) = g sigmoid(g); gelu_tanh(g) = g sigmoid(2 sqrt(2/pi) (g + 0.044715 g^3))
    Floats z = g;
    if (uses_gelu) {
      const Floats cubic = mul(mul(mul(g, g), g), splat(0.044715f));
      z = mul(add(g, cubic), splat(1.5957691216f));
    }
    const Floats decay = exponential(smaller(sub(splat(0.f), z), splat(87.f)));
    return div(g, add(splat(1.f), decay));
  }
};

// Rows row .. row + kRows - 1 times as many of the panels as are whole tiles; the first one left.
template <Format kFormat, int kRows, int kPanels>
ROOST_INLINE int multiply_tiles(const Matrix& w, int panel, int end_panel, const Activations& x,
                                int row, size_t ahead, const Output& out) {
  for (; panel + kPanels <= end_panel; panel += kPanels) {
    Tile<kFormat, kRows, kPanels> tile;
    tile.compute(w, panel, x, row, ahead);
    out.put<kRows, kPanels>(row, panel, tile.acc);
  }
  return panel;
}

template <Format kFormat, int kRows>
inline void multiply_rows(const Matrix& w, int panel, int end_panel, const Activations& x, int row,
                          bool is_only_tile, const Output& out) {
  constexpr int kPanels = tile_panels(kFormat, kRows);
  const size_t stride = panel_bytes(kFormat, w.k);
  // One tile of rows: the next tile of panels. Several: they share these panels, and what is
  // wanted from memory meanwhile are the panels that come after all of them.
  const int panels_ahead = is_only_tile ? std::min(kPanels, end_panel - panel) : end_panel - panel;
  const size_t ahead = stride * panels_ahead;
  panel = multiply_tiles<kFormat, kRows, kPanels>(w, panel, end_panel, x, row, ahead, out);
  if constexpr (kPanels > 2)
    panel = multiply_tiles<kFormat, kRows, 2>(w, panel, end_panel, x, row, ahead, out);
  if constexpr (kPanels > 1)
    multiply_tiles<kFormat, kRows, 1>(w, panel, end_panel, x, row, ahead, out);
}

// Rows first .. end - 1 times panels panel .. end_panel - 1.
template <Format kFormat>
inline void multiply_format(const Matrix& w, int panel, int end_panel, const Activations& x,
                            int first, int end, const Output& out) {
  const bool is_only_tile = end - first <= kMaxTileRows;
  while (first < end) {
    const int left = end - first;
    const int parts = (left + kMaxTileRows - 1) / kMaxTileRows;
    const int rows = (left + parts - 1) / parts;
    switch (rows) {
#define ROOST_ROWS(R)                                           \
  case R:                                                       \
    if constexpr (R <= kMaxTileRows)                            \
      multiply_rows<kFormat, R>(w, panel, end_panel, x, first, is_only_tile, out); \
    break;
      ROOST_FOR_1_TO_12(ROOST_ROWS)
#undef ROOST_ROWS
    }
    first += rows;
  }
}

inline void multiply(const Matrix& w, int panel, int end_panel, const Activations& x, int first,
                     int end, const Output& out) {
  switch (w.format) {
    case Format::F32: return multiply_format<Format::F32>(w, panel, end_panel, x, first, end, out);
    case Format::BF16:
      return multiply_format<Format::BF16>(w, panel, end_panel, x, first, end, out);
    case Format::INT8:
      return multiply_format<Format::INT8>(w, panel, end_panel, x, first, end, out);
    case Format::INT4:
      return multiply_format<Format::INT4>(w, panel, end_panel, x, first, end, out);
  }
}

}  // namespace roost
