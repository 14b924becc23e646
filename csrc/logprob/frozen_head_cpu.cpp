// linear_logprobs of a frozen head on CPU: each tile of logits is folded and weighed while it is in cache, and its
// weights multiply the head's rows: log-probs and their gradients of the hidden states take two products instead of
// three.
#include <cmath>
#include <vector>

#include "common/cpu/counted_rows.h"
#include "common/cpu/head.h"
#include "common/cpu/parallel.h"
#include "common/workspace.h"
#include "logprob/linear_logprobs.h"
#include "logprob/row_results_cpu.h"

namespace rk {
namespace {

using at::Tensor;

// Of a chunk of rows, relative to a power of two that is no smaller than any e^z so far, 2^scale:
//   U = S e^z_v z'_v W_v and s = S e^z_v, both over the vocabulary but the target.
// With Z = s + e^z_y:   1 - p_y = s / Z,   d log p_y / d h = (s z'_y W_y - U) / Z, which cancels nowhere.
template <class T>
class FrozenForward {
 public:
  FrozenForward(const Side& side, const CountedRows& rows, int32_t outputs)
      : head_(side),
        side_(side),
        rows_(rows),
        outputs_(outputs),
        plan_(plan_frozen(rows.count(), head_.vocab(), head_.depth(), sizeof(T), Partials::floats(outputs),
                          workspace_budget_bytes(Memory::cpu))),
        results_(rows.targets.size()),
        operands_(head_.operands(side.hidden, rows.index)),
        padded_width_(round_up(head_.width(), kRowBlock)),
        sums_stride_(padded_width_ + kPad),
        columns_(std::min(plan_.group * plan_.split, round_up(head_.vocab(), plan_.tile))),
        packed_(std::min(plan_.packed, columns_)),
        weights_stride_(columns_ + kPad),
        directions_(at::zeros({side.rows(), head_.width()}, at::kFloat)) {}

  std::pair<RowResults, Tensor> run() {
    const int64_t blocks = ceil_div(rows_.count(), kRowBlock);
    const int64_t chunk = std::min(plan_.row_chunk / kRowBlock, blocks), rows = chunk * kRowBlock;
    operand_blocks_.resize(rows * head_.depth());
    weights_.resize(rows * weights_stride_);
    scales_.resize(rows * columns_ / plan_.tile);
    others_of_tiles_.resize(scales_.size());
    packed_head_.resize(packed_ * padded_width_);
    sums_.resize(rows * sums_stride_);
    for (int64_t first = 0; first < blocks; first += chunk) run_chunk(first, std::min(chunk, blocks - first));
    return {std::move(results_), directions_};
  }

 private:
  static constexpr int64_t kPad = 32;  // strides that are powers of two would map rows to few sets of the cache
  static constexpr int64_t kRowTile = 128;

  void run_chunk(int64_t first, int64_t blocks) {
    Partials partials(plan_.splits, blocks * kRowBlock, outputs_);
    head_.pack_blocks(operands_, first, blocks, operand_blocks_.data());
    scale_.assign(blocks * kRowBlock, -kInfinity);
    others_.assign(blocks * kRowBlock, 0);
    factor_.assign(blocks * kRowBlock, 0);
    for (int64_t split = 0; split < plan_.splits; split += plan_.group) {
      const int64_t end = std::min(split + plan_.group, plan_.splits);
      fold(split, end, first, blocks, partials);
      const int64_t v = split * plan_.split, count = std::min(end * plan_.split, head_.vocab()) - v;
      restate(count, blocks);
      for (int64_t from = 0; from < count; from += packed_) {
        multiply(v, from, std::min(packed_, count - from), first, blocks);
      }
    }
    results_.finish_rows(first * kRowBlock, blocks * kRowBlock, rows_, head_.vocab(), plan_.splits, partials, outputs_);
    finish(first, blocks);
  }

  // The group's tiles: statistics as a plain forward folds them, and weights.
  void fold(int64_t split, int64_t end, int64_t first, int64_t blocks, Partials& partials) {
    const int64_t groups = ceil_div(blocks, kFrozenBlocks), begin = split * plan_.split;
    parallel_tasks((end - split) * groups, [&] {
      return [&, scratch = Buffer<T>(), logits = Buffer<float>(plan_.tile * kRowBlock),
              releaser = GemmReleaser{gemm_release<T>}](int64_t task) mutable {
        const int64_t s = split + task / groups, block_begin = task % groups * kFrozenBlocks;
        const int64_t block_end = std::min(block_begin + kFrozenBlocks, blocks);
        const int64_t v_end = std::min((s + 1) * plan_.split, head_.vocab());
        for (int64_t v = s * plan_.split; v < v_end; v += plan_.tile) {
          const int64_t count = std::min(plan_.tile, v_end - v);
          const auto head_rows = head_.rows(v, count, scratch);
          for (int64_t block = block_begin; block < block_end; ++block) {
            const int64_t row = (first + block) * kRowBlock, here = block * kRowBlock;
            const int64_t* targets = &rows_.targets[row];
            const LogprobStats stats = partials.at(s, here);
            const LogitTile tile =
                head_.tile(head_rows, v, count, &operand_blocks_[here * head_.depth()], rows_.live(row), logits.data());
            tile_kernels().logprob_forward({tile, targets, outputs_, stats, &results_.target_logit[row]});
            const int64_t place = place_of(block, v - begin);
            T* weights = &weights_[here * weights_stride_ + v - begin];
            tile_kernels().logprob_weights({tile,
                                            targets,
                                            stats.max,
                                            &scale_[here],
                                            &scales_[place],
                                            &others_of_tiles_[place],
                                            {kFormat<T>, nullptr, 0, weights, weights_stride_, nullptr}});
          }
        }
      };
    });
  }

  // One scale for all of the group's tiles: `count` rows of the vocabulary.
  void restate(int64_t count, int64_t blocks) {
    parallel_tasks(blocks, [&] {
      return [&](int64_t block) {
        for (int64_t lane = 0; lane < kRowBlock; ++lane) {
          const int64_t i = block * kRowBlock + lane;
          float scale = scale_[i];
          for (int64_t v = 0; v < count; v += plan_.tile) scale = std::max(scale, scales_[place_of(block, v) + lane]);
          factor_[i] = power(scale_[i], scale);
          others_[i] *= factor_[i];
          for (int64_t v = 0; v < count; v += plan_.tile) {
            const int64_t place = place_of(block, v) + lane;
            const float factor = power(scales_[place], scale);
            others_[i] += factor * others_of_tiles_[place];
            T* weights = &weights_[i * weights_stride_ + v];
            for (int64_t c = 0; factor != 1 && c < std::min(plan_.tile, count - v); ++c) {
              weights[c] = static_cast<T>(factor * static_cast<float>(weights[c]));
            }
          }
          scale_[i] = scale;
        }
      };
    });
  }

  // 2^(from - to) of whole numbers; of a row that had no finite logit yet there is nothing to restate.
  static float power(float from, float to) { return from == to ? 1 : from == -kInfinity ? 0 : std::exp2(from - to); }

  // U <- 2^(scale - scale') U + weights times the head's rows [v + from, v + from + count).
  void multiply(int64_t v, int64_t from, int64_t count, int64_t first, int64_t blocks) {
    const int64_t rows = live_rows(std::min(blocks * kRowBlock, rows_.count() - first * kRowBlock));
    const int64_t row_tiles = ceil_div(rows, kRowTile), columns = padded_width_ / kRowBlock;
    const int64_t depth = round_up(count, kGemmDepthStep<T>);  // an odd last row is paired with zeros
    parallel_tasks(ceil_div(count, plan_.tile), [&] {
      return [&, scratch = Buffer<T>()](int64_t task) mutable {
        const int64_t at = task * plan_.tile, here = std::min(plan_.tile, count - at);
        pack_head_rows(head_, v + from + at, here, scratch, &packed_head_[at * kRowBlock], packed_);
      };
    });
    parallel_tasks(row_tiles * columns, [&] {
      return [&, releaser = GemmReleaser{gemm_release<T>}](int64_t task) {
        const int64_t row = task % row_tiles * kRowTile, d = task / row_tiles * kRowBlock;
        const int64_t here = std::min(kRowTile, rows - row);
        float* to = &sums_[row * sums_stride_ + d];
        for (int64_t i = 0; v > 0 && from == 0 && i < here; ++i) {
          if (factor_[row + i] == 1) continue;
          for (int64_t c = 0; c < kRowBlock; ++c) to[i * sums_stride_ + c] *= factor_[row + i];
        }
        gemm_tile<T>(here, kRowBlock, depth, &weights_[row * weights_stride_ + from], weights_stride_,
                     &packed_head_[d * packed_], to, sums_stride_, v + from > 0);
      };
    });
  }

  // (s z'_y W_y - U) / Z, where the rows belong.
  void finish(int64_t first, int64_t blocks) {
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t row = (first + block) * kRowBlock, live = rows_.live(row);
      const Tensor of_target = at::empty({live, 1}, at::kDouble), of_sums = at::empty({live, 1}, at::kDouble);
      for (int64_t i = 0; i < live; ++i) {
        const float z = results_.target_logit[row + i], scale = finite_max<ScalarMath>(scale_[block * kRowBlock + i]);
        const double others = others_[block * kRowBlock + i], total = others + std::exp(z - scale * std::log(2.0));
        of_target.data_ptr<double>()[i] = others * slope(z) / total;
        of_sums.data_ptr<double>()[i] = -1 / total;
      }
      const Tensor sums =
          at::from_blob(&sums_[block * kRowBlock * sums_stride_], {live, head_.width()}, {sums_stride_, 1}, at::kFloat);
      const Tensor targets = at::from_blob(const_cast<int64_t*>(&rows_.targets[row]), {live}, at::kLong);
      const Tensor head_rows = side_.weight.detach().index_select(0, targets).to(side_.gemm_dtype).to(at::kDouble);
      const Tensor directions = (sums * of_sums).addcmul_(head_rows, of_target);  // rounded once
      directions_.index_copy_(0, rows_.index.narrow(0, row, live), directions.to(at::kFloat));
    }
  }

  float slope(float z) const {
    switch (kind_of(head_.transform(), head_.bias() != nullptr)) {
      case Transform::identity: return LogitMap<ScalarMath, Transform::identity>(head_.transform()).derivative(z);
      case Transform::affine: return LogitMap<ScalarMath, Transform::affine>(head_.transform()).derivative(z);
      default: return LogitMap<ScalarMath, Transform::softcap>(head_.transform()).derivative(z);
    }
  }

  // Of the first row of a block, for the tile at `column` of the group.
  int64_t place_of(int64_t block, int64_t column) const {
    return (block * (columns_ / plan_.tile) + column / plan_.tile) * kRowBlock;
  }

  Head<T> head_;
  const Side& side_;
  const CountedRows& rows_;
  int32_t outputs_;
  FrozenPlan plan_;
  RowResults results_;
  Tensor operands_;
  int64_t padded_width_, sums_stride_, columns_, packed_, weights_stride_;
  Tensor directions_;
  Buffer<T> operand_blocks_, weights_, packed_head_;
  Buffer<float> sums_;
  std::vector<float> scale_, others_, factor_;   // of each row
  std::vector<float> scales_, others_of_tiles_;  // of each row of a block, by tile
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_logprobs_frozen_cpu(
    const Side& side, const Targets& targets, const WantedOutputs& wanted) {
  check_side(side);
  check_rows("targets", targets.ids, side.rows(), at::kLong);
  const auto rows = CountedRows::of_targets(targets.ids, targets.ignore_index, side.vocab());
  const auto run = [&](auto forward) {
    const auto [results, directions] = forward.run();
    return std::tuple_cat(results.tensors(rows, side.rows(), wanted), std::make_tuple(directions));
  };
  const int32_t outputs = wanted.accumulated();
  return runs_on_bf16(side.gemm_dtype) ? run(FrozenForward<at::BFloat16>(side, rows, outputs))
                                       : run(FrozenForward<float>(side, rows, outputs));
}

}  // namespace rk
