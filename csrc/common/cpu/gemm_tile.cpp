#include "common/cpu/gemm_tile.h"

#include <ATen/Context.h>

#include <exception>

namespace rk {
namespace {

bool cpu_has_bf16_products() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// ATen answers for AMX alone (could_pack), though its brgemm takes AVX512_BF16 too, unless oneDNN was built or set
// (ONEDNN_MAX_CPU_ISA) to leave it out. So it is tried once.
bool brgemm_takes_bf16() {
  const at::BFloat16 a[2] = {}, b[2 * kRowBlock] = {};
  float c[kRowBlock];
  try {
    gemm_tile<at::BFloat16>(1, kRowBlock, 2, a, 2, b, c, kRowBlock, false);
  } catch (const std::exception&) {
    return false;
  }
  gemm_release<at::BFloat16>();
  return true;
}

}  // namespace

bool runs_on_bf16(at::ScalarType gemm) {
  if (gemm != at::kBFloat16 || !at::globalContext().userEnabledMkldnn()) return false;
  static const bool without_amx = cpu_has_bf16_products() && brgemm_takes_bf16();
  return without_amx || at::native::cpublas::could_pack(at::kBFloat16);
}

}  // namespace rk
