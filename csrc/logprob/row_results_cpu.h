// What linear_logprobs' forwards on CPU accumulate, and their results.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "common/cpu/counted_rows.h"
#include "common/online_softmax.h"
#include "common/simd/tile_kernels.h"
#include "logprob/linear_logprobs.h"

namespace rk {

// Statistics of every (split, row), in arrays of `rows` per split and field.
class Partials {
 public:
  Partials(int64_t splits, int64_t rows, int32_t outputs) : rows_(rows), outputs_(outputs) {
    const int64_t size = splits * rows;
    max_.assign(size, -kInfinity);
    sum_.assign(size, 0);
    if (outputs & kEntropy) shifted_.assign(size, 0);
    if (outputs & kExtras) {
      squares_.assign(size, 0);
      logit_sum_.assign(size, 0);
      argmax_.assign(size, 0);
    }
  }

  // Floats that a row leaves for each split.
  static int64_t floats(int32_t outputs) { return 2 + (outputs & kEntropy ? 1 : 0) + (outputs & kExtras ? 4 : 0); }

  LogprobStats at(int64_t split, int64_t row) {
    const int64_t i = split * rows_ + row;
    const bool entropy = outputs_ & kEntropy, extras = outputs_ & kExtras;
    return {&max_[i],
            &sum_[i],
            entropy ? &shifted_[i] : nullptr,
            extras ? &squares_[i] : nullptr,
            extras ? &logit_sum_[i] : nullptr,
            extras ? &argmax_[i] : nullptr};
  }

 private:
  int64_t rows_;
  int32_t outputs_;
  std::vector<float> max_, sum_, shifted_, squares_;
  std::vector<double> logit_sum_;
  std::vector<int32_t> argmax_;
};

// The forward's results of each counted row.
struct RowResults {
  std::vector<float> logprob, max, log_sum, entropy, is_top1, mean_logit, log_sum_sq_probs, target_logit;

  explicit RowResults(size_t rows) {
    for (auto* field : {&logprob, &max, &log_sum, &entropy, &is_top1, &mean_logit, &log_sum_sq_probs, &target_logit}) {
      field->assign(rows, 0);
    }
  }

  // Of `count` rows from `first` on, of which the partials are the first.
  void finish_rows(int64_t first, int64_t count, const CountedRows& rows, int64_t vocab, int64_t splits,
                   Partials& partials, int32_t outputs) {
    at::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        finish_row(first + i, rows.targets[first + i], vocab, splits, i, partials, outputs);
      }
    });
  }

  // The op's results of all `n` rows, empty where not wanted.
  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> tensors(
      const CountedRows& rows, int64_t n, const WantedOutputs& wanted) const {
    const auto of = [&](bool is_wanted, const std::vector<float>& values) {
      return is_wanted ? rows.scatter(values, n) : at::empty({0}, at::kFloat);
    };
    return {of(true, logprob),
            of(true, max),
            of(true, log_sum),
            of(wanted.entropy, entropy),
            of(wanted.is_top1, is_top1),
            of(wanted.mean_logit, mean_logit),
            of(wanted.log_sum_sq_probs, log_sum_sq_probs)};
  }

 private:
  // Merges the splits in their order.
  void finish_row(int64_t row, int64_t target, int64_t vocab, int64_t splits, int64_t chunk_row, Partials& partials,
                  int32_t outputs) {
    auto state = SoftmaxState<ScalarMath>::empty();
    float best = -kInfinity;
    double logit_total = 0;
    int64_t argmax = 0;
    for (int64_t split = 0; split < splits; ++split) {
      const LogprobStats s = partials.at(split, chunk_row);
      merge<ScalarMath>(state, {*s.max, *s.sum, s.shifted ? *s.shifted : 0, s.squares ? *s.squares : 0});
      if (!(outputs & kExtras)) continue;
      logit_total += *s.logit_sum;
      if (*s.max > best) {
        best = *s.max;
        argmax = *s.argmax;
      }
    }
    max[row] = state.max;
    log_sum[row] = std::log(state.sum);
    logprob[row] = logprob_of(state, target_logit[row]);
    if (outputs & kEntropy) entropy[row] = entropy_of(state);
    if (!(outputs & kExtras)) return;
    is_top1[row] = argmax == target ? 1 : 0;
    mean_logit[row] = static_cast<float>(logit_total / vocab);
    log_sum_sq_probs[row] = log_sum_sq_probs_of(state);
  }
};

}  // namespace rk
