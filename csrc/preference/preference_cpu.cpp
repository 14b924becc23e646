// dpo_loss and bradley_terry_loss on CPU: one pass over the pairs, in their order.
#include "preference/preference.h"

#include "common/checks.h"
#include "preference/pair_losses.h"

namespace rk {
namespace {

using at::Tensor;

// Arguments as contiguous fp32 and int64 arrays whose indices are known to be in bounds.
struct Pairs {
  Tensor policy, ref, chosen, rejected;
  PairLoss type;

  Pairs(const Tensor& policy_in, const std::optional<Tensor>& ref_in, const Tensor& chosen_in,
        const Tensor& rejected_in, int64_t loss_type)
      : policy(float_rows(policy_in, policy_in.size(0))),
        ref(float_rows(ref_in, policy_in.size(0))),
        chosen(chosen_in.contiguous()),
        rejected(rejected_in.contiguous()),
        type(static_cast<PairLoss>(loss_type)) {
    check_pairs(chosen, rejected, loss_type);
    for (const Tensor* idxs : {&chosen, &rejected}) {
      for (int64_t i = 0; i < idxs->size(0); ++i) {
        const int64_t at = idxs->const_data_ptr<int64_t>()[i];
        TORCH_CHECK_INDEX(at >= 0 && at < policy.size(0), "a pair's index must lie in [0, ", policy.size(0), "), got ",
                          at);
      }
    }
  }

  int64_t count() const { return chosen.size(0); }
  int64_t chosen_at(int64_t pair) const { return chosen.const_data_ptr<int64_t>()[pair]; }
  int64_t rejected_at(int64_t pair) const { return rejected.const_data_ptr<int64_t>()[pair]; }
  float log_ratio(int64_t i) const { return policy.const_data_ptr<float>()[i] - ref.const_data_ptr<float>()[i]; }
  float h(int64_t pair) const { return log_ratio(chosen_at(pair)) - log_ratio(rejected_at(pair)); }
};

}  // namespace

std::tuple<Tensor, Tensor> dpo_loss_cpu(const Tensor& policy, const std::optional<Tensor>& ref, const Tensor& chosen,
                                        const Tensor& rejected, double beta, int64_t loss_type,
                                        double label_smoothing) {
  const Pairs pairs(policy, ref, chosen, rejected, loss_type);
  Tensor losses = at::empty({pairs.count()}, at::kFloat), rewards = at::empty({policy.size(0)}, at::kFloat);
  for (int64_t i = 0; i < pairs.count(); ++i) {
    losses.data_ptr<float>()[i] = pair_loss(pairs.type, pairs.h(i), beta, label_smoothing).loss;
  }
  for (int64_t i = 0; i < policy.size(0); ++i) {
    rewards.data_ptr<float>()[i] = static_cast<float>(beta) * pairs.log_ratio(i);
  }
  return {losses, rewards};
}

Tensor dpo_loss_backward_cpu(const Tensor& grad_losses, const Tensor& policy, const std::optional<Tensor>& ref,
                             const Tensor& chosen, const Tensor& rejected, double beta, int64_t loss_type,
                             double label_smoothing) {
  const Pairs pairs(policy, ref, chosen, rejected, loss_type);
  const Tensor upstream = float_rows(grad_losses, pairs.count());
  Tensor grad = at::zeros({policy.size(0)}, at::kFloat);
  float* to = grad.data_ptr<float>();
  for (int64_t i = 0; i < pairs.count(); ++i) {
    const float slope = pair_loss(pairs.type, pairs.h(i), beta, label_smoothing).slope;
    to[pairs.chosen_at(i)] += upstream.const_data_ptr<float>()[i] * slope;
    to[pairs.rejected_at(i)] -= upstream.const_data_ptr<float>()[i] * slope;
  }
  return grad;
}

Tensor bradley_terry_loss_cpu(const Tensor& chosen, const Tensor& rejected, const std::optional<Tensor>& margin,
                              double label_smoothing, double center_coefficient) {
  const int64_t n = chosen.size(0);
  const Tensor w = float_rows(chosen, n), l = float_rows(rejected, n), m = float_rows(margin, n);
  Tensor losses = at::empty({n}, at::kFloat);
  for (int64_t i = 0; i < n; ++i) {
    losses.data_ptr<float>()[i] = bradley_terry(w.const_data_ptr<float>()[i], l.const_data_ptr<float>()[i],
                                                m.const_data_ptr<float>()[i], label_smoothing, center_coefficient)
                                      .loss;
  }
  return losses;
}

std::tuple<Tensor, Tensor> bradley_terry_loss_backward_cpu(const Tensor& grad_losses, const Tensor& chosen,
                                                           const Tensor& rejected, const std::optional<Tensor>& margin,
                                                           double label_smoothing, double center_coefficient) {
  const int64_t n = chosen.size(0);
  const Tensor w = float_rows(chosen, n), l = float_rows(rejected, n), m = float_rows(margin, n);
  const Tensor upstream = float_rows(grad_losses, n);
  Tensor grad_chosen = at::empty({n}, at::kFloat), grad_rejected = at::empty({n}, at::kFloat);
  for (int64_t i = 0; i < n; ++i) {
    const BradleyTerry pair = bradley_terry(w.const_data_ptr<float>()[i], l.const_data_ptr<float>()[i],
                                            m.const_data_ptr<float>()[i], label_smoothing, center_coefficient);
    const float g = upstream.const_data_ptr<float>()[i];
    grad_chosen.data_ptr<float>()[i] = g * pair.slope_chosen;
    grad_rejected.data_ptr<float>()[i] = g * pair.slope_rejected;
  }
  return {grad_chosen, grad_rejected};
}

}  // namespace rk
