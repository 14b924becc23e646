// A tile of logits on the device, as host and device code see it.
#pragma once

#include <cstdint>

#include "common/simd/tile_kernels.h"

namespace rk::cuda {

constexpr int kVector = 4;  // floats of a 16-byte load

inline int64_t size_of(Format format) { return format == Format::f32 ? 4 : 2; }

// Raw logits [rows][stride] of vocabulary entries [vocab_begin, vocab_begin + columns).
struct Tile {
  const float* logits;
  int64_t stride;
  int32_t columns;
  int64_t vocab_begin;
  const float* bias;  // [vocab] or null
  LogitTransform transform;

  bool aligned() const { return reinterpret_cast<uintptr_t>(logits) % 16 == 0 && stride % kVector == 0; }
  Transform kind() const { return kind_of(transform, bias != nullptr); }
};

}  // namespace rk::cuda
