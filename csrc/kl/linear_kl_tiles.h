// Tile kernels of linear_kl: fold a pair of logit tiles into KL statistics, or turn the policy's into dlogits.
#ifndef RK_ISA
#error "include this through isa/*.cpp"
#endif
#pragma once

#include "common/simd/logit_tiles.h"

namespace rk {
namespace RK_ISA {

static KlState<Simd> fold_pair(const float* weighing, const float* other, int64_t count) {
  auto part = KlState<Simd>::empty();
  for (int64_t row = 0; row < count; ++row) {
    const VecF z = Simd::load(weighing + row * kRowBlock), y = Simd::load(other + row * kRowBlock);
    note_kl_maxima<Simd>(part, z, y);
  }
  settle_centre<Simd>(part);
  const VecF shift = finite_max<Simd>(part.max), other_shift = finite_max<Simd>(part.other_max);
  // In two levels, few terms at a time: far from the reference a KL is a sum of large terms of both signs.
  constexpr int64_t kTermsAtATime = 16;
  for (int64_t begin = 0; begin < count; begin += kTermsAtATime) {
    const int64_t end = begin + kTermsAtATime < count ? begin + kTermsAtATime : count;
    auto few = KlState<Simd>::empty();
    few.centre = part.centre;
    for (int64_t row = begin; row < end; ++row) {
      const VecF z = Simd::load(weighing + row * kRowBlock), y = Simd::load(other + row * kRowBlock);
      add_kl_pair<Simd>(few, z, y, shift, other_shift);
    }
    part.sum += few.sum;
    part.other_sum += few.other_sum;
    part.second += few.second;
    part.first += few.first;
  }
  return part;
}

static void kl_forward(const KlForwardTile& a) {
  finish_logits(a.weighing);
  finish_logits(a.other);
  for (int j = 0; j < kVectors; ++j) {
    const int64_t at = j * kLanes;
    float* const slots[] = {a.stats.max,    a.stats.sum,    a.stats.other_max, a.stats.other_sum,
                            a.stats.centre, a.stats.second, a.stats.first};
    auto running = KlState<Simd>::empty();
    VecF* const fields[] = {&running.max,    &running.sum,    &running.other_max, &running.other_sum,
                            &running.centre, &running.second, &running.first};
    for (int f = 0; f < 7; ++f) *fields[f] = Simd::load(slots[f] + at);
    merge<Simd>(running, fold_pair(a.weighing.logits + at, a.other.logits + at, a.weighing.count));
    for (int f = 0; f < 7; ++f) Simd::store(slots[f] + at, *fields[f]);
  }
}

template <Transform kind>
static void differentiate_kl(const KlBackwardTile& a) {
  const LogitTile& policy = a.policy_weighs ? a.weighing : a.other;
  const LogitMap<Simd, kind> map(policy.transform);
  const float* weighing = a.final_weighing ? a.final_weighing : a.weighing.logits;
  const float* other = a.final_other ? a.final_other : a.other.logits;
  for (int j = 0; j < kVectors; ++j) {
    const int64_t at = j * kLanes;
    KlRow<Simd> row;
    row.max = Simd::load(a.max + at);
    row.log_sum = Simd::load(a.log_sum + at);
    row.other_max = Simd::load(a.other_max + at);
    row.other_log_sum = Simd::load(a.other_log_sum + at);
    row.centre = Simd::load(a.centre + at);
    row.shift = Simd::load(a.shift + at);
    row.kl = Simd::load(a.kl + at);
    row.grad = Simd::load(a.grad + at);
    for (int64_t v = 0; v < policy.count; ++v) {
      const int64_t here = v * kRowBlock + at;
      const VecF z = Simd::load(weighing + here), y = Simd::load(other + here);
      const VecF dz =
          a.policy_weighs ? kl_gradient_of_weighing<Simd>(z, y, row) : kl_gradient_of_other<Simd>(z, y, row);
      Simd::store(policy.logits + here, dz * map.derivative(a.policy_weighs ? z : y));
    }
  }
}

static void kl_backward(const KlBackwardTile& a) {
  if (!a.final_weighing) finish_logits(a.weighing);
  if (!a.final_other) finish_logits(a.other);
  const LogitTile& policy = a.policy_weighs ? a.weighing : a.other;
  switch (kind_of(policy)) {
    case Transform::identity: differentiate_kl<Transform::identity>(a); break;
    case Transform::affine: differentiate_kl<Transform::affine>(a); break;
    case Transform::softcap: differentiate_kl<Transform::softcap>(a); break;
  }
  emit_gradient(policy, a.sink);
}

}  // namespace RK_ISA
}  // namespace rk
