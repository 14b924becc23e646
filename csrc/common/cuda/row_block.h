// Device code shared by the row kernels: one block of threads walks one row of a logit tile, 16 bytes a load. What its
// threads computed is merged across the lanes of each warp, then across the warps by the first one: always in the same
// order.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "common/cuda/launch.h"
#include "common/cuda/tile.h"
#include "common/online_softmax.h"

namespace rk::cuda {

constexpr int kWarp = 32;
constexpr int kWarps = 4;  // of a row: so few that their merge is cheap, so many that few rows fill a GPU
constexpr int kThreads = kWarps * kWarp;
constexpr int kChunk = 16;                      // logits a thread holds at a time
constexpr int kStep = kThreads * kVector;       // logits a block reads with one load a thread
constexpr int kBlockChunk = kThreads * kChunk;  // logits a block holds at a time
constexpr unsigned kAllLanes = 0xffffffffu;

// The hardware's exponential: relative error 2^-22 + |x| 2^-23, and 0 below e^-87. Terms with large |x| are small
// against the row's sum.
struct DeviceMath : ScalarMath {
  static RK_INLINE F exp(F x) {
#if defined(__CUDA_ARCH__)
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.44269504f));
    return result;
#else
    return ::expf(x);
#endif
  }
  static RK_INLINE F expm1_minus_identity(F u) {
    return ::fabsf(u) < 1.0f ? expm1_minus_identity_series(u) : exp(u) - 1.0f - u;
  }
  static RK_INLINE F max(F a, F b) { return ::fmaxf(a, b); }  // of a NaN and a number, the number: sums keep the NaN
  static RK_INLINE F min(F a, F b) { return ::fminf(a, b); }
};

// Column of a thread's i-th logit in the block's chunk that starts at `begin`.
__device__ inline int32_t column_of(int32_t begin, int i) {
  return begin + (i / kVector) * kStep + static_cast<int32_t>(threadIdx.x) * kVector + i % kVector;
}

// The thread that has a column, whatever the chunk.
__device__ inline bool is_of_this_thread(int64_t column) { return column / kVector % kThreads == threadIdx.x; }

// A thread's final logits of a chunk of a row that starts at `from`; -inf beyond the tile. `whole`: the chunk does not
// reach beyond it. Rows are padded to whole loads (check_rows), so that only values have to be checked, not addresses.
template <bool whole, Transform kind>
__device__ inline void load_chunk(const Tile& tile, const LogitMap<DeviceMath, kind>& map, const float* from,
                                  int32_t begin, float (&z)[kChunk]) {
#pragma unroll
  for (int i = 0; i < kChunk; i += kVector) {
    const int32_t column = column_of(begin, i);
    const float4 four = *reinterpret_cast<const float4*>(from + (whole || column < tile.columns ? column : 0));
    const float x[kVector] = {four.x, four.y, four.z, four.w};
    float bias[kVector] = {};
    if (kind != Transform::identity && tile.bias) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) bias[j] = tile.bias_of(whole || column + j < tile.columns ? column + j : 0);
    }
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      z[i + j] = whole || column + j < tile.columns ? map(x[j], bias[j]) : -kInfinity;
    }
  }
}

// Calls f(std::bool_constant<whole>, begin) for each chunk of a row of so many columns.
template <class F>
__device__ inline void for_each_chunk(int32_t columns, const F& f) {
  int32_t begin = 0;
  for (; begin + kBlockChunk <= columns; begin += kBlockChunk) f(std::true_type{}, begin);
  if (begin < columns) f(std::false_type{}, begin);
}

// All lanes' values joined by `join`, which does not mind their order; every lane has the result.
template <class T, class Join>
__device__ inline T across_lanes(T value, const Join& join) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value = join(value, __shfl_xor_sync(kAllLanes, value, offset));
  return value;
}
template <class T>
__device__ inline T sum_across_lanes(T value) {
  return across_lanes(value, [](T a, T b) { return a + b; });
}
__device__ inline float max_across_lanes(float value) {
  return across_lanes(value, [](float a, float b) { return DeviceMath::max(a, b); });
}

// A row's statistics from those of its block's threads and of `before`, which the first warp alone has to know: true
// where `state` is the result, of one thread. merge_lanes(state) gives every lane what all lanes had.
template <class State, class MergeLanes>
__device__ inline bool merge_block(State& state, const State& before, const MergeLanes& merge_lanes) {
  __shared__ State of_warp[kWarps + 1];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  merge_lanes(state);
  if (lane == 0) of_warp[warp] = state;
  if (threadIdx.x == 0) of_warp[kWarps] = before;
  __syncthreads();
  if (warp > 0) return false;
  state = lane <= kWarps ? of_warp[lane] : State::empty();
  merge_lanes(state);
  return lane == 0;
}

// Throws std::invalid_argument where a row's loads or stores would not be whole.
inline void check_rows(const void* rows, int64_t stride, int64_t bytes) {
  if (reinterpret_cast<uintptr_t>(rows) % (kVector * bytes) != 0 || stride % kVector != 0) {
    throw std::invalid_argument("rows of a tile must be aligned and padded to whole loads");
  }
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
