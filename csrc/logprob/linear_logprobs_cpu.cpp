// linear_logprobs on CPU: stream logit tiles that stay in cache, fold them (forward) or turn them into dlogits
// (backward).
#include "logprob/linear_logprobs.h"

#include "common/cpu/counted_rows.h"
#include "common/cpu/head.h"
#include "common/cpu/head_gradient.h"
#include "common/cpu/kept_logits.h"
#include "common/cpu/parallel.h"
#include "common/workspace.h"
#include "logprob/row_results_cpu.h"

namespace rk {
namespace {

using at::Tensor;

template <class T>
KeptLogits plan_kept_logits(int64_t count, const CountedRows& rows, const Head<T>& head) {
  return KeptLogits::plan(count, rows.count(), head.vocab(), vocab_tile(head.depth(), sizeof(T)));
}

template <class T>
std::pair<RowResults, Tensor> forward(const Side& side, const CountedRows& rows, int32_t outputs, int64_t kept_logits) {
  const Head<T> head(side);
  const ForwardPlan plan =
      plan_forward(rows.count(), head.vocab(), head.depth(), head.depth(), sizeof(T), Partials::floats(outputs),
                   workspace_budget_bytes(Memory::cpu), at::get_num_threads());
  RowResults results(rows.targets.size());
  KeptLogits kept = plan_kept_logits(kept_logits, rows, head);
  const Tensor cache = kept_logits_memory(kept_logits, kept.size);
  kept.data = cache.data_ptr<float>();
  const Tensor operands = head.operands(side.hidden, rows.index);
  const int64_t blocks = ceil_div(rows.count(), kRowBlock), chunk_blocks = plan.row_chunk / kRowBlock;
  Buffer<T> packed(std::min(blocks, chunk_blocks) * kRowBlock * head.depth());

  for (int64_t first = 0; first < blocks; first += chunk_blocks) {
    const int64_t here = std::min(chunk_blocks, blocks - first);
    Partials partials(plan.splits, here * kRowBlock, outputs);
    head.pack_blocks(operands, first, here, packed.data());
    const int64_t group_blocks = ceil_div(here, plan.row_groups), groups = ceil_div(here, group_blocks);
    parallel_tasks(plan.splits * groups, [&] {
      return [&, scratch = Buffer<T>(), logits = Buffer<float>(plan.tile * kRowBlock),
              releaser = GemmReleaser{gemm_release<T>}](int64_t task) mutable {
        const int64_t split = task / groups, block_begin = task % groups * group_blocks;
        const int64_t block_end = std::min(block_begin + group_blocks, here);
        const int64_t end = std::min((split + 1) * plan.split, head.vocab());
        for (int64_t v = split * plan.split; v < end; v += plan.tile) {
          const int64_t count = std::min(plan.tile, end - v);
          const auto head_rows = head.rows(v, count, scratch);
          for (int64_t block = block_begin; block < block_end; ++block) {
            const int64_t row = (first + block) * kRowBlock;
            float* to = kept.has(v, count) ? kept.tile(first + block, v) : logits.data();
            const T* columns = &packed[block * kRowBlock * head.depth()];
            const LogitTile tile = head.tile(head_rows, v, count, columns, rows.live(row), to);
            tile_kernels().logprob_forward(
                {tile, &rows.targets[row], outputs, partials.at(split, block * kRowBlock), &results.target_logit[row]});
          }
        }
      };
    });
    results.finish_rows(first * kRowBlock, here * kRowBlock, rows, head.vocab(), plan.splits, partials, outputs);
  }
  return {results, cache};
}

// Backward's inputs of the rows that count, padded to whole blocks.
struct GradientRows {
  Tensor grad_logprob, grad_log_sum, grad_entropy, max, log_sum, entropy;
  bool with_entropy;

  GradientRows(const LogprobUpstreams& upstream, const SavedLogprobs& saved, const CountedRows& rows, int64_t n)
      : grad_logprob(rows.gather(upstream.logprobs, n, 0)),
        grad_log_sum(rows.gather(upstream.log_sum, n, 0)),
        grad_entropy(rows.gather(upstream.entropy, n, 0)),
        // Rows that pad the last block have p = exp(z - 3e38) = 0 whatever their logits, so their dlogits are 0.
        max(rows.gather(saved.max_logit, n, 3e38f)),
        log_sum(rows.gather(saved.log_sum, n, 0)),
        with_entropy(upstream.entropy.has_value() && upstream.entropy->defined()) {
    entropy = rows.gather(with_entropy ? std::optional(saved.entropy) : std::nullopt, n, 0);
  }
};

template <class T>
HeadGradients backward(const Side& side, const CountedRows& rows, const GradientRows& values, const Tensor& kept_logits,
                       GradientNeeds needs) {
  const Head<T> head(side);
  KeptLogits kept = plan_kept_logits(kept_logits.numel(), rows, head);
  kept.data = kept_logits.data_ptr<float>();
  const int64_t kept_bytes = kept.size * static_cast<int64_t>(sizeof(float));
  const Tensor operands = head.operands(side.hidden, rows.index);
  HeadGradient<T> gradient(head, side, operands, rows.index, needs, {head.depth(), head.depth(), kept_bytes});
  const bool recomputes = kept.vocab < head.vocab();
  Buffer<T> packed(recomputes ? gradient.plan().row_chunk * head.depth() : 0);
  int64_t first_packed = 0;
  const auto prepare_chunk = [&](int64_t first, int64_t blocks) {
    first_packed = first;
    if (recomputes) head.pack_blocks(operands, first, blocks, packed.data());
  };
  const auto at_row = [](const Tensor& values, int64_t row) { return values.const_data_ptr<float>() + row; };
  return gradient.run(prepare_chunk, [&] {
    return [&, scratch = Buffer<T>(), logits = Buffer<float>(gradient.plan().tile * kRowBlock), at_tile = int64_t{-1},
            head_rows = typename Head<T>::Rows{}](int64_t v, int64_t count, int64_t block,
                                                  const GradientSink& sink) mutable {
      LogitTile tile{logits.data(), v, count, head.bias(), head.transform()};
      const int64_t row = block * kRowBlock;
      const float* final_logits = kept.has(v, count) ? kept.tile(block, v) : nullptr;
      if (!final_logits) {
        if (at_tile != v) head_rows = head.rows(v, count, scratch);
        at_tile = v;
        const T* columns = &packed[(block - first_packed) * kRowBlock * head.depth()];
        tile = head.tile(head_rows, v, count, columns, rows.live(row), logits.data());
      }
      tile_kernels().logprob_backward({tile, final_logits, &rows.targets[row], values.with_entropy,
                                       at_row(values.max, row), at_row(values.log_sum, row),
                                       at_row(values.grad_logprob, row), at_row(values.grad_log_sum, row),
                                       at_row(values.grad_entropy, row), at_row(values.entropy, row), sink});
    };
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_logprobs_cpu(
    const Side& side, const Targets& targets, const WantedOutputs& wanted, int64_t kept_logits) {
  check_side(side);
  const int64_t n = side.rows();
  check_rows("targets", targets.ids, n, at::kLong);
  const auto rows = CountedRows::of_targets(targets.ids, targets.ignore_index, side.vocab());
  TORCH_CHECK_VALUE(kept_logits >= 0, "kept_logits must be >= 0, got ", kept_logits);

  const auto run = runs_on_bf16(side.gemm_dtype) ? forward<at::BFloat16> : forward<float>;
  const auto [results, cache] = run(side, rows, wanted.accumulated(), kept_logits);
  return std::tuple_cat(results.tensors(rows, n, wanted), std::make_tuple(cache));
}

std::tuple<Tensor, Tensor, Tensor> linear_logprobs_backward_cpu(const LogprobUpstreams& upstream,
                                                                const SavedLogprobs& saved, const Side& side,
                                                                const Targets& targets, GradientNeeds needs) {
  check_side(side);
  const int64_t n = side.rows();
  check_rows("targets", targets.ids, n, at::kLong);
  const auto rows = CountedRows::of_targets(targets.ids, targets.ignore_index, side.vocab());
  const GradientRows values(upstream, saved, rows, n);
  check_logit_cache(saved.logit_cache);
  const auto run = runs_on_bf16(side.gemm_dtype) ? backward<at::BFloat16> : backward<float>;
  return run(side, rows, values, saved.logit_cache, needs).tensors(side.hidden);
}

}  // namespace rk
