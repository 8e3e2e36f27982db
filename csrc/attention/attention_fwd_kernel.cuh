// Attention forward on sm_90a. A producer warp brings tiles in through TMA, for the warpgroups that multiply.
#pragma once
#include "attention/attention_fwd_consumer.cuh"

template <int HeadDim>
GK_DEVICE void attention_fwd_produce(const AttentionFwdArguments& args,
                                     typename AttentionFwdTraits<HeadDim>::Shared& shared) {
    using Traits = AttentionFwdTraits<HeadDim>;
    const AttentionShape& shape = args.params.shape;
    const bool leader = elect_one();
    RingPlace<Traits::kStages> k_place, v_place;
    RingPlace<Traits::kQStages> q_place;
    RingPlace<2> slot;

    int index = blockIdx.x;
    while (true) {
        mbarrier_wait(slot.of(shared.tile_empty), slot.parity() ^ 1);
        AttentionTile& tile = shared.tiles[slot.stage()];
        const int block = locate_tile<Traits::kBlockM>(shape, args.order, index, &tile);
        if (leader) mbarrier_arrive(slot.of(shared.tile_full));
        slot.advance();
        if (block < 0) break;
        if (leader) {
            const int query = tile.block * Traits::kBlockM;
            const int kv_head = tile.head / (shape.heads / shape.kv_heads);
            const int batch = shape.cu_seqlens ? 0 : tile.batch;
            const BlockRange blocks = key_blocks<Traits::kBlockN>(shape, tile, query, Traits::kBlockM);
            auto load_block = [&](const CUtensorMap* map, auto& tiles, auto& full, auto& empty, auto& place, int n) {
                mbarrier_wait(place.of(empty), place.parity() ^ 1);
                mbarrier_arrive_expect(place.of(full), Traits::kKvBytes);
                load_panels<HeadDim, Traits::kBlockN>(tiles[place.stage()], map, place.of(full),
                                                      tile.k_row + n * Traits::kBlockN, kv_head, batch);
                place.advance();
            };
            auto load_k = [&](int n) { load_block(&args.k, shared.k, shared.k_full, shared.k_empty, k_place, n); };
            auto load_v = [&](int n) { load_block(&args.v, shared.v, shared.v_full, shared.v_empty, v_place, n); };

            const uint32_t q_full = q_place.of(shared.q_full);
            mbarrier_wait(q_place.of(shared.q_empty), q_place.parity() ^ 1);
            mbarrier_arrive_expect(q_full, Traits::kConsumers * Traits::kQBytes);
            for (int w = 0; w < Traits::kConsumers; ++w)
                load_panels<HeadDim, 64>(shared.q[q_place.stage()][w], &args.q, q_full, tile.q_row + query + 64 * w,
                                         tile.head, batch);
            // K runs one block ahead of V, as the scores run ahead of the output.
            for (int n = blocks.end - 1; n >= blocks.begin; --n) {
                load_k(n);
                if (n + 1 < blocks.end) load_v(n + 1);
            }
            if (blocks.begin < blocks.end) load_v(blocks.begin);
            index = gridDim.x + atomicAdd(args.params.tile_counter, 1);
        }
        index = from_leader(index, leader);
        q_place.advance();
    }
    if (leader) leave_tile_counter(args.params.tile_counter);
}

template <class T, int HeadDim, bool kBent>
__global__ void __launch_bounds__(AttentionFwdTraits<HeadDim>::kThreads, 1)
    attention_fwd_kernel(const __grid_constant__ AttentionFwdArguments args) {
    using Traits = AttentionFwdTraits<HeadDim>;
    extern __shared__ __align__(1024) char base[];
    auto& shared = *reinterpret_cast<typename Traits::Shared*>(base);
    const int warp = warp_index();
    if (warp == 0 && elect_one()) {
        prefetch_tensor_maps(args.q, args.k, args.v, args.out.map);
        constexpr int kWarps = 4 * Traits::kConsumers;
        init_ring(shared.q_full, 1, shared.q_empty, kWarps);
        init_ring(shared.k_full, 1, shared.k_empty, kWarps);
        init_ring(shared.v_full, 1, shared.v_empty, kWarps);
        init_ring(shared.tile_full, 1, shared.tile_empty, kWarps);
        fence_mbarrier_init();
    }
    __syncthreads();
    if (warp < 4) {
        give_registers<Traits::kProducerRegisters>();
        if (warp == 0) attention_fwd_produce<HeadDim>(args, shared);
    } else {
        take_registers<Traits::kConsumerRegisters>();
        AttentionFwdConsumer<T, HeadDim, kBent>{args, shared, warp / 4 - 1}.run();
    }
}

template <class T, int HeadDim, bool kBent>
void attention_fwd_launch(const AttentionFwdParams& params, cudaStream_t stream) {
    using Traits = AttentionFwdTraits<HeadDim>;
    const AttentionShape& shape = params.shape;
    bind_device();
    AttentionFwdArguments args;
    constexpr auto map = attention_tensor_map<T, Traits::kPanel>;
    args.q = map("q", params.q, shape, shape.heads, shape.q_len, 64);
    args.k = map("k", params.k, shape, shape.kv_heads, shape.k_len, Traits::kBlockN);
    args.v = map("v", params.v, shape, shape.kv_heads, shape.k_len, Traits::kBlockN);
    args.out = {map("out", params.out, shape, shape.heads, shape.q_len, 16), params.out};
    args.params = params;
    args.order = attention_tile_order(shape, shape.heads, shape.q_len, Traits::kBlockM, false,
                                      int64_t(shape.k_len) * HeadDim * 4 * shape.kv_heads / shape.heads, true);
    args.bend = attention_bend<T>(shape);
    const unsigned ctas = unsigned(args.order.tiles < params.sm_count ? args.order.tiles : params.sm_count);
    launch<attention_fwd_kernel<T, HeadDim, kBent>>(
        "attention_fwd_kernel", {ctas, Traits::kThreads, sizeof(typename Traits::Shared), stream}, args);
}
