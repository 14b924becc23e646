// Row kernels of linear_kl on CUDA: fold a pair of logit tiles into KL statistics, or turn the policy's into dlogits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/cuda/tile.h"

namespace rk::cuda {

// Running statistics of a row: the fields of KlState.
struct KlRowState {
  float max, sum, other_max, other_sum, centre, second, first;
};

// `weighing` holds the logits of p, `other` those of q; both of the same vocabulary entries.
void fold_kl(const Tile& weighing, const Tile& other, int64_t count, bool first, KlRowState* rows, cudaStream_t stream);

// kl and stats [6][stats_stride], by index into the caller's rows.
void finish_kl(const KlRowState* rows, int64_t count, const int64_t* index, float* kl, float* stats,
               int64_t stats_stride, cudaStream_t stream);

// Per-row inputs of backward, by index into the caller's rows.
struct KlUpstream {
  const float *grad, *kl, *stats;
  int64_t stats_stride;
  const int64_t* index;  // [count], negative: a row that does not count
};

// The policy's dlogits; see differentiate_logprobs.
void differentiate_kl(const Tile& weighing, const Tile& other, bool policy_weighs, int64_t row, int64_t count,
                      const KlUpstream& upstream, const DlogitsSink& sink, cudaStream_t stream);

}  // namespace rk::cuda
