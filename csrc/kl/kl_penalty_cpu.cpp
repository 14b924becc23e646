// kl_penalty on CPU: one pass over the sampled tokens' log-probabilities.
#include <ATen/Parallel.h>

#include "kl/kl_checks.h"

namespace rk {
namespace {

using at::Tensor;

// The ratio's difference is taken in fp32 after reading either dtype exactly.
template <class F>
Tensor map_log_ratio(const Tensor& logprobs, const Tensor& ref_logprobs, int64_t estimator, const F& value) {
  check_penalty(logprobs, ref_logprobs, estimator);
  const Tensor policy = logprobs.detach().to(at::kFloat).contiguous();
  const Tensor ref = ref_logprobs.detach().to(at::kFloat).contiguous();
  Tensor out = at::empty(logprobs.sizes(), at::kFloat);
  const float *p = policy.const_data_ptr<float>(), *r = ref.const_data_ptr<float>();
  float* to = out.data_ptr<float>();
  at::parallel_for(0, out.numel(), 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) to[i] = value(i, r[i] - p[i]);
  });
  return out;
}

}  // namespace

Tensor kl_penalty_cpu(const Tensor& logprobs, const Tensor& ref_logprobs, int64_t estimator) {
  return map_log_ratio(logprobs, ref_logprobs, estimator, [&](int64_t, float log_ratio) {
    return kl_estimate(static_cast<KlEstimator>(estimator), log_ratio);
  });
}

Tensor kl_penalty_backward_cpu(const Tensor& grad, const Tensor& logprobs, const Tensor& ref_logprobs,
                               int64_t estimator) {
  TORCH_CHECK_VALUE(grad.sizes() == logprobs.sizes(), "grad must be ", logprobs.sizes(), ", got ", grad.sizes());
  const Tensor upstream = grad.detach().to(at::kFloat).contiguous();
  const float* g = upstream.const_data_ptr<float>();
  return map_log_ratio(logprobs, ref_logprobs, estimator, [&](int64_t i, float log_ratio) {
    return g[i] * kl_estimate_slope(static_cast<KlEstimator>(estimator), log_ratio);
  });
}

}  // namespace rk
