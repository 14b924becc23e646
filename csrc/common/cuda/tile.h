// A tile of logits on the device, as host and device code see it.
#pragma once

#include <cstdint>

#include "common/format.h"
#include "common/logit_transform.h"

namespace rk::cuda {

constexpr int kVector = 4;  // floats of a 16-byte load

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

// The places where a tile's dlogits go: dz [rows][dz_stride], rounded once to `format` for the GEMMs behind, and where
// a bias wants their sums also unrounded [rows][unrounded_stride], which may be the tile itself.
struct DlogitsSink {
  void* dz;
  int64_t dz_stride;
  Format format;
  float* unrounded;  // or null
  int64_t unrounded_stride;
};

}  // namespace rk::cuda
