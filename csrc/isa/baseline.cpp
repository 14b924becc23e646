// Tile kernels for Portable: whatever the build targets by default (SSE2 on x86-64, NEON on arm64).
#include "common/simd/tile_kernels.h"

#define RK_ISA baseline
#define RK_LANES 4
#include "common/simd/pack_tiles.h"
#include "kl/linear_kl_tiles.h"
#include "kl/penalty_rows.h"
#include "logprob/logprob_tiles.h"
#include "preference/pair_loss_rows.h"

namespace rk {
extern const TileKernels kTileKernels_baseline;
const TileKernels kTileKernels_baseline = {"baseline",
                                           baseline::logprob_forward,
                                           baseline::logprob_backward,
                                           baseline::logprob_weights,
                                           baseline::kl_forward,
                                           baseline::kl_backward,
                                           baseline::pack_columns,
                                           baseline::store_rows,
                                           baseline::pair_losses,
                                           baseline::reward_losses,
                                           baseline::kl_penalties};
}  // namespace rk
