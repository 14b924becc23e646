// The rows that count, listed on the device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace rk::cuda {

// The choice of rows that count: a target that is not ignore_index, or, where targets is null, its mask.
struct RowChoice {
  const int64_t* targets;
  int64_t ignore_index, vocab;
  const bool* mask;
  int64_t rows;
};

// keep_places false: index and targets list the rows that count, in order, and counts[0] is their number.
// keep_places true: every row keeps its place, and index is -1 where it does not count.
// counts[1]: the first row whose target is outside the vocabulary, or -1. Results are those of one block of threads.
void compact_rows(const RowChoice& choice, bool keep_places, int64_t* index, int64_t* targets, int64_t* counts,
                  cudaStream_t stream);

}  // namespace rk::cuda
