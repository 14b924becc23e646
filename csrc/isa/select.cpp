// Chooses the tile kernels for the CPU that runs this.
#include <atomic>
#include <cstring>
#include <string>

#include "common/simd/tile_kernels.h"

namespace rk {

extern const TileKernels kTileKernels_baseline;
#if defined(__x86_64__)
extern const TileKernels kTileKernels_avx2;
extern const TileKernels kTileKernels_avx512;
#endif

namespace {

struct Candidates {
  const TileKernels* list[3];
  int count = 0;
  std::string names;

  Candidates() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (fma && wide) list[count++] = &kTileKernels_avx512;
    if (fma) list[count++] = &kTileKernels_avx2;
#endif
    list[count++] = &kTileKernels_baseline;
    for (int i = 0; i < count; ++i) names += std::string(i ? " " : "") + list[i]->name;
  }
};

const Candidates& candidates() {
  static const Candidates candidates;
  return candidates;
}

std::atomic<const TileKernels*> chosen{nullptr};

}  // namespace

const TileKernels& tile_kernels() {
  const TileKernels* kernels = chosen.load();
  return kernels ? *kernels : *candidates().list[0];
}

bool use_instruction_set(const char* name) {
  for (int i = 0; i < candidates().count; ++i) {
    if (std::strcmp(candidates().list[i]->name, name) == 0) {
      chosen = candidates().list[i];
      return true;
    }
  }
  return false;
}

const char* instruction_sets() { return candidates().names.c_str(); }

}  // namespace rk
