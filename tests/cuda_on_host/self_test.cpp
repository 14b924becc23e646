// The imitation of CUDA, tried on kernels that are known to be right or wrong: one check per command-line argument.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <functional>
#include <map>
#include <set>

#include "common/cuda/gemm.h"
#include "common/cuda/launch.h"

namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kSchedules = 4;

void expect(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error("not so: " + what);
}

// The error that a launch ends with.
std::string error_of(const std::function<void()>& run) {
  try {
    run();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "none";
}

void expect_error(const std::function<void()>& run, const std::string& part) {
  const std::string error = error_of(run);
  expect(error.find(part) != std::string::npos, "'" + part + "' is in the error: " + error);
}

// ---- right ones
// ------------------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(256) sum_rows(const T* __restrict__ from, int columns, T* to) {
  __shared__ T of_warp[8];
  T sum = 0;
  for (int i = threadIdx.x; i < columns; i += blockDim.x) sum += from[blockIdx.x * columns + i];
  for (int offset = warpSize / 2; offset > 0; offset /= 2) sum += __shfl_down_sync(kAll, sum, offset);
  if (threadIdx.x % warpSize == 0) of_warp[threadIdx.x / warpSize] = sum;
  __syncthreads();
  if (threadIdx.x >= warpSize) return;
  sum = threadIdx.x < blockDim.x / warpSize ? of_warp[threadIdx.x] : T{0};
  for (int mask = 4; mask > 0; mask /= 2) sum += __shfl_xor_sync(kAll, sum, mask);
  if (threadIdx.x == 0) to[blockIdx.x] = sum;
}

template <class T>
void check_sum_of() {
  constexpr int kRows = 5, kColumns = 999;
  std::vector<T> from(kRows * kColumns), to(kRows);
  for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<T>(i % 7);
  RK_LAUNCH((sum_rows<T>), kRows, 256, nullptr, from.data(), kColumns, to.data());
  for (int row = 0; row < kRows; ++row) {
    const auto* begin = from.data() + row * kColumns;
    expect(to[row] == std::accumulate(begin, begin + kColumns, T{0}), "the sum of row " + std::to_string(row));
  }
}

void check_sum() {
  for (int schedule = 0; schedule < kSchedules; ++schedule) {
    rk_cuda_on_host::schedule = schedule;
    check_sum_of<float>(), check_sum_of<double>(), check_sum_of<int>(), check_sum_of<uint64_t>();
  }
}

__global__ void shuffles(int* to) {
  const int x = threadIdx.x;
  int* mine = to + x * 9;
  mine[0] = __shfl_sync(kAll, x, 5);
  mine[1] = __shfl_sync(kAll, x, 9, 8);
  mine[2] = __shfl_up_sync(kAll, x, 3);
  mine[3] = __shfl_down_sync(kAll, x, 3, 16);
  mine[4] = __shfl_xor_sync(kAll, x, 1);
  mine[5] = static_cast<int>(__ballot_sync(kAll, x % 3 == 0));
  mine[6] = __any_sync(kAll, x == 7) + 2 * __any_sync(kAll, x > 99);
  mine[7] = __all_sync(kAll, x < 99) + 2 * __all_sync(kAll, x != 7);
  if (x < 16) mine[8] = __shfl_sync(0xffffu, x, 2);  // each half with a mask of its own
  if (x >= 16) mine[8] = __shfl_sync(0xffff0000u, x, 17);
}

void check_shuffles() {
  unsigned every_third = 0;
  for (unsigned lane = 0; lane < 32; lane += 3) every_third |= 1u << lane;
  for (int schedule = 0; schedule < kSchedules; ++schedule) {
    rk_cuda_on_host::schedule = schedule;
    std::vector<int> to(32 * 9);
    RK_LAUNCH(shuffles, 1, 32, nullptr, to.data());
    for (int x = 0; x < 32; ++x) {
      const int wanted[] = {
          5, x / 8 * 8 + 1,  x < 3 ? x : x - 3, x % 16 < 13 ? x + 3 : x, x ^ 1, static_cast<int>(every_third), 1,
          1, x < 16 ? 2 : 17};
      for (int i = 0; i < 9; ++i) expect(to[x * 9 + i] == wanted[i], "shuffle " + std::to_string(i));
    }
  }
}

__global__ void halving(int* values) {
  __shared__ int shared[128];
  shared[threadIdx.x] = values[threadIdx.x];
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x >= half) return;  // those who remain must still meet at the barrier
    shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  values[0] = shared[0];
}

void check_barrier() {
  for (int schedule = 0; schedule < kSchedules; ++schedule) {
    rk_cuda_on_host::schedule = schedule;
    std::vector<int> values(128);
    std::iota(values.begin(), values.end(), 0);
    RK_LAUNCH(halving, 1, 128, nullptr, values.data());
    expect(values[0] == 127 * 128 / 2, "the sum by halves");
  }
}

__global__ void indices(int* to) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  to[block * (blockDim.x * blockDim.y * blockDim.z) + thread] += 1;
}

void check_indices() {
  std::vector<int> to(2 * 3 * 4 * 5 * 6 * 7);
  const auto kernel = [&] { indices(to.data()); };
  rk_cuda_on_host::launch(kernel, dim3(2, 3, 4), dim3(5, 6, 7));
  for (int count : to) expect(count == 1, "every thread of every block ran once");
  expect_error([&] { rk_cuda_on_host::launch(kernel, 0, 32); }, "invalid configuration");
  expect_error([&] { rk_cuda_on_host::launch(kernel, 1, 1025); }, "invalid configuration");
  expect_error([&] { rk_cuda_on_host::launch(kernel, int64_t{1} << 32, 32); }, "invalid configuration");
}

template <class T>
__global__ void nothing(T*) {}

void check_launches() {
  const auto launch_as = [](auto value) { RK_LAUNCH((nothing<decltype(value)>), 1, 1, nullptr, &value); };
  const auto never = [&] { launch_as(1.0f); };  // compiled, not called
  launch_as(1), launch_as(1), launch_as(1.0);
  static_cast<void>(never);
  std::multiset<int64_t> counts;
  for (const auto* launches : rk_cuda_on_host::Launches::all()) {
    if (std::string(launches->site.kernel) == "(nothing<decltype(value)>)") counts.insert(launches->count);
  }
  expect(counts == std::multiset<int64_t>{0, 1, 2}, "every instance is counted, also one that was never launched");
}

// ---- wrong ones
// ------------------------------------------------------------------------------------------------------

__global__ void reverse_racing(unsigned* values) {
  __shared__ unsigned shared[64];
  shared[threadIdx.x] = values[threadIdx.x];
  values[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];  // without a barrier between
}

// The second round overwrites what warps that are behind have yet to read of the first.
__global__ void reuse_racing(unsigned* values) {
  __shared__ unsigned of_warp[4];
  unsigned sum = values[threadIdx.x];
  for (int round = 0; round < 2; ++round) {
    for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(kAll, sum, mask);
    if (threadIdx.x % warpSize == 0) of_warp[threadIdx.x / warpSize] = sum;
    __syncthreads();
    sum = of_warp[0] + of_warp[1] + of_warp[2] + of_warp[3];
  }
  values[threadIdx.x] = sum;
}

void check_races() {
  for (const bool reuse : {false, true}) {
    std::vector<std::vector<unsigned>> results;
    for (int schedule = 0; schedule < kSchedules; ++schedule) {
      rk_cuda_on_host::schedule = schedule;
      std::vector<unsigned> values(reuse ? 128 : 64);
      std::iota(values.begin(), values.end(), 1);
      if (reuse) {
        RK_LAUNCH(reuse_racing, 1, 128, nullptr, values.data());
      } else {
        RK_LAUNCH(reverse_racing, 1, 64, nullptr, values.data());
      }
      results.push_back(values);
    }
    expect(results[0] != results[1], "a race shows between ascending and descending threads");
    expect(results[0] != results[2], "a race shows between ascending and shuffled threads");
  }
}

__global__ void deserted_shuffle(int* to) {
  if (threadIdx.x >= 16) return;
  to[threadIdx.x] = __shfl_sync(kAll, static_cast<int>(threadIdx.x), 0);
}

__global__ void split_ways(int* to) {
  if (threadIdx.x < 40) __syncthreads();
  to[threadIdx.x] = __any_sync(kAll, 1);
}

__global__ void different_masks(int* to) {
  to[threadIdx.x] = __shfl_sync(threadIdx.x < 16 ? 0xffffu : kAll, 1, 0);
  to[threadIdx.x] = __shfl_sync(kAll, 1, 0);
}

__global__ void partial_warp(int* to) { to[threadIdx.x] = __shfl_xor_sync(kAll, 1, 1); }

__global__ void lane_not_in_mask(int* to) {
  if (threadIdx.x < 16) to[threadIdx.x] = __shfl_sync(0xffffu, 1, 20);
}

__global__ void own_lane_missing(int* to) { to[threadIdx.x] = __shfl_sync(0xffffu, 1, 2); }

__global__ void two_barriers(int* to) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  to[threadIdx.x] = 1;
}

void check_deadlocks() {
  std::vector<int> to(64);
  for (int schedule = 0; schedule < kSchedules; ++schedule) {
    rk_cuda_on_host::schedule = schedule;
    expect_error([&] { RK_LAUNCH(deserted_shuffle, 1, 32, nullptr, to.data()); }, "for lane 16 of its warp, which has");
    expect_error([&] { RK_LAUNCH(split_ways, 1, 64, nullptr, to.data()); },
                 "which waits in __syncthreads at self_test");
    expect_error([&] { RK_LAUNCH(different_masks, 1, 32, nullptr, to.data()); }, "no thread can go on");
    expect_error([&] { RK_LAUNCH(partial_warp, 1, 48, nullptr, to.data()); },
                 "lane 16 of its warp, which does not exist");
    expect_error([&] { RK_LAUNCH(lane_not_in_mask, 1, 32, nullptr, to.data()); }, "reads a lane that the mask lacks");
    expect_error([&] { RK_LAUNCH(own_lane_missing, 1, 32, nullptr, to.data()); }, "lacks the caller's own lane");
    expect_error([&] { RK_LAUNCH(two_barriers, 1, 64, nullptr, to.data()); }, "threads meet at different barriers");
    check_barrier();  // the machine still works after an error
    rk_cuda_on_host::schedule = schedule;
  }
}

__global__ void write_past_heap(float* to, int count) {
  __syncthreads();
  if (static_cast<int>(threadIdx.x) <= count) to[threadIdx.x] = 1;
}

void write_past_end() {
  std::vector<float> to(48);
  RK_LAUNCH(write_past_heap, 1, 64, nullptr, to.data(), 48);
}

template <int size>
__global__ void write_past_shared(float* to) {
  __shared__ float shared[size];
  float* at = shared;
  at[threadIdx.x] = to[0];
  __syncthreads();
  to[0] = at[0];
}

void write_past_shared_end() {
  std::vector<float> to(1);
  RK_LAUNCH((write_past_shared<48>), 1, 49, nullptr, to.data());
}

__global__ void load_four(const float* from, float4* to) { *to = *reinterpret_cast<const float4*>(from); }

void misaligned() {
  alignas(16) float from[8] = {};
  float4 to;
  RK_LAUNCH(load_four, 1, 1, nullptr, from + threadIdx.x + 1, &to);
}

// ---- numbers
// ---------------------------------------------------------------------------------------------------------

void check_rounding() {
  const auto bf16 = [](float value) { return std::bit_cast<uint16_t>(__float2bfloat16_rn(value)); };
  const auto f16 = [](float value) { return std::bit_cast<uint16_t>(__float2half_rn(value)); };
  const auto expect_bits = [](uint16_t bits, uint16_t wanted, const char* what) {
    expect(bits == wanted, std::string(what) + ", but " + std::to_string(bits));
  };
  const float infinity = std::numeric_limits<float>::infinity();
  expect_bits(bf16(1.0f), 0x3f80, "bf16 1");
  expect_bits(bf16(-2.5f), 0xc020, "bf16 -2.5");
  expect_bits(bf16(0x1.01p0f), 0x3f80, "bf16 tie goes down to even");
  expect_bits(bf16(0x1.03p0f), 0x3f82, "bf16 tie goes up to even");
  expect_bits(bf16(0x1.010002p0f), 0x3f81, "bf16 just above a tie");
  expect_bits(bf16(0x1.fffffep127f), 0x7f80, "bf16 overflows to infinity");
  expect_bits(bf16(-infinity), 0xff80, "bf16 -infinity");
  expect_bits(bf16(0x1p-133f), 0x0001, "bf16 smallest subnormal");
  expect_bits(bf16(0x1p-134f), 0x0000, "bf16 half of it is a tie");
  expect_bits(bf16(-0.0f), 0x8000, "bf16 -0");
  expect_bits(f16(1.0f), 0x3c00, "fp16 1");
  expect_bits(f16(0x1.002p0f), 0x3c00, "fp16 tie goes down to even");
  expect_bits(f16(0x1.006p0f), 0x3c02, "fp16 tie goes up to even");
  expect_bits(f16(65504.0f), 0x7bff, "fp16 largest");
  expect_bits(f16(65519.0f), 0x7bff, "fp16 just below the tie with infinity");
  expect_bits(f16(65520.0f), 0x7c00, "fp16 overflows to infinity");
  expect_bits(f16(0x1p-24f), 0x0001, "fp16 smallest subnormal");
  expect_bits(f16(0x1p-25f), 0x0000, "fp16 half of it is a tie");
  expect_bits(f16(-0x1.8p-24f), 0x8002, "fp16 subnormal tie goes up to even");
  const float nan = std::nanf("");
  expect(std::isnan(__half2float(__float2half_rn(nan))), "fp16 NaN");
  expect(std::isnan(__bfloat162float(__float2bfloat16_rn(nan))), "bf16 NaN");
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {  // a 16-bit number is one in fp32 too
    const float b = __bfloat162float(__nv_bfloat16{static_cast<uint16_t>(bits)});
    const float h = __half2float(__half{static_cast<uint16_t>(bits)});
    expect(std::isnan(b) || bf16(b) == bits, "bf16 there and back");
    expect(std::isnan(h) || f16(h) == bits, "fp16 there and back");
  }
  static_assert(alignof(float4) == 16 && alignof(float2) == 8 && alignof(uint4) == 16 && sizeof(__half) == 2);
}

// ---- products
// --------------------------------------------------------------------------------------------------------

// A matrix in exactly the memory that it names: its last row ends with its last element.
struct Matrix {
  int64_t rows, columns, stride;
  std::vector<float> values;

  Matrix(int64_t rows, int64_t columns, int64_t seed)
      : rows(rows), columns(columns), stride((columns + 7) / 4 * 4), values((rows - 1) * stride + columns) {
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>((i * 7 + seed) % 11) - 5;
  }
  float at(int64_t i, int64_t j, bool transposed) const { return values[transposed ? j * stride + i : i * stride + j]; }
};

// Integers, so that every order of summation gives the same.
void check_gemm_of(int64_t m, int64_t n, int64_t k, bool a_transposed, bool b_transposed, bool accumulate) {
  const Matrix a = a_transposed ? Matrix(k, m, 1) : Matrix(m, k, 1);
  const Matrix b = b_transposed ? Matrix(n, k, 2) : Matrix(k, n, 2);
  Matrix c(m, n, 3);
  const Matrix before = c;
  std::vector<char> workspace(100);
  rk::cuda::gemm({workspace.data(), 100, false, nullptr},
                 {m, n, k, a.values.data(), a.stride, a_transposed, b.values.data(), b.stride, b_transposed,
                  c.values.data(), c.stride, accumulate, rk::Format::f32, rk::Format::f32, m, (n + 7) / 8 * 8});
  for (size_t i = 0; i < c.values.size(); ++i) {
    const int64_t row = static_cast<int64_t>(i) / c.stride, column = static_cast<int64_t>(i) % c.stride;
    float wanted = accumulate || column >= n ? before.values[i] : 0;
    for (int64_t d = 0; column < n && d < k; ++d) wanted += a.at(row, d, a_transposed) * b.at(d, column, b_transposed);
    expect(c.values[i] == wanted, "element " + std::to_string(i) + " of a product");
  }
}

template <class T, class To, class From>
void check_gemm_in(rk::Format format, To to_16, From from_16) {
  std::vector<T> a(72), b(70 * 8), c(8);
  float wanted = 0;
  for (int d = 0; d < 70; ++d) {
    a[d] = to_16(static_cast<float>(d)), b[d * 8] = to_16(1);
    wanted += from_16(a[d]);
  }
  rk::cuda::gemm({nullptr, 0, false, nullptr},
                 {1, 1, 70, a.data(), 72, false, b.data(), 8, false, c.data(), 8, false, format, format, 0, 0});
  expect(c[0].bits == to_16(wanted).bits, "a product rounded once");
}

void check_gemm() {
  for (int bits = 0; bits < 8; ++bits) {
    check_gemm_of(3, 300, 70, bits & 1, bits & 2, bits & 4);
    check_gemm_of(65, 1, 1, bits & 1, bits & 2, bits & 4);
  }
  check_gemm_in<__nv_bfloat16>(rk::Format::bf16, __float2bfloat16_rn, __bfloat162float);
  check_gemm_in<__half>(rk::Format::f16, __float2half_rn, __half2float);
}

const std::map<std::string, void (*)()> kChecks = {{"sum", check_sum},
                                                   {"shuffles", check_shuffles},
                                                   {"barrier", check_barrier},
                                                   {"indices", check_indices},
                                                   {"launches", check_launches},
                                                   {"races", check_races},
                                                   {"deadlocks", check_deadlocks},
                                                   {"rounding", check_rounding},
                                                   {"gemm", check_gemm},
                                                   {"write_past_end", write_past_end},
                                                   {"write_past_shared_end", write_past_shared_end},
                                                   {"misaligned", misaligned}};

}  // namespace

int main(int count, char** names) {
  for (int i = 1; i < count; ++i) {
    try {
      kChecks.at(names[i])();
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s: %s\n", names[i], error.what());
      return 1;
    }
  }
  return 0;
}
