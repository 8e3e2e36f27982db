// What the three kernels of the backward pass share: tile sizes and the workspace between them.
#pragma once
#include "attention/attention_tile.cuh"

// A CTA of the main kernel owns kBlockN keys and loops over blocks of kBlockM queries. Of dq each of its two warpgroups
// computes 64 rows by kDqColumns columns: half of the rows, or half of the columns.
template <int HeadDim>  // 64, 96, 128 or 256: what smaller heads are padded to
struct AttentionBwdBlock {
    static constexpr int kBlockM = HeadDim == 64 ? 128 : 64;
    static constexpr int kBlockN = HeadDim == 256 ? 64 : 128;
    static constexpr bool kSplitDqRows = kBlockM == 128;
    static constexpr int kDqColumns = kSplitDqRows ? HeadDim : HeadDim == 96 ? 64 : HeadDim / 2;  // in whole panels
    static constexpr int kDqWidth = kSplitDqRows ? HeadDim : 2 * kDqColumns;
};

// Blocks of queries have slots in the workspace: of each query head of each sequence, one after the other.
struct AttentionBwdWorkspace {
    int64_t slots_per_head;  // of one batch entry; of all documents with cu_seqlens
    int* tile_counter;
    int* added;        // (slots,): how many blocks of keys, or warps, have added to dq, where their order is fixed
    float* minus_lse;  // (slots, kBlockM), base 2; -inf where there is no query or it sees no key
    float* delta;      // (slots, kBlockM): row sums of out * dout
    float* dq;         // (slots, kBlockM * kDqWidth), float32, in the order of the accumulator registers
    // The query heads that share a key head are worked on in so many parts, each with a share of dk and dv.
    int splits;
    int64_t key_slots_per_head;    // blocks of keys have slots as well, of each part of each key head
    float *dk_shares, *dv_shares;  // (key slots, kBlockN * HeadDim), as dq; null without splits
};

// As few as make two tiles for each SM, so that the longest of them are not what everybody waits for.
template <int HeadDim>
int query_head_splits(const AttentionShape& shape, int sm_count) {
    constexpr int kBlockN = AttentionBwdBlock<HeadDim>::kBlockN;
    const int group = shape.heads / shape.kv_heads;
    const int64_t blocks = shape.cu_seqlens ? shape.k_len / kBlockN + 1 : shape.batch * ceil_div(shape.k_len, kBlockN);
    int splits = 1;
    while (splits < group && (group % splits || blocks * shape.kv_heads * splits < 2 * int64_t(sm_count))) ++splits;
    return splits;
}

template <int HeadDim>
int64_t attention_bwd_workspace(const AttentionShape& shape, int sm_count, void* base,
                                AttentionBwdWorkspace* workspace) {
    constexpr int kBlockM = AttentionBwdBlock<HeadDim>::kBlockM, kBlockN = AttentionBwdBlock<HeadDim>::kBlockN;
    auto slots_per_head = [&](int rows, int block) {
        return shape.cu_seqlens ? rows / block + int64_t(shape.batch) : ceil_div(rows, block);
    };
    const int64_t batch = shape.cu_seqlens ? 1 : shape.batch;
    workspace->slots_per_head = slots_per_head(shape.q_len, kBlockM);
    workspace->key_slots_per_head = slots_per_head(shape.k_len, kBlockN);
    workspace->splits = query_head_splits<HeadDim>(shape, sm_count);
    const int64_t slots = workspace->slots_per_head * shape.heads * batch;
    const int64_t key_slots =
        workspace->splits == 1 ? 0 : workspace->key_slots_per_head * shape.kv_heads * workspace->splits * batch;
    char* at = static_cast<char*>(base);
    auto take = [&](int64_t bytes) {
        char* taken = at;
        at += (bytes + 255) / 256 * 256;
        return taken;
    };
    workspace->tile_counter = reinterpret_cast<int*>(take(sizeof(int)));
    workspace->added = reinterpret_cast<int*>(take(slots * sizeof(int)));
    workspace->minus_lse = reinterpret_cast<float*>(take(slots * kBlockM * sizeof(float)));
    workspace->delta = reinterpret_cast<float*>(take(slots * kBlockM * sizeof(float)));
    constexpr int kDqSize = kBlockM * AttentionBwdBlock<HeadDim>::kDqWidth;
    workspace->dq = reinterpret_cast<float*>(take(slots * kDqSize * sizeof(float)));
    workspace->dk_shares = reinterpret_cast<float*>(take(key_slots * kBlockN * HeadDim * sizeof(float)));
    workspace->dv_shares = reinterpret_cast<float*>(take(key_slots * kBlockN * HeadDim * sizeof(float)));
    return at - static_cast<char*>(base);
}

// The main kernel.
template <int HeadDim>
struct AttentionBwdTraits : AttentionBwdBlock<HeadDim> {
    using AttentionBwdBlock<HeadDim>::kBlockM;
    using AttentionBwdBlock<HeadDim>::kBlockN;
    using AttentionBwdBlock<HeadDim>::kSplitDqRows;
    using AttentionBwdBlock<HeadDim>::kDqColumns;
    static constexpr int kConsumers = 2;
    static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
    static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
    static constexpr int kStages = 2;
    // The two warpgroups share out the keys; or, where registers do not hold whole rows of dk and dv, their columns.
    // Then each computes the scores of half of the queries, and exponentials go through shared memory like dscores.
    static constexpr bool kSplitColumns = HeadDim == 256;
    static constexpr int kScoreColumns = kSplitColumns ? kBlockM / 2 : kBlockM;
    static constexpr int kGradientColumns = kSplitColumns ? HeadDim / 2 : HeadDim;
    // Whether dv multiplies while dscores are turned into gradients: both need the registers of a block of scores.
    static constexpr bool kDvFirst = HeadDim == 96 || HeadDim == 128;

    static constexpr int kPanel = HeadDim % 64 ? 32 : 64;  // columns of a swizzled panel
    static constexpr int kRowBytes = 2 * kPanel;
    static constexpr int kPanels = HeadDim / kPanel;
    static constexpr int kKvBytes = 2 * kBlockN * HeadDim;
    static constexpr int kQBytes = 2 * kBlockM * HeadDim;
    static constexpr int kStatisticsBytes = 4 * kBlockM;
    static constexpr int kDsRowBytes = 128, kDsPanelBytes = kBlockN * kDsRowBytes;  // panels of 64 queries
    static constexpr int kDsBytes = 2 * kBlockM * kBlockN;
    // Whether dq goes out straight from registers, for want of shared memory, or through a warp of its own.
    static constexpr bool kDirectDq = kSplitColumns;
    static constexpr int kDqRegisters = kDqColumns / 2;
    static constexpr int kDqBytes = 4 * kWarpgroup * kDqRegisters;  // of one warpgroup
    static constexpr int kOutBytes = 64 * 2 * kGradientColumns;  // of one warpgroup

    struct Shared {
        alignas(1024) char k[kKvBytes];
        // Follows k: with 96 columns, dq's second half has 32 of these for the columns beyond, which nobody reads.
        char v[kKvBytes];
        char q[kStages][kQBytes];
        char dout[kStages][kQBytes];
        char ds[kDsBytes];
        // Exponentials, where columns are split; or rows on their way out, which else go over k and v.
        char exponentials_or_out[kSplitColumns ? kDsBytes : kConsumers * kOutBytes];
        char dq[kDirectDq ? 16 : kConsumers * kDqBytes];
        float lse[kStages][kBlockM], delta[kStages][kBlockM];
        AttentionTile tiles[2];
        uint64_t q_full[kStages], q_empty[kStages], dout_full[kStages], dout_empty[kStages];
        uint64_t dq_full[kConsumers], dq_empty[kConsumers];
        uint64_t tile_full[2], tile_empty[2];
        uint64_t kv_full, kv_empty, ds_empty;
    };
    static constexpr uint32_t kK = offsetof(Shared, k), kV = offsetof(Shared, v);
    static constexpr uint32_t kQ = offsetof(Shared, q), kDout = offsetof(Shared, dout);
    static constexpr uint32_t kDs = offsetof(Shared, ds), kProbabilities = offsetof(Shared, exponentials_or_out);
    static constexpr uint32_t kDq = offsetof(Shared, dq), kOut = kSplitColumns ? kK : kProbabilities;
    static constexpr uint32_t kLse = offsetof(Shared, lse), kDelta = offsetof(Shared, delta);
    static constexpr uint32_t kTiles = offsetof(Shared, tiles);
    static constexpr uint32_t kQFull = offsetof(Shared, q_full), kQEmpty = offsetof(Shared, q_empty);
    static constexpr uint32_t kDoutFull = offsetof(Shared, dout_full), kDoutEmpty = offsetof(Shared, dout_empty);
    static constexpr uint32_t kDqFull = offsetof(Shared, dq_full), kDqEmpty = offsetof(Shared, dq_empty);
    static constexpr uint32_t kTileFull = offsetof(Shared, tile_full), kTileEmpty = offsetof(Shared, tile_empty);
    static constexpr uint32_t kKvFull = offsetof(Shared, kv_full), kKvEmpty = offsetof(Shared, kv_empty);
    static constexpr uint32_t kDsEmpty = offsetof(Shared, ds_empty);
    static constexpr int kSharedBytes = sizeof(Shared);
    static_assert(kSharedBytes <= 232448, "");
};

struct AttentionBwdArguments {
    CUtensorMap q, dout, k, v;
    AttentionShape shape;
    AttentionTileOrder order;  // over blocks of keys, of each part of each key head
    int group;                 // query heads of a part
    AttentionOutput dk, dv;
    AttentionBwdWorkspace workspace;
    DqOrder dq_order;
};

#ifdef __CUDACC__

// The slot of a sequence's first block of queries. Documents start at multiples of BlockM, at no more than one block's
// distance beyond their number.
template <int BlockM>
__device__ __forceinline__ int64_t first_slot(const AttentionShape& shape, const AttentionBwdWorkspace& workspace,
                                              const AttentionTile& tile, int head) {
    if (shape.cu_seqlens) return head * workspace.slots_per_head + (tile.q_row + tile.batch * BlockM) / BlockM;
    return (int64_t(tile.batch) * shape.heads + head) * workspace.slots_per_head;
}

// The slot of a block of keys; `part` counts the parts of all key heads.
template <int BlockN>
__device__ __forceinline__ int64_t key_slot(const AttentionShape& shape, const AttentionBwdWorkspace& workspace,
                                            const AttentionTile& tile, int part) {
    const int64_t parts = shape.cu_seqlens ? part : int64_t(tile.batch) * shape.kv_heads * workspace.splits + part;
    const int64_t first = shape.cu_seqlens ? (tile.k_row + tile.batch * BlockN) / BlockN : 0;
    return parts * workspace.key_slots_per_head + first + tile.block;
}

// Blocks of queries that see any key of this block.
template <int BlockM, int BlockN>
__device__ __forceinline__ BlockRange query_blocks(const AttentionShape& shape, const AttentionTile& tile) {
    const int offset = tile.k_len - tile.q_len;
    const int first_key = tile.block * BlockN;
    const int last_key = min(first_key + BlockN, tile.k_len) - 1;
    const int first = max(0, first_key - shape.right - offset);
    const int last = min(tile.q_len - 1, last_key + shape.left - offset);
    if (last < first || last_key < tile.key_start) return {0, 0};
    return {first / BlockM, last / BlockM + 1};
}

// Blocks of keys that see a block of queries: those that add to its dq.
template <int BlockM, int BlockN>
__device__ __forceinline__ BlockRange adding_blocks(const AttentionShape& shape, const AttentionTile& tile, int m) {
    const int first = visible_keys(shape, tile, m * BlockM).first;
    const int last = visible_keys(shape, tile, min((m + 1) * BlockM, tile.q_len) - 1).last;
    if (last < 0 || min((last / BlockN + 1) * BlockN, tile.k_len) <= tile.key_start) return {0, 0};
    return {first / BlockN, last / BlockN + 1};
}

// How many blocks of keys add to a block of dq before this one; -1 where the order is not fixed.
template <int HeadDim>
__device__ __forceinline__ int adding_before(const AttentionBwdArguments& args, const AttentionTile& tile, int m) {
    using Block = AttentionBwdBlock<HeadDim>;
    if (args.dq_order == DqOrder::kAny) return -1;
    const BlockRange adding = adding_blocks<Block::kBlockM, Block::kBlockN>(args.shape, tile, m);
    return args.dq_order == DqOrder::kAscending ? tile.block - adding.begin : adding.end - 1 - tile.block;
}

// Queries that see a key, first ... last, both included; `last` may be before the sequence's first query.
__device__ __forceinline__ KeyRange visible_queries(const AttentionShape& shape, const AttentionTile& tile, int key) {
    const int diagonal = key - (tile.k_len - tile.q_len);
    const bool any = key >= tile.key_start && key < tile.k_len;
    return {any ? diagonal - shape.right : kUnbounded, min(tile.q_len - 1, diagonal + shape.left)};
}

#endif  // __CUDACC__
