// The vector code's interface: the arguments of tile kernels, and the table of kernels of the instruction set in use.
//
// A logit tile is transposed: `count` vocabulary rows of kRowBlock tokens each, so that a softmax reduces over rows
// with a vector of tokens, and no vector is ever summed across its lanes. Plain pointers and PODs only: the files that
// implement these are compiled once an instruction set, and must not instantiate anything shared.
#pragma once

#include <cstdint>

#include "common/format.h"
#include "common/logit_transform.h"
#include "common/logprob_outputs.h"

namespace rk {

struct LogitTile {
  float* logits;  // [count][kRowBlock]
  int64_t vocab_begin, count;
  const float* bias;  // [vocab] or null
  LogitTransform transform;
};

// Running statistics of kRowBlock rows over one vocabulary split.
struct LogprobStats {
  float *max, *sum, *shifted, *squares;
  double* logit_sum;
  int32_t* argmax;  // first vocabulary index that attains max
};

struct LogprobForwardTile {
  LogitTile tile;
  const int64_t* targets;  // [kRowBlock], -1 where there is none
  int32_t outputs;         // LogprobOutputs
  LogprobStats stats;
  float* target_logit;
};

// The places where a gradient tile goes: both layouts that the two GEMMs behind it read, and into the bias gradient.
struct GradientSink {
  Format format;   // f32 or bf16
  void* by_vocab;  // [count][by_vocab_stride], this block's kRowBlock columns; or null
  int64_t by_vocab_stride;
  void* by_row;  // [kRowBlock][by_row_stride], this tile's count columns
  int64_t by_row_stride;
  float* bias_grad;  // [count], added to; or null
};

struct LogprobBackwardTile {
  LogitTile tile;             // becomes dlogits
  const float* final_logits;  // kept from forward; or null, and the tile holds raw ones
  const int64_t* targets;
  bool with_entropy;
  const float *max, *log_sum, *grad_logprob, *grad_log_sum, *grad_entropy, *entropy;  // [kRowBlock] each
  GradientSink sink;
};

// Weights of the head's rows in the gradient of a log-prob: 2^-scale e^z dz/dx, and 0 of the target. The scale, a whole
// number, is the least that is no smaller than the one before and leaves no weight above 1: weights of other scales are
// restated without rounding.
struct LogprobWeightTile {
  LogitTile tile;             // of final logits, which `max` bounds; becomes weights
  const int64_t* targets;     // [kRowBlock], -1 where there is none
  const float *max, *before;  // [kRowBlock], the scale before; -inf: none yet
  float *scale, *others;      // [kRowBlock], the scale, and the sum of 2^-scale e^z of all but the target
  GradientSink sink;          // by_row alone
};

struct KlStats {
  float *max, *sum, *other_max, *other_sum, *centre, *second, *first;
};

struct KlForwardTile {
  LogitTile weighing, other;
  KlStats stats;
};

struct KlBackwardTile {
  LogitTile weighing, other;                  // the policy's becomes dlogits
  const float *final_weighing, *final_other;  // kept from forward; or null, and the tiles hold raw ones
  bool policy_weighs;                         // which of the two is the policy's
  const float *max, *log_sum, *other_max, *other_log_sum, *centre, *shift, *kl, *grad;
  GradientSink sink;
};

enum class PairLoss : int64_t;     // preference/pair_losses.h
enum class KlEstimator : int64_t;  // kl/penalty_terms.h

// Arrays of `count` pairs or tokens, in fp32; results that are null are not wanted.
struct PairLossRows {
  PairLoss type;
  const float* h;
  int64_t count;
  float beta, smoothing;
  float *losses, *slopes;
};

struct RewardRows {
  const float *chosen, *rejected, *margin;  // margin: or null
  int64_t count;
  float smoothing, centring;
  float* losses;
  const float* grad;  // with it, gradients
  float *grad_chosen, *grad_rejected;
};

struct KlPenaltyRows {
  KlEstimator estimator;
  const float *policy, *ref, *grad;  // with grad, the gradient of policy instead of the estimate
  int64_t count;
  float* to;
};

struct TileKernels {
  const char* name;
  void (*logprob_forward)(const LogprobForwardTile&);
  void (*logprob_backward)(const LogprobBackwardTile&);
  void (*logprob_weights)(const LogprobWeightTile&);
  void (*kl_forward)(const KlForwardTile&);
  void (*kl_backward)(const KlBackwardTile&);
  // Packs rows [k][columns] (stride in elements) as a GEMM's right operand, kRowBlock columns wide and zero-padded to
  // it: f32 as [k][64], bf16 as [ceil(k / 2)][64][2] (pairs of rows interleaved).
  void (*pack_columns)(Format, const void* rows, int64_t stride, int64_t k, int64_t columns, void* packed);
  // Rounds float rows to `format`.
  void (*store_rows)(Format, const float* from, int64_t from_stride, void* to, int64_t to_stride, int64_t rows,
                     int64_t columns);
  void (*pair_losses)(const PairLossRows&);
  void (*reward_losses)(const RewardRows&);
  void (*kl_penalties)(const KlPenaltyRows&);
};

const TileKernels& tile_kernels();           // of the instruction set in use
bool use_instruction_set(const char* name);  // false: unknown, or this CPU cannot run it
const char* instruction_sets();              // names this CPU can run, separated by spaces, best first

}  // namespace rk
