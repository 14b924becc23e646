// linear_kl on CUDA: two heads' tiles at a time, policy's and reference's, folded together.
#include "common/cuda/device_gradient.h"
#include "kl/kl_checks.h"
#include "kl/kl_kernels.h"
#include "kl/linear_kl.h"

namespace rk {
namespace {

using at::Tensor;
using cuda::DeviceHead, cuda::DeviceRows, cuda::DeviceScope, cuda::Operand, cuda::Scratch, cuda::Tile, cuda::TilePlaces;

// A side's head and room for its operands, its slice and its tile. Each side multiplies in its own format.
struct DeviceSide {
  const Tensor& hidden;
  DeviceHead head;
  Tensor room, cast;
  TilePlaces places;

  DeviceSide(const Side& side, const DeviceScope& device) : hidden(side.hidden), head(side, device.stream()) {}

  bool copies(const DeviceRows& rows) const { return !head.reads_in_place(hidden, rows); }

  void make_room(const DeviceRows& rows, const DevicePlan& plan, const Scratch& scratch, bool for_operands,
                 TilePlaces for_tiles) {
    room = head.room(hidden, rows, for_operands ? plan.rows_at_once : 0, scratch);
    cast = scratch.of(head.format(), {head.casts() && for_operands ? plan.tile : 0, head.depth()});
    places = for_tiles;
  }

  Operand operands(const DeviceRows& rows, int64_t first, int64_t count) const {
    return head.operands(hidden, rows, first, count, room);
  }

  Tile logits(const Scratch& scratch, const DevicePlan& plan, Operand operands, int64_t row, int64_t rows,
              Operand slice, int64_t begin, int64_t columns) const {
    return head.tile(scratch.gemm_context(), plan, operands, row, rows, slice, begin, columns, places);
  }
};

// Of both models, the policy's first.
int64_t all_logits(const KlInputs& inputs) { return 2 * inputs.mask.size(0) * cached_vocab(inputs.policy.vocab()); }

struct Pair {
  DeviceSide policy, ref;
  DevicePlan plan;

  // `cache`: the logits that are kept, or nothing.
  Pair(const KlInputs& inputs, const DeviceRows& rows, const Scratch& scratch, const DeviceScope& device, bool backward,
       const Tensor& cache)
      : policy(inputs.policy, device), ref(inputs.ref, device) {
    const int64_t size = std::max(size_of(policy.head.format()), size_of(ref.head.format()));
    const int64_t width = policy.head.depth(), ref_width = ref.head.depth();
    const bool casts = policy.head.casts() || ref.head.casts(), copies = policy.copies(rows) || ref.copies(rows);
    const DeviceHeads heads{width, width + ref_width, 2, size, policy.head.biased(), casts, copies};
    plan = plan_device(heads, rows.count, policy.head.vocab(), backward, device.sizes(), scratch.budget_left(),
                       cache.nbytes());
    float* const logits = cache.numel() ? cache.data_ptr<float>() : nullptr;
    const auto places = [&](float* of_model) {
      return TilePlaces(of_model, backward, policy.head.vocab(), rows.count, plan, scratch);
    };
    // In backward, DeviceGradient has the policy's operands, and kept logits need none.
    policy.make_room(rows, plan, scratch, !backward, places(logits));
    ref.make_room(rows, plan, scratch, !backward || !logits,
                  places(logits ? logits + all_logits(inputs) / 2 : nullptr));
  }
};

void check_devices(const KlInputs& inputs) {
  const Side &policy = inputs.policy, &ref = inputs.ref;
  cuda::check_same_device(inputs.mask, {policy.hidden, policy.weight, policy.bias, ref.hidden, ref.weight, ref.bias});
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> linear_kl_cuda(const KlInputs& inputs, int64_t kept_logits) {
  check_kl(inputs);
  check_devices(inputs);
  TORCH_CHECK_VALUE(kept_logits == 0 || kept_logits >= all_logits(inputs),
                    "on CUDA all logits of both models are kept or none: expected ", all_logits(inputs), " or 0, got ",
                    kept_logits);
  const Tensor& mask = inputs.mask;
  const bool policy_ref = inputs.policy_ref;
  const DeviceScope device(mask);
  const Scratch scratch(mask, device);
  const auto rows = DeviceRows::of_mask(mask, device);
  const Tensor cache = scratch.floats({kept_logits});
  const int64_t of_policy = kept_logits ? all_logits(inputs) / 2 : 0;
  cuda::clear_unwritten(cache.narrow(0, 0, of_policy), rows.count, inputs.policy.vocab());
  cuda::clear_unwritten(cache.narrow(0, of_policy, kept_logits - of_policy), rows.count, inputs.policy.vocab());
  const Pair pair(inputs, rows, scratch, device, false, cache);
  const int64_t vocab = pair.policy.head.vocab(), n = mask.size(0);
  const Tensor states = scratch.bytes(rows.count * static_cast<int64_t>(sizeof(cuda::KlRowState)));
  auto* state = static_cast<cuda::KlRowState*>(states.data_ptr());
  for (int64_t first = 0; first < rows.count; first += pair.plan.rows_at_once) {
    const int64_t end = std::min(first + pair.plan.rows_at_once, rows.count);
    const Operand operands = pair.policy.operands(rows, first, end - first);
    const Operand ref_operands = pair.ref.operands(rows, first, end - first);
    for (int64_t begin = 0; begin < vocab; begin += pair.plan.tile) {
      const int64_t columns = std::min(pair.plan.tile, vocab - begin);
      const Operand slice = pair.policy.head.slice(begin, columns, pair.policy.cast);
      const Operand ref_slice = pair.ref.head.slice(begin, columns, pair.ref.cast);
      for (int64_t row = first; row < end; row += pair.plan.row_chunk) {
        const int64_t here = std::min(pair.plan.row_chunk, end - row);
        const Tile policy = pair.policy.logits(scratch, pair.plan, pair.policy.head.part(operands, row - first), row,
                                               here, slice, begin, columns);
        const Tile ref = pair.ref.logits(scratch, pair.plan, pair.ref.head.part(ref_operands, row - first), row, here,
                                         ref_slice, begin, columns);
        cuda::fold_kl(policy_ref ? policy : ref, policy_ref ? ref : policy, here, begin == 0, state + row,
                      device.stream());
      }
    }
  }
  const Tensor kl = scratch.floats({n}).zero_(), stats = scratch.floats({6, n}).zero_();
  cuda::finish_kl(state, rows.count, rows.index_data(), kl.data_ptr<float>(), stats.data_ptr<float>(), n,
                  device.stream());
  return {kl, stats, cache};
}

std::tuple<Tensor, Tensor, Tensor> linear_kl_backward_cuda(const Tensor& grad_kl, const SavedKl& saved,
                                                           const KlInputs& inputs, GradientNeeds needs) {
  check_kl(inputs);
  check_devices(inputs);
  const Tensor& cache = saved.logit_cache;
  TORCH_CHECK_VALUE(
      (cache.numel() == 0 || cache.numel() >= all_logits(inputs)) && cache.dim() == 1 && cache.is_contiguous(),
      "logit_cache does not belong to these inputs: got ", cache.sizes());
  const Tensor& mask = inputs.mask;
  const bool policy_ref = inputs.policy_ref;
  const DeviceScope device(mask);
  const Scratch scratch(mask, device);
  const auto rows = DeviceRows::of_mask(mask, device);
  const Pair pair(inputs, rows, scratch, device, true, cache);
  const int64_t n = mask.size(0);
  cuda::check_same_device(mask, {grad_kl, saved.kl, saved.stats, cache});
  const Tensor grad_values = float_rows(grad_kl, n), kl_values = float_rows(saved.kl, n),
               all_stats = saved.stats.contiguous();
  const cuda::KlUpstream upstream{grad_values.const_data_ptr<float>(), kl_values.const_data_ptr<float>(),
                                  all_stats.const_data_ptr<float>(), n, rows.index_data()};
  cuda::DeviceGradient gradient(pair.policy.head, inputs.policy, rows, needs, pair.plan, scratch);
  int64_t chunk = 0, sliced = -1;
  Operand ref_operands{}, ref_slice{};
  const auto prepare = [&](int64_t first, int64_t count) {
    chunk = first;
    if (!pair.ref.places.computed) ref_operands = pair.ref.operands(rows, first, count);
  };
  const auto differentiate = [&](int64_t begin, int64_t columns, Operand slice, Operand operands, int64_t row,
                                 int64_t here, const cuda::DlogitsSink& sink) {
    if (!pair.ref.places.computed && sliced != begin) ref_slice = pair.ref.head.slice(begin, columns, pair.ref.cast);
    sliced = begin;
    const Tile policy = pair.policy.logits(scratch, pair.plan, operands, row, here, slice, begin, columns);
    const Tile ref = pair.ref.logits(scratch, pair.plan, pair.ref.head.part(ref_operands, row - chunk), row, here,
                                     ref_slice, begin, columns);
    cuda::differentiate_kl(policy_ref ? policy : ref, policy_ref ? ref : policy, policy_ref, row, here, upstream, sink,
                           device.stream());
  };
  return gradient.run(prepare, differentiate).tensors(inputs.policy.hidden);
}

}  // namespace rk
