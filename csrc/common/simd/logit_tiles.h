// Vector code shared by the tile kernels: final logits from a GEMM's tile, and dlogits handed to the GEMMs behind.
#ifndef RK_ISA
#error "include this through isa/*.cpp"
#endif
#pragma once

#include "common/simd/simd.h"
#include "common/simd/tile_kernels.h"
#include "common/tile_plan_constants.h"

namespace rk {
namespace RK_ISA {

constexpr int kVectors = kRowBlock / kLanes;  // vectors of tokens in a tile's row

static inline Transform kind_of(const LogitTile& t) { return kind_of(t.transform, t.bias != nullptr); }

static RK_INLINE float bias_of(const LogitTile& t, int64_t row) { return t.bias ? t.bias[t.vocab_begin + row] : 0.0f; }

// Overwrites the tile with final logits.
template <Transform kind>
static void finish_logits(const LogitTile& t) {
  if constexpr (kind == Transform::identity) return;
  const LogitMap<Simd, kind> map(t.transform);
  for (int64_t row = 0; row < t.count; ++row) {
    float* z = t.logits + row * kRowBlock;
    const float bias = bias_of(t, row);
    for (int j = 0; j < kVectors; ++j) Simd::store(z + j * kLanes, map(Simd::load(z + j * kLanes), bias));
  }
}

static inline void finish_logits(const LogitTile& t) {
  switch (kind_of(t)) {
    case Transform::identity: return;
    case Transform::affine: return finish_logits<Transform::affine>(t);
    case Transform::softcap: return finish_logits<Transform::softcap>(t);
  }
}

// A square of kLanes vocabulary rows and as many tokens, transposed in registers: a token stores neighbours at once.
template <bool full, bool by_rows_alone>
static RK_INLINE void emit_f32_square(const LogitTile& t, int64_t first, int64_t at, const GradientSink& sink) {
  float* by_vocab = static_cast<float*>(sink.by_vocab) + first * sink.by_vocab_stride + at;
  float* by_row = static_cast<float*>(sink.by_row) + at * sink.by_row_stride + first;
  const float* from = t.logits + first * kRowBlock + at;
  const int64_t rows = full ? kLanes : t.count - first;
  VecU square[kLanes] = {};
  for (int64_t row = 0; row < rows; ++row) {
    const VecF dz = Simd::load(from + row * kRowBlock);
    if constexpr (!by_rows_alone) Simd::store(by_vocab + row * sink.by_vocab_stride, dz);
    square[row] = (VecU)dz;
  }
  transpose(square);
  for (int lane = 0; lane < kLanes; ++lane) {
    __builtin_memcpy(by_row + lane * sink.by_row_stride, &square[lane], rows * sizeof(float));
  }
}

template <bool by_rows_alone>
static inline void emit_f32(const LogitTile& t, const GradientSink& sink) {
  for (int64_t first = 0; first < t.count; first += kLanes) {
    const bool full = t.count - first >= kLanes;
    for (int64_t at = 0; at < kRowBlock; at += kLanes) {
      full ? emit_f32_square<true, by_rows_alone>(t, first, at, sink)
           : emit_f32_square<false, by_rows_alone>(t, first, at, sink);
    }
  }
}

constexpr int64_t kSquare = 2 * kLanes;  // vocabulary rows of a square of bf16

// The bf16 bits of two vocabulary rows side by side make a 32-bit number a token, and kLanes such pairs of rows a
// square of kLanes x kLanes: transposed in registers, a token stores kSquare neighbours at once.
template <bool full, bool by_rows_alone>
static RK_INLINE void emit_bf16_square(const LogitTile& t, int64_t first, int64_t at, const GradientSink& sink) {
  uint16_t* by_vocab = static_cast<uint16_t*>(sink.by_vocab) + first * sink.by_vocab_stride + at;
  uint16_t* by_row = static_cast<uint16_t*>(sink.by_row) + at * sink.by_row_stride + first;
  const float* from = t.logits + first * kRowBlock + at;
  const int64_t rows = t.count - first;
  const auto bits_of = [&](int64_t row) {
    if (!full && row >= rows) return VecU{};  // an odd last row is paired with zeros
    const VecU bits = Simd::to_bf16_bits(Simd::load(from + row * kRowBlock));
    if constexpr (!by_rows_alone) {
      const VecH half = __builtin_convertvector(bits, VecH);
      __builtin_memcpy(by_vocab + row * sink.by_vocab_stride, &half, sizeof(half));
    }
    return bits;
  };
  VecU pairs[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    const VecU low = bits_of(2 * i), high = bits_of(2 * i + 1);
    pairs[i] = low | (high << 16);
  }
  transpose(pairs);
  const int64_t bytes = full ? kSquare * sizeof(uint16_t) : (rows + 1) / 2 * sizeof(uint32_t);
  for (int lane = 0; lane < kLanes; ++lane) {
    __builtin_memcpy(by_row + lane * sink.by_row_stride, &pairs[lane], bytes);
  }
}

template <bool by_rows_alone>
static inline void emit_bf16(const LogitTile& t, const GradientSink& sink) {
  for (int64_t first = 0; first < t.count; first += kSquare) {
    const bool full = t.count - first >= kSquare;
    for (int64_t at = 0; at < kRowBlock; at += kLanes) {
      full ? emit_bf16_square<true, by_rows_alone>(t, first, at, sink)
           : emit_bf16_square<false, by_rows_alone>(t, first, at, sink);
    }
  }
}

// Writes dlogits (in the tile's place) to where the two GEMMs behind read them, rounded once to their operand format.
static inline void emit_gradient(const LogitTile& t, const GradientSink& sink) {
  if (sink.bias_grad) {
    for (int64_t row = 0; row < t.count; ++row) {
      VecF sum{};
      for (int j = 0; j < kVectors; ++j) sum += Simd::load(t.logits + row * kRowBlock + j * kLanes);
      float lanes[kLanes];
      Simd::store(lanes, sum);
      float total = 0;
      for (float lane : lanes) total += lane;
      sink.bias_grad[row] += total;
    }
  }
  if (sink.by_vocab) {
    sink.format == Format::f32 ? emit_f32<false>(t, sink) : emit_bf16<false>(t, sink);
  } else {
    sink.format == Format::f32 ? emit_f32<true>(t, sink) : emit_bf16<true>(t, sink);
  }
}

}  // namespace RK_ISA
}  // namespace rk
