// kl_penalty on CUDA.
#include "common/cuda/device.h"
#include "kl/kl_checks.h"
#include "kl/penalty_kernels.h"

namespace rk {
namespace {

using at::Tensor;

Tensor run(const Tensor& logprobs, const Tensor& ref_logprobs, const std::optional<Tensor>& grad, int64_t estimator) {
  check_penalty(logprobs, ref_logprobs, estimator);
  cuda::check_same_device(logprobs, {ref_logprobs, grad});
  const cuda::DeviceScope device(logprobs);
  const Tensor policy = in_fp32(logprobs), ref = in_fp32(ref_logprobs), upstream = grad ? in_fp32(*grad) : Tensor();
  Tensor out = at::empty(logprobs.sizes(), logprobs.options().dtype(at::kFloat));
  cuda::kl_penalty(policy.const_data_ptr<float>(), ref.const_data_ptr<float>(),
                   grad ? upstream.const_data_ptr<float>() : nullptr, out.numel(), static_cast<KlEstimator>(estimator),
                   out.data_ptr<float>(), device.stream());
  return out;
}

}  // namespace

Tensor kl_penalty_cuda(const Tensor& logprobs, const Tensor& ref_logprobs, int64_t estimator) {
  return run(logprobs, ref_logprobs, std::nullopt, estimator);
}

Tensor kl_penalty_backward_cuda(const Tensor& grad, const Tensor& logprobs, const Tensor& ref_logprobs,
                                int64_t estimator) {
  TORCH_CHECK_VALUE(grad.sizes() == logprobs.sizes(), "grad must be ", logprobs.sizes(), ", got ", grad.sizes());
  return run(logprobs, ref_logprobs, grad, estimator);
}

}  // namespace rk
