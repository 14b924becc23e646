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

  static Tensor forward(AutogradContext* ctx, const Tensor& logprobs, const Tensor& ref_logprobs, int64_t estimator) {
    static const auto op = find_op<decltype(kl_penalty_cpu)>("rlhf_kernels::kl_penalty");
    ctx->save_for_backward({logprobs, ref_logprobs});
    ctx->saved_data["estimator"] = estimator;
    const at::AutoDispatchBelowADInplaceOrView below;
    return op.call(logprobs, ref_logprobs, estimator);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    static const auto op = find_op<decltype(kl_penalty_backward_cpu)>("rlhf_kernels::kl_penalty_backward");
    const auto saved = ctx->get_saved_variables();
    variable_list gradients(3);
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      const Tensor gradient = op.call(upstream[0], saved[0], saved[1], ctx->saved_data["estimator"].toInt());
      // Every estimator depends on the difference of its arguments, so the second gradient is minus the first.
      gradients[0] = gradient.to(saved[0].scalar_type());
      if (ctx->needs_input_grad(1)) gradients[1] = gradient.neg().to(saved[1].scalar_type());
    }
    return once("kl_penalty", std::move(gradients));
  }
};

}  // namespace

Tensor kl_penalty_autograd(const Tensor& logprobs, const Tensor& ref_logprobs, int64_t estimator) {
  return KlPenalty::apply(logprobs, ref_logprobs, estimator);
}

}  // namespace rk
