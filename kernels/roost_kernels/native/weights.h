// Weight matrices: how they lie in a model file (rows), and how the kernels read them (panels).
//
// A matrix has N rows (outputs) of K weights. A panel holds 16 of the N, all K, in the order in
// which a product reads them, so that one product is one forward read of memory:
//
//   F32   for each k:         16 floats                                        64 B
//   BF16  for each k pair:    16 pairs                                         64 B
//   INT8  for each 32 of k:   16 scales (half) | 16 pair steps of 16 int8 pairs        544 B
//   INT4  for each 32 of k:   16 scales, 16 minima (half) | 4 x 64 B of nibbles        320 B
//
//   INT8: weight = scale * q           q in -127 .. 127   (ggml's Q8_0)
//   INT4: weight = scale * q + minimum q in 0 .. 15       (ggml's Q4_1)
//
// INT8 from Q8_0 and INT4 from Q4_1 keep every number of the file. From anything else they are
// quantised here, by ggml's own rules. N is padded to whole panels with zeros.
#pragma once

#include <algorithm>

#include "simd.h"

namespace roost {

enum class Encoding : int32_t { F32 = 0, F16 = 1, BF16 = 2, Q8_0 = 3, Q4_1 = 4 };
enum class Format : int32_t { F32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };

constexpr int kGroup = 32;  // weights that share a scale
constexpr size_t kInt8GroupBytes = 32 + 16 * kGroup;
constexpr size_t kInt4GroupBytes = 64 + 8 * kGroup;

// One matrix in panels.
struct Matrix {
  int32_t n, k;
  Format format;
  int32_t unused;
  const uint8_t* data;

  int num_panels() const { return (n + kLanes - 1) / kLanes; }
};

inline size_t panel_bytes(Format format, int k) {
  switch (format) {
    case Format::F32: return static_cast<size_t>(k) * 64;
    case Format::BF16: return static_cast<size_t>(k) * 32;
    case Format::INT8: return static_cast<size_t>(k) / kGroup * kInt8GroupBytes;
    case Format::INT4: return static_cast<size_t>(k) / kGroup * kInt4GroupBytes;
  }
  return 0;
}

// Floats of one stored row.
inline void decode_row(Encoding encoding, const uint8_t* row, int k, float* out) {
  switch (encoding) {
    case Encoding::F32:
      memcpy(out, row, sizeof(float) * k);
      return;
    case Encoding::F16:
    case Encoding::BF16:
      for (int i = 0; i < k; i++) {
        uint16_t bits;
        memcpy(&bits, row + 2 * i, 2);
        out[i] = encoding == Encoding::F16 ? from_half(bits) : from_bf16(bits);
      }
      return;
    case Encoding::Q8_0:
      for (int g = 0; g < k / kGroup; g++, row += 34, out += kGroup) {
        half scale;
        memcpy(&scale, row, 2);
        const float d = from_half(scale);
        for (int i = 0; i < kGroup; i++) out[i] = d * static_cast<int8_t>(row[2 + i]);
      }
      return;
    case Encoding::Q4_1:
      for (int g = 0; g < k / kGroup; g++, row += 20, out += kGroup) {
        half numbers[2];
        memcpy(numbers, row, 4);
        const float d = from_half(numbers[0]), m = from_half(numbers[1]);
        for (int i = 0; i < 16; i++) {
          out[i] = d * (row[4 + i] & 15) + m;
          out[i + 16] = d * (row[4 + i] >> 4) + m;
        }
      }
      return;
  }
}

// Scale and int8 of 32 weights.
struct Int8Group {
  half scale;
  int8_t q[kGroup];
};

inline Int8Group quantise_int8(const float* w) {
  Int8Group out;
  float most = 0;
  for (int i = 0; i < kGroup; i++) most = std::max(most, std::fabs(w[i]));
  const float scale = most / 127, inverse = scale > 0 ? 1 / scale : 0;
  out.scale = to_half(scale);
  for (int i = 0; i < kGroup; i++)
    out.q[i] = static_cast<int8_t>(std::max(-127.f, std::min(127.f, std::round(w[i] * inverse))));
  return out;
}

// Scale, minimum and nibbles of 32 weights.
struct Int4Group {
  half scale, minimum;
  uint8_t q[kGroup];
};

inline Int4Group quantise_int4(const float* w) {
  Int4Group out;
  const auto [low, high] = std::minmax_element(w, w + kGroup);
  const float scale = (*high - *low) / 15, inverse = scale > 0 ? 1 / scale : 0;
  out.scale = to_half(scale);
  out.minimum = to_half(*low);
  for (int i = 0; i < kGroup; i++)
    out.q[i] = static_cast<uint8_t>(std::max(0.f, std::min(15.f, (w[i] - *low) * inverse + 0.5f)));
  return out;
}

inline void put_half(uint8_t* base, int index, half value) { memcpy(base + 2 * index, &value, 2); }

// Pack up to 16 stored rows as one panel; a null row is zeros. `scratch` holds k floats.
inline void pack_panel(Format format, Encoding encoding, const uint8_t* const* rows, int k,
                       uint8_t* out, float* scratch) {
  memset(out, 0, panel_bytes(format, k));
  for (int column = 0; column < kLanes; column++) {
    const uint8_t* row = rows[column];
    if (row == nullptr) continue;
    const bool keeps_grid = (format == Format::INT8 && encoding == Encoding::Q8_0) ||
                            (format == Format::INT4 && encoding == Encoding::Q4_1);
    if (!keeps_grid) decode_row(encoding, row, k, scratch);
    switch (format) {
      case Format::F32:
        for (int i = 0; i < k; i++) memcpy(out + (i * kLanes + column) * 4, scratch + i, 4);
        break;
      case Format::BF16:
        for (int i = 0; i < k; i++)
          put_half(out, (i / 2 * kLanes + column) * 2 + i % 2, to_bf16(scratch[i]));
        break;
      case Format::INT8:
        for (int g = 0; g < k / kGroup; g++) {
          Int8Group group;
          if (keeps_grid) memcpy(&group, row + 34 * g, 34);
          else group = quantise_int8(scratch + g * kGroup);
          uint8_t* base = out + g * kInt8GroupBytes;
          put_half(base, column, group.scale);
          for (int i = 0; i < kGroup; i++)
            base[32 + (i / 2 * kLanes + column) * 2 + i % 2] = static_cast<uint8_t>(group.q[i]);
        }
        break;
      case Format::INT4:
        for (int g = 0; g < k / kGroup; g++) {
          Int4Group group;
          if (keeps_grid) {
            const uint8_t* block = row + 20 * g;
            memcpy(&group, block, 4);
            for (int i = 0; i < 16; i++) {
              group.q[i] = block[4 + i] & 15;
              group.q[i + 16] = block[4 + i] >> 4;
            }
          } else {
            group = quantise_int4(scratch + g * kGroup);
          }
          uint8_t* base = out + g * kInt4GroupBytes;
          put_half(base, column, group.scale);
          put_half(base + 32, column, group.minimum);
          for (int i = 0; i < kGroup; i++) {
            // quarter z of the group, nibble group j, pair member i % 2
            const int z = i / 8, j = i / 2 % 4;
            uint8_t* lane = base + 64 + 64 * z + (column * 2 + i % 2) * 2;
            uint16_t bits;
            memcpy(&bits, lane, 2);
            bits |= static_cast<uint16_t>(group.q[i] << 4 * j);
            memcpy(lane, &bits, 2);
          }
        }
        break;
    }
  }
}

}  // namespace roost
