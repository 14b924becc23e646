// linear_logprobs on CUDA: vendor GEMMs make logit tiles that stay in L2, row kernels fold them (forward) or turn them
// into dlogits (backward).
#include "common/cuda/device_gradient.h"
#include "logprob/linear_logprobs.h"
#include "logprob/logprob_rows_cuda.h"

namespace rk {
namespace {

using at::Tensor;
using cuda::DeviceHead, cuda::DeviceRows, cuda::DeviceScope, cuda::Operand, cuda::Scratch, cuda::TilePlaces;

std::optional<Tensor> float_vector(const std::optional<Tensor>& values, int64_t rows) {
  if (!values || !values->defined() || values->numel() == 0) return std::nullopt;
  return float_rows(values, rows);
}

const float* data_of(const std::optional<Tensor>& values) { return values ? values->const_data_ptr<float>() : nullptr; }

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_logprobs_cuda(
    const Side& side, const Targets& targets, const WantedOutputs& wanted, int64_t kept_logits) {
  check_side(side);
  const Tensor& hidden = side.hidden;
  const int64_t n = side.rows(), vocab = side.vocab();
  check_rows("targets", targets.ids, n, at::kLong);
  cuda::check_same_device(hidden, {side.weight, targets.ids, side.bias});
  const DeviceScope device(hidden);
  const Scratch scratch(hidden, device);
  const auto rows = DeviceRows::of_targets(targets.ids, targets.ignore_index, vocab, device);
  const DeviceHead head(side, device.stream());
  const int64_t all_logits = n * cached_vocab(vocab);
  TORCH_CHECK_VALUE(kept_logits == 0 || kept_logits >= all_logits, "on CUDA all logits are kept or none: expected ",
                    all_logits, " or 0, got ", kept_logits);
  const Tensor cache = scratch.floats({kept_logits});
  cuda::clear_unwritten(cache, rows.count, vocab);
  const DevicePlan plan = cuda::plan_logprobs(head, hidden, rows, scratch, device, false, cache.nbytes());
  const int32_t outputs = wanted.accumulated();

  const Tensor room = head.room(hidden, rows, plan.rows_at_once, scratch);
  const Tensor cast = scratch.of(head.format(), {head.casts() ? plan.tile : 0, head.depth()});
  const TilePlaces places(kept_logits ? cache.data_ptr<float>() : nullptr, false, vocab, rows.count, plan, scratch);
  const cuda::LogprobStates states(rows, scratch);
  for (int64_t first = 0; first < rows.count; first += plan.rows_at_once) {
    const int64_t end = std::min(first + plan.rows_at_once, rows.count);
    const Operand operands = head.operands(hidden, rows, first, end - first, room);
    for (int64_t begin = 0; begin < vocab; begin += plan.tile) {
      const int64_t columns = std::min(plan.tile, vocab - begin);
      const Operand slice = head.slice(begin, columns, cast);
      for (int64_t row = first; row < end; row += plan.row_chunk) {
        const int64_t here = std::min(plan.row_chunk, end - row);
        const auto logits = head.tile(scratch.gemm_context(), plan, head.part(operands, row - first), row, here, slice,
                                      begin, columns, places);
        cuda::fold_logprobs(logits, here, rows.target_data() + row, outputs, begin == 0, states.data() + row,
                            device.stream());
      }
    }
  }

  return std::tuple_cat(states.results(n, vocab, wanted), std::make_tuple(cache));
}

std::tuple<Tensor, Tensor, Tensor> linear_logprobs_backward_cuda(const LogprobUpstreams& upstream,
                                                                 const SavedLogprobs& saved, const Side& side,
                                                                 const Targets& targets, GradientNeeds needs) {
  check_side(side);
  const Tensor &hidden = side.hidden, &logit_cache = saved.logit_cache;
  const int64_t n = side.rows(), vocab = side.vocab();
  check_rows("targets", targets.ids, n, at::kLong);
  cuda::check_same_device(hidden, {side.weight, targets.ids, side.bias, saved.max_logit, saved.log_sum, logit_cache,
                                   upstream.logprobs, upstream.log_sum, upstream.entropy});
  TORCH_CHECK_VALUE((logit_cache.numel() == 0 || logit_cache.numel() >= n * cached_vocab(vocab)) &&
                        logit_cache.dim() == 1 && logit_cache.is_contiguous(),
                    "logit_cache does not belong to these inputs: got ", logit_cache.sizes());
  const DeviceScope device(hidden);
  const Scratch scratch(hidden, device);
  const auto rows = DeviceRows::of_targets(targets.ids, targets.ignore_index, vocab, device);
  const DeviceHead head(side, device.stream());
  const DevicePlan plan = cuda::plan_logprobs(head, hidden, rows, scratch, device, true, logit_cache.nbytes());

  const auto max_values = float_rows(saved.max_logit, n), sums = float_rows(saved.log_sum, n);
  const auto of_logprobs = float_vector(upstream.logprobs, n), of_log_sum = float_vector(upstream.log_sum, n);
  const auto of_entropy = float_vector(upstream.entropy, n);
  const auto entropies = of_entropy ? float_vector(saved.entropy, n) : std::nullopt;
  const cuda::LogprobUpstream gradients{max_values.const_data_ptr<float>(),
                                        sums.const_data_ptr<float>(),
                                        data_of(entropies),
                                        data_of(of_logprobs),
                                        data_of(of_log_sum),
                                        data_of(of_entropy),
                                        rows.index_data(),
                                        rows.target_data()};

  const TilePlaces places(logit_cache.numel() ? logit_cache.data_ptr<float>() : nullptr, true, vocab, rows.count, plan,
                          scratch);
  cuda::DeviceGradient gradient(head, side, rows, needs, plan, scratch);
  const auto differentiate = [&](int64_t begin, int64_t columns, Operand slice, Operand operands, int64_t row,
                                 int64_t here, const cuda::DlogitsSink& sink) {
    const auto logits = head.tile(scratch.gemm_context(), plan, operands, row, here, slice, begin, columns, places);
    cuda::differentiate_logprobs(logits, row, here, gradients, sink, device.stream());
  };
  return gradient.run([](int64_t, int64_t) {}, differentiate).tensors(hidden);
}

}  // namespace rk
