// kl_penalty differentiated: what is kept for backward, and which gradient is whose. The same in Python for the Triton
// op: rlhf_kernels/kl/triton_ops.py.
#include "common/autograd.h"
#include "kl/linear_kl.h"

namespace rk {
namespace {

using at::Tensor;

class KlPenalty : public torch::autograd::Function<KlPenalty> {
 public:
  static constexpr bool is_traceable = true;

  static Tensor compute(const Tensor& logprobs, const Tensor& ref_logprobs, int64_t estimator) {
    static const auto op = find_op<decltype(kl_penalty_cpu)>("rlhf_kernels::kl_penalty");
    const at::AutoDispatchBelowADInplaceOrView below;
    return op.call(logprobs, ref_logprobs, estimator);
  }

  static Tensor forward(AutogradContext* ctx, const Tensor& logprobs, const Tensor& ref_logprobs, int64_t estimator) {
    ctx->save_for_backward({logprobs, ref_logprobs});
    save_option(ctx, "estimator", estimator);
    return compute(logprobs, ref_logprobs, estimator);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    static const auto op = find_op<decltype(kl_penalty_backward_cpu)>("rlhf_kernels::kl_penalty_backward");
    const auto saved = ctx->get_saved_variables();
    variable_list gradients(3);
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      const Tensor gradient = op.call(upstream[0], saved[0], saved[1], saved_option<int64_t>(ctx, "estimator"));
      // Every estimator depends on the difference of its arguments, so the second gradient is minus the first.
      gradients[0] = in_dtype_of(saved[0], gradient);
      if (ctx->needs_input_grad(1)) gradients[1] = in_dtype_of(saved[1], gradient.neg());
    }
    return once("kl_penalty", std::move(gradients));
  }
};

}  // namespace

Tensor kl_penalty_autograd(const Tensor& logprobs, const Tensor& ref_logprobs, int64_t estimator) {
  if (!wants_gradient(logprobs) && !wants_gradient(ref_logprobs)) {
    return KlPenalty::compute(logprobs, ref_logprobs, estimator);
  }
  return KlPenalty::apply(logprobs, ref_logprobs, estimator);
}

}  // namespace rk
