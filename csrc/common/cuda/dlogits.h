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
__device__ inline void store_dlogits(const float (&d)[kVector], int32_t column, int32_t columns, Out* to,
                                     bool aligned) {
  if (aligned && column + kVector <= columns) {
    Four<Out> four;
#pragma unroll
    for (int j = 0; j < kVector; ++j) four.values[j] = from_float<Out>(d[j]);
    *reinterpret_cast<Four<Out>*>(to + column) = four;
    return;
  }
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    if (column + j < columns) to[column + j] = from_float<Out>(d[j]);
  }
}

// One block a row. `gradient.start(row)` reads the row's inputs, false where the row does not count (its dlogits are
// 0); `gradient(z, vocab)` is d loss / d z of the final logit z.
template <Transform kind, class Out, class Gradient>
__global__ void __launch_bounds__(kThreads)
    differentiate_row(Tile tile, LogitMap<DeviceMath, kind> map, bool aligned, int64_t first_row, Gradient gradient,
                      Out* dz, int64_t dz_stride, bool dz_aligned, float* unrounded, int64_t unrounded_stride) {
  const int64_t row = blockIdx.x;
  const bool counts = gradient.start(first_row + row);
  for (int32_t begin = 0; begin < tile.columns; begin += kBlockChunk) {
    float z[kChunk];
    load_chunk(tile, map, row, begin, aligned, z);
#pragma unroll
    for (int i = 0; i < kChunk; i += kVector) {
      const int32_t column = column_of(begin, i);
      float d[kVector];
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        d[j] = counts ? gradient(z[i + j], tile.vocab_begin + column + j) * map.derivative(z[i + j]) : 0.0f;
      }
      store_dlogits(d, column, tile.columns, dz + row * dz_stride, dz_aligned);
      if (unrounded) store_dlogits(d, column, tile.columns, unrounded + row * unrounded_stride, false);
    }
  }
}

template <class Gradient>
void differentiate(const Tile& tile, int64_t row, int64_t count, const Gradient& gradient, const DlogitsSink& sink,
                   cudaStream_t stream) {
  if (count == 0) return;
  const bool aligned = tile.aligned();
  const bool dz_aligned =
      reinterpret_cast<uintptr_t>(sink.dz) % (kVector * size_of(sink.format)) == 0 && sink.dz_stride % kVector == 0;
  with_kind(tile.kind(), [&](auto kind) {
    constexpr Transform k = decltype(kind)::value;
    const LogitMap<DeviceMath, k> map(tile.transform);
    with_type(sink.format, [&](auto out) {
      using Out = typename decltype(out)::type;
      RK_LAUNCH((differentiate_row<k, Out, Gradient>), count, kThreads, stream, tile, map, aligned, row, gradient,
                static_cast<Out*>(sink.dz), sink.dz_stride, dz_aligned, sink.unrounded, sink.unrounded_stride);
    });
  });
}

}  // namespace rk::cuda
