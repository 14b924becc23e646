// The way from a logit tile to dlogits in the GEMM's format: the row kernel that every loss shares.
#pragma once

#include "common/cuda/formats.h"
#include "common/cuda/row_block.h"

namespace rk::cuda {

// Four numbers stored at once.
template <class Out>
struct alignas(kVector * sizeof(Out)) Four {
  Out values[kVector];
};

template <class Out>
__device__ inline void store(const float (&d)[kVector], Out* to) {
  Four<Out> four;
#pragma unroll
  for (int j = 0; j < kVector; ++j) four.values[j] = from_float<Out>(d[j]);
  *reinterpret_cast<Four<Out>*>(to) = four;
}

// One block a row. The loss's part, a Gradient g:
//   g.start(row)          reads the row's inputs; false where the row does not count: its dlogits are 0
//   g.read<whole>(begin)  reads what it needs beside the chunk at `begin`
//   g(z, i)               d loss / d z of the thread's i-th final logit z of that chunk
//   g.own(), g.of_own(z)  a vocabulary entry whose gradient is another one, or -1
template <Transform kind, class Out, class Gradient>
__global__ void __launch_bounds__(kThreads)
    differentiate_row(Tile tile, LogitMap<DeviceMath, kind> map, int64_t first_row, Gradient gradient, Out* dz,
                      int64_t dz_stride, float* unrounded, int64_t unrounded_stride) {
  const int64_t row = blockIdx.x;
  const float* from = tile.logits + row * tile.stride;
  dz += row * dz_stride;
  if constexpr (kind == Transform::identity) unrounded = nullptr;  // there is no bias
  if (unrounded) unrounded += row * unrounded_stride;
  if (!gradient.start(first_row + row)) {
    const float zeros[kVector] = {};
    for (int32_t column = threadIdx.x * kVector; column < tile.columns; column += kStep) {
      store(zeros, dz + column);
      if (unrounded) store(zeros, unrounded + column);
    }
    return;
  }

  const int64_t own = gradient.own() - tile.vocab_begin;
  const bool has_own = own >= 0 && own < tile.columns && is_of_this_thread(own);
  const int32_t column_of_own = has_own ? static_cast<int32_t>(own) : 0;
  const float own_logit = has_own ? map(from[own], tile.bias ? tile.bias_of(column_of_own) : 0.0f) : 0.0f;
  for_each_chunk(tile.columns, [&](auto whole, int32_t begin) {
    float z[kChunk];
    load_chunk<whole()>(tile, map, from, begin, z);
    gradient.template read<whole()>(begin);
#pragma unroll
    for (int i = 0; i < kChunk; i += kVector) {
      const int32_t column = column_of(begin, i);
      float d[kVector];
#pragma unroll
      for (int j = 0; j < kVector; ++j) d[j] = gradient(z[i + j], i + j) * map.derivative(z[i + j]);
      if (whole() || column < tile.columns) {
        store(d, dz + column);
        if (unrounded) store(d, unrounded + column);
      }
    }
  });
  if (has_own) {  // after this thread's own stores
    const float d = gradient.of_own(own_logit) * map.derivative(own_logit);
    dz[own] = from_float<Out>(d);
    if (unrounded) unrounded[own] = d;
  }
}

template <class Gradient>
void differentiate(const Tile& tile, int64_t row, int64_t count, const Gradient& gradient, const DlogitsSink& sink,
                   cudaStream_t stream) {
  if (count == 0) return;
  check_rows(tile.logits, tile.stride, sizeof(float));
  check_rows(sink.dz, sink.dz_stride, size_of(sink.format));
  check_rows(sink.unrounded, sink.unrounded_stride, sizeof(float));
  with_kind(tile.kind(), [&](auto kind) {
    constexpr Transform k = decltype(kind)::value;
    const LogitMap<DeviceMath, k> map(tile.transform);
    with_type(sink.format, [&](auto out) {
      using Out = typename decltype(out)::type;
      RK_LAUNCH((differentiate_row<k, Out, Gradient>), count, kThreads, stream, tile, map, row, gradient,
                static_cast<Out*>(sink.dz), sink.dz_stride, sink.unrounded, sink.unrounded_stride);
    });
  });
}

}  // namespace rk::cuda
