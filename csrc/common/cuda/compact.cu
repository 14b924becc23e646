#include "common/cuda/compact.h"

#include "common/cuda/launch.h"

namespace rk::cuda {
namespace {

constexpr int kThreads = 256, kWarp = 32;
constexpr int kRowsPerThread = 16;

// Sum of `value` over the threads before this one, and over all of them in `total`.
__device__ inline int64_t exclusive_sum(int64_t value, int64_t& total) {
  __shared__ int64_t of_warp[kThreads / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int64_t sum = value;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int64_t before = __shfl_up_sync(0xffffffffu, sum, offset);
    if (lane >= offset) sum += before;
  }
  __syncthreads();  // of_warp may still be read from the round before
  if (lane == kWarp - 1) of_warp[warp] = sum;
  __syncthreads();
  int64_t before = 0;
  total = 0;
  for (int i = 0; i < kThreads / kWarp; ++i) {
    if (i < warp) before += of_warp[i];
    total += of_warp[i];
  }
  return before + sum - value;
}

__global__ void __launch_bounds__(kThreads)
    compact(RowChoice choice, bool keep_places, int64_t* index, int64_t* targets, int64_t* counts) {
  __shared__ int64_t first_bad[kThreads];
  const auto counts_at = [&](int64_t row) {
    return choice.targets ? choice.targets[row] != choice.ignore_index : choice.mask[row];
  };
  const auto target_at = [&](int64_t row) { return choice.targets ? choice.targets[row] : int64_t{-1}; };
  int64_t done = 0, bad = choice.rows;
  for (int64_t begin = 0; begin < choice.rows; begin += kThreads * kRowsPerThread) {
    const int64_t from = begin + threadIdx.x * kRowsPerThread;
    const int64_t to = from + kRowsPerThread < choice.rows ? from + kRowsPerThread : choice.rows;
    int64_t mine = 0;
    for (int64_t row = from; row < to; ++row) {
      mine += counts_at(row);
      const bool outside = choice.targets && counts_at(row) && (target_at(row) < 0 || target_at(row) >= choice.vocab);
      if (outside && row < bad) bad = row;
    }
    int64_t total = 0;
    int64_t place = done + exclusive_sum(mine, total);
    for (int64_t row = from; row < to; ++row) {
      if (keep_places) place = row;
      if (counts_at(row) || keep_places) {
        index[place] = counts_at(row) ? row : -1;
        targets[place] = counts_at(row) ? target_at(row) : -1;
        ++place;
      }
    }
    done += total;
  }
  first_bad[threadIdx.x] = bad;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kThreads; ++i) bad = first_bad[i] < bad ? first_bad[i] : bad;
  counts[0] = done;
  counts[1] = bad < choice.rows ? bad : -1;
}

}  // namespace

void compact_rows(const RowChoice& choice, bool keep_places, int64_t* index, int64_t* targets, int64_t* counts,
                  cudaStream_t stream) {
  RK_LAUNCH(compact, 1, kThreads, stream, choice, keep_places, index, targets, counts);
}

}  // namespace rk::cuda
