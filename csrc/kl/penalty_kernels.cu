#include "kl/penalty_kernels.h"

#include "common/cuda/launch.h"

namespace rk::cuda {
namespace {

constexpr int kPenaltyThreads = 256;

__global__ void __launch_bounds__(kPenaltyThreads)
    penalty(const float* logprobs, const float* ref_logprobs, const float* grad, int64_t count, KlEstimator estimator,
            float* to) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kPenaltyThreads + threadIdx.x;
  if (i >= count) return;
  const float log_ratio = ref_logprobs[i] - logprobs[i];
  to[i] = grad ? grad[i] * kl_estimate_slope<ScalarMath>(estimator, log_ratio)
               : kl_estimate<ScalarMath>(estimator, log_ratio);
}

}  // namespace

void kl_penalty(const float* logprobs, const float* ref_logprobs, const float* grad, int64_t count,
                KlEstimator estimator, float* to, cudaStream_t stream) {
  if (count == 0) return;
  RK_LAUNCH(penalty, (count + kPenaltyThreads - 1) / kPenaltyThreads, kPenaltyThreads, stream, logprobs, ref_logprobs,
            grad, count, estimator, to);
}

}  // namespace rk::cuda
