// What forward and backward share: which tile a CTA works on next, and which keys its rows see.
#pragma once
#include <algorithm>

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
    int blocks;  // of one head of one batch entry, or of all documents: no fewer than there are
    int section_heads;
    bool from_last_block;
    bool of_keys;   // whether the rows are keys
    int64_t tiles;  // no fewer than there are
};

inline AttentionTileOrder attention_tile_order(const AttentionShape& shape, int heads, int rows, int block_rows,
                                               bool of_keys, int64_t bytes_per_head = 0, bool from_last_block = false) {
    constexpr int64_t kL2Bytes = 32 << 20;
    const int blocks = shape.cu_seqlens ? rows / block_rows + shape.batch : int(ceil_div(rows, block_rows));
    const int64_t all_heads = (shape.cu_seqlens ? 1 : shape.batch) * int64_t(heads);
    const int64_t section = bytes_per_head ? kL2Bytes / bytes_per_head : all_heads;
    return {heads, blocks, int(std::clamp(section, int64_t(1), all_heads)), from_last_block, of_keys,
            all_heads * blocks};
}

// (head_dim, rows, heads, batch), in boxes of one swizzled panel.
template <class T, int Panel>
CUtensorMap attention_tensor_map(const char* name, const AttentionTensor& tensor, const AttentionShape& shape,
                                 int heads, int rows, int box_rows) {
    const int batch = shape.cu_seqlens ? 1 : shape.batch;
    return encode_tensor_map<T>(
        name, tensor.data,
        {4,
         {cuuint64_t(shape.head_dim), cuuint64_t(rows), cuuint64_t(heads), cuuint64_t(batch)},
         {cuuint64_t(tensor.row_stride), cuuint64_t(tensor.head_stride), cuuint64_t(tensor.batch_stride)},
         {Panel, cuuint32_t(box_rows), 1, 1}});
}

// How tiles of 16-bit rows lie in shared memory: in panels as wide as the swizzle.
template <int HeadDim>
struct AttentionPanels {
    static constexpr int kPanel = HeadDim % 64 ? 32 : 64;  // columns
    static constexpr int kRowBytes = 2 * kPanel, kPanels = HeadDim / kPanel;
};

// Starts the copy of a tile of `Rows` rows into the panels at `to`.
template <int HeadDim, int Rows>
GK_DEVICE void load_panels(const char* to, const CUtensorMap* map, uint32_t barrier, int row, int head, int batch) {
    using Panels = AttentionPanels<HeadDim>;
#pragma unroll
    for (int p = 0; p < Panels::kPanels; ++p)
        tma_load_4d(shared_address(to) + p * Rows * Panels::kRowBytes, map, barrier, p * Panels::kPanel, row, head,
                    batch);
}

// scores = a * b, 64 rows by N, of tiles of `ARows` and `BRows` rows: one group.
template <class T, int HeadDim, int N, int ARows, int BRows>
GK_DEVICE void multiply_tiles(float (&scores)[N / 2], uint64_t a, uint64_t b) {
    using Panels = AttentionPanels<HeadDim>;
    wgmma_fence();
#pragma unroll
    for (int d = 0; d < HeadDim; d += 16) {
        const int panel = d / Panels::kPanel * Panels::kRowBytes, within = d % Panels::kPanel * 2;
        Wgmma<N, T, false, false>::multiply(scores, a + (panel * ARows + within >> 4),
                                            b + (panel * BRows + within >> 4), d > 0);
    }
    wgmma_commit();
}

// Where a document starts, and how many rows it has. Nobody has checked the bounds: wrong ones must not lead outside of
// the `limit` rows of all documents.
struct DocumentRows {
    int first, length;
};

GK_DEVICE DocumentRows document_rows(const int* cu_seqlens, int document, int limit) {
    const int first = min(max(cu_seqlens[document], 0), limit);
    return {first, max(min(cu_seqlens[document + 1], limit) - first, 0)};
}

// Writes the tile of this index to shared memory, and returns its block. Called by a whole warp, all of which sees it
// written. `BlockRows` rows of q, or of k, to a block.
template <int BlockRows>
GK_DEVICE int locate_tile(const AttentionShape& shape, const AttentionTileOrder& order, int index,
                          AttentionTile* tile) {
    const int lane = threadIdx.x % 32;
    int block = -1;
    if (shape.cu_seqlens) {
        const int unit = index / order.heads;
        const bool own_keys = shape.cu_seqlens_k != nullptr;
        const int* bounds = own_keys && order.of_keys ? shape.cu_seqlens_k : shape.cu_seqlens;
        const int limit = order.of_keys ? shape.k_len : shape.q_len;
        for (int base = 0, before = 0; base < shape.batch && block < 0; base += 32) {
            const int document = base + lane;
            const DocumentRows rows =
                document < shape.batch ? document_rows(bounds, document, limit) : DocumentRows{0, 0};
            const int blocks = (rows.length + BlockRows - 1) / BlockRows;
            int through = blocks;
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const int other = __shfl_up_sync(~0u, through, step);
                if (lane >= step) through += other;
            }
            const unsigned reached = __ballot_sync(~0u, unit < before + through);
            if (reached) {
                const int source = __ffs(reached) - 1, rank = unit - before - (through - blocks);
                block = order.from_last_block ? blocks - 1 - rank : rank;
                if (lane == source) {
                    const DocumentRows q =
                        own_keys && order.of_keys ? document_rows(shape.cu_seqlens, document, shape.q_len) : rows;
                    const DocumentRows k =
                        own_keys && !order.of_keys ? document_rows(shape.cu_seqlens_k, document, shape.k_len) : rows;
                    *tile = {document, index % order.heads, block, q.first, k.first, q.length, k.length, 0};
                }
                block = __shfl_sync(~0u, block, source);
            }
            before += __shfl_sync(~0u, through, 31);
        }
    } else {
        const int heads = shape.batch * order.heads;
        const int first_head = index / (order.section_heads * order.blocks) * order.section_heads;
        if (first_head < heads) {
            const int within = index - first_head * order.blocks;
            const int section_heads = min(order.section_heads, heads - first_head), rank = within / section_heads;
            const int head = first_head + within % section_heads, batch = head / order.heads;
            const int key_start = shape.key_start ? max(shape.key_start[batch], 0) : 0;
            block = order.from_last_block ? order.blocks - 1 - rank : rank;
            if (lane == 0) *tile = {batch, head % order.heads, block, 0, 0, shape.q_len, shape.k_len, key_start};
        }
    }
    if (lane == 0 && block < 0) tile->block = -1;
    __syncwarp();
    return block;
}

// Of one thread of each CTA that is out of tiles: the last of them leaves the counter as the next launch expects it.
// counter: (2,), the tiles that were taken and the CTAs that are done.
GK_DEVICE void leave_tile_counter(int* counter) {
    __threadfence();
    if (atomicAdd(counter + 1, 1) != gridDim.x - 1) return;
    __threadfence();
    counter[0] = counter[1] = 0;
}

// Keys first ... last, both visible; empty when last < first.
struct KeyRange {
    int first, last;
};

GK_DEVICE KeyRange visible_keys(const AttentionShape& shape, const AttentionTile& tile, int query) {
    const int diagonal = query + tile.k_len - tile.q_len;
    return {max(tile.key_start, diagonal - shape.left), min(tile.k_len - 1, diagonal + shape.right)};
}

// Half-open ranges of blocks.
struct BlockRange {
    int begin, end;
};

// Blocks of keys that any of `count` queries sees.
template <int BlockN>
GK_DEVICE BlockRange key_blocks(const AttentionShape& shape, const AttentionTile& tile, int query, int count) {
    const int first = visible_keys(shape, tile, query).first;
    const int last = visible_keys(shape, tile, min(query + count, tile.q_len) - 1).last;
    return last < first ? BlockRange{0, 0} : BlockRange{first / BlockN, last / BlockN + 1};
}

// The lowest `count` bits, 0 ... 32 of them for any count.
GK_DEVICE uint32_t lowest_bits(int count) { return count <= 0 ? 0u : count >= 32 ? ~0u : (1u << count) - 1; }

// Sets scores of a thread's row (h = 0 or 1) outside columns low ... high to -inf; its columns are 8 i + {0, 1}. Which
// to keep is worked out for 32 scores at once, as bits that the compiler moves to predicates, seven at a time.
template <int R>
GK_DEVICE void mask_row(float (&s)[R], int h, int low, int high) {
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

// Where 16-bit rows go: through a map in boxes of 16, or, where a document ends between them, without.
struct AttentionOutput {
    CUtensorMap map;
    AttentionTensor tensor;
};

// A row of a tile's head.
template <class T>
GK_DEVICE T* row_of(const AttentionTensor& tensor, const AttentionShape& shape, const AttentionTile& tile, int row) {
    return static_cast<T*>(tensor.data) + (shape.cu_seqlens ? 0 : tile.batch * tensor.batch_stride) +
           tile.head * tensor.head_stride + row * tensor.row_stride;
}

// A warp's 16 rows of a tile, 2 R columns from `column` on, on their way out: accumulators times their rows' factors go
// to `rows` in shared memory, in panels, and from there to the tensor's rows from `row` on, of which the sequence has
// `count`.
template <class T, int Panel, int R>
GK_DEVICE void store_warp_rows(const float (&x)[R], const float (&factor)[2], char* rows, const AttentionOutput& output,
                               const AttentionShape& shape, const AttentionTile& tile, int row, int count, int column) {
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
        stmatrix_x4((to ^ at(0, i / 4 % kPanelUnits)) + at(0, i / 4 / kPanelUnits * kPanelUnits), packed);
    }
    fence_async_proxy();
    __syncwarp();
    if (count >= 16 || !shape.cu_seqlens) {
        if (count > 0 && lane == 0) {
#pragma unroll
            for (int p = 0; p < 2 * R / Panel; ++p)
                tma_store_4d(&output.map, shared_address(rows) + p * 16 * kRowBytes, column + p * Panel, row, tile.head,
                             shape.cu_seqlens ? 0 : tile.batch);
        }
    } else {
        T* data = row_of<T>(output.tensor, shape, tile, row) + column;
#pragma unroll 1
        for (int i = 0; i < R / 8; ++i) {
            const int r = lane % 16, unit = 2 * i + lane / 16;
            if (r < count && column + 8 * unit < shape.head_dim)
                *reinterpret_cast<uint4*>(data + r * output.tensor.row_stride + 8 * unit) =
                    *reinterpret_cast<const uint4*>(rows + at(r, unit));
        }
    }
    bulk_commit();
}

// Clears a tile from row `from` on, all consumers together: what lies past a sequence's end belongs to the next, and a
// probability of 0 does not hide its NaNs.
template <int HeadDim, int Rows, int Consumers>
GK_DEVICE void clear_rows(char* tile, int from) {
    constexpr int kRowBytes = AttentionPanels<HeadDim>::kRowBytes, kStep = 16 * Consumers * kWarpgroup;
#pragma unroll 1
    for (int p = 0; p < AttentionPanels<HeadDim>::kPanels; ++p)
#pragma unroll 1
        for (int byte = from * kRowBytes + 16 * (threadIdx.x - kWarpgroup); byte < Rows * kRowBytes; byte += kStep)
            *reinterpret_cast<uint4*>(tile + p * Rows * kRowBytes + byte) = uint4{0, 0, 0, 0};
}
