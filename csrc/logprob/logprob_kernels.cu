#include "logprob/logprob_kernels.h"

#include "common/cuda/dlogits.h"
#include "common/logprob_outputs.h"

namespace rk::cuda {
namespace {

using M = DeviceMath;

// A thread's part of a row's statistics.
struct Part {
  SoftmaxState<M> softmax;
  int32_t argmax;
  float unused;  // the double after it is aligned without padding, whose bits would be undefined
  double logit_sum;
};

__device__ inline void merge_parts(Part& a, const Part& b) {
  const bool later = b.softmax.max > a.softmax.max || (b.softmax.max == a.softmax.max && b.argmax < a.argmax);
  a.argmax = later ? b.argmax : a.argmax;
  a.logit_sum += b.logit_sum;
  merge<M>(a.softmax, b.softmax);
}

template <Transform kind, int outputs>
__global__ void __launch_bounds__(kThreads)
    fold(Tile tile, LogitMap<M, kind> map, bool aligned, const int64_t* targets, bool first, LogprobRow* rows) {
  constexpr bool entropy = (outputs & kEntropy) != 0, extras = (outputs & kExtras) != 0;
  const int64_t row = blockIdx.x;
  Part part{SoftmaxState<M>::empty(), INT32_MAX, 0.0f, 0.0};
  for (int32_t begin = 0; begin < tile.columns; begin += kBlockChunk) {
    float z[kChunk];
    load_chunk(tile, map, row, begin, aligned, z);
    float chunk_max = part.softmax.max;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if constexpr (extras) {
        if (z[i] > chunk_max) part.argmax = static_cast<int32_t>(tile.vocab_begin) + column_of(begin, i);
      }
      chunk_max = M::max(chunk_max, z[i]);
    }
    rescale<M>(part.softmax, chunk_max);
    const float shift = finite_max<M>(chunk_max);
    auto few = SoftmaxState<M>::empty();
    float logit_sum = 0;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      add_softmax_term<M, entropy, extras>(few, z[i] - shift);
      if constexpr (extras) logit_sum += column_of(begin, i) < tile.columns ? z[i] : 0.0f;
    }
    part.softmax.sum += few.sum;
    part.softmax.shifted += few.shifted;
    part.softmax.squares += few.squares;
    part.logit_sum += logit_sum;
  }
  part = reduce_block(part, [](Part& a, const Part& b) { merge_parts(a, b); });
  if (threadIdx.x != 0) return;

  LogprobRow& state = rows[row];
  float target_logit = first ? nanf("") : state.target_logit;
  const int64_t target = targets[row] - tile.vocab_begin;
  if (target >= 0 && target < tile.columns) {
    const float bias = tile.bias ? tile.bias[targets[row]] : 0.0f;
    target_logit = map(tile.logits[row * tile.stride + target], bias);
  }
  if (!first) {
    Part running{{state.max, state.sum, state.shifted, state.squares}, state.argmax, 0.0f, state.logit_sum};
    merge_parts(running, part);
    part = running;
  }
  state = {part.softmax.max, part.softmax.sum, part.softmax.shifted, part.softmax.squares,
           target_logit,     part.argmax,      part.logit_sum};
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
  __device__ float operator()(float z, int64_t vocab) const {
    return vocab == target ? target_logit_gradient<M>(z, gradient, with_entropy)
                           : logit_gradient<M>(z, gradient, with_entropy);
  }
};

}  // namespace

void fold_logprobs(const Tile& tile, int64_t count, const int64_t* targets, int32_t outputs, bool first,
                   LogprobRow* rows, cudaStream_t stream) {
  if (count == 0) return;
  const bool aligned = tile.aligned();
  with_kind(tile.kind(), [&](auto kind) {
    constexpr Transform k = decltype(kind)::value;
    const LogitMap<M, k> map(tile.transform);
    switch (outputs) {
      case kPlain:
        RK_LAUNCH((fold<k, kPlain>), count, kThreads, stream, tile, map, aligned, targets, first, rows);
        break;
      case kEntropy:
        RK_LAUNCH((fold<k, kEntropy>), count, kThreads, stream, tile, map, aligned, targets, first, rows);
        break;
      case kExtras:
        RK_LAUNCH((fold<k, kExtras>), count, kThreads, stream, tile, map, aligned, targets, first, rows);
        break;
      default:
        RK_LAUNCH((fold<k, kEntropy | kExtras>), count, kThreads, stream, tile, map, aligned, targets, first, rows);
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
