// An LM head on CPU: hands out logit tiles. Owns the packing of hidden states and the casting of the head's tiles.
//
// T is the type of the GEMM's operands: bfloat16 where the CPU multiplies it into fp32 (AMX, AVX512_BF16), otherwise
// float, into which bf16 and fp16 go without loss. Every tile is one single-threaded GEMM of a fixed shape, so a
// logit's bits depend on its row and its vocabulary entry alone.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <optional>
#include <type_traits>

#include "common/checks.h"
#include "common/cpu/buffer.h"
#include "common/cpu/gemm_tile.h"
#include "common/side.h"
#include "common/simd/tile_kernels.h"
#include "common/tile_plan.h"

namespace rk {

template <class T>
constexpr Format kFormat = std::is_same_v<T, float> ? Format::f32 : Format::bf16;

template <class T>
class Head {
 public:
  explicit Head(const Side& side)
      : weight_(side.weight.detach()),
        bias_(side.bias ? side.bias->detach().to(at::kFloat).contiguous() : at::Tensor()),
        transform_(side.transform),
        gemm_(side.gemm_dtype),
        vocab_(weight_.size(0)),
        width_(weight_.size(1)),
        depth_(round_up(width_, kGemmDepthStep<T>)),
        direct_(weight_.scalar_type() == c10::CppTypeToScalarType<T>::value && gemm_ == weight_.scalar_type() &&
                weight_.stride(1) == 1 && depth_ == width_ && weight_.stride(0) >= width_) {}

  int64_t vocab() const { return vocab_; }
  int64_t width() const { return width_; }
  int64_t depth() const { return depth_; }
  const float* bias() const { return bias_.defined() ? bias_.data_ptr<float>() : nullptr; }
  const LogitTransform& transform() const { return transform_; }

  struct Rows {
    const T* data;
    int64_t stride;
  };

  // Rows [begin, begin + count) of the head as operands: in place, or cast to `scratch` where they cannot be read so.
  Rows rows(int64_t begin, int64_t count, Buffer<T>& scratch) const {
    if (direct_) return {weight_.const_data_ptr<T>() + begin * weight_.stride(0), weight_.stride(0)};
    scratch.assign(count * depth_, T(0));
    cast_into(weight_.narrow(0, begin, count), scratch.data());
    return {scratch.data(), depth_};
  }

  // Hidden states as contiguous operands [n, depth()], rounded to the GEMM's dtype, of the rows listed.
  at::Tensor operands(const at::Tensor& hidden, const at::Tensor& rows) const {
    const at::Tensor picked = hidden.detach().index_select(0, rows);
    if (picked.scalar_type() == c10::CppTypeToScalarType<T>::value && gemm_ == picked.scalar_type() &&
        depth_ == width_) {
      return picked;
    }
    at::Tensor out = at::zeros({picked.size(0), depth_}, c10::CppTypeToScalarType<T>::value);
    out.narrow(1, 0, width_).copy_(picked.to(gemm_));
    return out;
  }

  // Packs 64 rows of operands, zero beyond the last, as the right side of logit tiles: [depth][64].
  void pack_block(const at::Tensor& operands, int64_t begin, T* packed) const {
    const int64_t count = std::min(kRowBlock, operands.size(0) - begin);
    const T* from = operands.const_data_ptr<T>() + begin * depth_;
    constexpr int64_t step = kGemmDepthStep<T>;
    for (int64_t d = 0; d < depth_; d += step, packed += step * kRowBlock) {
      for (int64_t row = 0; row < kRowBlock; ++row) {
        for (int64_t i = 0; i < step; ++i) packed[row * step + i] = row < count ? from[row * depth_ + d + i] : T(0);
      }
    }
  }

  // Packs `blocks` blocks from block `first` on, all threads at it.
  void pack_blocks(const at::Tensor& operands, int64_t first, int64_t blocks, T* packed) const {
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        pack_block(operands, (first + block) * kRowBlock, packed + block * kRowBlock * depth_);
      }
    });
  }

  // The tile of raw logits: head rows against a packed block, of whose rows `live` count; the others' logits are 0.
  LogitTile tile(Rows head_rows, int64_t begin, int64_t count, const T* packed, int64_t live, float* logits) const {
    const int64_t columns = live_rows(live);
    gemm_tile<T>(count, columns, depth_, head_rows.data, head_rows.stride, packed, logits, kRowBlock, false);
    for (int64_t row = 0; columns < kRowBlock && row < count; ++row) {
      std::fill(logits + row * kRowBlock + columns, logits + (row + 1) * kRowBlock, 0.0f);
    }
    return {logits, begin, count, bias(), transform_};
  }

 private:
  void cast_into(const at::Tensor& from, T* to) const {
    at::Tensor out = at::from_blob(to, {from.size(0), width_}, {depth_, 1}, c10::CppTypeToScalarType<T>::value);
    out.copy_(from.scalar_type() == gemm_ ? from : from.to(gemm_));
  }

  at::Tensor weight_, bias_;
  LogitTransform transform_;
  at::ScalarType gemm_;
  int64_t vocab_, width_, depth_;
  bool direct_;
};

// Rows of the head as a GEMM's right operand: `packed` [D / 64][stride][64], from an even row of it on.
template <class T>
void pack_head_rows(const Head<T>& head, int64_t begin, int64_t count, Buffer<T>& scratch, T* packed, int64_t stride) {
  const auto rows = head.rows(begin, count, scratch);
  for (int64_t d = 0; d < head.width(); d += kRowBlock) {
    const int64_t columns = std::min(kRowBlock, head.width() - d);
    tile_kernels().pack_columns(kFormat<T>, rows.data + d, rows.stride, count, columns, packed + d * stride);
  }
}

}  // namespace rk
