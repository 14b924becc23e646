// Row kernels of linear_logprobs on CUDA: fold a logit tile into running statistics, or turn it into dlogits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/cuda/tile.h"

namespace rk::cuda {

// Running statistics of a row over the tiles folded so far.
struct LogprobRow {
  float max, sum, shifted, squares;  // SoftmaxState
  float target_logit;                // NaN until its tile was folded: a target outside the vocabulary gives NaN
  int32_t argmax;                    // first vocabulary index that attains max
  double logit_sum;
};

// Folds `count` rows of the tile. targets [count]; `first`: starts the rows' statistics.
void fold_logprobs(const Tile& tile, int64_t count, const int64_t* targets, int32_t outputs, bool first,
                   LogprobRow* rows, cudaStream_t stream);

// Results of all rows by index into the caller's rows; null: not wanted.
struct LogprobResults {
  float *logprobs, *max_logit, *log_sum, *entropy, *is_top1, *mean_logit, *log_sum_sq_probs;
};
void finish_logprobs(const LogprobRow* rows, int64_t count, const int64_t* index, const int64_t* targets, int64_t vocab,
                     const LogprobResults& results, cudaStream_t stream);

// Per-row inputs of backward, by index into the caller's rows; a null gradient is zero.
struct LogprobUpstream {
  const float *max_logit, *log_sum, *entropy;
  const float *grad_logprobs, *grad_log_sum, *grad_entropy;
  const int64_t* index;    // [count], negative: a row that does not count
  const int64_t* targets;  // [count]
};

// The dlogits of `count` rows from `row` on.
void differentiate_logprobs(const Tile& tile, int64_t row, int64_t count, const LogprobUpstream& upstream,
                            const DlogitsSink& sink, cudaStream_t stream);

}  // namespace rk::cuda
