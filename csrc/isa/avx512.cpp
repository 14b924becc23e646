// Tile kernels for AVX-512 (F, BW, DQ, VL).
#include "common/simd/tile_kernels.h"

#if defined(__x86_64__)
#include <cmath>
#include <limits>

#define RK_ISA avx512
#define RK_LANES 16
// To the end of the file: templates are compiled with the options in force there. Nothing of the standard library may
// follow, or its inline functions would be emitted for this instruction set and used by everyone.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif
#include "common/simd/pack_tiles.h"
#include "kl/linear_kl_tiles.h"
#include "kl/penalty_rows.h"
#include "logprob/logprob_tiles.h"
#include "preference/pair_loss_rows.h"

namespace rk {
extern const TileKernels kTileKernels_avx512;
const TileKernels kTileKernels_avx512 = {"avx512",
                                         avx512::logprob_forward,
                                         avx512::logprob_backward,
                                         avx512::logprob_weights,
                                         avx512::kl_forward,
                                         avx512::kl_backward,
                                         avx512::pack_columns,
                                         avx512::store_rows,
                                         avx512::pair_losses,
                                         avx512::reward_losses,
                                         avx512::kl_penalties};
}  // namespace rk
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // x86-64
