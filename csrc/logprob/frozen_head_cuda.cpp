// linear_logprobs of a frozen head on CUDA: each tile of logits is folded, then becomes weights that multiply the
// head's slice behind it, which is in L2 still: log-probs and their gradients of the hidden states in two products.
#include "common/cuda/device_head.h"
#include "logprob/linear_logprobs.h"
#include "logprob/logprob_kernels.h"
#include "logprob/logprob_rows_cuda.h"

namespace rk {

using at::Tensor;
using cuda::DeviceHead, cuda::DeviceRows, cuda::DeviceScope, cuda::Operand, cuda::Scratch, cuda::TilePlaces;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_logprobs_frozen_cuda(
    const Side& side, const Targets& targets, const WantedOutputs& wanted) {
  check_side(side);
  const Tensor& hidden = side.hidden;
  const int64_t n = side.rows(), vocab = side.vocab(), width = hidden.size(1);
  check_rows("targets", targets.ids, n, at::kLong);
  cuda::check_same_device(hidden, {side.weight, targets.ids, side.bias});
  const DeviceScope device(hidden);
  const Scratch scratch(hidden, device);
  const auto rows = DeviceRows::of_targets(targets.ids, targets.ignore_index, vocab, device);
  const DeviceHead head(side, device.stream());
  DevicePlan plan = cuda::plan_logprobs(head, hidden, rows, scratch, device, false, 0);
  // The weights of all rows of a slice take what of the budget is left.
  const int64_t weights_bytes = plan.tile * size_of(head.format());
  const int64_t chunks = std::max<int64_t>(1, (scratch.budget_left() - plan.bytes) / weights_bytes / plan.row_chunk);
  plan.rows_at_once = std::min(plan.rows_at_once, chunks * plan.row_chunk);
  const int64_t held = std::min(plan.rows_at_once, rows.count);

  const Tensor room = head.room(hidden, rows, held, scratch);
  const Tensor cast = scratch.of(head.format(), {head.casts() ? plan.tile : 0, head.depth()});
  const TilePlaces places(nullptr, false, vocab, rows.count, plan, scratch);
  const Tensor weights = scratch.of(head.format(), {held, plan.tile});
  const cuda::LogprobStates states(rows, scratch);
  const Tensor weighed = scratch.bytes(rows.count * static_cast<int64_t>(sizeof(cuda::WeightRow)));
  auto* weight_rows = static_cast<cuda::WeightRow*>(weighed.data_ptr());
  const Tensor directions = scratch.floats({n, width}).zero_();
  // Sums of weighed rows of the head: in their place at once, where every row has its own.
  const int64_t depth = head.depth();
  const Tensor sums = rows.all && depth == width ? directions : scratch.floats({rows.count, depth});

  for (int64_t first = 0; first < rows.count; first += held) {
    const int64_t count = std::min(held, rows.count - first);
    const Operand operands = head.operands(hidden, rows, first, count, room);
    for (int64_t begin = 0; begin < vocab; begin += plan.tile) {
      const int64_t columns = std::min(plan.tile, vocab - begin);
      const Operand slice = head.slice(begin, columns, cast);
      float* const of_rows = sums.data_ptr<float>() + first * depth;
      for (int64_t from = 0; from < count; from += plan.row_chunk) {
        const int64_t row = first + from, here = std::min(plan.row_chunk, count - from);
        const auto logits = head.tile(scratch.gemm_context(), plan, head.part(operands, from), row, here, slice, begin,
                                      columns, places);
        cuda::fold_logprobs(logits, here, rows.target_data() + row, wanted.accumulated(), begin == 0,
                            states.data() + row, device.stream());
        void* const to = static_cast<char*>(weights.data_ptr()) + from * weights_bytes;
        cuda::weigh_logprobs(logits, here, rows.target_data() + row, states.data() + row, begin == 0, weight_rows + row,
                             {of_rows + from * depth, depth, depth}, {to, plan.tile, head.format(), nullptr, 0},
                             device.stream());
      }
      gemm(scratch.gemm_context(), {count, depth, columns, weights.const_data_ptr(), plan.tile, false, slice.data,
                                    slice.stride, false, of_rows, depth, begin > 0, head.format(), Format::f32, 0, 0});
    }
  }
  cuda::finish_directions({states.data(), weight_rows, rows.index_data(), rows.target_data(), rows.count},
                          {side.weight.const_data_ptr(), side.weight.stride(0), side.weight.stride(1), vocab,
                           format_of(side.weight.scalar_type()), head.format()},
                          side.transform, head.biased(), {sums.data_ptr<float>(), depth, width},
                          directions.data_ptr<float>(), device.stream());
  return std::tuple_cat(states.results(n, vocab, wanted), std::make_tuple(directions));
}

}  // namespace rk
