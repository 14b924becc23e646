// linear_kl on CPU: two heads' tiles at a time, policy's and reference's, folded together.
#include "kl/linear_kl.h"

#include <array>
#include <cmath>
#include <vector>

#include "common/cpu/counted_rows.h"
#include "common/cpu/head.h"
#include "common/cpu/head_gradient.h"
#include "common/cpu/kept_logits.h"
#include "common/cpu/parallel.h"
#include "common/online_softmax.h"
#include "common/workspace.h"
#include "kl/kl_checks.h"

namespace rk {
namespace {

using at::Tensor;

constexpr int64_t kFields = 7;  // of KlState, in its order

// Both models' hidden states, packed for a chunk of rows, a worker's tiles of both heads, and where those that are kept
// lie: the policy's in the first half of the memory for `kept_logits`, the reference's behind.
template <class T>
struct Pair {
  Head<T> policy, ref;
  Tensor policy_operands, ref_operands;
  Buffer<T> policy_packed, ref_packed;
  KeptLogits policy_kept, ref_kept;

  Pair(const KlInputs& inputs, const CountedRows& rows, int64_t kept_logits)
      : policy(inputs.policy),
        ref(inputs.ref),
        policy_operands(policy.operands(inputs.policy.hidden, rows.index)),
        ref_operands(ref.operands(inputs.ref.hidden, rows.index)),
        policy_kept(KeptLogits::plan(kept_logits / 2, rows.count(), policy.vocab(), vocab_tile(widest(), sizeof(T)))),
        ref_kept(policy_kept) {}

  int64_t widest() const { return std::max(policy.depth(), ref.depth()); }
  int64_t kept_size() const { return policy_kept.size + ref_kept.size; }
  bool recomputes() const { return policy_kept.vocab < policy.vocab(); }

  void keep_in(float* memory) {
    policy_kept.data = memory;
    ref_kept.data = memory + policy_kept.size;
  }

  void make_room(int64_t chunk_rows) {
    policy_packed = Buffer<T>(chunk_rows * policy.depth());
    ref_packed = Buffer<T>(chunk_rows * ref.depth());
  }

  void pack(int64_t first, int64_t blocks) {
    policy.pack_blocks(policy_operands, first, blocks, policy_packed.data());
    ref.pack_blocks(ref_operands, first, blocks, ref_packed.data());
  }

  struct Worker {
    Buffer<T> policy_scratch, ref_scratch;
    Buffer<float> policy_logits, ref_logits;
    int64_t at = -1;
    typename Head<T>::Rows policy_rows{}, ref_rows{};

    explicit Worker(int64_t tile) : policy_logits(tile * kRowBlock), ref_logits(tile * kRowBlock) {}
  };

  struct Tiles {
    LogitTile policy, ref;
  };

  // Tiles into which backward writes what it makes of kept ones.
  Tiles blank_tiles(Worker& w, int64_t v, int64_t count) const {
    return {{w.policy_logits.data(), v, count, policy.bias(), policy.transform()},
            {w.ref_logits.data(), v, count, ref.bias(), ref.transform()}};
  }

  // `block` counts from `first`, the first block packed; `live` of its rows count. Kept tiles are made where they stay.
  Tiles tiles(Worker& w, int64_t v, int64_t count, int64_t first, int64_t block, int64_t live) const {
    if (w.at != v) {
      w.policy_rows = policy.rows(v, count, w.policy_scratch);
      w.ref_rows = ref.rows(v, count, w.ref_scratch);
      w.at = v;
    }
    const T* policy_columns = &policy_packed[block * kRowBlock * policy.depth()];
    const T* ref_columns = &ref_packed[block * kRowBlock * ref.depth()];
    const bool keep = policy_kept.has(v, count);
    float* const policy_to = keep ? policy_kept.tile(first + block, v) : w.policy_logits.data();
    float* const ref_to = keep ? ref_kept.tile(first + block, v) : w.ref_logits.data();
    return {policy.tile(w.policy_rows, v, count, policy_columns, live, policy_to),
            ref.tile(w.ref_rows, v, count, ref_columns, live, ref_to)};
  }
};

// Returns the logits that are kept.
template <class T>
Tensor forward(const KlInputs& inputs, const CountedRows& rows, int64_t kept_logits, Tensor& kl, Tensor& stats) {
  Pair<T> pair(inputs, rows, kept_logits);
  const bool policy_ref = inputs.policy_ref;
  const int64_t vocab = pair.policy.vocab();
  const ForwardPlan plan = plan_forward(rows.count(), vocab, pair.policy.depth() + pair.ref.depth(), pair.widest(),
                                        sizeof(T), kFields, workspace_budget_bytes(Memory::cpu), at::get_num_threads());
  const int64_t blocks = ceil_div(rows.count(), kRowBlock), chunk_blocks = plan.row_chunk / kRowBlock;
  const Tensor memory = kept_logits_memory(kept_logits, pair.kept_size());
  pair.keep_in(memory.data_ptr<float>());
  pair.make_room(std::min(blocks, chunk_blocks) * kRowBlock);
  std::array<std::vector<float>, 7> results;  // kl, then the six rows of stats
  for (auto& field : results) field.resize(rows.padded());

  for (int64_t first = 0; first < blocks; first += chunk_blocks) {
    const int64_t here = std::min(chunk_blocks, blocks - first), chunk_rows = here * kRowBlock;
    std::array<std::vector<float>, kFields> partials;
    for (int64_t f = 0; f < kFields; ++f)
      partials[f].assign(plan.splits * chunk_rows, f == 0 || f == 2 ? -kInfinity : 0);
    pair.pack(first, here);
    const int64_t group_blocks = ceil_div(here, plan.row_groups), groups = ceil_div(here, group_blocks);
    parallel_tasks(plan.splits * groups, [&] {
      return [&, worker = typename Pair<T>::Worker(plan.tile),
              releaser = GemmReleaser{gemm_release<T>}](int64_t task) mutable {
        const int64_t split = task / groups, block_begin = task % groups * group_blocks;
        const int64_t block_end = std::min(block_begin + group_blocks, here);
        const int64_t end = std::min((split + 1) * plan.split, vocab);
        for (int64_t v = split * plan.split; v < end; v += plan.tile) {
          const int64_t count = std::min(plan.tile, end - v);
          for (int64_t block = block_begin; block < block_end; ++block) {
            const auto tiles = pair.tiles(worker, v, count, first, block, rows.live((first + block) * kRowBlock));
            const int64_t i = split * chunk_rows + block * kRowBlock;
            tile_kernels().kl_forward({policy_ref ? tiles.policy : tiles.ref,
                                       policy_ref ? tiles.ref : tiles.policy,
                                       {&partials[0][i], &partials[1][i], &partials[2][i], &partials[3][i],
                                        &partials[4][i], &partials[5][i], &partials[6][i]}});
          }
        }
      };
    });
    at::parallel_for(0, chunk_rows, 64, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        auto state = KlState<ScalarMath>::empty();
        for (int64_t split = 0; split < plan.splits; ++split) {
          const int64_t i = split * chunk_rows + row;
          merge<ScalarMath>(state, {partials[0][i], partials[1][i], partials[2][i], partials[3][i], partials[4][i],
                                    partials[5][i], partials[6][i]});
        }
        const KlResult result = kl_of(state);
        const float values[] = {
            result.kl,    state.max,   std::log(state.sum), state.other_max, std::log(state.other_sum),
            state.centre, result.shift};
        for (int f = 0; f < 7; ++f) results[f][first * kRowBlock + row] = values[f];
      }
    });
  }
  rows.scatter(results[0].data(), kl.data_ptr<float>());
  for (int f = 0; f < 6; ++f) rows.scatter(results[f + 1].data(), stats[f].data_ptr<float>());
  return memory;
}

template <class T>
HeadGradients backward(const Tensor& grad_kl, const SavedKl& saved, const KlInputs& inputs, const CountedRows& rows,
                       GradientNeeds needs) {
  const int64_t n = saved.kl.size(0);
  const bool policy_ref = inputs.policy_ref;
  Pair<T> pair(inputs, rows, saved.logit_cache.numel());
  pair.keep_in(saved.logit_cache.data_ptr<float>());
  const int64_t kept_bytes = pair.kept_size() * static_cast<int64_t>(sizeof(float));
  HeadGradient<T> gradient(pair.policy, inputs.policy, pair.policy_operands, rows.index, needs,
                           {pair.policy.depth() + pair.ref.depth(), pair.widest(), kept_bytes});
  if (pair.recomputes()) pair.make_room(gradient.plan().row_chunk);
  // Rows that pad the last block get maxima that make every p and q 0.
  const float fills[] = {3e38f, 0, 3e38f, 0, 0, 0};
  std::array<Tensor, 6> row_stats;
  for (int f = 0; f < 6; ++f) row_stats[f] = rows.gather(saved.stats[f], n, fills[f]);
  const Tensor row_kl = rows.gather(saved.kl, n, 0), row_grad = rows.gather(grad_kl, n, 0);
  int64_t first_packed = 0;
  const auto prepare_chunk = [&](int64_t first, int64_t blocks) {
    first_packed = first;
    if (pair.recomputes()) pair.pack(first, blocks);
  };
  return gradient.run(prepare_chunk, [&] {
    return [&, worker = typename Pair<T>::Worker(gradient.plan().tile)](int64_t v, int64_t count, int64_t block,
                                                                        const GradientSink& sink) mutable {
      const bool kept = pair.policy_kept.has(v, count);
      const auto tiles =
          kept ? pair.blank_tiles(worker, v, count)
               : pair.tiles(worker, v, count, first_packed, block - first_packed, rows.live(block * kRowBlock));
      const float* policy_final = kept ? pair.policy_kept.tile(block, v) : nullptr;
      const float* ref_final = kept ? pair.ref_kept.tile(block, v) : nullptr;
      const auto at_row = [&](const Tensor& values) { return values.const_data_ptr<float>() + block * kRowBlock; };
      tile_kernels().kl_backward({policy_ref ? tiles.policy : tiles.ref, policy_ref ? tiles.ref : tiles.policy,
                                  policy_ref ? policy_final : ref_final, policy_ref ? ref_final : policy_final,
                                  policy_ref, at_row(row_stats[0]), at_row(row_stats[1]), at_row(row_stats[2]),
                                  at_row(row_stats[3]), at_row(row_stats[4]), at_row(row_stats[5]), at_row(row_kl),
                                  at_row(row_grad), sink});
    };
  });
}

bool both_run_on_bf16(const KlInputs& inputs) {
  return runs_on_bf16(inputs.policy.gemm_dtype) && runs_on_bf16(inputs.ref.gemm_dtype);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> linear_kl_cpu(const KlInputs& inputs, int64_t kept_logits) {
  check_kl(inputs);
  TORCH_CHECK_VALUE(kept_logits >= 0, "kept_logits must be >= 0, got ", kept_logits);
  const int64_t n = inputs.mask.size(0);
  const auto rows = CountedRows::of_mask(inputs.mask);
  Tensor kl = at::zeros({n}, at::kFloat), stats = at::zeros({6, n}, at::kFloat);
  const auto run = both_run_on_bf16(inputs) ? forward<at::BFloat16> : forward<float>;
  const Tensor logit_cache = run(inputs, rows, kept_logits, kl, stats);
  return {kl, stats, logit_cache};
}

std::tuple<Tensor, Tensor, Tensor> linear_kl_backward_cpu(const Tensor& grad_kl, const SavedKl& saved,
                                                          const KlInputs& inputs, GradientNeeds needs) {
  check_kl(inputs);
  const auto rows = CountedRows::of_mask(inputs.mask);
  check_logit_cache(saved.logit_cache);
  const auto run = both_run_on_bf16(inputs) ? backward<at::BFloat16> : backward<float>;
  return run(grad_kl, saved, inputs, rows, needs).tensors(inputs.policy.hidden);
}

}  // namespace rk
