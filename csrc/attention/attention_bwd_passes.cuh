// The passes before and after the backward pass's main kernel, and the launch of all three.
#pragma once
#include "attention/attention_bwd_kernel.cuh"
#include "common/vector.cuh"

struct AttentionBwdPassArguments {
    AttentionBwdParams params;
    AttentionTileOrder order, key_order;  // over blocks of queries, and of keys of each key head
    int query_blocks;                     // no fewer than there are
    AttentionBwdWorkspace workspace;
    int first_tile;  // that the main kernel's CTAs take from the counter
};

// A row of T of a tile's head.
template <class T, class Data>
__device__ __forceinline__ T* row_of(Data* data, const AttentionShape& shape, const AttentionTile& tile,
                                     const AttentionStrides& strides, int row) {
    return static_cast<T*>(data) + (shape.cu_seqlens ? 0 : tile.batch * strides.batch) + tile.head * strides.head +
           int64_t(row) * strides.row;
}

// One CTA to a block of queries: its statistics as the main kernel wants them, and zeros to add dq to. Where the order
// of the additions is fixed the first of them writes instead.
template <class T, int HeadDim>
__global__ void __launch_bounds__(256) attention_bwd_begin_kernel(const AttentionBwdPassArguments args) {
    constexpr int kBlockM = AttentionBwdBlock<HeadDim>::kBlockM;
    constexpr int kRowThreads = HeadDim == 96 ? 16 : HeadDim / 8;  // a power of two
    constexpr int kDqSize = kBlockM * AttentionBwdBlock<HeadDim>::kDqWidth;
    const AttentionBwdParams& params = args.params;
    const AttentionShape& shape = params.shape;
    __shared__ AttentionTile tile;
    let_dependents_start();
    if (threadIdx.x < 32) locate_tile<kBlockM>(shape, args.order, blockIdx.x, &tile);
    __syncthreads();
    if (blockIdx.x == 0 && threadIdx.x == 0) *args.workspace.tile_counter = args.first_tile;
    if (tile.block < 0) return;
    const int64_t slot = first_slot<kBlockM>(shape, args.workspace, tile, tile.head) + tile.block;
    if (threadIdx.x == 0) args.workspace.added[slot] = 0;
    const BlockRange adding = adding_blocks<kBlockM, AttentionBwdBlock<HeadDim>::kBlockN>(shape, tile, tile.block);
    if (params.dq_order == DqOrder::kAny || adding.begin == adding.end) {
        float4* dq = reinterpret_cast<float4*>(args.workspace.dq + slot * kDqSize);
        for (int i = threadIdx.x; i < kDqSize / 4; i += blockDim.x) dq[i] = float4{0.f, 0.f, 0.f, 0.f};
    }

    const int column = threadIdx.x % kRowThreads * 8;
    const int64_t first_lse = shape.cu_seqlens ? int64_t(tile.head) * shape.q_len + tile.q_row
                                               : (int64_t(tile.batch) * shape.heads + tile.head) * shape.q_len;
#pragma unroll 1  // few registers: an SM takes as many CTAs as it has threads for, which hides the loads better
    for (int i = threadIdx.x / kRowThreads; i < kBlockM; i += blockDim.x / kRowThreads) {
        const int row = tile.block * kBlockM + i;
        const float lse = column == 0 && row < tile.q_len ? params.lse[first_lse + row] : -INFINITY;
        float delta = 0.f;
        if (row < tile.q_len && column < shape.head_dim) {
            const T* out = row_of<const T>(params.out, shape, tile, params.out_strides, tile.q_row + row) + column;
            const T* dout = row_of<const T>(params.dout, shape, tile, params.dout_strides, tile.q_row + row) + column;
            const uint4 a = *reinterpret_cast<const uint4*>(out), b = *reinterpret_cast<const uint4*>(dout);
#pragma unroll
            for (int j = 0; j < 8; ++j)
                delta += to_float(reinterpret_cast<const T*>(&a)[j]) * to_float(reinterpret_cast<const T*>(&b)[j]);
        }
#pragma unroll
        for (int step = kRowThreads / 2; step; step /= 2) delta += __shfl_xor_sync(~0u, delta, step);
        if (column == 0) {
            args.workspace.delta[slot * kBlockM + i] = delta;
            args.workspace.minus_lse[slot * kBlockM + i] = lse == -INFINITY ? -INFINITY : -1.44269504088896f * lse;
        }
    }
}

// A block of `Rows` rows by `Width` columns from the main kernel's accumulator order to rows of T, as a sum of `shares`
// that are `apart` floats apart. Its two warpgroups hold half of the rows each, or half of the columns.
template <class T, int Width, int Rows>
__device__ __forceinline__ void store_block(const float* from, int shares, int64_t apart, float factor, T* to,
                                            int64_t row_stride, int row_count, int head_dim, char* rows) {
    constexpr bool kSplitRows = Rows == 128;
    constexpr int kColumns = kSplitRows ? Width : Width / 2;
    constexpr int kPitch = 2 * kColumns + 16;
    constexpr int kUnits = kColumns / 8;  // of 16 bytes, in a row
    const int group = threadIdx.x / kWarpgroup, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float4* sources =
        reinterpret_cast<const float4*>(from + group * (Rows * Width / 2)) + threadIdx.x % kWarpgroup;
    rows += warp * 16 * kPitch;
#pragma unroll
    for (int i = 0; i < kColumns / 8; i += 2) {
        uint32_t packed[4];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            float4 x = sources[(i + j) * kWarpgroup];
#pragma unroll 1
            for (int share = 1; share < shares; ++share) {
                const float4 other = sources[share * apart / 4 + (i + j) * kWarpgroup];
                x = {x.x + other.x, x.y + other.y, x.z + other.z, x.w + other.w};
            }
            packed[2 * j] = pack<T>(x.x * factor, x.y * factor);
            packed[2 * j + 1] = pack<T>(x.z * factor, x.w * factor);
        }
        stmatrix_x4(shared_address(rows) + lane % 16 * kPitch + lane / 16 * 16 + i * 16, packed[0], packed[1],
                    packed[2], packed[3]);
    }
    __syncwarp();
    const int first_row = warp % 4 * 16 + (kSplitRows ? 64 * group : 0);
    const int first_column = kSplitRows ? 0 : kColumns * group;
#pragma unroll
    for (int i = lane; i < 16 * kUnits; i += 32) {
        const int row = first_row + i / kUnits, column = first_column + i % kUnits * 8;
        if (row < row_count && column < head_dim)
            *reinterpret_cast<uint4*>(to + row * row_stride + column) =
                *reinterpret_cast<const uint4*>(rows + i / kUnits * kPitch + i % kUnits * 16);
    }
}

// One CTA to a block of queries, for dq; then, if they have shares, one to a block of keys for dk and one for dv.
template <class T, int HeadDim>
__global__ void __launch_bounds__(256) attention_bwd_end_kernel(const AttentionBwdPassArguments args) {
    constexpr int kBlockM = AttentionBwdBlock<HeadDim>::kBlockM, kBlockN = AttentionBwdBlock<HeadDim>::kBlockN;
    const AttentionBwdParams& params = args.params;
    const AttentionShape& shape = params.shape;
    const AttentionBwdWorkspace& workspace = args.workspace;
    __shared__ AttentionTile tile;
    __shared__ __align__(16) char rows[8 * 16 * (2 * (HeadDim == 64 ? 64 : 128) + 16)];
    const int key_index = int(blockIdx.x) - args.query_blocks;
    if (threadIdx.x < 32) {
        if (key_index < 0)
            locate_tile<kBlockM>(shape, args.order, blockIdx.x, &tile);
        else
            locate_tile<kBlockN>(shape, args.key_order, key_index / 2, &tile);
    }
    __syncthreads();
    wait_for_prerequisite();
    if (tile.block < 0) return;
    if (key_index < 0) {
        const int64_t slot = first_slot<kBlockM>(shape, workspace, tile, tile.head) + tile.block;
        const int row = tile.block * kBlockM;
        constexpr int kWidth = AttentionBwdBlock<HeadDim>::kDqWidth;
        store_block<T, kWidth, kBlockM>(
            workspace.dq + slot * (kBlockM * kWidth), 1, 0, shape.scale,
            row_of<T>(params.dq, shape, tile, params.dq_strides, tile.q_row + row), params.dq_strides.row,
            tile.q_len - row, shape.head_dim, rows);
    } else {
        const bool is_dk = key_index % 2;
        const AttentionStrides& strides = is_dk ? params.dk_strides : params.dv_strides;
        constexpr int64_t kSize = kBlockN * HeadDim;
        const int64_t slot = key_slot<kBlockN>(shape, workspace, tile, tile.head * workspace.splits);
        const int row = tile.block * kBlockN;
        store_block<T, HeadDim, kBlockN>(
            (is_dk ? workspace.dk_shares : workspace.dv_shares) + slot * kSize, workspace.splits,
            workspace.key_slots_per_head * kSize, is_dk ? shape.scale : 1.f,
            row_of<T>(is_dk ? params.dk : params.dv, shape, tile, strides, tile.k_row + row),
            strides.row, tile.k_len - row, shape.head_dim, rows);
    }
}

template <class T, int HeadDim>
void attention_bwd_launch(const AttentionBwdParams& params, cudaStream_t stream) {
    using Traits = AttentionBwdTraits<HeadDim>;
    const AttentionShape& shape = params.shape;
    AttentionBwdPassArguments pass;
    pass.params = params;
    pass.order = attention_tile_order(shape, shape.heads, shape.q_len, Traits::kBlockM, 0, false);
    attention_bwd_workspace<HeadDim>(shape, params.sm_count, params.workspace, &pass.workspace);
    const int parts = shape.kv_heads * pass.workspace.splits;
    pass.key_order = attention_tile_order(shape, shape.kv_heads, shape.k_len, Traits::kBlockN, 0, false);
    bind_device();
    AttentionBwdArguments args;
    auto map = [&](const char* tensor, const void* data, const AttentionStrides& strides, int heads, int rows,
                   int box) {
        return attention_tensor_map<T>(tensor, data, strides, shape, heads, rows, Traits::kPanel, box);
    };
    args.q = map("q", params.q, params.q_strides, shape.heads, shape.q_len, Traits::kBlockM);
    args.dout = map("dout", params.dout, params.dout_strides, shape.heads, shape.q_len, Traits::kBlockM);
    args.k = map("k", params.k, params.k_strides, shape.kv_heads, shape.k_len, Traits::kBlockN);
    args.v = map("v", params.v, params.v_strides, shape.kv_heads, shape.k_len, Traits::kBlockN);
    args.shape = shape;
    // Queries, dout and float32 dq are what blocks of keys share.
    args.group = shape.heads / parts;
    args.order =
        attention_tile_order(shape, parts, shape.k_len, Traits::kBlockN,
                             int64_t(shape.q_len) * HeadDim * 8 * args.group, params.dq_order == DqOrder::kDescending);
    auto output = [&](const char* tensor, void* data, const AttentionStrides& strides) {
        return AttentionOutput{map(tensor, data, strides, shape.kv_heads, shape.k_len, 16), data, strides};
    };
    args.dk = output("dk", params.dk, params.dk_strides);
    args.dv = output("dv", params.dv, params.dv_strides);
    args.workspace = pass.workspace;
    args.dq_order = params.dq_order;

    pass.query_blocks = attention_tile_count(shape, pass.order, shape.q_len, Traits::kBlockM);
    const int64_t tiles = attention_tile_count(shape, args.order, shape.k_len, Traits::kBlockN);
    const unsigned ctas = unsigned(tiles < params.sm_count ? tiles : params.sm_count);
    pass.first_tile = params.dq_order == DqOrder::kAny ? ctas : 0;
    const unsigned query_blocks = pass.query_blocks;
    const unsigned key_blocks = attention_tile_count(shape, pass.key_order, shape.k_len, Traits::kBlockN);
    const unsigned last_ctas = query_blocks + (pass.workspace.splits > 1 ? 2 * key_blocks : 0);
    launch<attention_bwd_begin_kernel<T, HeadDim>>("attention_bwd_begin_kernel", {query_blocks, 256, 0, stream}, pass);
    launch<attention_bwd_kernel<T, HeadDim>>("attention_bwd_kernel",
                                             {ctas, Traits::kThreads, Traits::kSharedBytes, stream, true}, args);
    launch<attention_bwd_end_kernel<T, HeadDim>>("attention_bwd_end_kernel", {last_ctas, 256, 0, stream, true}, pass);
}
