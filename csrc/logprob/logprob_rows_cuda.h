// What linear_logprobs' forwards on CUDA share: the plan, the rows' statistics, and their results.
#pragma once

#include <ATen/ATen.h>

#include <tuple>

#include "common/cuda/device_head.h"
#include "common/device_plan.h"
#include "logprob/linear_logprobs.h"
#include "logprob/logprob_kernels.h"

namespace rk::cuda {

// `kept_bytes`: of the budget, what a logit cache takes.
inline DevicePlan plan_logprobs(const DeviceHead& head, const at::Tensor& hidden, const DeviceRows& rows,
                                const Scratch& scratch, const DeviceScope& device, bool backward, int64_t kept_bytes) {
  const DeviceHeads heads{head.depth(),
                          head.depth(),
                          1,
                          size_of(head.format()),
                          head.biased(),
                          head.casts(),
                          !head.reads_in_place(hidden, rows)};
  return plan_device(heads, rows.count, head.vocab(), backward, device.sizes(), scratch.budget_left(), kept_bytes);
}

// The statistics of the rows that count.
class LogprobStates {
 public:
  LogprobStates(const DeviceRows& rows, const Scratch& scratch)
      : rows_(rows), scratch_(scratch), memory_(scratch.bytes(rows.count * static_cast<int64_t>(sizeof(LogprobRow)))) {}

  LogprobRow* data() const { return static_cast<LogprobRow*>(memory_.data_ptr()); }

  // The results of all `n` rows, exactly 0 of those that do not count; empty where not wanted.
  auto results(int64_t n, int64_t vocab, const WantedOutputs& wanted) const {
    const auto of = [&](bool is_wanted) { return scratch_.floats({is_wanted ? n : 0}).zero_(); };
    const std::tuple tensors{of(true),
                             of(true),
                             of(true),
                             of(wanted.entropy),
                             of(wanted.is_top1),
                             of(wanted.mean_logit),
                             of(wanted.log_sum_sq_probs)};
    const auto to = [](const at::Tensor& values) { return values.numel() ? values.data_ptr<float>() : nullptr; };
    const auto places = std::apply([&](const auto&... tensor) { return LogprobResults{to(tensor)...}; }, tensors);
    finish_logprobs(data(), rows_.count, rows_.index_data(), rows_.target_data(), vocab, places,
                    scratch_.gemm_context().stream);
    return tensors;
  }

 private:
  const DeviceRows& rows_;
  const Scratch& scratch_;
  at::Tensor memory_;
};

}  // namespace rk::cuda
