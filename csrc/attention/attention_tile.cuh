// What forward and backward share: which tile a CTA works on next, and which keys its rows see.
#pragma once
#include <cstddef>

#include "attention/attention.h"
#include "common/hopper.cuh"
#include "common/tensor_map.h"

// A block of rows (queries in the forward pass, keys in the backward) of one head of one sequence.
struct __align__(16) AttentionTile {
    int batch, head, block;  // block < 0: there are no more tiles
    int q_row, k_row;        // where the sequence starts, in rows of q and of k
    int q_len, k_len;
    int key_start;
};

// Longest tiles first, unless their order is fixed, in sections of as many heads as fit the L2 cache together.
struct AttentionTileOrder {
    int heads;   // heads whose rows are cut into blocks: query heads forward, key heads backward
    int blocks;  // per head; unused with cu_seqlens
    int section_heads;
    bool from_last_block;
};

inline AttentionTileOrder attention_tile_order(const AttentionShape& shape, int heads, int rows, int block_rows,
                                               int64_t bytes_per_head, bool from_last_block) {
    constexpr int64_t kL2Bytes = 32 << 20;
    int64_t section = kL2Bytes / (bytes_per_head ? bytes_per_head : 1);
    section = section < 1 ? 1 : section > shape.batch * int64_t(heads) ? shape.batch * int64_t(heads) : section;
    return {heads, (rows + block_rows - 1) / block_rows, int(section), from_last_block};
}

// No fewer than there are.
inline int64_t attention_tile_count(const AttentionShape& shape, const AttentionTileOrder& order, int rows,
                                    int block_rows) {
    return int64_t(order.heads) *
           (shape.cu_seqlens ? rows / block_rows + int64_t(shape.batch) : shape.batch * int64_t(order.blocks));
}

// (head_dim, rows, heads, batch), in boxes of one swizzled panel.
template <class T>
CUtensorMap attention_tensor_map(const char* tensor, const void* data, const AttentionStrides& strides,
                                 const AttentionShape& shape, int heads, int rows, int panel, int box_rows) {
    const int batch = shape.cu_seqlens ? 1 : shape.batch;
    // A dimension of one entry may have any stride in torch; the driver wants a multiple of 16 bytes.
    auto bytes = [&](int64_t stride, int entries) { return cuuint64_t(entries > 1 ? 2 * stride : 16); };
    return encode_tensor_map<T>(tensor, data,
                                {4,
                                 {cuuint64_t(shape.head_dim), cuuint64_t(rows), cuuint64_t(heads), cuuint64_t(batch)},
                                 {bytes(strides.row, rows), bytes(strides.head, heads), bytes(strides.batch, batch)},
                                 {cuuint32_t(panel), cuuint32_t(box_rows), 1, 1}});
}

#ifdef __CUDACC__

// Writes the tile of this index to shared memory, and returns its block. Called by a whole warp, all of which sees it
// written. `BlockRows` rows of q, or of k, to a block.
template <int BlockRows>
__device__ __forceinline__ int locate_tile(const AttentionShape& shape, const AttentionTileOrder& order, int index,
                                           AttentionTile* tile) {
    const int lane = threadIdx.x % 32;
    if (shape.cu_seqlens) {
        const int unit = index / order.heads;
        int before = 0;
        for (int base = 0; base < shape.batch; base += 32) {
            const int document = base + lane;
            // Bounds that nobody has checked: wrong ones must not lead outside of the rows.
            const int first = document < shape.batch ? min(max(shape.cu_seqlens[document], 0), shape.k_len) : 0;
            const int end = document < shape.batch ? min(shape.cu_seqlens[document + 1], shape.k_len) : 0;
            const int length = max(end - first, 0);
            const int blocks = (length + BlockRows - 1) / BlockRows;
            int through = blocks;
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const int other = __shfl_up_sync(~0u, through, step);
                if (lane >= step) through += other;
            }
            const unsigned reached = __ballot_sync(~0u, unit < before + through);
            if (reached) {
                const int source = __ffs(reached) - 1;
                const int rank = unit - before - (through - blocks);
                const int block = order.from_last_block ? blocks - 1 - rank : rank;
                if (lane == source) *tile = {document, index % order.heads, block, first, first, length, length, 0};
                __syncwarp();
                return __shfl_sync(~0u, block, source);
            }
            before += __shfl_sync(~0u, through, 31);
        }
        if (lane == 0) tile->block = -1;
        __syncwarp();
        return -1;
    }
    const int heads = shape.batch * order.heads;
    const int first_head = index / (order.section_heads * order.blocks) * order.section_heads;
    if (first_head >= heads) {
        if (lane == 0) tile->block = -1;
        __syncwarp();
        return -1;
    }
    const int within = index - first_head * order.blocks;
    const int section_heads = min(order.section_heads, heads - first_head);
    const int rank = within / section_heads;
    const int head = first_head + within % section_heads;
    const int batch = head / order.heads;
    const int block = order.from_last_block ? order.blocks - 1 - rank : rank;
    const int key_start = shape.key_start ? max(shape.key_start[batch], 0) : 0;
    if (lane == 0) *tile = {batch, head % order.heads, block, 0, 0, shape.q_len, shape.k_len, key_start};
    __syncwarp();
    return block;
}

// Of one thread of each CTA that is out of tiles: the last of them leaves the counter as the next launch expects it.
// counter: (2,), the tiles that were taken and the CTAs that are done.
__device__ __forceinline__ void leave_tile_counter(int* counter) {
    __threadfence();
    if (atomicAdd(counter + 1, 1) != gridDim.x - 1) return;
    __threadfence();
    counter[0] = counter[1] = 0;
}

// Keys first ... last, both visible; empty when last < first.
struct KeyRange {
    int first, last;
};

__device__ __forceinline__ KeyRange visible_keys(const AttentionShape& shape, const AttentionTile& tile, int query) {
    const int diagonal = query + tile.k_len - tile.q_len;
    return {max(tile.key_start, diagonal - shape.left), min(tile.k_len - 1, diagonal + shape.right)};
}

// Half-open ranges of blocks.
struct BlockRange {
    int begin, end;
};

// Blocks of keys that any of `count` queries sees.
template <int BlockN>
__device__ __forceinline__ BlockRange key_blocks(const AttentionShape& shape, const AttentionTile& tile, int query,
                                                 int count) {
    const int first = visible_keys(shape, tile, query).first;
    const int last = visible_keys(shape, tile, min(query + count, tile.q_len) - 1).last;
    return last < first ? BlockRange{0, 0} : BlockRange{first / BlockN, last / BlockN + 1};
}

// The lowest `count` bits, 0 ... 32 of them for any count.
__device__ __forceinline__ uint32_t lowest_bits(int count) {
    return count <= 0 ? 0u : count >= 32 ? ~0u : (1u << count) - 1;
}

// Sets scores of a thread's row (h = 0 or 1) outside columns low ... high to -inf; its columns are 8 i + {0, 1}. Which
// to keep is worked out for 32 scores at once, as bits that the compiler moves to predicates, seven at a time.
template <int R>
__device__ __forceinline__ void mask_row(float (&s)[R], int h, int low, int high) {
    // How many of the row's scores stand in columns below this one.
    auto scores_below = [](int column) { return column <= 0 ? 0 : column / 8 * 2 + min(column % 8, 2); };
    const int first = scores_below(low), end = scores_below(high + 1);
#pragma unroll
    for (int word = 0; word < R / 2; word += 32) {
        const uint32_t keep = lowest_bits(end - word) & ~lowest_bits(first - word);
#pragma unroll
        for (int j = 0; j < 32 && word + j < R / 2; ++j) {
            float& score = s[(word + j) / 2 * 4 + 2 * h + j % 2];
            score = keep & 1u << j ? score : -INFINITY;
        }
    }
}

// Where 16-bit rows go: through a map in boxes of 16, or, where a document ends between them, to `data`.
struct AttentionOutput {
    CUtensorMap map;
    void* data;
    AttentionStrides strides;
};

// A warp's 16 rows of a tile, 2 R columns from `column` on, on their way out: accumulators times their rows' factors go
// to `rows` in shared memory, in panels, and from there to the tensor's rows from `row` on, of which the sequence has
// `count`.
template <class T, int Panel, int R>
__device__ __forceinline__ void store_warp_rows(const float (&x)[R], const float (&factor)[2], char* rows,
                                                const AttentionOutput& output, const AttentionShape& shape,
                                                const AttentionTile& tile, int row, int count, int column) {
    constexpr int kRowBytes = 2 * Panel, kPanelUnits = Panel / 8;  // units of 16 bytes
    const int lane = threadIdx.x % 32;
    // A row's units are swizzled by the 128 bytes that it lies in.
    auto at = [](int row, int unit) {
        return unit / kPanelUnits * 16 * kRowBytes + row * kRowBytes +
               ((unit ^ row * kRowBytes / 128) % kPanelUnits << 4);
    };
    const uint32_t to = shared_address(rows) + at(lane % 16, lane / 16);
#pragma unroll
    for (int i = 0; i < R; i += 8) {
        uint32_t packed[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) packed[j] = pack<T>(x[i + 2 * j] * factor[j % 2], x[i + 2 * j + 1] * factor[j % 2]);
        stmatrix_x4((to ^ at(0, i / 4 % kPanelUnits)) + at(0, i / 4 / kPanelUnits * kPanelUnits), packed[0], packed[1],
                    packed[2], packed[3]);
    }
    fence_async_proxy();
    __syncwarp();
    const int batch = shape.cu_seqlens ? 0 : tile.batch;
    if (count >= 16 || !shape.cu_seqlens) {
        if (count > 0 && lane == 0) {
#pragma unroll
            for (int p = 0; p < 2 * R / Panel; ++p)
                tma_store_4d(&output.map, shared_address(rows) + p * 16 * kRowBytes, column + p * Panel, row, tile.head,
                             batch);
        }
    } else {
        T* data = static_cast<T*>(output.data) + batch * output.strides.batch + tile.head * output.strides.head +
                  row * output.strides.row + column;
#pragma unroll 1
        for (int i = 0; i < R / 8; ++i) {
            const int r = lane % 16, unit = 2 * i + lane / 16;
            if (r < count && column + 8 * unit < shape.head_dim)
                *reinterpret_cast<uint4*>(data + r * output.strides.row + 8 * unit) =
                    *reinterpret_cast<const uint4*>(rows + at(r, unit));
        }
    }
    bulk_commit();
}

// Clears a tile from row `from` on, `threads` threads together: what lies past a sequence's end belongs to the next,
// and a probability of 0 does not hide its NaNs.
template <int Panels, int Rows, int RowBytes>
__device__ __forceinline__ void clear_rows(char* tile, int from, int thread, int threads) {
#pragma unroll 1
    for (int p = 0; p < Panels; ++p)
#pragma unroll 1
        for (int byte = from * RowBytes + 16 * thread; byte < Rows * RowBytes; byte += 16 * threads)
            *reinterpret_cast<uint4*>(tile + p * Rows * RowBytes + byte) = uint4{0, 0, 0, 0};
}

#endif  // __CUDACC__
