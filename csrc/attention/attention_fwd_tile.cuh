// What the forward pass's kernel keeps in shared memory, and what it is launched with.
#pragma once
#include "attention/attention_tile.cuh"

template <int HeadDim>  // 64, 96, 128, 192 or 256: what smaller heads are padded to, in shared memory
struct AttentionFwdTraits {
    static constexpr int kConsumers = HeadDim == 64 ? 3 : 2;
    static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
    static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 40;
    static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 232;
    static constexpr int kBlockM = 64 * kConsumers;
    static constexpr int kBlockN = HeadDim == 256 ? 80 : HeadDim == 192 ? 112 : 128;
    static constexpr int kStages = 2;
    static constexpr bool kOutOverQ = HeadDim >= 192;  // no shared memory left for both
    static constexpr int kQStages = kOutOverQ ? 1 : 2;
    static constexpr bool kPingpong = HeadDim <= 128;

    static constexpr int kPanel = HeadDim % 64 ? 32 : 64;  // columns of a swizzled panel
    static constexpr int kPanels = HeadDim / kPanel;
    static constexpr int kRowBytes = 2 * kPanel;
    static constexpr int kKvBytes = 2 * kBlockN * HeadDim;
    static constexpr int kQBytes = 2 * 64 * HeadDim;  // of one warpgroup, as its output

    struct Shared {
        alignas(1024) char k[kStages][kKvBytes];
        char v[kStages][kKvBytes];
        char q[kQStages][kConsumers][kQBytes];
        char out[kOutOverQ ? 16 : kConsumers * kQBytes];
        AttentionTile tiles[2];
        uint64_t q_full[kQStages], q_empty[kQStages];
        uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
        uint64_t tile_full[2], tile_empty[2];
    };
    static constexpr uint32_t kK = offsetof(Shared, k), kV = offsetof(Shared, v), kQ = offsetof(Shared, q);
    static constexpr uint32_t kOut = kOutOverQ ? kQ : offsetof(Shared, out);
    static constexpr uint32_t kTiles = offsetof(Shared, tiles);
    static constexpr uint32_t kQFull = offsetof(Shared, q_full), kQEmpty = offsetof(Shared, q_empty);
    static constexpr uint32_t kKFull = offsetof(Shared, k_full), kKEmpty = offsetof(Shared, k_empty);
    static constexpr uint32_t kVFull = offsetof(Shared, v_full), kVEmpty = offsetof(Shared, v_empty);
    static constexpr uint32_t kTileFull = offsetof(Shared, tile_full), kTileEmpty = offsetof(Shared, tile_empty);
    static constexpr int kSharedBytes = sizeof(Shared);
    static_assert(kSharedBytes <= 232448 && kKvBytes % 1024 == 0 && kQBytes % 1024 == 0, "");
};

struct AttentionFwdArguments {
    CUtensorMap q, k, v;
    AttentionOutput out;
    AttentionShape shape;
    AttentionTileOrder order;
    float* lse;
    int* tile_counter;
};
