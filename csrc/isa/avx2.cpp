// Tile kernels for AVX2 and FMA.
#include "common/simd/tile_kernels.h"

#if defined(__x86_64__)
#include <cmath>
#include <limits>

#define RK_ISA avx2
#define RK_LANES 8
// To the end of the file: templates are compiled with the options in force there. Nothing of the standard library may
// follow, or its inline functions would be emitted for this instruction set and used by everyone.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include "common/simd/pack_tiles.h"
#include "kl/linear_kl_tiles.h"
#include "kl/penalty_rows.h"
#include "logprob/logprob_tiles.h"
#include "preference/pair_loss_rows.h"

namespace rk {
extern const TileKernels kTileKernels_avx2;
const TileKernels kTileKernels_avx2 = {"avx2",
                                       avx2::logprob_forward,
                                       avx2::logprob_backward,
                                       avx2::logprob_weights,
                                       avx2::kl_forward,
                                       avx2::kl_backward,
                                       avx2::pack_columns,
                                       avx2::store_rows,
                                       avx2::pair_losses,
                                       avx2::reward_losses,
                                       avx2::kl_penalties};
}  // namespace rk
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // x86-64
