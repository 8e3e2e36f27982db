// What the three kernels of the backward pass share: tile sizes and the workspace between them.
#pragma once
#include "attention/attention_tile.cuh"

// A CTA of the main kernel owns kBlockN keys and loops over blocks of kBlockM queries. Of dq each of its two warpgroups
// computes 64 rows by kDqColumns columns: half of the rows, or half of the columns.
template <int HeadDim>  // 64, 128 or 256: what smaller heads are padded to
struct AttentionBwdBlock {
    static constexpr int kBlockM = HeadDim == 64 ? 128 : 64;
    static constexpr int kBlockN = HeadDim == 256 ? 64 : 128;
    static constexpr bool kSplitDqRows = kBlockM == 128;
    static constexpr int kDqColumns = kSplitDqRows ? HeadDim : HeadDim / 2;
};

// Blocks of queries have slots in the workspace: of each query head of each sequence, one after the other.
struct AttentionBwdWorkspace {
    int64_t slots_per_head;  // of one batch entry; of all documents with cu_seqlens
    int* tile_counter;
    int* added;        // (slots,): how many blocks of keys have added to dq, when their order is fixed
    float* minus_lse;  // (slots, kBlockM), base 2; -inf where there is no query or it sees no key
    float* delta;      // (slots, kBlockM): row sums of out * dout
    float* dq;         // (slots, kBlockM * HeadDim), float32, in the order of the accumulator registers
};

template <int HeadDim>
int64_t attention_bwd_workspace(const AttentionShape& shape, void* base, AttentionBwdWorkspace* workspace) {
    constexpr int kBlockM = AttentionBwdBlock<HeadDim>::kBlockM;
    const int64_t blocks = (int64_t(shape.q_len) + kBlockM - 1) / kBlockM;
    workspace->slots_per_head = shape.cu_seqlens ? shape.q_len / kBlockM + shape.batch : blocks;
    const int64_t slots = workspace->slots_per_head * shape.heads * (shape.cu_seqlens ? 1 : shape.batch);
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
    workspace->dq = reinterpret_cast<float*>(take(slots * kBlockM * HeadDim * sizeof(float)));
    return at - static_cast<char*>(base);
}

#ifdef __CUDACC__

// The slot of a sequence's first block of queries. Documents start at multiples of BlockM, at no more than one block's
// distance beyond their number.
template <int BlockM>
__device__ __forceinline__ int64_t first_slot(const AttentionShape& shape, const AttentionBwdWorkspace& workspace,
                                              const AttentionTile& tile, int head) {
    if (shape.cu_seqlens) return head * workspace.slots_per_head + (tile.q_row + tile.batch * BlockM) / BlockM;
    return (int64_t(tile.batch) * shape.heads + head) * workspace.slots_per_head;
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

// Queries that see a key, first ... last, both included; `last` may be before the sequence's first query.
__device__ __forceinline__ KeyRange visible_queries(const AttentionShape& shape, const AttentionTile& tile, int key) {
    const int diagonal = key - (tile.k_len - tile.q_len);
    const bool any = key >= tile.key_start && key < tile.k_len;
    return {any ? diagonal - shape.right : kUnbounded, min(tile.q_len - 1, diagonal + shape.left)};
}

#endif  // __CUDACC__
