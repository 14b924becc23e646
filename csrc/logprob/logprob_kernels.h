// Row kernels of linear_logprobs on CUDA: fold a logit tile into running statistics, or turn it into dlogits, or, of a
// frozen head, into weights of its rows.
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

// Of a frozen head, the sum of e^(z - max) over the vocabulary weighed so far, but for the target.
struct WeightRow {
  float max, others;
};

// Sums of weighed rows of the head [rows][stride].
struct RowSums {
  float* data;
  int64_t stride, width;
};

// The weights e^(z - max) dz/dx of a tile that was folded into `states`, 0 of the target, to the sink; `rows` and
// `sums` are restated about the new maximum. `first`: starts them.
void weigh_logprobs(const Tile& tile, int64_t count, const int64_t* targets, const LogprobRow* states, bool first,
                    WeightRow* rows, const RowSums& sums, const DlogitsSink& sink, cudaStream_t stream);

struct WeighedRows {
  const LogprobRow* states;
  const WeightRow* weighed;
  const int64_t *index, *targets;
  int64_t count;
};

// The head's rows as they are, and the format to which GEMMs round them.
struct HeadRows {
  const void* data;
  int64_t row_stride, column_stride, vocab;
  Format format, gemm_format;
};

// directions [caller's rows][width] = d logprob / d hidden. `sums` may lie in the same place.
void finish_directions(const WeighedRows& rows, const HeadRows& head, const LogitTransform& transform, bool biased,
                       const RowSums& sums, float* directions, cudaStream_t stream);

}  // namespace rk::cuda
