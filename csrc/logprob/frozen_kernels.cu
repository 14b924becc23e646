// Row kernels of linear_logprobs with a frozen head.
#include "common/cuda/dlogits.h"
#include "logprob/logprob_kernels.h"

namespace rk::cuda {
namespace {

using M = DeviceMath;

// One block a row: the tile's weights, and what was summed before restated about the row's new maximum.
template <Transform kind, class Out>
__global__ void __launch_bounds__(kThreads)
    weigh(Tile tile, LogitMap<M, kind> map, const int64_t* targets, const LogprobRow* states, bool first,
          WeightRow* rows, RowSums sums, Out* weights, int64_t weights_stride) {
  const int64_t row = blockIdx.x;
  const float* from = tile.logits + row * tile.stride;
  const float max = states[row].max, shift = finite_max<M>(max);
  const WeightRow before = first ? WeightRow{-kInfinity, 0.0f} : rows[row];
  const int64_t own = targets[row] - tile.vocab_begin;
  weights += row * weights_stride;
  float others = 0;
  for_each_chunk(tile.columns, [&](auto whole, int32_t begin) {
    float z[kChunk];
    load_chunk<whole()>(tile, map, from, begin, z);
    if (own >= begin && own < begin + kBlockChunk) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) z[i] = column_of(begin, i) == own ? -kInfinity : z[i];
    }
#pragma unroll
    for (int i = 0; i < kChunk; i += kVector) {
      const int32_t column = column_of(begin, i);
      float w[kVector];
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const float e = M::exp(z[i + j] - shift);
        others += e;
        w[j] = e * map.derivative(M::max(z[i + j], -map.cap));  // at -inf a soft cap's slope would be infinite
      }
      if (whole() || column < tile.columns) store(w, weights + column);
    }
  });

  __shared__ float of_warp[kWarps];
  others = sum_across_lanes(others);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = others;
  __syncthreads();
  const float factor = before.max == -kInfinity ? 0.0f : M::exp(before.max - shift);
  if (threadIdx.x == 0) {
    others = factor * before.others;
    for (int warp = 0; warp < kWarps; ++warp) others += of_warp[warp];
    rows[row] = {max, others};
  }
  if (first || before.max == max) return;
  for (int64_t d = threadIdx.x; d < sums.width; d += kThreads) sums.data[row * sums.stride + d] *= factor;
}

__device__ inline float rounded(float x, Format format) {
  switch (format) {
    case Format::bf16: return to_float(from_float<__nv_bfloat16>(x));
    case Format::f16: return to_float(from_float<__half>(x));
    default: return x;
  }
}

__device__ inline float element(const void* data, int64_t i, Format format) {
  switch (format) {
    case Format::bf16: return to_float(static_cast<const __nv_bfloat16*>(data)[i]);
    case Format::f16: return to_float(static_cast<const __half*>(data)[i]);
    default: return static_cast<const float*>(data)[i];
  }
}

// One block a row: (s z'_y W_y - U) / Z, with Z = s + e^(z_y - m).
template <Transform kind>
__global__ void __launch_bounds__(kThreads)
    combine(WeighedRows rows, HeadRows head, LogitMap<M, kind> map, RowSums sums, float* directions) {
  const int64_t row = blockIdx.x, to = rows.index[row], target = rows.targets[row];
  if (to < 0) return;
  const bool inside = target >= 0 && target < head.vocab;  // where nothing was read back, it was not checked
  const float z = rows.states[row].target_logit, others = rows.weighed[row].others;
  const float total = others + ::expf(z - finite_max<M>(rows.states[row].max));
  const float of_target = others * map.derivative(z) / total;
  for (int64_t d = threadIdx.x; d < sums.width; d += kThreads) {
    const int64_t at = inside ? target * head.row_stride + d * head.column_stride : 0;
    const float w = rounded(element(head.data, at, head.format), head.gemm_format);
    directions[to * sums.width + d] = of_target * w - sums.data[row * sums.stride + d] / total;
  }
}

}  // namespace

void weigh_logprobs(const Tile& tile, int64_t count, const int64_t* targets, const LogprobRow* states, bool first,
                    WeightRow* rows, const RowSums& sums, const DlogitsSink& sink, cudaStream_t stream) {
  if (count == 0) return;
  check_rows(tile.logits, tile.stride, sizeof(float));
  check_rows(sink.dz, sink.dz_stride, size_of(sink.format));
  with_kind(tile.kind(), [&](auto kind) {
    constexpr Transform k = decltype(kind)::value;
    const LogitMap<M, k> map(tile.transform);
    with_type(sink.format, [&](auto out) {
      using Out = typename decltype(out)::type;
      RK_LAUNCH((weigh<k, Out>), count, kThreads, stream, tile, map, targets, states, first, rows, sums,
                static_cast<Out*>(sink.dz), sink.dz_stride);
    });
  });
}

void finish_directions(const WeighedRows& rows, const HeadRows& head, const LogitTransform& transform, bool biased,
                       const RowSums& sums, float* directions, cudaStream_t stream) {
  if (rows.count == 0) return;
  with_kind(kind_of(transform, biased), [&](auto kind) {
    constexpr Transform k = decltype(kind)::value;
    RK_LAUNCH(combine<k>, rows.count, kThreads, stream, rows, head, LogitMap<M, k>(transform), sums, directions);
  });
}

}  // namespace rk::cuda
