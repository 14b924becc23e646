#include "logprob/logprob_kernels.h"

#include "common/cuda/dlogits.h"
#include "common/logprob_outputs.h"

namespace rk::cuda {
namespace {

using M = DeviceMath;

// Statistics of a part of a row. What `outputs` do not ask for is neither computed nor read.
struct Part {
  SoftmaxState<M> softmax;
  int32_t argmax;
  double logit_sum;

  static RK_INLINE Part empty() { return {SoftmaxState<M>::empty(), INT32_MAX, 0.0}; }
};

template <int outputs>
__device__ inline void merge_lanes(Part& part) {
  SoftmaxState<M>& softmax = part.softmax;
  const float max = max_across_lanes(softmax.max);
  if constexpr ((outputs & kExtras) != 0) {
    part.argmax =
        across_lanes(softmax.max == max ? part.argmax : INT32_MAX, [](int32_t a, int32_t b) { return a < b ? a : b; });
    part.logit_sum = sum_across_lanes(part.logit_sum);
  }
  rescale<M>(softmax, max);
  softmax.sum = sum_across_lanes(softmax.sum);
  if constexpr ((outputs & kEntropy) != 0) softmax.shifted = sum_across_lanes(softmax.shifted);
  if constexpr ((outputs & kExtras) != 0) softmax.squares = sum_across_lanes(softmax.squares);
}

template <Transform kind, int outputs>
__global__ void __launch_bounds__(kThreads)
    fold(Tile tile, LogitMap<M, kind> map, const int64_t* targets, bool first, LogprobRow* rows) {
  constexpr bool entropy = (outputs & kEntropy) != 0, extras = (outputs & kExtras) != 0;
  LogprobRow& state = rows[blockIdx.x];
  const float* from = tile.logits + blockIdx.x * tile.stride;
  // One thread alone needs these, at the end: it asks for them now.
  Part before = Part::empty();
  float target_logit = nanf("");
  if (threadIdx.x == 0) {
    const int64_t target = targets[blockIdx.x] - tile.vocab_begin;
    if (!first) {
      before = {{state.max, state.sum, state.shifted, state.squares}, state.argmax, state.logit_sum};
      target_logit = state.target_logit;
    }
    if (target >= 0 && target < tile.columns) {
      const auto column = static_cast<int32_t>(target);
      target_logit = map(from[target], tile.bias ? tile.bias_of(column) : 0.0f);
    }
  }

  Part part = Part::empty();
  for_each_chunk(tile.columns, [&](auto whole, int32_t begin) {
    float z[kChunk];
    load_chunk<whole()>(tile, map, from, begin, z);
    float max = part.softmax.max;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if constexpr (extras) part.argmax = z[i] > max ? column_of(begin, i) : part.argmax;
      max = M::max(max, z[i]);
    }
    rescale<M>(part.softmax, max);
    const float shift = finite_max<M>(max);
    float logit_sum = 0;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      add_softmax_term<M, entropy, extras>(part.softmax, z[i] - shift);
      if constexpr (extras) logit_sum += whole() || column_of(begin, i) < tile.columns ? z[i] : 0.0f;
    }
    part.logit_sum += logit_sum;
  });
  if (part.argmax != INT32_MAX) part.argmax += static_cast<int32_t>(tile.vocab_begin);
  if (!merge_block(part, before, merge_lanes<outputs>)) return;

  const SoftmaxState<M>& softmax = part.softmax;
  state.max = softmax.max;
  state.sum = softmax.sum;
  state.target_logit = target_logit;
  if constexpr (entropy) state.shifted = softmax.shifted;
  if constexpr (extras) {
    state.squares = softmax.squares;
    state.argmax = part.argmax;
    state.logit_sum = part.logit_sum;
  }
}

__global__ void __launch_bounds__(kThreads) finish(const LogprobRow* rows, int64_t count, const int64_t* index,
                                                   const int64_t* targets, int64_t vocab, LogprobResults to) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= count || index[row] < 0) return;
  const LogprobRow& r = rows[row];
  const int64_t i = index[row];
  const SoftmaxState<ScalarMath> state{r.max, r.sum, r.shifted, r.squares};
  to.logprobs[i] = logprob_of(state, r.target_logit);
  to.max_logit[i] = r.max;
  to.log_sum[i] = logf(r.sum);
  if (to.entropy) to.entropy[i] = entropy_of(state);
  if (to.is_top1) to.is_top1[i] = r.argmax == targets[row] ? 1.0f : 0.0f;
  if (to.mean_logit) to.mean_logit[i] = static_cast<float>(r.logit_sum / vocab);
  if (to.log_sum_sq_probs) to.log_sum_sq_probs[i] = log_sum_sq_probs_of(state);
}

// The loss's part of differentiate_row (common/cuda/dlogits.h).
template <bool with_entropy>
struct LogprobGradient {
  LogprobUpstream upstream;
  RowGradient<M> gradient;
  int64_t target;

  __device__ bool start(int64_t row) {
    const int64_t i = upstream.index[row];
    if (i < 0) return false;
    const auto at = [&](const float* values) { return values ? values[i] : 0.0f; };
    gradient = {at(upstream.max_logit),    at(upstream.log_sum),      at(upstream.grad_logprobs),
                at(upstream.grad_log_sum), at(upstream.grad_entropy), at(upstream.entropy)};
    target = upstream.targets[row];
    return true;
  }
  template <bool whole>
  __device__ void read(int32_t) {}
  __device__ float operator()(float z, int) const { return logit_gradient<M>(z, gradient, with_entropy); }
  __device__ int64_t own() const { return target; }
  __device__ float of_own(float z) const { return target_logit_gradient<M>(z, gradient, with_entropy); }
};

}  // namespace

void fold_logprobs(const Tile& tile, int64_t count, const int64_t* targets, int32_t outputs, bool first,
                   LogprobRow* rows, cudaStream_t stream) {
  if (count == 0) return;
  check_rows(tile.logits, tile.stride, sizeof(float));
  with_kind(tile.kind(), [&](auto kind) {
    constexpr Transform k = decltype(kind)::value;
    const LogitMap<M, k> map(tile.transform);
    switch (outputs) {
      case kPlain: RK_LAUNCH((fold<k, kPlain>), count, kThreads, stream, tile, map, targets, first, rows); break;
      case kEntropy: RK_LAUNCH((fold<k, kEntropy>), count, kThreads, stream, tile, map, targets, first, rows); break;
      case kExtras: RK_LAUNCH((fold<k, kExtras>), count, kThreads, stream, tile, map, targets, first, rows); break;
      default: RK_LAUNCH((fold<k, kEntropy | kExtras>), count, kThreads, stream, tile, map, targets, first, rows);
    }
  });
}

void finish_logprobs(const LogprobRow* rows, int64_t count, const int64_t* index, const int64_t* targets, int64_t vocab,
                     const LogprobResults& results, cudaStream_t stream) {
  if (count == 0) return;
  RK_LAUNCH(finish, (count + kThreads - 1) / kThreads, kThreads, stream, rows, count, index, targets, vocab, results);
}

void differentiate_logprobs(const Tile& tile, int64_t row, int64_t count, const LogprobUpstream& upstream,
                            const DlogitsSink& sink, cudaStream_t stream) {
  const auto run = [&](auto gradient) { differentiate(tile, row, count, gradient, sink, stream); };
  upstream.grad_entropy ? run(LogprobGradient<true>{upstream, {}, 0}) : run(LogprobGradient<false>{upstream, {}, 0});
}

}  // namespace rk::cuda
