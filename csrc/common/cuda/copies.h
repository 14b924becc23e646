// Copies between formats and row orders, and sums of columns.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/format.h"

namespace rk::cuda {

// to [rows][to_stride] = from[index[row]], rounded to `to_format`; zeros where the index is negative and beyond `width`
// up to `to_width`. index null: row itself.
struct GatherRows {
  const void* from;
  int64_t from_row_stride, from_column_stride;
  Format from_format;
  const int64_t* index;
  int64_t rows, width;
  void* to;
  int64_t to_stride, to_width;
  Format to_format;
};
void gather_rows(const GatherRows& args, cudaStream_t stream);

// to[index[row]] = from [rows][from_stride], rounded to `to_format`; rows with a negative index go nowhere.
void scatter_rows(const float* from, int64_t from_stride, const int64_t* index, int64_t rows, int64_t width, void* to,
                  int64_t to_stride, Format to_format, cudaStream_t stream);

// sums[column] += sum over rows, in their order, of values [rows][stride].
void add_column_sums(const float* values, int64_t stride, int64_t rows, int64_t columns, float* sums,
                     cudaStream_t stream);

}  // namespace rk::cuda
