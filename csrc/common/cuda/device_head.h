// An LM head on a CUDA device: hands out tiles of raw logits, and operands in the GEMM's format.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Context.h>

#include <optional>

#include "common/checks.h"
#include "common/cuda/copies.h"
#include "common/cuda/device.h"
#include "common/cuda/device_rows.h"
#include "common/cuda/gemm.h"
#include "common/cuda/tile.h"
#include "common/side.h"
#include "common/tile_plan.h"
#include "common/workspace.h"

namespace rk::cuda {

inline at::ScalarType dtype_of(Format format) {
  return format == Format::f32 ? at::kFloat : format == Format::bf16 ? at::kBFloat16 : at::kHalf;
}

// Whether torch allows TF32, by either of its settings: the older allow_tf32 or fp32_precision.
inline bool allows_tf32() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
         at::Float32Precision::TF32;
}

// Scratch of one call, from torch's allocator: what the GEMM library works in, at most an eighth of the budget.
class Scratch {
 public:
  Scratch(const at::Tensor& like, const DeviceScope& device)
      : budget_(workspace_budget_bytes(Memory::cuda)), options_(like.options().dtype(at::kByte)) {
    const int64_t bytes = std::min(kGemmWorkspaceBytes, budget_ / 8);
    gemm_workspace_ = at::empty({bytes}, options_);
    context_ = {gemm_workspace_.data_ptr(), bytes, allows_tf32(), device.stream()};
  }

  int64_t budget_left() const { return budget_ - gemm_workspace_.numel(); }
  const GemmContext& gemm_context() const { return context_; }
  at::Tensor floats(at::IntArrayRef sizes) const { return at::empty(sizes, options_.dtype(at::kFloat)); }
  at::Tensor of(Format format, at::IntArrayRef sizes) const {
    return at::empty(sizes, options_.dtype(dtype_of(format)));
  }
  at::Tensor bytes(int64_t count) const { return at::empty({count}, options_); }

 private:
  int64_t budget_;
  at::TensorOptions options_;
  at::Tensor gemm_workspace_;
  GemmContext context_;
};

// The memory of logit tiles: one after the other in the same place, or each in its own among all that are kept.
struct TilePlaces {
  at::Tensor tile;
  float* data = nullptr;
  int64_t stride = 0;
  bool kept = false, computed = false;

  TilePlaces() = default;
  // `cache`: the first of the logits that are kept, or null; `computed`: before, so that they are there.
  TilePlaces(float* cache, bool computed, int64_t vocab, int64_t rows, const DevicePlan& plan, const Scratch& scratch)
      : tile(scratch.floats({cache ? 0 : std::min(plan.row_chunk, rows), plan.tile})),
        data(cache ? cache : tile.data_ptr<float>()),
        stride(cache ? cached_vocab(vocab) : plan.tile),
        kept(cache != nullptr),
        computed(kept && computed) {}

  float* at(int64_t row, int64_t begin) const { return kept ? data + row * stride + begin : data; }
};

// Zeroes what no product writes of one model's kept logits, of so many rows: what pads them, and what is behind them.
inline void clear_unwritten(const at::Tensor& cache, int64_t rows, int64_t vocab) {
  if (cache.numel() == 0) return;
  const int64_t stride = cached_vocab(vocab), written = rows * stride;
  cache.narrow(0, written, cache.numel() - written).zero_();
  cache.narrow(0, 0, written).view({rows, stride}).narrow(1, vocab, stride - vocab).zero_();
}

// A matrix that a GEMM reads: rows of `stride` elements.
struct Operand {
  const void* data;
  int64_t stride;
};

class DeviceHead {
 public:
  DeviceHead(const Side& side, cudaStream_t stream)
      : weight_(side.weight.detach()),
        bias_(side.bias ? side.bias->detach().to(at::kFloat).contiguous() : at::Tensor()),
        transform_(side.transform),
        format_(format_of(side.gemm_dtype)),
        stream_(stream),
        stride_(weight_.is_contiguous() ? width() : weight_.stride(0)),  // of a size of 1 a stride may be anything
        direct_(weight_.scalar_type() == side.gemm_dtype && (weight_.is_contiguous() || weight_.stride(1) == 1) &&
                stride_ >= width() && width() == depth() && stride_ * size_of(format_) % kRowAlignment == 0 &&
                reinterpret_cast<uintptr_t>(weight_.const_data_ptr()) % kRowAlignment == 0) {}

  int64_t vocab() const { return weight_.size(0); }
  int64_t width() const { return weight_.size(1); }
  // The width of operands: copies are padded with zeros, so that their rows start where a GEMM wants them.
  int64_t depth() const { return round_up(width(), kRowAlignment / size_of(format_)); }
  Format format() const { return format_; }
  bool casts() const { return !direct_; }
  bool biased() const { return bias_.defined(); }
  const at::Tensor& weight() const { return weight_; }

  // Rows [begin, begin + count) of the head: in place, or cast into `scratch` [count][depth].
  Operand slice(int64_t begin, int64_t count, const at::Tensor& scratch) const {
    const int64_t size = weight_.element_size();
    const char* from = static_cast<const char*>(weight_.const_data_ptr()) + begin * weight_.stride(0) * size;
    if (direct_) return {from, stride_};
    gather_rows({from, weight_.stride(0), weight_.stride(1), format_of(weight_.scalar_type()), nullptr, count, width(),
                 scratch.data_ptr(), depth(), depth(), format_},
                stream_);
    return {scratch.data_ptr(), depth()};
  }

  // Only hidden states that look to a GEMM as a copy would: its algorithm, and so a row's bits, may depend on strides
  // and alignment.
  bool reads_in_place(const at::Tensor& hidden, const DeviceRows& rows) const {
    return rows.all && hidden.scalar_type() == dtype_of(format_) && hidden.is_contiguous() && width() == depth() &&
           reinterpret_cast<uintptr_t>(hidden.const_data_ptr()) % 256 == 0;
  }

  // Room for operands() of `rows_at_once` rows, if they have to be copied.
  at::Tensor room(const at::Tensor& hidden, const DeviceRows& rows, int64_t rows_at_once,
                  const Scratch& scratch) const {
    return scratch.of(format_, {reads_in_place(hidden, rows) ? 0 : std::min(rows_at_once, rows.count), depth()});
  }

  // Hidden states of the rows that count from the `first` of them on: in place, or copied to `room`, where a row that
  // does not count is zero.
  Operand operands(const at::Tensor& hidden, const DeviceRows& rows, int64_t first, int64_t count,
                   const at::Tensor& room) const {
    if (reads_in_place(hidden, rows)) return part({hidden.const_data_ptr(), depth()}, first);
    gather_rows({hidden.const_data_ptr(), hidden.stride(0), hidden.stride(1), format_of(hidden.scalar_type()),
                 rows.index_data() + first, count, width(), room.data_ptr(), depth(), depth(), format_},
                stream_);
    return {room.data_ptr(), depth()};
  }

  // The operand's rows from `row` on.
  Operand part(Operand whole, int64_t row) const {
    return {static_cast<const char*>(whole.data) + row * whole.stride * size_of(format_), whole.stride};
  }

  // Raw logits of `rows` operands, rows from `row` on, against a slice of `count` vocabulary rows from `begin` on.
  Tile tile(const GemmContext& context, const DevicePlan& plan, Operand operands, int64_t row, int64_t rows,
            Operand slice, int64_t begin, int64_t count, const TilePlaces& places) const {
    if (!places.computed) {
      gemm(context, {rows, count, depth(), operands.data, operands.stride, false, slice.data, slice.stride, true,
                     places.at(row, begin), places.stride, false, format_, Format::f32, plan.nominal_rows,
                     plan.nominal_columns});
    }
    return {places.at(row, begin),
            places.stride,
            static_cast<int32_t>(count),
            begin,
            bias_.defined() ? bias_.const_data_ptr<float>() : nullptr,
            transform_};
  }

 private:
  at::Tensor weight_, bias_;
  LogitTransform transform_;
  Format format_;
  cudaStream_t stream_;
  int64_t stride_;
  bool direct_;
};

}  // namespace rk::cuda
