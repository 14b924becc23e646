// A tile of logits on the device, as host and device code see it.
#pragma once

#include <cstdint>

#include "common/format.h"
#include "common/logit_transform.h"

namespace rk::cuda {

constexpr int kVector = 4;  // numbers of a load or a store

// Raw logits [rows][stride] of vocabulary entries [vocab_begin, vocab_begin + columns). Rows start aligned to a load of
// kVector, and the stride is a multiple of it: what pads a row may be read, and holds anything.
struct Tile {
  const float* logits;
  int64_t stride;
  int32_t columns;
  int64_t vocab_begin;
  const float* bias;  // [vocab] or null
  LogitTransform transform;

  Transform kind() const { return kind_of(transform, bias != nullptr); }
  RK_INLINE float bias_of(int32_t column) const { return bias[vocab_begin + column]; }
};

// The places where a tile's dlogits go: dz [rows][dz_stride], rounded once to `format` for the GEMMs behind, and where
// a bias wants their sums also unrounded [rows][unrounded_stride]. Rows are aligned and padded as a tile's, and what
// pads them may be written.
struct DlogitsSink {
  void* dz;
  int64_t dz_stride;
  Format format;
  float* unrounded;  // or null
  int64_t unrounded_stride;
};

}  // namespace rk::cuda
