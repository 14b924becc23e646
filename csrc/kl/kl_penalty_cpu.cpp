// kl_penalty on CPU: one pass over the sampled tokens' log-probabilities.
#include <ATen/Parallel.h>

#include "common/simd/tile_kernels.h"
#include "kl/kl_checks.h"

namespace rk {
namespace {

using at::Tensor;

constexpr int64_t kTokensPerTask = 16384;

// The ratio's difference is taken in fp32 after reading either dtype exactly.
Tensor penalties(const Tensor& logprobs, const Tensor& ref_logprobs, int64_t estimator, const Tensor& grad) {
  check_penalty(logprobs, ref_logprobs, estimator);
  const Tensor policy = in_fp32(logprobs), ref = in_fp32(ref_logprobs);
  Tensor out = at::empty(logprobs.sizes(), at::kFloat);
  const float *p = policy.const_data_ptr<float>(), *r = ref.const_data_ptr<float>();
  const float* g = grad.defined() ? grad.const_data_ptr<float>() : nullptr;
  float* to = out.data_ptr<float>();
  at::parallel_for(0, out.numel(), kTokensPerTask, [&](int64_t begin, int64_t end) {
    tile_kernels().kl_penalties(
        {static_cast<KlEstimator>(estimator), p + begin, r + begin, g ? g + begin : nullptr, end - begin, to + begin});
  });
  return out;
}

}  // namespace

Tensor kl_penalty_cpu(const Tensor& logprobs, const Tensor& ref_logprobs, int64_t estimator) {
  return penalties(logprobs, ref_logprobs, estimator, {});
}

Tensor kl_penalty_backward_cpu(const Tensor& grad, const Tensor& logprobs, const Tensor& ref_logprobs,
                               int64_t estimator) {
  TORCH_CHECK_VALUE(grad.sizes() == logprobs.sizes(), "grad must be ", logprobs.sizes(), ", got ", grad.sizes());
  return penalties(logprobs, ref_logprobs, estimator, in_fp32(grad));
}

}  // namespace rk
