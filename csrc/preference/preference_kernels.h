// dpo_loss and bradley_terry_loss on CUDA: one launch forward, one backward.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "preference/pair_losses.h"

namespace rk::cuda {

// policy and ref [responses] (ref null: zeros), chosen and rejected [pairs]. An index outside [0, responses) cannot be
// refused without waiting for the device: its pair's loss is NaN, and nothing is read out of bounds.
struct DpoPairs {
  const float *policy, *ref;
  const int64_t *chosen, *rejected;
  int64_t responses, pairs;
  PairLoss type;
  float beta, label_smoothing;
};
void dpo_forward(const DpoPairs& args, float* losses, float* rewards, cudaStream_t stream);
// grad [responses]: each response adds up its pairs in their order.
void dpo_backward(const DpoPairs& args, const float* grad_losses, float* grad, cudaStream_t stream);

struct RewardPairs {
  const float *chosen, *rejected, *margin;  // [pairs]; margin null: zeros
  int64_t pairs;
  float label_smoothing, center_coefficient;
};
void bradley_terry_forward(const RewardPairs& args, float* losses, cudaStream_t stream);
void bradley_terry_backward(const RewardPairs& args, const float* grad_losses, float* grad_chosen, float* grad_rejected,
                            cudaStream_t stream);

}  // namespace rk::cuda
