// Device code shared by the row kernels: one block of threads walks one row of a logit tile, 16 bytes a load, and what
// its threads computed is merged in a fixed order.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/cuda/launch.h"
#include "common/cuda/tile.h"
#include "common/online_softmax.h"

namespace rk::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kChunk = 16;                      // logits a thread holds at a time
constexpr int kStep = kThreads * kVector;       // logits a block reads with one load a thread
constexpr int kBlockChunk = kThreads * kChunk;  // logits a block holds at a time

// The hardware's exponential: relative error 2^-22 + |x| 2^-24. Terms with large |x| are small against the row's sum.
struct DeviceMath : ScalarMath {
  static RK_INLINE F exp(F x) {
#if defined(__CUDA_ARCH__)
    return __expf(x);
#else
    return ::expf(x);
#endif
  }
};

// Column of a thread's i-th logit in the block's chunk that starts at `begin`.
__device__ inline int32_t column_of(int32_t begin, int i) {
  return begin + (i / kVector) * kStep + static_cast<int32_t>(threadIdx.x) * kVector + i % kVector;
}

// A thread's final logits of a chunk of its block's row; -inf beyond the tile.
template <Transform kind>
__device__ inline void load_chunk(const Tile& tile, const LogitMap<DeviceMath, kind>& map, int64_t row, int32_t begin,
                                  bool aligned, float (&z)[kChunk]) {
  const float* from = tile.logits + row * tile.stride;
#pragma unroll
  for (int i = 0; i < kChunk; i += kVector) {
    const int32_t column = column_of(begin, i);
    if (aligned && column + kVector <= tile.columns) {
      const float4 four = *reinterpret_cast<const float4*>(from + column);
      z[i] = four.x, z[i + 1] = four.y, z[i + 2] = four.z, z[i + 3] = four.w;
    } else {
#pragma unroll
      for (int j = 0; j < kVector; ++j) z[i + j] = column + j < tile.columns ? from[column + j] : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const bool inside = column + j < tile.columns;
      const float bias = tile.bias && inside ? tile.bias[tile.vocab_begin + column + j] : 0.0f;
      z[i + j] = inside ? map(z[i + j], bias) : -kInfinity;
    }
  }
}

// A plain struct of 32-bit words, from the lane `offset` further on.
template <class State>
__device__ inline State shuffle_down(const State& state, int offset) {
  static_assert(sizeof(State) % sizeof(uint32_t) == 0);
  constexpr int kWords = sizeof(State) / sizeof(uint32_t);
  uint32_t words[kWords];
  memcpy(words, &state, sizeof(State));
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = __shfl_down_sync(0xffffffffu, words[i], offset);
  State other;
  memcpy(&other, words, sizeof(State));
  return other;
}

// Merges the states of a block's threads in a fixed order; the result is thread 0's. merge(a, b) adds b to a.
template <class State, class Merge>
__device__ inline State reduce_block(State state, const Merge& merge) {
  __shared__ State of_warp[kThreads / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) merge(state, shuffle_down(state, offset));
  __syncthreads();  // of_warp may still be read from an earlier reduction
  if (lane == 0) of_warp[warp] = state;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < kThreads / kWarp; ++i) merge(state, of_warp[i]);
  }
  return state;
}

// Calls f(std::integral_constant<Transform, kind>) for the tile's kind of logits.
template <class F>
void with_kind(Transform kind, const F& f) {
  switch (kind) {
    case Transform::identity: return f(std::integral_constant<Transform, Transform::identity>{});
    case Transform::affine: return f(std::integral_constant<Transform, Transform::affine>{});
    case Transform::softcap: return f(std::integral_constant<Transform, Transform::softcap>{});
  }
}

}  // namespace rk::cuda
