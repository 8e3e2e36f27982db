// What the producer, the consumers and the epilogues of the MLP's products share.
#pragma once
#include "common/tensor_map.h"
#include "mlp/mlp_activation.cuh"

struct MlpTraits {
    static constexpr int kConsumers = 2, kCluster = 2;
    static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
    static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
    static constexpr int kRows = 128, kColumns = 256, kDepth = 64;  // of a tile; of a step
    static constexpr int kGroupRows = 64;                           // of a tile, that one warpgroup multiplies
    static constexpr int kGroupM = 8;  // tiles of a cluster below each other that come first, for L2
    static constexpr int kStages = 3;
    // What goes in and out with the epilogue, for each warp: its rows, in boxes of columns.
    static constexpr int kBoxRows = 16, kBoxColumns = 64, kBoxes = kColumns / kBoxColumns;
    static constexpr int kWarps = 4 * kConsumers;
};

struct alignas(1024) MlpShared {
    using Traits = MlpTraits;
    uint16_t a[Traits::kStages][Traits::kRows * Traits::kDepth];
    uint16_t b[Traits::kStages][Traits::kColumns * Traits::kDepth];
    uint16_t boxes[Traits::kWarps][Traits::kBoxes][Traits::kBoxRows * Traits::kBoxColumns];
    float2 sums[Traits::kWarps][Traits::kColumns / 2];  // of columns, over a warp's rows
    uint64_t full[Traits::kStages], empty[Traits::kStages];
    uint64_t boxes_loaded[Traits::kWarps];
};
static_assert(sizeof(MlpShared) <= 232448, "");

struct MlpArguments {
    CUtensorMap a;            // (M, K)
    CUtensorMap b;            // (N, K) forward, (K, N) backward
    CUtensorMap epilogue_in;  // (M, N): residual forward, preact backward
    CUtensorMap side_out;     // (M, N), written beside out: preact forward, act backward
    CUtensorMap out;          // (M, N): out forward, grad backward
    // Of a gated MLP, whose gate's are those above: up_weight (N, K) forward, up (M, N) backward; up forward, its grad
    // backward.
    CUtensorMap up, up_out;
    const void *bias, *up_bias;
    float* partials;
    bool has_epilogue_in, has_side_out;
    int M, N, K;
    int tiles_m, tiles_n;  // of a cluster
    int parts;             // partial sums of a column
};

struct MlpTile {
    int row, column;  // of its corner
};

// Calls work with the corner of each of this CTA's tiles, in order.
template <int TileColumns, class Work>
GK_DEVICE void for_each_mlp_tile(const MlpArguments& args, Work work) {
    using Traits = MlpTraits;
    const int clusters = gridDim.x / Traits::kCluster, in_group = Traits::kGroupM * args.tiles_n;
    for (int index = blockIdx.x / Traits::kCluster; index < args.tiles_m * args.tiles_n; index += clusters) {
        const int first = index / in_group * Traits::kGroupM, within = index % in_group;
        const int height = min(args.tiles_m - first, Traits::kGroupM);
        work(MlpTile{((first + within % height) * Traits::kCluster + int(cluster_rank())) * Traits::kRows,
                     within / height * TileColumns});
    }
}
