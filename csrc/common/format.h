// Number formats of stored matrices, as both devices' kernels name them.
#pragma once

#include <cstdint>

namespace rk {

enum class Format : int32_t { f32, bf16, f16 };

inline int64_t size_of(Format format) { return format == Format::f32 ? 4 : 2; }

}  // namespace rk
