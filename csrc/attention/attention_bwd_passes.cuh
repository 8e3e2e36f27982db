// The passes before and after the backward pass's main kernel, and the launch of all three.
#pragma once
#include "attention/attention_bwd_kernel.cuh"
#include "common/vector.cuh"

// One CTA to a block of queries: its statistics as the main kernel wants them, and zeros to add dq to. Where the order
// of the additions is fixed the first of them writes instead.
template <class T, int HeadDim>
__global__ void __launch_bounds__(256) attention_bwd_begin_kernel(const AttentionBwdArguments args) {
    using Traits = AttentionBwdTraits<HeadDim>;
    constexpr int kBlockM = Traits::kBlockM;
    constexpr int kRowThreads = HeadDim == 96 ? 16 : HeadDim / 8;  // a power of two
    constexpr int kDqSize = kBlockM * Traits::kDqWidth;
    const AttentionBwdParams& params = args.params;
    const AttentionShape& shape = params.shape;
    __shared__ AttentionTile tile;
    let_dependents_start();
    if (threadIdx.x < 32) locate_tile<kBlockM>(shape, args.query_order, blockIdx.x, &tile);
    __syncthreads();
    if (blockIdx.x == 0 && threadIdx.x == 0) *args.workspace.tile_counter = args.first_tile;
    if (tile.block < 0) return;
    const int64_t slot = first_slot<kBlockM>(shape, args.query_order, tile, tile.head, tile.q_row) + tile.block;
    if (threadIdx.x == 0) args.workspace.added[slot] = 0;
    const BlockRange adding = adding_blocks<kBlockM, Traits::kBlockN>(shape, tile, tile.block);
    if (!params.dq_in_order || adding.begin == adding.end) {
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
            const T* out = row_of<const T>(params.out, shape, tile, tile.q_row + row) + column;
            const T* dout = row_of<const T>(params.dout, shape, tile, tile.q_row + row) + column;
            const Packed<T> a = load_packed<true>(out, 0, kElements), b = load_packed<true>(dout, 0, kElements);
#pragma unroll
            for (int j = 0; j < kElements; ++j) delta += a[j] * b[j];
        }
#pragma unroll
        for (int step = kRowThreads / 2; step; step /= 2) delta += __shfl_xor_sync(~0u, delta, step);
        if (column == 0) {
            if (params.dlse && row < tile.q_len) delta -= params.dlse[first_lse + row];
            if (params.delta && row < tile.q_len) params.delta[first_lse + row] = delta;
            args.workspace.delta[slot * kBlockM + i] = delta;
            args.workspace.minus_lse[slot * kBlockM + i] = lse == -INFINITY ? -INFINITY : -kLog2E * lse;
        }
    }
}

// A block of `Rows` rows by `Width` columns from the main kernel's accumulator order to rows of T, as a sum of `shares`
// that are `apart` floats apart. Its two warpgroups hold half of the rows each, or half of the columns.
template <class T, int Width, int Rows>
GK_DEVICE void store_block(const float* from, int shares, int64_t apart, float factor, T* to, int64_t row_stride,
                           int row_count, int head_dim, char* rows) {
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
        stmatrix_x4(shared_address(rows) + lane % 16 * kPitch + lane / 16 * 16 + i * 16, packed);
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
__global__ void __launch_bounds__(256) attention_bwd_end_kernel(const AttentionBwdArguments args) {
    using Traits = AttentionBwdTraits<HeadDim>;
    constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN, kWidth = Traits::kDqWidth;
    const AttentionBwdParams& params = args.params;
    const AttentionShape& shape = params.shape;
    const AttentionBwdWorkspace& workspace = args.workspace;
    __shared__ AttentionTile tile;
    __shared__ __align__(16) char rows[8 * 16 * (2 * (HeadDim == 64 ? 64 : 128) + 16)];
    const int key_index = int(blockIdx.x) - int(args.query_order.tiles);
    if (threadIdx.x < 32) {
        if (key_index < 0)
            locate_tile<kBlockM>(shape, args.query_order, blockIdx.x, &tile);
        else
            locate_tile<kBlockN>(shape, args.key_order, key_index / 2, &tile);
    }
    __syncthreads();
    wait_for_prerequisite();
    if (tile.block < 0) return;
    if (key_index < 0) {
        const int64_t slot = first_slot<kBlockM>(shape, args.query_order, tile, tile.head, tile.q_row) + tile.block;
        const int row = tile.block * kBlockM;
        store_block<T, kWidth, kBlockM>(workspace.dq + slot * (kBlockM * kWidth), 1, 0, shape.scale,
                                        row_of<T>(params.dq, shape, tile, tile.q_row + row), params.dq.row_stride,
                                        tile.q_len - row, shape.head_dim, rows);
    } else {
        const bool is_dk = key_index % 2;
        const AttentionTensor& to = is_dk ? params.dk : params.dv;
        constexpr int64_t kSize = kBlockN * HeadDim;
        const int64_t slot =
            first_slot<kBlockN>(shape, args.part_order, tile, tile.head * workspace.splits, tile.k_row) + tile.block;
        const int row = tile.block * kBlockN;
        store_block<T, HeadDim, kBlockN>((is_dk ? workspace.dk_shares : workspace.dv_shares) + slot * kSize,
                                         workspace.splits, args.part_order.blocks * kSize, is_dk ? shape.scale : 1.f,
                                         row_of<T>(to, shape, tile, tile.k_row + row), to.row_stride, tile.k_len - row,
                                         shape.head_dim, rows);
    }
}

template <class T, int HeadDim, bool kBent>
void attention_bwd_launch(const AttentionBwdParams& params, cudaStream_t stream) {
    using Traits = AttentionBwdTraits<HeadDim>;
    const AttentionShape& shape = params.shape;
    bind_device();
    AttentionBwdArguments args;
    attention_bwd_plan<HeadDim>(params, &args);
    constexpr auto map = attention_tensor_map<T, Traits::kPanel>;
    args.q = map("q", params.q, shape, shape.heads, shape.q_len, Traits::kBlockM);
    args.dout = map("dout", params.dout, shape, shape.heads, shape.q_len, Traits::kBlockM);
    args.k = map("k", params.k, shape, shape.kv_heads, shape.k_len, Traits::kBlockN);
    args.v = map("v", params.v, shape, shape.kv_heads, shape.k_len, Traits::kBlockN);
    args.dk = {map("dk", params.dk, shape, shape.kv_heads, shape.k_len, 16), params.dk};
    args.dv = {map("dv", params.dv, shape, shape.kv_heads, shape.k_len, 16), params.dv};
    args.bend = attention_bend<T>(shape);

    const unsigned ctas = unsigned(args.part_order.tiles < params.sm_count ? args.part_order.tiles : params.sm_count);
    args.first_tile = params.dq_in_order ? 0 : ctas;
    const unsigned query_blocks = args.query_order.tiles;
    const unsigned last_ctas = query_blocks + (args.workspace.splits > 1 ? 2 * unsigned(args.key_order.tiles) : 0);
    launch<attention_bwd_begin_kernel<T, HeadDim>>("attention_bwd_begin_kernel", {query_blocks, 256, 0, stream}, args);
    launch<attention_bwd_kernel<T, HeadDim, kBent>>(
        "attention_bwd_kernel", {ctas, Traits::kThreads, sizeof(typename Traits::Shared), stream, true}, args);
    launch<attention_bwd_end_kernel<T, HeadDim>>("attention_bwd_end_kernel", {last_ctas, 256, 0, stream, true}, args);
}
