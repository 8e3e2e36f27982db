// What the three kernels of the backward pass share: tile sizes and the workspace between them.
#pragma once
#include "attention/attention_bend.cuh"

// A CTA of the main kernel owns kBlockN keys and loops over blocks of kBlockM queries. Of dq each of its two warpgroups
// computes 64 rows by kDqColumns columns: half of the rows, or half of the columns.
template <int HeadDim>  // 64, 96, 128 or 256: what smaller heads are padded to
struct AttentionBwdTraits : AttentionPanels<HeadDim> {
    static constexpr int kBlockM = HeadDim == 64 ? 128 : 64;
    static constexpr int kBlockN = HeadDim == 256 ? 64 : 128;
    static constexpr bool kSplitDqRows = kBlockM == 128;
    static constexpr int kDqColumns = kSplitDqRows ? HeadDim : HeadDim == 96 ? 64 : HeadDim / 2;  // in whole panels
    static constexpr int kDqWidth = kSplitDqRows ? HeadDim : 2 * kDqColumns;
    static constexpr int kConsumers = 2;
    static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
    // 64 columns take 238 registers; where fewer do, the producer has those that it would spill without.
    static constexpr int kProducerRegisters = HeadDim == 64 ? 24 : 40;
    static constexpr int kConsumerRegisters = HeadDim == 64 ? 240 : 232;
    static constexpr int kStages = 2;
    // The two warpgroups share out the keys; or, where registers do not hold whole rows of dk and dv, their columns.
    // Then each computes the scores of half of the queries, and exponentials go through shared memory like dscores.
    static constexpr bool kSplitColumns = HeadDim == 256;
    static constexpr int kScoreColumns = kSplitColumns ? kBlockM / 2 : kBlockM;
    static constexpr int kGradientColumns = kSplitColumns ? HeadDim / 2 : HeadDim;
    // Whether dv multiplies while dscores are turned into gradients: both need the registers of a block of scores.
    static constexpr bool kDvFirst = HeadDim == 96 || HeadDim == 128;

    static constexpr int kKvBytes = 2 * kBlockN * HeadDim;
    static constexpr int kQBytes = 2 * kBlockM * HeadDim;
    static constexpr int kStatisticsBytes = 4 * kBlockM;
    static constexpr int kDsRowBytes = 128, kDsPanelBytes = kBlockN * kDsRowBytes;  // panels of 64 queries
    static constexpr int kDsBytes = 2 * kBlockM * kBlockN;
    // Whether dq goes out straight from registers, for want of shared memory, or through a warp of its own.
    static constexpr bool kDirectDq = kSplitColumns;
    static constexpr int kDqRegisters = kDqColumns / 2;
    static constexpr int kDqBytes = 4 * kWarpgroup * kDqRegisters;  // of one warpgroup
    static constexpr int kOutBytes = 64 * 2 * kGradientColumns;     // of one warpgroup

    struct Shared {
        alignas(1024) char k[kKvBytes];
        // Follows k: with 96 columns, dq's second half has 32 of these for the columns beyond, which nobody reads.
        char v[kKvBytes];
        char q[kStages][kQBytes];
        char dout[kStages][kQBytes];
        char ds[kDsBytes];
        // Exponentials, where columns are split; or rows on their way out, which else go over k and v.
        char exponentials_or_out[kSplitColumns ? kDsBytes : kConsumers * kOutBytes];
        char dq[kConsumers][kDirectDq ? 16 : kDqBytes];
        float lse[kStages][kBlockM], delta[kStages][kBlockM];
        AttentionTile tiles[2];
        uint64_t q_full[kStages], q_empty[kStages], dout_full[kStages], dout_empty[kStages];
        uint64_t dq_full[kConsumers], dq_empty[kConsumers];
        uint64_t tile_full[2], tile_empty[2];
        uint64_t kv_full[1], kv_empty[1], ds_empty[1];

        GK_DEVICE char* out(int group) { return (kSplitColumns ? k : exponentials_or_out) + group * kOutBytes; }
    };
    static_assert(sizeof(Shared) <= 232448, "");
};

// Blocks of queries have slots in the workspace: of each query head of each sequence, one after the other.
struct AttentionBwdWorkspace {
    int* tile_counter;
    int* added;        // (slots,): how many blocks of keys, or warps, have added to dq, where their order is fixed
    float* minus_lse;  // (slots, kBlockM), base 2; -inf where there is no query or it sees no key
    float* delta;      // (slots, kBlockM): row sums of out * dout, less dlse
    float* dq;         // (slots, kBlockM * kDqWidth), float32, in the order of the accumulator registers
    // The query heads that share a key head are worked on in so many parts, each with a share of dk and dv.
    int splits;
    // Blocks of keys have slots as well, of each part of each key head.
    float *dk_shares, *dv_shares;  // (key slots, kBlockN * HeadDim), as dq; null without splits
};

// As few as make two tiles for each SM, so that the longest of them are not what everybody waits for.
template <int HeadDim>
int query_head_splits(const AttentionShape& shape, int sm_count) {
    constexpr int kBlockN = AttentionBwdTraits<HeadDim>::kBlockN;
    const int group = shape.heads / shape.kv_heads;
    const int64_t blocks = shape.cu_seqlens ? shape.k_len / kBlockN + 1 : shape.batch * ceil_div(shape.k_len, kBlockN);
    int splits = 1;
    while (splits < group && (group % splits || blocks * shape.kv_heads * splits < 2 * int64_t(sm_count))) ++splits;
    return splits;
}

// Of all three kernels.
struct AttentionBwdArguments {
    AttentionBwdParams params;
    AttentionBwdWorkspace workspace;
    AttentionTileOrder query_order, key_order;  // over blocks of queries, and of keys of each key head
    AttentionTileOrder part_order;              // over blocks of keys, of each part of each key head
    int group;                                  // query heads of a part
    int first_tile;                             // that the main kernel's CTAs take from the counter
    CUtensorMap q, dout, k, v;
    AttentionOutput dk, dv;
    AttentionBend bend;
};

// All but the maps; the tensors are not looked at. Returns how many bytes the workspace has.
template <int HeadDim>
int64_t attention_bwd_plan(const AttentionBwdParams& params, AttentionBwdArguments* args) {
    using Traits = AttentionBwdTraits<HeadDim>;
    const AttentionShape& shape = params.shape;
    AttentionBwdWorkspace& workspace = args->workspace;
    workspace.splits = query_head_splits<HeadDim>(shape, params.sm_count);
    const int parts = shape.kv_heads * workspace.splits;
    args->params = params;
    args->group = shape.heads / parts;
    args->query_order = attention_tile_order(shape, shape.heads, shape.q_len, Traits::kBlockM, false);
    args->key_order = attention_tile_order(shape, shape.kv_heads, shape.k_len, Traits::kBlockN, true);
    // Queries, dout and float32 dq are what blocks of keys share.
    args->part_order = attention_tile_order(shape, parts, shape.k_len, Traits::kBlockN, true,
                                            int64_t(shape.q_len) * HeadDim * 8 * args->group);
    const int64_t slots = args->query_order.tiles, key_slots = workspace.splits == 1 ? 0 : args->part_order.tiles;
    int64_t bytes = 0;
    auto take = [&](auto*& array, int64_t count) {
        array =
            reinterpret_cast<std::remove_reference_t<decltype(array)>>(static_cast<char*>(params.workspace) + bytes);
        bytes += (count * sizeof(*array) + 255) / 256 * 256;
    };
    take(workspace.tile_counter, 1);
    take(workspace.added, slots);
    take(workspace.minus_lse, slots * Traits::kBlockM);
    take(workspace.delta, slots * Traits::kBlockM);
    take(workspace.dq, slots * Traits::kBlockM * Traits::kDqWidth);
    take(workspace.dk_shares, key_slots * Traits::kBlockN * HeadDim);
    take(workspace.dv_shares, key_slots * Traits::kBlockN * HeadDim);
    return bytes;
}

// The slot of the first block of a head's rows, which start at `row`. Documents start at multiples of BlockRows, at no
// more than one block's distance beyond their number.
template <int BlockRows>
GK_DEVICE int64_t first_slot(const AttentionShape& shape, const AttentionTileOrder& order, const AttentionTile& tile,
                             int head, int row) {
    if (shape.cu_seqlens) return int64_t(head) * order.blocks + (row + tile.batch * BlockRows) / BlockRows;
    return (int64_t(tile.batch) * order.heads + head) * order.blocks;
}

// Blocks of queries that see any key of this block.
template <int BlockM, int BlockN>
GK_DEVICE BlockRange query_blocks(const AttentionShape& shape, const AttentionTile& tile) {
    const int offset = tile.k_len - tile.q_len;
    const int first_key = tile.block * BlockN;
    const int last_key = min(first_key + BlockN, tile.k_len) - 1;
    const int first = max(0, first_key - shape.right - offset);
    const int last = min(tile.q_len - 1, last_key + shape.left - offset);
    if (last < first || last_key < tile.key_start) return {0, 0};
    return {first / BlockM, last / BlockM + 1};
}

// Calls work(head, block, its slot) for the blocks of queries that a tile of the main kernel meets. From the last to
// the first: blocks of keys add to dq in ascending order, and so a CTA rarely has to wait for the one before it, which
// has begun with queries that this one does not see, or with the same ones earlier.
template <int HeadDim, class Work>
GK_DEVICE void for_each_query_block(const AttentionBwdArguments& args, const AttentionTile& tile, Work work) {
    using Traits = AttentionBwdTraits<HeadDim>;
    const BlockRange blocks = query_blocks<Traits::kBlockM, Traits::kBlockN>(args.params.shape, tile);
#pragma unroll 1
    for (int head = tile.head * args.group; head < (tile.head + 1) * args.group; ++head) {
        const int64_t first = first_slot<Traits::kBlockM>(args.params.shape, args.query_order, tile, head, tile.q_row);
#pragma unroll 1
        for (int m = blocks.end - 1; m >= blocks.begin; --m) work(head, m, first + m);
    }
}

// Blocks of keys that see a block of queries: those that add to its dq.
template <int BlockM, int BlockN>
GK_DEVICE BlockRange adding_blocks(const AttentionShape& shape, const AttentionTile& tile, int m) {
    const int first = visible_keys(shape, tile, m * BlockM).first;
    const int last = visible_keys(shape, tile, min((m + 1) * BlockM, tile.q_len) - 1).last;
    if (last < 0 || min((last / BlockN + 1) * BlockN, tile.k_len) <= tile.key_start) return {0, 0};
    return {first / BlockN, last / BlockN + 1};
}

// How many blocks of keys add to a block of dq before this one; -1 where the order is not fixed.
template <int HeadDim>
GK_DEVICE int adding_before(const AttentionBwdArguments& args, const AttentionTile& tile, int m) {
    using Traits = AttentionBwdTraits<HeadDim>;
    if (!args.params.dq_in_order) return -1;
    return tile.block - adding_blocks<Traits::kBlockM, Traits::kBlockN>(args.params.shape, tile, m).begin;
}

// Calls put with each four registers of an accumulator and their place in `to`, where a warpgroup's accumulators lie in
// the order of their registers.
template <int R, class Put>
GK_DEVICE void put_accumulators(const float (&x)[R], void* to, Put put) {
    float4* at = static_cast<float4*>(to) + threadIdx.x % kWarpgroup;
#pragma unroll
    for (int i = 0; i < R; i += 4) put(at[i / 4 * kWarpgroup], float4{x[i], x[i + 1], x[i + 2], x[i + 3]});
}

template <int R>
GK_DEVICE void put_accumulators(const float (&x)[R], void* to) {
    put_accumulators(x, to, [](float4& at, float4 value) { at = value; });
}

// Queries that see a key, first ... last, both included; `last` may be before the sequence's first query.
GK_DEVICE KeyRange visible_queries(const AttentionShape& shape, const AttentionTile& tile, int key) {
    const int diagonal = key - (tile.k_len - tile.q_len);
    const bool any = key >= tile.key_start && key < tile.k_len;
    return {any ? diagonal - shape.right : kUnbounded, min(tile.q_len - 1, diagonal + shape.left)};
}
