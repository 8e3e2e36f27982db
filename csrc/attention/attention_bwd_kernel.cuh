// Attention backward on sm_90a. Each CTA owns a block of keys and loops over the queries that see them. Scores and
// their gradients are computed transposed, keys by queries, so that they feed dv and dk from registers; dq is added to
// float32 in global memory, by a warp of its own unless shared memory is too small for that.
#pragma once
#include "attention/attention_bwd_consumer.cuh"

template <int HeadDim>
__device__ __forceinline__ void attention_bwd_produce(const AttentionBwdArguments& args, char* base) {
    using Traits = AttentionBwdTraits<HeadDim>;
    const AttentionShape& shape = args.shape;
    const uint32_t shared = shared_address(base);
    const bool leader = elect_one();
    RingPlace<Traits::kStages> place;

    auto take_tile = [&] {
        int index = 0;
        if (leader) index = atomicAdd(args.workspace.tile_counter, 1);
        return from_leader(index, leader);
    };
    // CTAs may start in any order, and where additions wait for others, those that they wait for must have started.
    int index = args.dq_order == DqOrder::kAny ? blockIdx.x : take_tile();
    for (uint32_t tiles = 0;; ++tiles) {
        const RingPlace<2> slot{tiles};
        const RingPlace<1> kv_place{tiles};
        mbarrier_wait(shared + Traits::kTileEmpty + 8 * slot.stage(), slot.parity() ^ 1);
        // Stays in shared memory: there are few registers.
        AttentionTile& tile = reinterpret_cast<AttentionTile*>(base + Traits::kTiles)[slot.stage()];
        const int block = locate_tile<Traits::kBlockN>(shape, args.order, index, &tile);
        if (leader) mbarrier_arrive(shared + Traits::kTileFull + 8 * slot.stage());
        if (block < 0) return;
        if (leader) {
            const int batch = shape.cu_seqlens ? 0 : tile.batch;
            const BlockRange blocks = query_blocks<Traits::kBlockM, Traits::kBlockN>(shape, tile);
            const int kv_head = tile.head / args.workspace.splits;

            auto load_keys = [&] {
                mbarrier_wait(shared + Traits::kKvEmpty, kv_place.parity() ^ 1);
                mbarrier_arrive_expect(shared + Traits::kKvFull, 2 * Traits::kKvBytes);
#pragma unroll
                for (int p = 0; p < Traits::kPanels; ++p) {
                    const int panel = p * Traits::kBlockN * Traits::kRowBytes,
                              row = tile.k_row + tile.block * Traits::kBlockN;
                    tma_load_4d(shared + Traits::kK + panel, &args.k, shared + Traits::kKvFull, p * Traits::kPanel, row,
                                kv_head, batch);
                    tma_load_4d(shared + Traits::kV + panel, &args.v, shared + Traits::kKvFull, p * Traits::kPanel, row,
                                kv_head, batch);
                }
            };
            auto load_block = [&](const CUtensorMap* map, const float* statistics, int full, int empty, int tiles,
                                  int statistics_tiles, int head, int m) {
                const uint32_t barrier = shared + full + 8 * place.stage();
                mbarrier_wait(shared + empty + 8 * place.stage(), place.parity() ^ 1);
                mbarrier_arrive_expect(barrier, Traits::kQBytes + Traits::kStatisticsBytes);
#pragma unroll
                for (int p = 0; p < Traits::kPanels; ++p)
                    tma_load_4d(
                        shared + tiles + place.stage() * Traits::kQBytes + p * Traits::kBlockM * Traits::kRowBytes, map,
                        barrier, p * Traits::kPanel, tile.q_row + m * Traits::kBlockM, head, batch);
                bulk_load(shared + statistics_tiles + place.stage() * Traits::kStatisticsBytes, statistics,
                          Traits::kStatisticsBytes, barrier);
            };
            // The first queries before the keys: there is room for them while the last tile is still being worked on.
#pragma unroll 1
            for (int head = tile.head * args.group; head < (tile.head + 1) * args.group; ++head) {
                const int64_t first = first_slot<Traits::kBlockM>(shape, args.workspace, tile, head);
#pragma unroll 1
                for (int m = blocks.begin; m < blocks.end; ++m) {
                    const int64_t at = (first + m) * Traits::kBlockM;
                    load_block(&args.q, args.workspace.minus_lse + at, Traits::kQFull, Traits::kQEmpty, Traits::kQ,
                               Traits::kLse, head, m);
                    load_block(&args.dout, args.workspace.delta + at, Traits::kDoutFull, Traits::kDoutEmpty,
                               Traits::kDout, Traits::kDelta, head, m);
                    place.advance();
                    if (m == blocks.begin && head == tile.head * args.group) load_keys();
                }
            }
            if (blocks.begin == blocks.end) load_keys();
        }
        __syncwarp();
        index = take_tile();
    }
}

// Adds what the consumers leave in shared memory to dq; one thread. Where blocks of keys add in a fixed order, tiles
// are handed out in that order too, so that whoever is waited for is running.
template <int HeadDim>
__device__ __forceinline__ void attention_bwd_add_dq(const AttentionBwdArguments& args, char* base) {
    using Traits = AttentionBwdTraits<HeadDim>;
    const AttentionShape& shape = args.shape;
    const uint32_t shared = shared_address(base);
    RingPlace<2> slot;
    RingPlace<1> place;
    while (true) {
        mbarrier_wait(shared + Traits::kTileFull + 8 * slot.stage(), slot.parity());
        const AttentionTile& tile = reinterpret_cast<const AttentionTile*>(base + Traits::kTiles)[slot.stage()];
        if (tile.block < 0) break;
        const BlockRange blocks = query_blocks<Traits::kBlockM, Traits::kBlockN>(shape, tile);
#pragma unroll 1
        for (int head = tile.head * args.group; head < (tile.head + 1) * args.group; ++head) {
            const int64_t first = first_slot<Traits::kBlockM>(shape, args.workspace, tile, head);
#pragma unroll 1
            for (int m = blocks.begin; m < blocks.end; ++m) {
                int* added = args.workspace.added + first + m;
                float* dq = args.workspace.dq + (first + m) * (Traits::kBlockM * Traits::kDqWidth);
                const int before = adding_before<HeadDim>(args, tile, m);
                if (before >= 0) {
                    while (load_acquire(added) != before) {
                    }
                    fence_async_proxy_global();
                }
#pragma unroll 1
                for (int w = 0; w < Traits::kConsumers; ++w) {
                    mbarrier_wait(shared + Traits::kDqFull + 8 * w, place.parity());
                    float* to = dq + w * (Traits::kDqBytes / 4);
                    const uint32_t from = shared + Traits::kDq + w * Traits::kDqBytes;
                    if (before == 0)
                        bulk_store(to, from, Traits::kDqBytes);
                    else
                        bulk_reduce_add(to, from, Traits::kDqBytes);
                    bulk_commit();
                    bulk_wait_read();
                    mbarrier_arrive(shared + Traits::kDqEmpty + 8 * w);
                }
                place.advance();
                if (before >= 0) {
                    bulk_wait();
                    fence_async_proxy_global();
                    red_release_add(added, 1);
                }
            }
        }
        mbarrier_arrive(shared + Traits::kTileEmpty + 8 * slot.stage());
        slot.advance();
    }
}

template <class T, int HeadDim>
__global__ void __launch_bounds__(AttentionBwdTraits<HeadDim>::kThreads, 1)
    attention_bwd_kernel(const __grid_constant__ AttentionBwdArguments args) {
    using Traits = AttentionBwdTraits<HeadDim>;
    extern __shared__ __align__(1024) char base[];
    const int warp = warp_index();
    if (warp == 0 && elect_one()) {
        const uint32_t shared = shared_address(base);
        prefetch_tensor_map(&args.q);
        prefetch_tensor_map(&args.dout);
        prefetch_tensor_map(&args.k);
        prefetch_tensor_map(&args.v);
        constexpr int kWarps = 4 * Traits::kConsumers;
        for (int i = 0; i < Traits::kStages; ++i) {
            mbarrier_init(shared + Traits::kQFull + 8 * i, 1);
            mbarrier_init(shared + Traits::kDoutFull + 8 * i, 1);
            mbarrier_init(shared + Traits::kQEmpty + 8 * i, kWarps);
            mbarrier_init(shared + Traits::kDoutEmpty + 8 * i, kWarps);
        }
        for (int i = 0; i < Traits::kConsumers; ++i) {
            mbarrier_init(shared + Traits::kDqFull + 8 * i, 4);
            mbarrier_init(shared + Traits::kDqEmpty + 8 * i, 1);
        }
        for (int i = 0; i < 2; ++i) {
            mbarrier_init(shared + Traits::kTileFull + 8 * i, 1);
            mbarrier_init(shared + Traits::kTileEmpty + 8 * i, kWarps + !Traits::kDirectDq);
        }
        mbarrier_init(shared + Traits::kKvFull, 1);
        mbarrier_init(shared + Traits::kKvEmpty, kWarps);
        mbarrier_init(shared + Traits::kDsEmpty, kWarps);
        fence_mbarrier_init();
    }
    let_dependents_start();
    __syncthreads();
    wait_for_prerequisite();
    if (warp < 4) {
        give_registers<Traits::kProducerRegisters>();
        if (warp == 0) attention_bwd_produce<HeadDim>(args, base);
        if (!Traits::kDirectDq && warp == 1 && elect_one()) attention_bwd_add_dq<HeadDim>(args, base);
    } else {
        take_registers<Traits::kConsumerRegisters>();
        AttentionBwdConsumer<T, HeadDim>{args, base, warp / 4 - 1}.run();
    }
}
