#include "common/cuda/copies.h"

#include "common/cuda/formats.h"
#include "common/cuda/launch.h"

namespace rk::cuda {
namespace {

constexpr int kCopyThreads = 256;

template <class From, class To>
__global__ void __launch_bounds__(kCopyThreads) gather(GatherRows args) {
  const int64_t row = blockIdx.x;
  const int64_t source = args.index ? args.index[row] : row;
  const From* from = static_cast<const From*>(args.from) + source * args.from_row_stride;
  To* to = static_cast<To*>(args.to) + row * args.to_stride;
  for (int64_t column = threadIdx.x; column < args.to_width; column += kCopyThreads) {
    const bool inside = source >= 0 && column < args.width;
    to[column] = from_float<To>(inside ? to_float(from[column * args.from_column_stride]) : 0.0f);
  }
}

template <class To>
__global__ void __launch_bounds__(kCopyThreads)
    scatter(const float* from, int64_t from_stride, const int64_t* index, int64_t width, To* to, int64_t to_stride) {
  const int64_t row = blockIdx.x, target = index[row];
  if (target < 0) return;
  for (int64_t column = threadIdx.x; column < width; column += kCopyThreads) {
    to[target * to_stride + column] = from_float<To>(from[row * from_stride + column]);
  }
}

constexpr int kSumColumns = 32, kSumRows = 8;  // a block's threads: neighbours read neighbouring columns

__global__ void __launch_bounds__(kSumColumns* kSumRows)
    sum_columns(const float* values, int64_t stride, int64_t rows, int64_t columns, float* sums) {
  __shared__ float parts[kSumRows][kSumColumns];
  const int x = threadIdx.x % kSumColumns, y = threadIdx.x / kSumColumns;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kSumColumns + x;
  float sum = 0;
  if (column < columns) {
    for (int64_t row = y; row < rows; row += kSumRows) sum += values[row * stride + column];
  }
  parts[y][x] = sum;
  __syncthreads();
  if (y != 0 || column >= columns) return;
  for (int i = 1; i < kSumRows; ++i) sum += parts[i][x];
  sums[column] += sum;
}

}  // namespace

void gather_rows(const GatherRows& args, cudaStream_t stream) {
  if (args.rows == 0) return;
  with_type(args.from_format, [&](auto from) {
    with_type(args.to_format, [&](auto to) {
      RK_LAUNCH((gather<typename decltype(from)::type, typename decltype(to)::type>), args.rows, kCopyThreads, stream,
                args);
    });
  });
}

void scatter_rows(const float* from, int64_t from_stride, const int64_t* index, int64_t rows, int64_t width, void* to,
                  int64_t to_stride, Format to_format, cudaStream_t stream) {
  if (rows == 0) return;
  with_type(to_format, [&](auto tag) {
    using To = typename decltype(tag)::type;
    RK_LAUNCH((scatter<To>), rows, kCopyThreads, stream, from, from_stride, index, width, static_cast<To*>(to),
              to_stride);
  });
}

void add_column_sums(const float* values, int64_t stride, int64_t rows, int64_t columns, float* sums,
                     cudaStream_t stream) {
  if (columns == 0) return;
  RK_LAUNCH(sum_columns, (columns + kSumColumns - 1) / kSumColumns, kSumColumns * kSumRows, stream, values, stride,
            rows, columns, sums);
}

}  // namespace rk::cuda
