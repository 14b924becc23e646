// The way from dlogits to the gradients of hidden states, head and bias on CUDA, by vocabulary group:
//   recompute a group's dlogits  ->  dW[group] = dz^T H, written once  ->  dH += dz W[group], in fp32.
// The caller computes dlogits; linear_logprobs and linear_kl share everything else.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>

#include "common/cuda/device_head.h"
#include "common/gradients.h"

namespace rk::cuda {

class DeviceGradient {
 public:
  // `head` is that of `side`.
  DeviceGradient(const DeviceHead& head, const Side& side, const DeviceRows& rows, GradientNeeds needs,
                 const DevicePlan& plan, const Scratch& scratch)
      : head_(head), hidden_(side.hidden), rows_(rows), needs_(needs), plan_(plan), scratch_(scratch) {
    needs_.bias = needs.bias && side.bias && side.bias->defined();
    const at::Tensor& weight = head.weight();
    if (needs_.weight) gradients_.weight = at::empty_like(weight, at::MemoryFormat::Contiguous);
    if (needs_.hidden) sums_ = scratch.floats({rows.count, head.depth()});
    if (needs_.bias) {
      bias_sums_ = scratch.floats({head.vocab()}).zero_();
      bias_dtype_ = side.bias->scalar_type();
    }
    // Rounded once: sums over several chunks of rows, or of a format that the GEMM does not write, are fp32 until then.
    const Format stored = format_of(weight.scalar_type());
    sums_weight_ = plan.rows_at_once < rows.count || head.width() != head.depth() ||
                   (stored != Format::f32 && stored != head.format());
  }

  // prepare(first, rows): a chunk of rows begins.
  // differentiate(begin, columns, slice, operands, row, rows, sink): writes the dlogits of vocabulary entries
  // [begin, begin + columns), which `slice` holds, and rows [row, row + rows), of which `operands` are the first, to
  // the sink.
  template <class Prepare, class Differentiate>
  HeadGradients run(const Prepare& prepare, const Differentiate& differentiate) {
    const Format format = head_.format();
    const int64_t vocab = head_.vocab(), depth = head_.depth(), count = rows_.count;
    const int64_t held = std::min(plan_.rows_at_once, count);
    const at::Tensor cast = scratch_.of(format, {head_.casts() ? plan_.vocab_group : 0, depth});
    const at::Tensor room = head_.room(hidden_, rows_, plan_.rows_at_once, scratch_);
    const at::Tensor weight_sums = scratch_.floats({needs_.weight && sums_weight_ ? plan_.vocab_group : 0, depth});
    const at::Tensor dz = scratch_.of(format, {held, plan_.vocab_group});
    const at::Tensor unrounded = scratch_.floats({needs_.bias ? std::min(plan_.row_chunk, count) : 0, plan_.tile});

    for (int64_t begin = 0; begin < vocab && count > 0; begin += plan_.vocab_group) {
      const int64_t group = std::min(plan_.vocab_group, vocab - begin);
      const Operand slice = head_.slice(begin, group, cast);
      for (int64_t first = 0; first < count; first += held) {
        const int64_t rows = std::min(held, count - first);
        if (begin == 0 || held < count) {  // the only chunk stays for all groups
          prepare(first, rows);
          operands_ = head_.operands(hidden_, rows_, first, rows, room);
        }
        for (int64_t from = 0; from < group; from += plan_.tile) {
          const int64_t columns = std::min(plan_.tile, group - from);
          for (int64_t row = 0; row < rows; row += plan_.row_chunk) {
            const int64_t here = std::min(plan_.row_chunk, rows - row);
            void* to = static_cast<char*>(dz.data_ptr()) + (row * dz.stride(0) + from) * size_of(format);
            differentiate(
                begin + from, columns, head_.part(slice, from), head_.part(operands_, row), first + row, here,
                DlogitsSink{to, dz.stride(0), format, needs_.bias ? unrounded.data_ptr<float>() : nullptr, plan_.tile});
            if (needs_.bias) {
              add_column_sums(unrounded.const_data_ptr<float>(), plan_.tile, here, columns,
                              bias_sums_.data_ptr<float>() + begin + from, scratch_.gemm_context().stream);
            }
          }
        }
        if (needs_.weight) multiply_weight(begin, group, rows, first, dz, weight_sums);
        if (needs_.hidden) {
          gemm(scratch_.gemm_context(),
               {rows, depth, group, dz.const_data_ptr(), dz.stride(0), false, slice.data, slice.stride, false,
                sums_.data_ptr<float>() + first * depth, depth, begin > 0, format, Format::f32, 0, 0});
        }
      }
      if (needs_.weight && sums_weight_) round_weight(begin, group, weight_sums);
    }
    return finish();
  }

 private:
  char* weight_rows(int64_t begin) const {
    const at::Tensor& out = gradients_.weight;
    return static_cast<char*>(out.data_ptr()) + begin * head_.width() * out.element_size();
  }

  void multiply_weight(int64_t begin, int64_t group, int64_t rows, int64_t first, const at::Tensor& dz,
                       const at::Tensor& weight_sums) const {
    const Format format = head_.format();
    void* to = sums_weight_ ? weight_sums.data_ptr() : weight_rows(begin);
    gemm(scratch_.gemm_context(), {group, head_.depth(), rows, dz.const_data_ptr(), dz.stride(0), true, operands_.data,
                                   operands_.stride, false, to, head_.depth(), first > 0, format,
                                   sums_weight_ ? Format::f32 : format_of(gradients_.weight.scalar_type()), 0, 0});
  }

  void round_weight(int64_t begin, int64_t group, const at::Tensor& weight_sums) const {
    const int64_t width = head_.width();
    gather_rows({weight_sums.const_data_ptr(), head_.depth(), 1, Format::f32, nullptr, group, width, weight_rows(begin),
                 width, width, format_of(gradients_.weight.scalar_type())},
                scratch_.gemm_context().stream);
  }

  HeadGradients finish() {
    if (needs_.weight && rows_.count == 0) gradients_.weight.zero_();
    if (needs_.bias) gradients_.bias = bias_sums_.to(bias_dtype_);
    if (needs_.hidden) {
      gradients_.hidden = at::zeros_like(hidden_, at::MemoryFormat::Contiguous);
      scatter_rows(sums_.const_data_ptr<float>(), head_.depth(), rows_.index_data(), rows_.count, head_.width(),
                   gradients_.hidden.data_ptr(), head_.width(), format_of(hidden_.scalar_type()),
                   scratch_.gemm_context().stream);
    }
    return std::move(gradients_);
  }

  const DeviceHead& head_;
  const at::Tensor& hidden_;
  const DeviceRows& rows_;
  GradientNeeds needs_;
  DevicePlan plan_;
  const Scratch& scratch_;
  HeadGradients gradients_;
  at::Tensor sums_, bias_sums_;
  at::ScalarType bias_dtype_ = at::kFloat;
  Operand operands_{};
  bool sums_weight_ = false;
};

}  // namespace rk::cuda
