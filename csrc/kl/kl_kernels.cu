#include "kl/kl_kernels.h"

#include "common/cuda/dlogits.h"

namespace rk::cuda {
namespace {

using M = DeviceMath;

__device__ inline void merge_lanes(KlState<M>& state) {
  const float max = max_across_lanes(state.max), other_max = max_across_lanes(state.other_max);
  const int owner = __ffs(__ballot_sync(kAllLanes, state.max == max)) - 1;
  restate<M>(state, max, other_max, __shfl_sync(kAllLanes, state.centre, owner));
  state.sum = sum_across_lanes(state.sum);
  state.other_sum = sum_across_lanes(state.other_sum);
  state.second = sum_across_lanes(state.second);
  state.first = sum_across_lanes(state.first);
}

template <Transform kind, Transform other_kind>
__global__ void __launch_bounds__(kThreads) fold(Tile weighing, Tile other, LogitMap<M, kind> map,
                                                 LogitMap<M, other_kind> other_map, bool first, KlRowState* rows) {
  KlRowState& to = rows[blockIdx.x];
  const float* from = weighing.logits + blockIdx.x * weighing.stride;
  const float* other_from = other.logits + blockIdx.x * other.stride;
  auto before = KlState<M>::empty(), state = before;
  if (threadIdx.x == 0 && !first) {
    before = {to.max, to.sum, to.other_max, to.other_sum, to.centre, to.second, to.first};
  }
  for_each_chunk(weighing.columns, [&](auto whole, int32_t begin) {
    float z[kChunk], y[kChunk];
    load_chunk<whole()>(weighing, map, from, begin, z);
    load_chunk<whole()>(other, other_map, other_from, begin, y);
    KlState<M> next = state;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) note_kl_maxima<M>(next, z[i], y[i]);
    settle_centre<M>(next);
    restate<M>(state, next.max, next.other_max, next.centre);
    const float shift = finite_max<M>(state.max), other_shift = finite_max<M>(state.other_max);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) add_kl_pair<M>(state, z[i], y[i], shift, other_shift);
  });
  if (!merge_block(state, before, merge_lanes)) return;
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
// other model's logits are read beside it.
template <Transform other_kind, bool policy_weighs>
struct KlGradient {
  KlUpstream upstream;
  Tile other;  // the tile of the model that is not the policy, of the same rows and vocabulary entries
  LogitMap<M, other_kind> map;
  KlRow<M> gradient;
  const float* from;
  float others[kChunk];

  __device__ bool start(int64_t row) {
    const int64_t i = upstream.index[row];
    if (i < 0) return false;
    const auto at = [&](int field) { return upstream.stats[field * upstream.stats_stride + i]; };
    gradient = {at(0), at(1), at(2), at(3), at(4), at(5), upstream.kl[i], upstream.grad[i]};
    from = other.logits + blockIdx.x * other.stride;
    return true;
  }
  template <bool whole>
  __device__ void read(int32_t begin) {
    load_chunk<whole>(other, map, from, begin, others);
  }
  __device__ float operator()(float policy, int i) const {
    return policy_weighs ? kl_gradient_of_weighing<M>(policy, others[i], gradient)
                         : kl_gradient_of_other<M>(others[i], policy, gradient);
  }
  __device__ int64_t own() const { return -1; }
  __device__ float of_own(float) const { return 0; }
};

}  // namespace

void fold_kl(const Tile& weighing, const Tile& other, int64_t count, bool first, KlRowState* rows,
             cudaStream_t stream) {
  if (count == 0) return;
  check_rows(weighing.logits, weighing.stride, sizeof(float));
  check_rows(other.logits, other.stride, sizeof(float));
  with_kind(weighing.kind(), [&](auto kind) {
    with_kind(other.kind(), [&](auto other_kind) {
      constexpr Transform k = decltype(kind)::value, o = decltype(other_kind)::value;
      RK_LAUNCH((fold<k, o>), count, kThreads, stream, weighing, other, LogitMap<M, k>(weighing.transform),
                LogitMap<M, o>(other.transform), first, rows);
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
  check_rows(reference.logits, reference.stride, sizeof(float));
  const auto run = [&](auto gradient) { differentiate(policy, row, count, gradient, sink, stream); };
  with_kind(reference.kind(), [&](auto kind) {
    constexpr Transform k = decltype(kind)::value;
    const LogitMap<M, k> map(reference.transform);
    policy_weighs ? run(KlGradient<k, true>{upstream, reference, map, {}, nullptr, {}})
                  : run(KlGradient<k, false>{upstream, reference, map, {}, nullptr, {}});
  });
}

}  // namespace rk::cuda
