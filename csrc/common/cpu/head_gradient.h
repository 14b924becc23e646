// The way from dlogits to the gradients of hidden states, head and bias, by vocabulary group:
//   recompute a group's dlogits  ->  dW[group] = dz^T H, written once  ->  dH += dz W[group], in fp32.
// The caller computes tiles of dlogits; linear_logprobs and linear_kl share everything else.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "common/cpu/head.h"
#include "common/cpu/parallel.h"
#include "common/gradients.h"
#include "common/workspace.h"

namespace rk {

// The tiles recomputed beside the two products: of heads whose depths sum to `depths` and of which the widest has
// `widest`; and the bytes of the budget that kept logits hold.
struct Recomputed {
  int64_t depths, widest, kept_bytes;
};

template <class T>
class HeadGradient {
 public:
  // `head` is that of `side`. `rows` [n]: which of the side's rows count; `operands`: those, as head.operands gives
  // them.
  HeadGradient(const Head<T>& head, const Side& side, const at::Tensor& operands, const at::Tensor& rows,
               GradientNeeds needs, Recomputed recomputed)
      : head_(head),
        hidden_(side.hidden),
        operands_(operands),
        rows_(rows),
        needs_(needs),
        count_(rows.size(0)),
        width_(head.width()),
        padded_width_(round_up(width_, kRowBlock)),
        plan_(plan_backward(count_, head.vocab(), width_, recomputed.depths, recomputed.widest, sizeof(T),
                            workspace_budget_bytes(Memory::cpu) - recomputed.kept_bytes)),
        by_vocab_stride_(plan_.row_chunk + kPad),
        by_row_stride_(plan_.vocab_group + kPad) {
    needs_.bias = needs.bias && side.bias && side.bias->defined();
    if (needs_.weight) gradients_.weight = at::empty_like(side.weight, at::MemoryFormat::Contiguous);
    if (needs_.hidden) sums_ = at::zeros({round_up(count_, kRowBlock), padded_width_ + kPad}, at::kFloat);
    if (needs_.bias) bias_sums_ = at::zeros({head.vocab()}, at::kFloat);
    if (needs_.bias) bias_dtype_ = side.bias->scalar_type();
  }

  const BackwardPlan& plan() const { return plan_; }

  // prepare_chunk(first_block, blocks): called before a chunk's tiles, from one thread.
  // make_tiler(): a worker's maker of tiles, tiler(vocab_begin, count, block, sink) -> writes dlogits to the sink,
  // where `block` counts blocks of kRowBlock rows among all rows.
  template <class PrepareChunk, class MakeTiler>
  HeadGradients run(const PrepareChunk& prepare_chunk, const MakeTiler& make_tiler) {
    const int64_t chunk_blocks = plan_.row_chunk / kRowBlock, blocks = ceil_div(count_, kRowBlock);
    Buffer<T> by_vocab(plan_.vocab_group * by_vocab_stride_), by_row(plan_.row_chunk * by_row_stride_);
    Buffer<T> packed_rows(needs_.weight ? plan_.row_chunk * padded_width_ : 0);
    Buffer<T> packed_head(needs_.hidden ? plan_.vocab_group * padded_width_ : 0);
    Buffer<float> weight_sums(plan_.row_chunk < count_ && needs_.weight ? plan_.vocab_group * padded_width_ : 0);

    for (int64_t begin = 0; begin < head_.vocab(); begin += plan_.vocab_group) {
      const int64_t group = std::min(plan_.vocab_group, head_.vocab() - begin);
      for (int64_t first = 0; first == 0 || first < blocks; first += chunk_blocks) {
        const int64_t here = std::min(chunk_blocks, blocks - first);
        const bool resident = begin > 0 && chunk_blocks >= blocks;  // the only chunk stays packed for all groups
        if (!resident) {
          prepare_chunk(first, here);
          if (needs_.weight) pack_rows(operands_, first * kRowBlock, here * kRowBlock, packed_rows.data());
        }
        recompute(begin, group, first, here, by_vocab.data(), by_row.data(), packed_head.data(), make_tiler);
        multiply(begin, group, first, here, blocks, by_vocab.data(), by_row.data(), packed_rows.data(),
                 packed_head.data(), weight_sums.data());
      }
    }
    finish();
    return std::move(gradients_);
  }

 private:
  // Strides that are powers of two would map a tile's rows to few sets of the cache.
  static constexpr int64_t kPad = 32;
  // Output rows of one GEMM: small enough that its operand, and the slice of dW it fills, stay in L2 over all columns.
  static constexpr int64_t kWeightTile = 128, kRowTile = 128;

  void pack_rows(const at::Tensor& operands, int64_t begin, int64_t count, T* packed) const {
    const int64_t real = std::clamp<int64_t>(count_ - begin, 0, count);
    const T* from = operands.const_data_ptr<T>() + begin * head_.depth();
    parallel_tasks(padded_width_ / kRowBlock, [&] {
      return [&](int64_t task) {
        const int64_t d = task * kRowBlock;
        T* to = packed + d * plan_.row_chunk;
        const int64_t written = round_up(real, kGemmDepthStep<T>);
        tile_kernels().pack_columns(kFormat<T>, from + d, head_.depth(), real, std::min(kRowBlock, width_ - d), to);
        std::fill(to + written * kRowBlock, to + count * kRowBlock, T(0));
      };
    });
  }

  template <class MakeTiler>
  void recompute(int64_t begin, int64_t group, int64_t first, int64_t blocks, T* by_vocab, T* by_row, T* packed_head,
                 const MakeTiler& make_tiler) {
    // A task takes several blocks, so that the head's tile is read from memory once and then from cache.
    constexpr int64_t kBlocksPerTask = 4;
    const int64_t block_groups = ceil_div(blocks, kBlocksPerTask), tiles = ceil_div(group, plan_.tile);
    std::vector<float> bias_parts(needs_.bias ? group * blocks : 0, 0.0f);
    parallel_tasks(tiles * block_groups, [&] {
      return [&, tiler = make_tiler(), scratch = Buffer<T>(),
              releaser = GemmReleaser{gemm_release<T>}](int64_t task) mutable {
        const int64_t from = task / block_groups * plan_.tile, count = std::min(plan_.tile, group - from);
        const int64_t block_begin = task % block_groups * kBlocksPerTask;
        for (int64_t block = block_begin; block < std::min(block_begin + kBlocksPerTask, blocks); ++block) {
          const GradientSink sink{kFormat<T>,       by_vocab + from * by_vocab_stride_ + block * kRowBlock,
                                  by_vocab_stride_, by_row + block * kRowBlock * by_row_stride_ + from,
                                  by_row_stride_,   needs_.bias ? bias_parts.data() + block * group + from : nullptr};
          tiler(begin + from, count, first + block, sink);
        }
        // Here, where the tile is in cache; once, with the tile's first blocks of the first chunk.
        if (needs_.hidden && first == 0 && block_begin == 0) {
          pack_head_rows(head_, begin + from, count, scratch, packed_head + from * kRowBlock, plan_.vocab_group);
        }
      };
    });
    if (!needs_.bias) return;
    float* sums = bias_sums_.template data_ptr<float>() + begin;
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t v = 0; v < group; ++v) sums[v] += bias_parts[block * group + v];
    }
  }

  // Both GEMMs of a group, in one parallel region: they share nothing they write. All tiles of a column come one after
  // the other: two threads in the same rows would both fault on a fresh page of dW, half as often again as there are.
  void multiply(int64_t begin, int64_t group, int64_t first, int64_t blocks, int64_t all_blocks, T* by_vocab, T* by_row,
                const T* packed_rows, const T* packed_head, float* weight_sums) {
    const int64_t columns = padded_width_ / kRowBlock;
    const int64_t rows = live_rows(std::min(blocks * kRowBlock, count_ - first * kRowBlock));
    const int64_t weight_tiles = needs_.weight ? ceil_div(group, kWeightTile) : 0;
    const int64_t row_tiles = needs_.hidden ? ceil_div(rows, kRowTile) : 0;
    const int64_t depth = round_up(group, kGemmDepthStep<T>);  // an odd last vocabulary row is paired with zeros
    const bool last = first + blocks >= all_blocks, accumulate = all_blocks > blocks;
    const int64_t tiles = weight_tiles + row_tiles;
    parallel_tasks(tiles * columns, [&] {
      return [&, out = Buffer<float>(kWeightTile * kRowBlock),
              releaser = GemmReleaser{gemm_release<T>}](int64_t task) mutable {
        const int64_t index = task % tiles, d = task / tiles * kRowBlock;
        if (index < weight_tiles) {
          const int64_t from = index * kWeightTile, count = std::min(kWeightTile, group - from);
          float* to = accumulate ? weight_sums + from * padded_width_ + d : out.data();
          const int64_t stride = accumulate ? padded_width_ : kRowBlock;
          if (rows > 0) {
            gemm_tile<T>(count, kRowBlock, rows, by_vocab + from * by_vocab_stride_, by_vocab_stride_,
                         packed_rows + d * plan_.row_chunk, to, stride, accumulate && first > 0);
          } else {
            std::fill(out.begin(), out.end(), 0.0f);
          }
          if (last) store(gradients_.weight, begin + from, count, d, to, stride);
        } else {
          const int64_t from = (index - weight_tiles) * kRowTile, count = std::min(kRowTile, rows - from);
          gemm_tile<T>(count, kRowBlock, depth, by_row + from * by_row_stride_, by_row_stride_,
                       packed_head + d * plan_.vocab_group,
                       sums_.template data_ptr<float>() + (first * kRowBlock + from) * sums_.size(1) + d, sums_.size(1),
                       begin > 0);
        }
      };
    });
  }

  void store(const at::Tensor& to, int64_t row, int64_t rows, int64_t column, const float* from, int64_t stride) const {
    char* data = static_cast<char*>(to.mutable_data_ptr());
    const int64_t offset = (row * to.stride(0) + column) * to.element_size();
    tile_kernels().store_rows(format_of(to.scalar_type()), from, stride, data + offset, to.stride(0), rows,
                              std::min(kRowBlock, width_ - column));
  }

  void finish() {
    if (needs_.hidden) {
      gradients_.hidden = at::zeros_like(hidden_, at::MemoryFormat::Contiguous);
      gradients_.hidden.index_copy_(0, rows_,
                                    sums_.narrow(0, 0, count_).narrow(1, 0, width_).to(hidden_.scalar_type()));
    }
    if (needs_.bias) gradients_.bias = bias_sums_.to(bias_dtype_);
  }

  const Head<T>& head_;
  at::Tensor hidden_, operands_, rows_;
  GradientNeeds needs_;
  int64_t count_, width_, padded_width_;
  BackwardPlan plan_;
  int64_t by_vocab_stride_, by_row_stride_;
  HeadGradients gradients_;
  at::Tensor sums_, bias_sums_;
  at::ScalarType bias_dtype_ = at::kFloat;
};

}  // namespace rk
