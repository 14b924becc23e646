// Tile kernels of linear_logprobs: fold a logit tile into running statistics, or turn it into dlogits.
#ifndef RK_ISA
#error "include this through isa/*.cpp"
#endif
#pragma once

#include "common/simd/logit_tiles.h"

namespace rk {
namespace RK_ISA {

static inline void pick_targets(const LogprobForwardTile& a) {
  for (int64_t token = 0; token < kRowBlock; ++token) {
    const int64_t row = a.targets[token] - a.tile.vocab_begin;
    if (row >= 0 && row < a.tile.count) a.target_logit[token] = a.tile.logits[row * kRowBlock + token];
  }
}

// Sums are taken in two levels, few terms at a time, so that rounding grows with the square root of kTermsAtATime and
// of the number of such parts, not of the tile.
constexpr int64_t kTermsAtATime = 16;

// Maximum and its place, first; then the sums about the maximum.
template <int outputs>
static void fold_statistics(const LogprobForwardTile& a) {
  constexpr bool entropy = (outputs & kEntropy) != 0, extras = (outputs & kExtras) != 0;
  const float* tile = a.tile.logits;
  VecF tile_max[kVectors];
  for (VecF& m : tile_max) m = Simd::set(-kInfinity);
  VecI tile_argmax[kVectors] = {};
  for (int64_t row = 0; row < a.tile.count; ++row) {
    for (int j = 0; j < kVectors; ++j) {
      const VecF z = Simd::load(tile + row * kRowBlock + j * kLanes);
      if constexpr (extras) tile_argmax[j] = z > tile_max[j] ? VecI{} + static_cast<int32_t>(row) : tile_argmax[j];
      tile_max[j] = Simd::max(tile_max[j], z);
    }
  }
  for (int j = 0; j < kVectors; ++j) {
    const int64_t at = j * kLanes;
    auto running = SoftmaxState<Simd>::empty();
    running.max = Simd::load(a.stats.max + at);
    running.sum = Simd::load(a.stats.sum + at);
    if constexpr (entropy) running.shifted = Simd::load(a.stats.shifted + at);
    if constexpr (extras) {
      running.squares = Simd::load(a.stats.squares + at);
      VecI argmax;
      __builtin_memcpy(&argmax, a.stats.argmax + at, sizeof(argmax));
      argmax = tile_max[j] > running.max ? tile_argmax[j] + static_cast<int32_t>(a.tile.vocab_begin) : argmax;
      __builtin_memcpy(a.stats.argmax + at, &argmax, sizeof(argmax));
    }
    auto part = SoftmaxState<Simd>::empty();
    part.max = Simd::max(running.max, tile_max[j]);  // fold about the common maximum: the merge then scales `running`
    const VecF shift = finite_max<Simd>(part.max);
    VecD logits{};
    for (int64_t begin = 0; begin < a.tile.count; begin += kTermsAtATime) {
      const int64_t end = begin + kTermsAtATime < a.tile.count ? begin + kTermsAtATime : a.tile.count;
      auto few = SoftmaxState<Simd>::empty();
      VecF few_logits{};
      for (int64_t row = begin; row < end; ++row) {
        const VecF z = Simd::load(tile + row * kRowBlock + at);
        add_softmax_term<Simd, entropy, extras>(few, z - shift);
        if constexpr (extras) few_logits += z;
      }
      part.sum += few.sum;
      if constexpr (entropy) part.shifted += few.shifted;
      if constexpr (extras) part.squares += few.squares;
      if constexpr (extras) logits += __builtin_convertvector(few_logits, VecD);
    }
    merge<Simd>(running, part);
    Simd::store(a.stats.max + at, running.max);
    Simd::store(a.stats.sum + at, running.sum);
    if constexpr (entropy) Simd::store(a.stats.shifted + at, running.shifted);
    if constexpr (extras) {
      Simd::store(a.stats.squares + at, running.squares);
      for (int lane = 0; lane < kLanes; ++lane) a.stats.logit_sum[at + lane] += logits[lane];
    }
  }
}

static void logprob_forward(const LogprobForwardTile& a) {
  finish_logits(a.tile);
  pick_targets(a);
  switch (a.outputs) {
    case kPlain: return fold_statistics<kPlain>(a);
    case kEntropy: return fold_statistics<kEntropy>(a);
    case kExtras: return fold_statistics<kExtras>(a);
    default: return fold_statistics<kEntropy | kExtras>(a);
  }
}

template <Transform kind, bool with_entropy>
static void differentiate(const LogprobBackwardTile& a) {
  const LogitMap<Simd, kind> map(a.tile.transform);
  float* tile = a.tile.logits;
  const float* from = a.final_logits ? a.final_logits : tile;
  const auto final_logit = [&](VecF x, int64_t row) { return a.final_logits ? x : map(x, bias_of(a.tile, row)); };

  // Targets first, from the untouched tile: few, one by one, in a lane of a vector so that the maths is the same code.
  float target_dz[kRowBlock];
  const auto row_of = [&](int64_t at) {
    RowGradient<Simd> row;
    row.max = Simd::load(a.max + at);
    row.log_sum = Simd::load(a.log_sum + at);
    row.grad_logprob = Simd::load(a.grad_logprob + at);
    row.grad_logsumexp = Simd::load(a.grad_log_sum + at);
    row.grad_entropy = with_entropy ? Simd::load(a.grad_entropy + at) : VecF{};
    row.entropy = with_entropy ? Simd::load(a.entropy + at) : VecF{};
    return row;
  };
  for (int j = 0; j < kVectors; ++j) {
    const int64_t at = j * kLanes;
    float z_target[kLanes] = {};
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t row = a.targets[at + lane] - a.tile.vocab_begin;
      if (row < 0 || row >= a.tile.count) continue;
      float z[kLanes];
      Simd::store(z, final_logit(Simd::set(from[row * kRowBlock + at + lane]), row));
      z_target[lane] = z[0];
    }
    const VecF z = Simd::load(z_target);
    Simd::store(target_dz + at, target_logit_gradient<Simd>(z, row_of(at), with_entropy) * map.derivative(z));
  }
  for (int j = 0; j < kVectors; ++j) {
    const int64_t at = j * kLanes;
    const RowGradient<Simd> row_gradient = row_of(at);
    for (int64_t row = 0; row < a.tile.count; ++row) {
      const int64_t here = row * kRowBlock + at;
      const VecF z = final_logit(Simd::load(from + here), row);
      Simd::store(tile + here, logit_gradient<Simd>(z, row_gradient, with_entropy) * map.derivative(z));
    }
  }
  for (int64_t token = 0; token < kRowBlock; ++token) {
    const int64_t row = a.targets[token] - a.tile.vocab_begin;
    if (row >= 0 && row < a.tile.count) tile[row * kRowBlock + token] = target_dz[token];
  }
}

static void logprob_backward(const LogprobBackwardTile& a) {
  switch (kind_of(a.tile)) {
    case Transform::identity:
      a.with_entropy ? differentiate<Transform::identity, true>(a) : differentiate<Transform::identity, false>(a);
      break;
    case Transform::affine:
      a.with_entropy ? differentiate<Transform::affine, true>(a) : differentiate<Transform::affine, false>(a);
      break;
    case Transform::softcap:
      a.with_entropy ? differentiate<Transform::softcap, true>(a) : differentiate<Transform::softcap, false>(a);
      break;
  }
  emit_gradient(a.tile, a.sink);
}

static RK_INLINE VecF ceil_of(VecF x) {
  float lanes[kLanes];
  Simd::store(lanes, x);
  for (float& lane : lanes) lane = __builtin_ceilf(lane);
  return Simd::load(lanes);
}

template <Transform kind>
static void weigh(const LogprobWeightTile& a) {
  const LogitMap<Simd, kind> map(a.tile.transform);
  float* tile = a.tile.logits;
  for (int64_t token = 0; token < kRowBlock; ++token) {
    const int64_t row = a.targets[token] - a.tile.vocab_begin;
    if (row >= 0 && row < a.tile.count) tile[row * kRowBlock + token] = -kInfinity;
  }
  for (int j = 0; j < kVectors; ++j) {
    const int64_t at = j * kLanes;
    const VecF scale = Simd::max(Simd::load(a.before + at), ceil_of(Simd::load(a.max + at) * 1.44269504f));
    const VecF bounded = finite_max<Simd>(scale);
    VecF sum{};
    for (int64_t begin = 0; begin < a.tile.count; begin += kTermsAtATime) {
      const int64_t end = begin + kTermsAtATime < a.tile.count ? begin + kTermsAtATime : a.tile.count;
      VecF few{};
      for (int64_t row = begin; row < end; ++row) {
        const VecF z = Simd::load(tile + row * kRowBlock + at);
        const VecF e = Simd::exp(scaled_exponent<Simd>(z, bounded));
        few += e;
        // Where e is 0 the slope may not be infinite: that of a soft cap at -inf.
        Simd::store(tile + row * kRowBlock + at, e * map.derivative(Simd::max(z, Simd::set(-map.cap))));
      }
      sum += few;
    }
    Simd::store(a.scale + at, scale);
    Simd::store(a.others + at, sum);
  }
}

static void logprob_weights(const LogprobWeightTile& a) {
  switch (kind_of(a.tile)) {
    case Transform::identity: weigh<Transform::identity>(a); break;
    case Transform::affine: weigh<Transform::affine>(a); break;
    case Transform::softcap: weigh<Transform::softcap>(a); break;
  }
  emit_gradient(a.tile, a.sink);
}

}  // namespace RK_ISA
}  // namespace rk
