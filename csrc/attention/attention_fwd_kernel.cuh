// Attention forward on sm_90a. A producer warp brings tiles in through TMA, for the warpgroups that multiply.
#pragma once
#include "attention/attention_fwd_consumer.cuh"

template <int HeadDim>
__device__ __forceinline__ void attention_fwd_produce(const AttentionFwdArguments& args, char* base) {
    using Traits = AttentionFwdTraits<HeadDim>;
    const AttentionShape& shape = args.shape;
    const uint32_t shared = shared_address(base);
    const bool leader = elect_one();
    RingPlace<Traits::kStages> k_place, v_place;
    RingPlace<Traits::kQStages> q_place;
    RingPlace<2> slot;

    int index = blockIdx.x;
    while (true) {
        mbarrier_wait(shared + Traits::kTileEmpty + 8 * slot.stage(), slot.parity() ^ 1);
        AttentionTile& tile = reinterpret_cast<AttentionTile*>(base + Traits::kTiles)[slot.stage()];
        const int block = locate_tile<Traits::kBlockM>(shape, args.order, index, &tile);
        if (leader) mbarrier_arrive(shared + Traits::kTileFull + 8 * slot.stage());
        slot.advance();
        if (block < 0) break;
        if (leader) {
            const int query = tile.block * Traits::kBlockM;
            const int kv_head = tile.head / (shape.heads / shape.kv_heads);
            const int batch = shape.cu_seqlens ? 0 : tile.batch;
            const BlockRange blocks = key_blocks<Traits::kBlockN>(shape, tile, query, Traits::kBlockM);
            auto load_block = [&](const CUtensorMap* map, int full, int empty, int tiles,
                                  RingPlace<Traits::kStages>& place, int n) {
                const uint32_t barrier = shared + full + 8 * place.stage();
                mbarrier_wait(shared + empty + 8 * place.stage(), place.parity() ^ 1);
                mbarrier_arrive_expect(barrier, Traits::kKvBytes);
#pragma unroll
                for (int p = 0; p < Traits::kPanels; ++p)
                    tma_load_4d(
                        shared + tiles + place.stage() * Traits::kKvBytes + p * Traits::kBlockN * Traits::kRowBytes,
                        map, barrier, p * Traits::kPanel, tile.k_row + n * Traits::kBlockN, kv_head, batch);
                place.advance();
            };

            const uint32_t q_full = shared + Traits::kQFull + 8 * q_place.stage();
            mbarrier_wait(shared + Traits::kQEmpty + 8 * q_place.stage(), q_place.parity() ^ 1);
            mbarrier_arrive_expect(q_full, Traits::kConsumers * Traits::kQBytes);
            for (int w = 0; w < Traits::kConsumers; ++w)
#pragma unroll
                for (int p = 0; p < Traits::kPanels; ++p)
                    tma_load_4d(shared + Traits::kQ + (q_place.stage() * Traits::kConsumers + w) * Traits::kQBytes +
                                    p * 64 * Traits::kRowBytes,
                                &args.q, q_full, p * Traits::kPanel, tile.q_row + query + 64 * w, tile.head, batch);
            // K runs one block ahead of V, as the scores run ahead of the output.
            for (int n = blocks.end - 1; n >= blocks.begin; --n) {
                load_block(&args.k, Traits::kKFull, Traits::kKEmpty, Traits::kK, k_place, n);
                if (n + 1 < blocks.end)
                    load_block(&args.v, Traits::kVFull, Traits::kVEmpty, Traits::kV, v_place, n + 1);
            }
            if (blocks.begin < blocks.end)
                load_block(&args.v, Traits::kVFull, Traits::kVEmpty, Traits::kV, v_place, blocks.begin);
            index = gridDim.x + atomicAdd(args.tile_counter, 1);
        }
        index = from_leader(index, leader);
        q_place.advance();
    }
    if (leader) leave_tile_counter(args.tile_counter);
}

template <class T, int HeadDim>
__global__ void __launch_bounds__(AttentionFwdTraits<HeadDim>::kThreads, 1)
    attention_fwd_kernel(const __grid_constant__ AttentionFwdArguments args) {
    using Traits = AttentionFwdTraits<HeadDim>;
    extern __shared__ __align__(1024) char base[];
    const int warp = warp_index();
    if (warp == 0 && elect_one()) {
        const uint32_t shared = shared_address(base);
        prefetch_tensor_map(&args.q);
        prefetch_tensor_map(&args.k);
        prefetch_tensor_map(&args.v);
        prefetch_tensor_map(&args.out.map);
        constexpr int kWarps = 4 * Traits::kConsumers;
        for (int i = 0; i < Traits::kQStages; ++i) {
            mbarrier_init(shared + Traits::kQFull + 8 * i, 1);
            mbarrier_init(shared + Traits::kQEmpty + 8 * i, kWarps);
        }
        for (int i = 0; i < Traits::kStages; ++i) {
            mbarrier_init(shared + Traits::kKFull + 8 * i, 1);
            mbarrier_init(shared + Traits::kVFull + 8 * i, 1);
            mbarrier_init(shared + Traits::kKEmpty + 8 * i, kWarps);
            mbarrier_init(shared + Traits::kVEmpty + 8 * i, kWarps);
        }
        for (int i = 0; i < 2; ++i) {
            mbarrier_init(shared + Traits::kTileFull + 8 * i, 1);
            mbarrier_init(shared + Traits::kTileEmpty + 8 * i, kWarps);
        }
        fence_mbarrier_init();
    }
    __syncthreads();
    if (warp < 4) {
        give_registers<Traits::kProducerRegisters>();
        if (warp == 0) attention_fwd_produce<HeadDim>(args, base);
    } else {
        take_registers<Traits::kConsumerRegisters>();
        AttentionFwdConsumer<T, HeadDim>{args, base, warp / 4 - 1}.run();
    }
}

template <class T, int HeadDim>
void attention_fwd_launch(const AttentionFwdParams& params, cudaStream_t stream) {
    using Traits = AttentionFwdTraits<HeadDim>;
    const AttentionShape& shape = params.shape;
    bind_device();
    AttentionFwdArguments args;
    auto map = [&](const char* tensor, const void* data, const AttentionStrides& strides, int heads, int rows,
                   int box) {
        return attention_tensor_map<T>(tensor, data, strides, shape, heads, rows, Traits::kPanel, box);
    };
    args.q = map("q", params.q, params.q_strides, shape.heads, shape.q_len, 64);
    args.k = map("k", params.k, params.k_strides, shape.kv_heads, shape.k_len, Traits::kBlockN);
    args.v = map("v", params.v, params.v_strides, shape.kv_heads, shape.k_len, Traits::kBlockN);
    args.out.map = map("out", params.out, params.out_strides, shape.heads, shape.q_len, 16);
    args.out.data = params.out;
    args.out.strides = params.out_strides;
    args.shape = shape;
    args.order = attention_tile_order(shape, shape.heads, shape.q_len, Traits::kBlockM,
                                      int64_t(shape.k_len) * HeadDim * 4 * shape.kv_heads / shape.heads, true);
    args.lse = params.lse;
    args.tile_counter = params.tile_counter;
    const int64_t tiles = attention_tile_count(shape, args.order, shape.q_len, Traits::kBlockM);
    const unsigned ctas = unsigned(tiles < params.sm_count ? tiles : params.sm_count);
    launch<attention_fwd_kernel<T, HeadDim>>("attention_fwd_kernel",
                                             {ctas, Traits::kThreads, Traits::kSharedBytes, stream}, args);
}
