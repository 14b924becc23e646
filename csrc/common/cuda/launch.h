// The start of kernels: one macro, so that the same .cu files can also be compiled by a plain C++ compiler and
// executed on the host by the tests (RK_CUDA_ON_HOST; see tests/cuda_on_host/).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace rk::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

}  // namespace rk::cuda

// RK_LAUNCH(kernel, blocks, threads, stream, arguments...); a template's arguments go in parentheses with its name.
#if defined(RK_CUDA_ON_HOST)
#define RK_LAUNCH(kernel, blocks, threads, stream, ...)                                                          \
  rk_cuda_on_host::launch([] { return rk_cuda_on_host::Site{__FILE__, #kernel}; }, [&] { kernel(__VA_ARGS__); }, \
                          blocks, threads)
#else
#define RK_LAUNCH(kernel, blocks, threads, stream, ...)                                                  \
  do {                                                                                                   \
    kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), 0, (stream)>>>(__VA_ARGS__); \
    ::rk::cuda::check(cudaGetLastError(), #kernel);                                                      \
  } while (false)
#endif
