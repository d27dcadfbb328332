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
//   INT8: weight = scale * q             ggml's Q8_0; Q5_0 (its 5 bits - 16)
//   INT4: weight = scale * q + minimum   ggml's Q4_1; Q4_0 (minimum = -8 * scale)
//
// These keep every number of the file. Nothing is quantised here: from other encodings there is F32
// and BF16 only. N is padded to whole panels with zeros.
#pragma once

#include <bit>

#include "simd.h"

namespace roost {

enum class Encoding : int32_t {
  F32 = 0,
  F16 = 1,
  BF16 = 2,
  Q8_0 = 3,
  Q4_1 = 4,
  Q4_0 = 5,
  Q5_0 = 6
};
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

// 32 weights: scale * q; laid out as a block of Q8_0.
struct Int8Group {
  half scale;
  int8_t q[kGroup];
};

// Read block `index` of a row of Q8_0 or Q5_0.
inline Int8Group int8_group(Encoding encoding, const uint8_t* row, int index) {
  Int8Group out;
  if (encoding == Encoding::Q8_0) {
    memcpy(&out, row + 34 * index, 34);
    return out;
  }
  const uint8_t* block = row + 22 * index;
  uint32_t fifth;
  memcpy(&out.scale, block, 2);
  memcpy(&fifth, block + 2, 4);
  for (int i = 0; i < 16; i++) {
    const int low = block[6 + i] & 15, high = block[6 + i] >> 4;
    out.q[i] = static_cast<int8_t>((low | (fifth >> i & 1) << 4) - 16);
    out.q[i + 16] = static_cast<int8_t>((high | (fifth >> (i + 16) & 1) << 4) - 16);
  }
  return out;
}

// 32 weights: scale * q + minimum.
struct Int4Group {
  float scale, minimum;  // the scale is a half, the minimum unless Q4_0's is too large
  uint8_t q[kGroup];
};

// Read block `index` of a row of Q4_1 or Q4_0.
inline Int4Group int4_group(Encoding encoding, const uint8_t* row, int index) {
  const bool has_minimum = encoding == Encoding::Q4_1;
  const uint8_t* block = row + (has_minimum ? 20 : 18) * index;
  const uint8_t* nibbles = block + (has_minimum ? 4 : 2);
  half numbers[2];
  memcpy(numbers, block, sizeof numbers);
  Int4Group out;
  out.scale = from_half(numbers[0]);
  out.minimum = has_minimum ? from_half(numbers[1]) : -8 * out.scale;
  for (int i = 0; i < 16; i++) {
    out.q[i] = nibbles[i] & 15;
    out.q[i + 16] = nibbles[i] >> 4;
  }
  return out;
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
    case Encoding::Q5_0:
      for (int g = 0; g < k / kGroup; g++, out += kGroup) {
        const Int8Group group = int8_group(encoding, row, g);
        const float scale = from_half(group.scale);
        for (int i = 0; i < kGroup; i++) out[i] = scale * group.q[i];
      }
      return;
    case Encoding::Q4_1:
    case Encoding::Q4_0:
      for (int g = 0; g < k / kGroup; g++, out += kGroup) {
        const Int4Group group = int4_group(encoding, row, g);
        for (int i = 0; i < kGroup; i++) out[i] = group.scale * group.q[i] + group.minimum;
      }
      return;
  }
}

inline void put_half(uint8_t* base, int index, half value) { memcpy(base + 2 * index, &value, 2); }

// Pack up to 16 stored rows as one panel; a null row is zeros. INT8 and INT4 take the encodings
// named above only. `scratch` holds k floats. False if a minimum is beyond half's range.
inline bool pack_panel(Format format, const Encoding* encodings, const uint8_t* const* rows, int k,
                       int num_rows, uint8_t* out, float* scratch) {
  bool fits = true;
  memset(out, 0, panel_bytes(format, k));
  for (int column = 0; column < num_rows; column++) {
    const uint8_t* row = rows[column];
    if (row == nullptr) continue;
    const Encoding encoding = encodings[column];
    switch (format) {
      case Format::F32:
        decode_row(encoding, row, k, scratch);
        for (int i = 0; i < k; i++) memcpy(out + (i * kLanes + column) * 4, scratch + i, 4);
        break;
      case Format::BF16:
        decode_row(encoding, row, k, scratch);
        for (int i = 0; i < k; i++)
          put_half(out, (i / 2 * kLanes + column) * 2 + i % 2, to_bf16(scratch[i]));
        break;
      case Format::INT8:
        for (int g = 0; g < k / kGroup; g++) {
          const Int8Group group = int8_group(encoding, row, g);
          uint8_t* base = out + g * kInt8GroupBytes;
          put_half(base, column, group.scale);
          for (int i = 0; i < kGroup; i++)
            base[32 + (i / 2 * kLanes + column) * 2 + i % 2] = static_cast<uint8_t>(group.q[i]);
        }
        break;
      case Format::INT4:
        for (int g = 0; g < k / kGroup; g++) {
          const Int4Group group = int4_group(encoding, row, g);
          const half minimum = to_half(group.minimum);
          fits = fits && std::isinf(from_half(minimum)) == std::isinf(group.minimum);
          uint8_t* base = out + g * kInt4GroupBytes;
          put_half(base, column, to_half(group.scale));
          put_half(base + 32, column, minimum);
          for (int i = 0; i < kGroup; i++) {
            // quarter z of the group, step j of it, pair member i % 2; where `Nibbles` has them
            const int z = i / 8, j = i / 2 % 4;
            uint8_t* lane = base + 64 + 64 * z + column * 4;
            uint32_t bits;
            memcpy(&bits, lane, 4);
            bits |= std::rotl(uint32_t{group.q[i]}, 16 * (i % 2) + 4 * j + 3);
            memcpy(lane, &bits, 4);
          }
        }
        break;
    }
  }
  return fits;
}

}  // namespace roost
