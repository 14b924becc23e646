// dpo_loss and bradley_terry_loss differentiated: what is kept for backward, and which gradient is whose. The same in
// Python for the Triton ops: rlhf_kernels/dpo/autograd.py, rlhf_kernels/bradley_terry/autograd.py.
#include "common/autograd.h"
#include "preference/preference.h"

namespace rk {
namespace {

using at::Tensor;

Tensor or_undefined(const std::optional<Tensor>& tensor) { return tensor.value_or(Tensor()); }
std::optional<Tensor> or_none(const Tensor& tensor) { return tensor.defined() ? std::optional(tensor) : std::nullopt; }

class DpoLoss : public torch::autograd::Function<DpoLoss> {
 public:
  static constexpr bool is_traceable = true;

  static std::tuple<Tensor, Tensor> compute(const Tensor& policy, const std::optional<Tensor>& ref,
                                            const Tensor& chosen, const Tensor& rejected, double beta,
                                            int64_t loss_type, double label_smoothing) {
    static const auto op = find_op<decltype(dpo_loss_cpu)>("rlhf_kernels::dpo_loss");
    const at::AutoDispatchBelowADInplaceOrView below;
    return op.call(policy, ref, chosen, rejected, beta, loss_type, label_smoothing);
  }

  static variable_list forward(AutogradContext* ctx, const Tensor& policy, const std::optional<Tensor>& ref,
                               const Tensor& chosen, const Tensor& rejected, double beta, int64_t loss_type,
                               double label_smoothing) {
    ctx->save_for_backward({policy, or_undefined(ref), chosen, rejected});
    save_option(ctx, "beta", beta);
    save_option(ctx, "loss_type", loss_type);
    save_option(ctx, "label_smoothing", label_smoothing);
    ctx->set_materialize_grads(false);  // there is none of the rewards
    auto [losses, rewards] = compute(policy, ref, chosen, rejected, beta, loss_type, label_smoothing);
    return {losses, rewards};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    static const auto op = find_op<decltype(dpo_loss_backward_cpu)>("rlhf_kernels::dpo_loss_backward");
    const auto saved = ctx->get_saved_variables();
    const Tensor &policy = saved[0], &ref = saved[1];
    variable_list gradients(7);
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      const Tensor gradient =
          op.call(upstream[0], policy, or_none(ref), saved[2], saved[3], saved_option<double>(ctx, "beta"),
                  saved_option<int64_t>(ctx, "loss_type"), saved_option<double>(ctx, "label_smoothing"));
      gradients[0] = in_dtype_of(policy, gradient);
      // The losses see policy - ref only.
      if (ref.defined() && ctx->needs_input_grad(1)) gradients[1] = in_dtype_of(ref, gradient.neg());
    }
    return once("dpo_loss", std::move(gradients));
  }
};

class BradleyTerryLoss : public torch::autograd::Function<BradleyTerryLoss> {
 public:
  static constexpr bool is_traceable = true;

  static Tensor compute(const Tensor& chosen, const Tensor& rejected, const std::optional<Tensor>& margin,
                        double label_smoothing, double center_coefficient) {
    static const auto op = find_op<decltype(bradley_terry_loss_cpu)>("rlhf_kernels::bradley_terry_loss");
    const at::AutoDispatchBelowADInplaceOrView below;
    return op.call(chosen, rejected, margin, label_smoothing, center_coefficient);
  }

  static Tensor forward(AutogradContext* ctx, const Tensor& chosen, const Tensor& rejected,
                        const std::optional<Tensor>& margin, double label_smoothing, double center_coefficient) {
    ctx->save_for_backward({chosen, rejected, or_undefined(margin)});
    save_option(ctx, "label_smoothing", label_smoothing);
    save_option(ctx, "center_coefficient", center_coefficient);
    return compute(chosen, rejected, margin, label_smoothing, center_coefficient);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    static const auto op =
        find_op<decltype(bradley_terry_loss_backward_cpu)>("rlhf_kernels::bradley_terry_loss_backward");
    const auto saved = ctx->get_saved_variables();
    variable_list gradients(5);
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      auto [chosen, rejected] =
          op.call(upstream[0], saved[0], saved[1], or_none(saved[2]), saved_option<double>(ctx, "label_smoothing"),
                  saved_option<double>(ctx, "center_coefficient"));
      gradients[0] = in_dtype_of(saved[0], chosen);
      gradients[1] = in_dtype_of(saved[1], rejected);
    }
    return once("bradley_terry_loss", std::move(gradients));
  }
};

}  // namespace

std::tuple<Tensor, Tensor> dpo_loss_autograd(const Tensor& policy, const std::optional<Tensor>& ref,
                                             const Tensor& chosen, const Tensor& rejected, double beta,
                                             int64_t loss_type, double label_smoothing) {
  if (!wants_gradient(policy) && !(ref && wants_gradient(*ref))) {
    return DpoLoss::compute(policy, ref, chosen, rejected, beta, loss_type, label_smoothing);
  }
  const auto results = DpoLoss::apply(policy, ref, chosen, rejected, beta, loss_type, label_smoothing);
  return {results[0], results[1].detach()};  // marked as not differentiable, compiled autograd would refuse it
}

Tensor bradley_terry_loss_autograd(const Tensor& chosen, const Tensor& rejected, const std::optional<Tensor>& margin,
                                   double label_smoothing, double center_coefficient) {
  if (!wants_gradient(chosen) && !wants_gradient(rejected)) {
    return BradleyTerryLoss::compute(chosen, rejected, margin, label_smoothing, center_coefficient);
  }
  return BradleyTerryLoss::apply(chosen, rejected, margin, label_smoothing, center_coefficient);
}

}  // namespace rk
