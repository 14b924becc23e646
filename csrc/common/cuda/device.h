// The device that an op's tensors live on, for the op's host side.
#pragma once

#include <ATen/ATen.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <optional>

#include "common/device_plan.h"

#if !defined(RK_CUDA_ON_HOST)
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGuard.h>
#include <ATen/cuda/CUDAGraphsUtils.cuh>
#endif

namespace rk::cuda {

// Kernels follow pointers: one to another device's memory, or the host's, would take the whole process down.
inline void check_same_device(const at::Tensor& first, std::initializer_list<std::optional<at::Tensor>> others) {
  for (const auto& other : others) {
    TORCH_CHECK_VALUE(!other || !other->defined() || other->device() == first.device(),
                      "all tensors must be on one device, got ", first.device(), " and ", other->device());
  }
}

// Makes the tensor's device the current one for a scope.
class DeviceScope {
 public:
#if defined(RK_CUDA_ON_HOST)
  explicit DeviceScope(const at::Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
  bool capturing() const { return std::getenv("RK_CUDA_ON_HOST_CAPTURING") != nullptr; }
  DeviceSizes sizes() const { return {5, 1 << 20}; }
#else
  explicit DeviceScope(const at::Tensor& tensor) : guard_(tensor.device()) {}
  cudaStream_t stream() const { return at::cuda::getCurrentCUDAStream(); }
  bool capturing() const { return at::cuda::currentStreamCaptureStatusMayInitCtx() != at::cuda::CaptureStatus::None; }
  DeviceSizes sizes() const {
    const auto* properties = at::cuda::getCurrentDeviceProperties();
    return {properties->multiProcessorCount, properties->l2CacheSize};
  }

 private:
  c10::cuda::CUDAGuard guard_;
#endif
};

}  // namespace rk::cuda
