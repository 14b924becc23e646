// dpo_loss and bradley_terry_loss on CUDA.
#include "common/checks.h"
#include "common/cuda/device.h"
#include "preference/preference.h"
#include "preference/preference_kernels.h"

namespace rk {
namespace {

using at::Tensor;

const float* data_of(const Tensor& values) { return values.const_data_ptr<float>(); }

// Arguments as contiguous fp32 and int64 arrays on the device.
struct Pairs {
  Tensor policy, ref, chosen, rejected;
  cuda::DpoPairs args;

  Pairs(const Tensor& policy_in, const std::optional<Tensor>& ref_in, const Tensor& chosen_in,
        const Tensor& rejected_in, double beta, int64_t loss_type, double label_smoothing)
      : policy(float_rows(policy_in, policy_in.size(0))),
        chosen(chosen_in.contiguous()),
        rejected(rejected_in.contiguous()) {
    const bool has_ref = ref_in && ref_in->defined();
    if (has_ref) ref = float_rows(ref_in, policy.size(0));
    check_pairs(chosen, rejected, loss_type);
    cuda::check_same_device(policy, {ref_in, chosen, rejected});
    args = {data_of(policy),
            has_ref ? data_of(ref) : nullptr,
            chosen.const_data_ptr<int64_t>(),
            rejected.const_data_ptr<int64_t>(),
            policy.size(0),
            chosen.size(0),
            static_cast<PairLoss>(loss_type),
            static_cast<float>(beta),
            static_cast<float>(label_smoothing)};
  }

  Tensor floats(int64_t count) const { return at::empty({count}, policy.options()); }
};

struct Rewards {
  Tensor chosen, rejected, margin;
  cuda::RewardPairs args;

  Rewards(const Tensor& chosen_in, const Tensor& rejected_in, const std::optional<Tensor>& margin_in,
          double label_smoothing, double center_coefficient)
      : chosen(float_rows(chosen_in, chosen_in.size(0))), rejected(float_rows(rejected_in, chosen_in.size(0))) {
    cuda::check_same_device(chosen, {rejected, margin_in});
    const bool has_margin = margin_in && margin_in->defined();
    if (has_margin) margin = float_rows(margin_in, chosen.size(0));
    args = {data_of(chosen),
            data_of(rejected),
            has_margin ? data_of(margin) : nullptr,
            chosen.size(0),
            static_cast<float>(label_smoothing),
            static_cast<float>(center_coefficient)};
  }
};

}  // namespace

std::tuple<Tensor, Tensor> dpo_loss_cuda(const Tensor& policy, const std::optional<Tensor>& ref, const Tensor& chosen,
                                         const Tensor& rejected, double beta, int64_t loss_type,
                                         double label_smoothing) {
  const cuda::DeviceScope device(policy);
  const Pairs pairs(policy, ref, chosen, rejected, beta, loss_type, label_smoothing);
  const Tensor losses = pairs.floats(pairs.args.pairs), rewards = pairs.floats(pairs.args.responses);
  cuda::dpo_forward(pairs.args, losses.data_ptr<float>(), rewards.data_ptr<float>(), device.stream());
  return {losses, rewards};
}

Tensor dpo_loss_backward_cuda(const Tensor& grad_losses, const Tensor& policy, const std::optional<Tensor>& ref,
                              const Tensor& chosen, const Tensor& rejected, double beta, int64_t loss_type,
                              double label_smoothing) {
  const cuda::DeviceScope device(policy);
  const Pairs pairs(policy, ref, chosen, rejected, beta, loss_type, label_smoothing);
  cuda::check_same_device(policy, {grad_losses});
  const Tensor upstream = float_rows(grad_losses, pairs.args.pairs), grad = pairs.floats(pairs.args.responses);
  cuda::dpo_backward(pairs.args, data_of(upstream), grad.data_ptr<float>(), device.stream());
  return grad;
}

Tensor bradley_terry_loss_cuda(const Tensor& chosen, const Tensor& rejected, const std::optional<Tensor>& margin,
                               double label_smoothing, double center_coefficient) {
  const cuda::DeviceScope device(chosen);
  const Rewards rewards(chosen, rejected, margin, label_smoothing, center_coefficient);
  const Tensor losses = at::empty_like(rewards.chosen);
  cuda::bradley_terry_forward(rewards.args, losses.data_ptr<float>(), device.stream());
  return losses;
}

std::tuple<Tensor, Tensor> bradley_terry_loss_backward_cuda(const Tensor& grad_losses, const Tensor& chosen,
                                                            const Tensor& rejected, const std::optional<Tensor>& margin,
                                                            double label_smoothing, double center_coefficient) {
  const cuda::DeviceScope device(chosen);
  const Rewards rewards(chosen, rejected, margin, label_smoothing, center_coefficient);
  cuda::check_same_device(chosen, {grad_losses});
  const Tensor upstream = float_rows(grad_losses, rewards.args.pairs);
  const Tensor grad_chosen = at::empty_like(rewards.chosen), grad_rejected = at::empty_like(rewards.chosen);
  cuda::bradley_terry_backward(rewards.args, data_of(upstream), grad_chosen.data_ptr<float>(),
                               grad_rejected.data_ptr<float>(), device.stream());
  return {grad_chosen, grad_rejected};
}

}  // namespace rk
