// From dlogits to the gradients of hidden states, head and bias on CUDA, by vocabulary group:
//   recompute a group's dlogits  ->  dW[group] = dz^T H, written once  ->  dH += dz W[group], in fp32.
// What dlogits are, the caller says; linear_logprobs and linear_kl share everything else.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>

#include "common/cuda/device_head.h"
#include "common/gradients.h"

namespace rk::cuda {

// Where a tile's dlogits go: rounded for the GEMMs behind, and unrounded where a bias wants their sums.
struct DlogitsSink {
  void* dz;
  int64_t dz_stride;
  Format format;
  float* unrounded;  // or null
  int64_t unrounded_stride;
};

class DeviceGradient {
 public:
  DeviceGradient(const DeviceHead& head, const at::Tensor& hidden, const std::optional<at::Tensor>& bias,
                 const DeviceRows& rows, const at::Tensor& operands, GradientNeeds needs, const DevicePlan& plan,
                 const Scratch& scratch)
      : head_(head), hidden_(hidden), rows_(rows), operands_(operands), needs_(needs), plan_(plan), scratch_(scratch) {
    needs_.bias = needs.bias && bias && bias->defined();
    const at::Tensor& weight = head.weight();
    if (needs_.weight) gradients_.weight = at::empty_like(weight, at::MemoryFormat::Contiguous);
    if (needs_.hidden) sums_ = scratch.floats({rows.count, head.width()});
    if (needs_.bias) {
      bias_sums_ = scratch.floats({head.vocab()}).zero_();
      bias_dtype_ = bias->scalar_type();
    }
    const Format stored = format_of(weight.scalar_type());
    rounds_weight_ = stored != Format::f32 && stored != head.format();
  }

  // differentiate(begin, count, slice, row, rows, sink): writes the dlogits of vocabulary entries [begin, begin +
  // count) and operand rows [row, row + rows) to the sink; `slice` holds those entries of the head.
  template <class Differentiate>
  HeadGradients run(const Differentiate& differentiate) {
    const Format format = head_.format();
    const int64_t vocab = head_.vocab(), width = head_.width(), count = rows_.count;
    const at::Tensor cast = scratch_.of(format, {head_.casts() ? plan_.vocab_group : 0, width});
    const at::Tensor weight_sums = scratch_.floats({needs_.weight && rounds_weight_ ? plan_.vocab_group : 0, width});
    const at::Tensor dz = scratch_.of(format, {std::max<int64_t>(count, 1), plan_.vocab_group});
    const at::Tensor unrounded = scratch_.floats({needs_.bias ? std::min(plan_.row_chunk, count) : 0, plan_.tile});
    if (count == 0) return finish();

    for (int64_t begin = 0; begin < vocab; begin += plan_.vocab_group) {
      const int64_t group = std::min(plan_.vocab_group, vocab - begin);
      const Operand slice = head_.slice(begin, group, cast);
      for (int64_t from = 0; from < group; from += plan_.tile) {
        const int64_t columns = std::min(plan_.tile, group - from);
        for (int64_t row = 0; row < count; row += plan_.row_chunk) {
          const int64_t here = std::min(plan_.row_chunk, count - row);
          const Operand part{at(slice.data, from * slice.stride), slice.stride};
          differentiate(begin + from, columns, part, row, here,
                        DlogitsSink{const_cast<void*>(at(dz.data_ptr(), row * dz.stride(0) + from)), dz.stride(0),
                                    format, needs_.bias ? unrounded.data_ptr<float>() : nullptr, plan_.tile});
          if (needs_.bias) {
            add_column_sums(unrounded.const_data_ptr<float>(), plan_.tile, here, columns,
                            bias_sums_.data_ptr<float>() + begin + from, scratch_.gemm_context().stream);
          }
        }
      }
      if (needs_.weight) multiply_weight(begin, group, dz, weight_sums);
      if (needs_.hidden) {
        gemm(scratch_.gemm_context(),
             {count, width, group, dz.const_data_ptr(), dz.stride(0), false, slice.data, slice.stride, false,
              sums_.data_ptr(), width, begin > 0, format, Format::f32, count});
      }
    }
    return finish();
  }

 private:
  const void* at(const void* data, int64_t elements) const {
    return static_cast<const char*>(data) + elements * size_of(head_.format());
  }

  void multiply_weight(int64_t begin, int64_t group, const at::Tensor& dz, const at::Tensor& weight_sums) const {
    const at::Tensor& out = gradients_.weight;
    const Format format = head_.format(), stored = format_of(out.scalar_type());
    const int64_t width = head_.width();
    void* to = static_cast<char*>(out.data_ptr()) + begin * width * size_of(stored);
    gemm(scratch_.gemm_context(),
         {group, width, rows_.count, dz.const_data_ptr(), dz.stride(0), true, operands_.const_data_ptr(),
          operands_.stride(0), false, rounds_weight_ ? weight_sums.data_ptr() : to, width, false, format,
          rounds_weight_ ? Format::f32 : stored, group});
    if (!rounds_weight_) return;
    gather_rows({weight_sums.const_data_ptr(), width, 1, Format::f32, nullptr, group, width, to, width, width, stored},
                scratch_.gemm_context().stream);
  }

  HeadGradients finish() {
    if (needs_.weight && rows_.count == 0) gradients_.weight.zero_();
    if (needs_.bias) gradients_.bias = bias_sums_.to(bias_dtype_);
    if (needs_.hidden) {
      gradients_.hidden = at::zeros_like(hidden_, at::MemoryFormat::Contiguous);
      scatter_rows(sums_.const_data_ptr<float>(), head_.width(), rows_.index_data(), rows_.count, head_.width(),
                   gradients_.hidden.data_ptr(), head_.width(), format_of(hidden_.scalar_type()),
                   scratch_.gemm_context().stream);
    }
    return std::move(gradients_);
  }

  const DeviceHead& head_;
  const at::Tensor& hidden_;
  const DeviceRows& rows_;
  const at::Tensor& operands_;
  GradientNeeds needs_;
  DevicePlan plan_;
  const Scratch& scratch_;
  HeadGradients gradients_;
  at::Tensor sums_, bias_sums_;
  at::ScalarType bias_dtype_ = at::kFloat;
  bool rounds_weight_ = false;
};

}  // namespace rk::cuda
