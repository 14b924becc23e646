#include "kl/kl_kernels.h"

#include "common/cuda/dlogits.h"

namespace rk::cuda {
namespace {

using M = DeviceMath;

template <Transform kind, Transform other_kind>
__global__ void __launch_bounds__(kThreads)
    fold(Tile weighing, Tile other, LogitMap<M, kind> map, LogitMap<M, other_kind> other_map, bool aligned,
         bool other_aligned, bool first, KlRowState* rows) {
  const int64_t row = blockIdx.x;
  auto state = KlState<M>::empty();
  for (int32_t begin = 0; begin < weighing.columns; begin += kBlockChunk) {
    float z[kChunk], y[kChunk];
    load_chunk(weighing, map, row, begin, aligned, z);
    load_chunk(other, other_map, row, begin, other_aligned, y);
    auto part = KlState<M>::empty();
#pragma unroll
    for (int i = 0; i < kChunk; ++i) note_kl_maxima<M>(part, z[i], y[i]);
    settle_centre<M>(part);
    const float shift = finite_max<M>(part.max), other_shift = finite_max<M>(part.other_max);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) add_kl_pair<M>(part, z[i], y[i], shift, other_shift);
    merge<M>(state, part);
  }
  state = reduce_block(state, [](KlState<M>& a, const KlState<M>& b) { merge<M>(a, b); });
  if (threadIdx.x != 0) return;
  KlRowState& to = rows[row];
  if (!first) {
    KlState<M> running{to.max, to.sum, to.other_max, to.other_sum, to.centre, to.second, to.first};
    merge<M>(running, state);
    state = running;
  }
  to = {state.max, state.sum, state.other_max, state.other_sum, state.centre, state.second, state.first};
}

__global__ void __launch_bounds__(kThreads)
    finish(const KlRowState* rows, int64_t count, const int64_t* index, float* kl, float* stats, int64_t stride) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= count || index[row] < 0) return;
  const KlRowState& r = rows[row];
  const KlResult result = kl_of({r.max, r.sum, r.other_max, r.other_sum, r.centre, r.second, r.first});
  const float values[] = {r.max, logf(r.sum), r.other_max, logf(r.other_sum), r.centre, result.shift};
  kl[index[row]] = result.kl;
  for (int field = 0; field < 6; ++field) stats[field * stride + index[row]] = values[field];
}

// The loss's part of differentiate_row (common/cuda/dlogits.h). The row that is differentiated is the policy's; the
// other model's logit is read beside it.
template <Transform other_kind, bool policy_weighs>
struct KlGradient {
  KlUpstream upstream;
  Tile other;  // the tile of the model that is not the policy, of the same rows and vocabulary entries
  LogitMap<M, other_kind> map;
  KlRow<M> gradient;
  const float* logits;

  __device__ bool start(int64_t row) {
    const int64_t i = upstream.index[row];
    if (i < 0) return false;
    const auto at = [&](int field) { return upstream.stats[field * upstream.stats_stride + i]; };
    gradient = {at(0), at(1), at(2), at(3), at(4), at(5), upstream.kl[i], upstream.grad[i]};
    logits = other.logits + static_cast<int64_t>(blockIdx.x) * other.stride;
    return true;
  }
  __device__ float operator()(float policy, int64_t vocab) const {
    const int64_t column = vocab - other.vocab_begin;
    if (column >= other.columns) return 0;
    const float reference = map(logits[column], other.bias ? other.bias[vocab] : 0.0f);
    return policy_weighs ? kl_gradient_of_weighing<M>(policy, reference, gradient)
                         : kl_gradient_of_other<M>(reference, policy, gradient);
  }
};

}  // namespace

void fold_kl(const Tile& weighing, const Tile& other, int64_t count, bool first, KlRowState* rows,
             cudaStream_t stream) {
  if (count == 0) return;
  with_kind(weighing.kind(), [&](auto kind) {
    with_kind(other.kind(), [&](auto other_kind) {
      constexpr Transform k = decltype(kind)::value, o = decltype(other_kind)::value;
      RK_LAUNCH((fold<k, o>), count, kThreads, stream, weighing, other, LogitMap<M, k>(weighing.transform),
                LogitMap<M, o>(other.transform), weighing.aligned(), other.aligned(), first, rows);
    });
  });
}

void finish_kl(const KlRowState* rows, int64_t count, const int64_t* index, float* kl, float* stats,
               int64_t stats_stride, cudaStream_t stream) {
  if (count == 0) return;
  RK_LAUNCH(finish, (count + kThreads - 1) / kThreads, kThreads, stream, rows, count, index, kl, stats, stats_stride);
}

void differentiate_kl(const Tile& weighing, const Tile& other, bool policy_weighs, int64_t row, int64_t count,
                      const KlUpstream& upstream, const DlogitsSink& sink, cudaStream_t stream) {
  const Tile& policy = policy_weighs ? weighing : other;
  const Tile& reference = policy_weighs ? other : weighing;
  const auto run = [&](auto gradient) { differentiate(policy, row, count, gradient, sink, stream); };
  with_kind(reference.kind(), [&](auto kind) {
    constexpr Transform k = decltype(kind)::value;
    const LogitMap<M, k> map(reference.transform);
    policy_weighs ? run(KlGradient<k, true>{upstream, reference, map, {}, nullptr})
                  : run(KlGradient<k, false>{upstream, reference, map, {}, nullptr});
  });
}

}  // namespace rk::cuda
