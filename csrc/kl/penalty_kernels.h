// kl_penalty on CUDA: one launch forward, one backward.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kl/penalty_terms.h"

namespace rk::cuda {

// to[i] = the estimate, or with `grad` the gradient of the policy's log-probability.
void kl_penalty(const float* logprobs, const float* ref_logprobs, const float* grad, int64_t count,
                KlEstimator estimator, float* to, cudaStream_t stream);

}  // namespace rk::cuda
