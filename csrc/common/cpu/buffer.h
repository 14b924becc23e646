// Scratch memory of the CPU kernels, at the start of a cache line. malloc promises 16 bytes only, and a GEMM whose
// vector loads straddle two lines runs at three quarters of its rate (fp32 on AVX2).
#pragma once

#include <cstddef>
#include <new>
#include <vector>

namespace rk {

constexpr std::size_t kCacheLine = 64;

template <class T>
struct CacheLineAllocator {
  using value_type = T;
  CacheLineAllocator() = default;
  template <class U>
  CacheLineAllocator(const CacheLineAllocator<U>&) {}

  T* allocate(std::size_t count) {
    return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(kCacheLine)));
  }
  void deallocate(T* data, std::size_t) { ::operator delete(data, std::align_val_t(kCacheLine)); }
  template <class U>
  bool operator==(const CacheLineAllocator<U>&) const {
    return true;
  }
  template <class U>
  bool operator!=(const CacheLineAllocator<U>&) const {
    return false;
  }
};

template <class T>
using Buffer = std::vector<T, CacheLineAllocator<T>>;

}  // namespace rk
