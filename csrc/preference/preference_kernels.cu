#include "preference/preference_kernels.h"

#include "common/cuda/launch.h"

namespace rk::cuda {
namespace {

constexpr int kPairThreads = 128;

int64_t blocks_for(int64_t count) { return (count + kPairThreads - 1) / kPairThreads; }

__device__ inline int64_t thread_index() { return static_cast<int64_t>(blockIdx.x) * kPairThreads + threadIdx.x; }

__device__ inline float log_ratio(const DpoPairs& args, int64_t i) {
  return args.policy[i] - (args.ref ? args.ref[i] : 0.0f);
}

__device__ inline LossAndSlope<ScalarMath> loss_of_pair(const DpoPairs& args, int64_t pair) {
  const int64_t chosen = args.chosen[pair], rejected = args.rejected[pair];
  const bool inside = chosen >= 0 && chosen < args.responses && rejected >= 0 && rejected < args.responses;
  const float h = inside ? log_ratio(args, chosen) - log_ratio(args, rejected) : nanf("");
  return inside ? pair_loss<ScalarMath>(args.type, h, args.beta, args.label_smoothing) : LossAndSlope<ScalarMath>{h, h};
}

__global__ void __launch_bounds__(kPairThreads) dpo_losses(DpoPairs args, float* losses, float* rewards) {
  const int64_t i = thread_index();
  if (i < args.pairs) losses[i] = loss_of_pair(args, i).loss;
  if (i < args.responses) rewards[i] = args.beta * log_ratio(args, i);
}

__global__ void __launch_bounds__(kPairThreads) dpo_gradients(DpoPairs args, const float* grad_losses, float* grad) {
  const int64_t response = thread_index();
  if (response >= args.responses) return;
  float sum = 0;
  for (int64_t pair = 0; pair < args.pairs; ++pair) {
    const bool chosen = args.chosen[pair] == response, rejected = args.rejected[pair] == response;
    if (!chosen && !rejected) continue;
    const float slope = grad_losses[pair] * loss_of_pair(args, pair).slope;
    if (chosen) sum += slope;
    if (rejected) sum -= slope;
  }
  grad[response] = sum;
}

__device__ inline BradleyTerry<ScalarMath> pair_of(const RewardPairs& args, int64_t i) {
  return bradley_terry<ScalarMath>(args.chosen[i], args.rejected[i], args.margin ? args.margin[i] : 0.0f,
                                   args.label_smoothing, args.center_coefficient);
}

__global__ void __launch_bounds__(kPairThreads) reward_losses(RewardPairs args, float* losses) {
  const int64_t i = thread_index();
  if (i < args.pairs) losses[i] = pair_of(args, i).loss;
}

__global__ void __launch_bounds__(kPairThreads)
    reward_gradients(RewardPairs args, const float* grad_losses, float* grad_chosen, float* grad_rejected) {
  const int64_t i = thread_index();
  if (i >= args.pairs) return;
  const BradleyTerry<ScalarMath> pair = pair_of(args, i);
  grad_chosen[i] = grad_losses[i] * pair.slope_chosen;
  grad_rejected[i] = grad_losses[i] * pair.slope_rejected;
}

}  // namespace

void dpo_forward(const DpoPairs& args, float* losses, float* rewards, cudaStream_t stream) {
  const int64_t count = args.pairs > args.responses ? args.pairs : args.responses;
  if (count > 0) RK_LAUNCH(dpo_losses, blocks_for(count), kPairThreads, stream, args, losses, rewards);
}

void dpo_backward(const DpoPairs& args, const float* grad_losses, float* grad, cudaStream_t stream) {
  if (args.responses == 0) return;
  RK_LAUNCH(dpo_gradients, blocks_for(args.responses), kPairThreads, stream, args, grad_losses, grad);
}

void bradley_terry_forward(const RewardPairs& args, float* losses, cudaStream_t stream) {
  if (args.pairs > 0) RK_LAUNCH(reward_losses, blocks_for(args.pairs), kPairThreads, stream, args, losses);
}

void bradley_terry_backward(const RewardPairs& args, const float* grad_losses, float* grad_chosen, float* grad_rejected,
                            cudaStream_t stream) {
  if (args.pairs == 0) return;
  RK_LAUNCH(reward_gradients, blocks_for(args.pairs), kPairThreads, stream, args, grad_losses, grad_chosen,
            grad_rejected);
}

}  // namespace rk::cuda
