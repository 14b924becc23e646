// dpo_loss and bradley_terry_loss on CPU: one pass over the pairs.
#include "preference/preference.h"

#include <ATen/Parallel.h>

#include "common/checks.h"
#include "common/simd/tile_kernels.h"
#include "preference/pair_losses.h"

namespace rk {
namespace {

using at::Tensor;

constexpr int64_t kPairsPerTask = 8192;

// Log-ratios of responses as contiguous fp32, and which of them are compared.
class Pairs {
 public:
  Pairs(const Tensor& policy, const std::optional<Tensor>& ref, const Tensor& chosen, const Tensor& rejected,
        double beta, int64_t loss_type, double label_smoothing)
      : ratios_(float_rows(policy, policy.size(0))),
        chosen_(chosen.contiguous()),
        rejected_(rejected.contiguous()),
        beta_(static_cast<float>(beta)),
        smoothing_(static_cast<float>(label_smoothing)),
        type_(static_cast<PairLoss>(loss_type)) {
    check_pairs(chosen_, rejected_, loss_type);
    if (ref && ref->defined()) ratios_ = ratios_ - float_rows(ref, responses());
  }

  int64_t count() const { return chosen_.size(0); }
  int64_t responses() const { return ratios_.size(0); }
  const int64_t* chosen() const { return chosen_.const_data_ptr<int64_t>(); }
  const int64_t* rejected() const { return rejected_.const_data_ptr<int64_t>(); }

  // Losses and slopes [P], either or null. Raises where an index is out of bounds.
  void evaluate(float* losses, float* slopes) const {
    const int64_t *w = chosen(), *l = rejected(), size = responses();
    const float* ratios = ratios_.const_data_ptr<float>();
    const auto ratio = [=](const char* idxs, int64_t i) {
      TORCH_CHECK_INDEX(i >= 0 && i < size, idxs, " must lie in [0, ", size, "), got ", i);
      return ratios[i];
    };
    at::parallel_for(0, count(), kPairsPerTask, [&](int64_t begin, int64_t end) {
      constexpr int64_t kStep = 1024;
      float h[kStep];
      for (int64_t first = begin; first < end; first += kStep) {
        const int64_t here = std::min(kStep, end - first);
        for (int64_t i = 0; i < here; ++i) {
          h[i] = ratio("chosen_idxs", w[first + i]) - ratio("rejected_idxs", l[first + i]);
        }
        tile_kernels().pair_losses(
            {type_, h, here, beta_, smoothing_, losses ? losses + first : nullptr, slopes ? slopes + first : nullptr});
      }
    });
  }

  // beta times the log-ratio of every response.
  Tensor rewards() const { return ratios_ * beta_; }

 private:
  Tensor ratios_, chosen_, rejected_;
  float beta_, smoothing_;
  PairLoss type_;
};

// Rewards [P], a margin or none, and whatever is computed of them.
class Rewards {
 public:
  Rewards(const Tensor& chosen, const Tensor& rejected, const std::optional<Tensor>& margin, double label_smoothing,
          double center_coefficient)
      : count_(chosen.size(0)),
        chosen_(float_rows(chosen, count_)),
        rejected_(float_rows(rejected, count_)),
        margin_(margin && margin->defined() ? float_rows(margin, count_) : Tensor()),
        smoothing_(static_cast<float>(label_smoothing)),
        centring_(static_cast<float>(center_coefficient)) {}

  void evaluate(float* losses, const float* grad, float* grad_chosen, float* grad_rejected) const {
    const float *w = chosen_.const_data_ptr<float>(), *l = rejected_.const_data_ptr<float>(),
                *m = margin_.defined() ? margin_.const_data_ptr<float>() : nullptr;
    const auto from = [](auto* data, int64_t begin) { return data ? data + begin : nullptr; };
    at::parallel_for(0, count_, kPairsPerTask, [&](int64_t begin, int64_t end) {
      tile_kernels().reward_losses({w + begin, l + begin, from(m, begin), end - begin, smoothing_, centring_,
                                    from(losses, begin), from(grad, begin), from(grad_chosen, begin),
                                    from(grad_rejected, begin)});
    });
  }

 private:
  int64_t count_;
  Tensor chosen_, rejected_, margin_;
  float smoothing_, centring_;
};

}  // namespace

std::tuple<Tensor, Tensor> dpo_loss_cpu(const Tensor& policy, const std::optional<Tensor>& ref, const Tensor& chosen,
                                        const Tensor& rejected, double beta, int64_t loss_type,
                                        double label_smoothing) {
  const Pairs pairs(policy, ref, chosen, rejected, beta, loss_type, label_smoothing);
  Tensor losses = at::empty({pairs.count()}, at::kFloat);
  pairs.evaluate(losses.data_ptr<float>(), nullptr);
  return {losses, pairs.rewards()};
}

Tensor dpo_loss_backward_cpu(const Tensor& grad_losses, const Tensor& policy, const std::optional<Tensor>& ref,
                             const Tensor& chosen, const Tensor& rejected, double beta, int64_t loss_type,
                             double label_smoothing) {
  const Pairs pairs(policy, ref, chosen, rejected, beta, loss_type, label_smoothing);
  const Tensor upstream = float_rows(grad_losses, pairs.count());
  Tensor slopes = at::empty({pairs.count()}, at::kFloat), grad = at::zeros({pairs.responses()}, at::kFloat);
  pairs.evaluate(nullptr, slopes.data_ptr<float>());
  const float *up = upstream.const_data_ptr<float>(), *slope = slopes.const_data_ptr<float>();
  const int64_t *w = pairs.chosen(), *l = pairs.rejected();
  float* to = grad.data_ptr<float>();
  for (int64_t i = 0; i < pairs.count(); ++i) {  // in the pairs' order, since a response may be in several
    to[w[i]] += up[i] * slope[i];
    to[l[i]] -= up[i] * slope[i];
  }
  return grad;
}

Tensor bradley_terry_loss_cpu(const Tensor& chosen, const Tensor& rejected, const std::optional<Tensor>& margin,
                              double label_smoothing, double center_coefficient) {
  Tensor losses = at::empty({chosen.size(0)}, at::kFloat);
  const Rewards rewards(chosen, rejected, margin, label_smoothing, center_coefficient);
  rewards.evaluate(losses.data_ptr<float>(), nullptr, nullptr, nullptr);
  return losses;
}

std::tuple<Tensor, Tensor> bradley_terry_loss_backward_cpu(const Tensor& grad_losses, const Tensor& chosen,
                                                           const Tensor& rejected, const std::optional<Tensor>& margin,
                                                           double label_smoothing, double center_coefficient) {
  const int64_t n = chosen.size(0);
  const Tensor upstream = float_rows(grad_losses, n);
  Tensor grad_chosen = at::empty({n}, at::kFloat), grad_rejected = at::empty({n}, at::kFloat);
  const Rewards rewards(chosen, rejected, margin, label_smoothing, center_coefficient);
  rewards.evaluate(nullptr, upstream.const_data_ptr<float>(), grad_chosen.data_ptr<float>(),
                   grad_rejected.data_ptr<float>());
  return {grad_chosen, grad_rejected};
}

}  // namespace rk
