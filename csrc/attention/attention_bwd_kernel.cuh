// Attention backward on sm_90a. Each CTA owns a block of keys and loops over the queries that see them. Scores and
// their gradients are computed transposed, keys by queries, so that they feed dv and dk from registers; dq is added to
// float32 in global memory, by a warp of its own unless shared memory is too small for that.
#pragma once
#include "attention/attention_bwd_consumer.cuh"

template <int HeadDim>
GK_DEVICE void attention_bwd_produce(const AttentionBwdArguments& args,
                                     typename AttentionBwdTraits<HeadDim>::Shared& shared) {
    using Traits = AttentionBwdTraits<HeadDim>;
    const AttentionShape& shape = args.params.shape;
    const bool leader = elect_one();
    RingPlace<Traits::kStages> place;

    auto take_tile = [&] { return from_leader(leader ? atomicAdd(args.workspace.tile_counter, 1) : 0, leader); };
    // CTAs may start in any order, and where additions wait for others, those that they wait for must have started.
    int index = args.params.dq_in_order ? take_tile() : blockIdx.x;
    for (uint32_t tiles = 0;; ++tiles) {
        const RingPlace<2> slot{tiles};
        const RingPlace<1> kv_place{tiles};
        mbarrier_wait(slot.of(shared.tile_empty), slot.parity() ^ 1);
        AttentionTile& tile = shared.tiles[slot.stage()];  // stays there: there are few registers
        const int block = locate_tile<Traits::kBlockN>(shape, args.part_order, index, &tile);
        if (leader) mbarrier_arrive(slot.of(shared.tile_full));
        if (block < 0) return;
        if (leader) {
            const int batch = shape.cu_seqlens ? 0 : tile.batch;
            bool keys_loaded = false;
            auto load_keys = [&] {
                const int row = tile.k_row + tile.block * Traits::kBlockN, head = tile.head / args.workspace.splits;
                const uint32_t full = kv_place.of(shared.kv_full);
                mbarrier_wait(kv_place.of(shared.kv_empty), kv_place.parity() ^ 1);
                mbarrier_arrive_expect(full, 2 * Traits::kKvBytes);
                load_panels<HeadDim, Traits::kBlockN>(shared.k, &args.k, full, row, head, batch);
                load_panels<HeadDim, Traits::kBlockN>(shared.v, &args.v, full, row, head, batch);
                keys_loaded = true;
            };
            for_each_query_block<HeadDim>(args, tile, [&](int head, int m, int64_t dq_slot) {
                auto load = [&](const CUtensorMap* map, auto& tiles, const float* statistics, auto& statistics_tiles,
                                auto& full, auto& empty) {
                    mbarrier_wait(place.of(empty), place.parity() ^ 1);
                    mbarrier_arrive_expect(place.of(full), Traits::kQBytes + Traits::kStatisticsBytes);
                    load_panels<HeadDim, Traits::kBlockM>(tiles[place.stage()], map, place.of(full),
                                                          tile.q_row + m * Traits::kBlockM, head, batch);
                    bulk_load(shared_address(statistics_tiles[place.stage()]), statistics + dq_slot * Traits::kBlockM,
                              Traits::kStatisticsBytes, place.of(full));
                };
                load(&args.q, shared.q, args.workspace.minus_lse, shared.lse, shared.q_full, shared.q_empty);
                load(&args.dout, shared.dout, args.workspace.delta, shared.delta, shared.dout_full, shared.dout_empty);
                place.advance();
                // After the first queries: there is room for them while the last tile is still being worked on.
                if (!keys_loaded) load_keys();
            });
            if (!keys_loaded) load_keys();
        }
        __syncwarp();
        index = take_tile();
    }
}

// Adds what the consumers leave in shared memory to dq; one thread. Where blocks of keys add in a fixed order, tiles
// are handed out in that order too, so that whoever is waited for is running.
template <int HeadDim>
GK_DEVICE void attention_bwd_add_dq(const AttentionBwdArguments& args,
                                    typename AttentionBwdTraits<HeadDim>::Shared& shared) {
    using Traits = AttentionBwdTraits<HeadDim>;
    RingPlace<2> slot;
    RingPlace<1> place;
    while (true) {
        mbarrier_wait(slot.of(shared.tile_full), slot.parity());
        const AttentionTile& tile = shared.tiles[slot.stage()];
        if (tile.block < 0) break;
        for_each_query_block<HeadDim>(args, tile, [&](int, int m, int64_t dq_slot) {
            int* added = args.workspace.added + dq_slot;
            float* dq = args.workspace.dq + dq_slot * (Traits::kBlockM * Traits::kDqWidth);
            const int before = adding_before<HeadDim>(args, tile, m);
            if (before >= 0) {
                while (load_acquire(added) != before) {
                }
                fence_async_proxy_global();
            }
#pragma unroll 1
            for (int w = 0; w < Traits::kConsumers; ++w) {
                mbarrier_wait(shared_address(&shared.dq_full[w]), place.parity());
                float* to = dq + w * (Traits::kDqBytes / 4);
                const uint32_t from = shared_address(shared.dq[w]);
                if (before == 0)
                    bulk_store(to, from, Traits::kDqBytes);
                else
                    bulk_reduce_add(to, from, Traits::kDqBytes);
                bulk_commit();
                bulk_wait_read();
                mbarrier_arrive(shared_address(&shared.dq_empty[w]));
            }
            place.advance();
            if (before >= 0) {
                bulk_wait();
                fence_async_proxy_global();
                red_release_add(added, 1);
            }
        });
        mbarrier_arrive(slot.of(shared.tile_empty));
        slot.advance();
    }
}

template <class T, int HeadDim, bool kBent>
__global__ void __launch_bounds__(AttentionBwdTraits<HeadDim>::kThreads, 1)
    attention_bwd_kernel(const __grid_constant__ AttentionBwdArguments args) {
    using Traits = AttentionBwdTraits<HeadDim>;
    extern __shared__ __align__(1024) char base[];
    auto& shared = *reinterpret_cast<typename Traits::Shared*>(base);
    const int warp = warp_index();
    if (warp == 0 && elect_one()) {
        prefetch_tensor_maps(args.q, args.dout, args.k, args.v);
        constexpr int kWarps = 4 * Traits::kConsumers;
        init_ring(shared.q_full, 1, shared.q_empty, kWarps);
        init_ring(shared.dout_full, 1, shared.dout_empty, kWarps);
        init_ring(shared.dq_full, 4, shared.dq_empty, 1);
        init_ring(shared.tile_full, 1, shared.tile_empty, kWarps + !Traits::kDirectDq);
        init_ring(shared.kv_full, 1, shared.kv_empty, kWarps);
        mbarrier_init(shared_address(shared.ds_empty), kWarps);
        fence_mbarrier_init();
    }
    let_dependents_start();
    __syncthreads();
    wait_for_prerequisite();
    if (warp < 4) {
        give_registers<Traits::kProducerRegisters>();
        if (warp == 0) attention_bwd_produce<HeadDim>(args, shared);
        if (!Traits::kDirectDq && warp == 1 && elect_one()) attention_bwd_add_dq<HeadDim>(args, shared);
    } else {
        take_registers<Traits::kConsumerRegisters>();
        AttentionBwdConsumer<T, HeadDim, kBent>{args, shared, warp / 4 - 1}.run();
    }
}
