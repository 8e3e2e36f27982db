// Attention backward on sm_90a. Each CTA owns a block of keys and loops over the queries that see them. Scores and
// their gradients are computed transposed, keys by queries, so that they feed dv and dk from registers; dq is added to
// float32 in global memory by a warp of its own.
#pragma once
#include "attention/attention_bwd_tile.cuh"

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
                float* dq = args.workspace.dq + (first + m) * (Traits::kBlockM * HeadDim);
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
__device__ __forceinline__ void attention_bwd_consume(const AttentionBwdArguments& args, char* base, int group) {
    using Traits = AttentionBwdTraits<HeadDim>;
    constexpr int kScores = Traits::kScoreColumns / 2,
                  kGradients = Traits::kGradientColumns / 2;  // accumulator registers
    constexpr int kEveryGroup = 1;                            // named barrier
    const AttentionShape& shape = args.shape;
    const uint32_t shared = shared_address(base);
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int queries_at = lane % 4 * 2;  // this thread's columns of the scores are 8 i + queries_at + {0, 1}

    // What of the keys and of the queries this warpgroup computes scores of, and which columns of dk and dv.
    const int group_key = Traits::kSplitColumns ? 0 : group * 64;
    const int group_query = Traits::kSplitColumns ? group * Traits::kScoreColumns : 0;
    const int group_column = Traits::kSplitColumns ? group * Traits::kGradientColumns : 0;

    // Operands, by what they multiply.
    constexpr int kPanelBytes = Traits::kBlockN * Traits::kRowBytes, kQPanelBytes = Traits::kBlockM * Traits::kRowBytes;
    const int q_columns = group_column / Traits::kPanel * kQPanelBytes;
    const uint64_t k_scores =
        operand_depth_in_rows<Traits::kRowBytes>(shared + Traits::kK + group_key * Traits::kRowBytes);
    const uint64_t v_scores =
        operand_depth_in_rows<Traits::kRowBytes>(shared + Traits::kV + group_key * Traits::kRowBytes);
    const uint64_t q_scores =
        operand_depth_in_rows<Traits::kRowBytes>(shared + Traits::kQ + group_query * Traits::kRowBytes);
    const uint64_t dout_scores =
        operand_depth_in_rows<Traits::kRowBytes>(shared + Traits::kDout + group_query * Traits::kRowBytes);
    const uint64_t q_dk = operand_depth_across_rows<Traits::kRowBytes>(shared + Traits::kQ + q_columns, kQPanelBytes);
    const uint64_t dout_dv =
        operand_depth_across_rows<Traits::kRowBytes>(shared + Traits::kDout + q_columns, kQPanelBytes);
    const uint64_t ds_dk = operand_depth_in_rows<Traits::kRowBytes>(shared + Traits::kDs);
    const uint64_t probabilities_dv = operand_depth_in_rows<Traits::kRowBytes>(shared + Traits::kProbabilities);
    const uint64_t ds_dq = operand_depth_across_rows<Traits::kRowBytes>(
        shared + Traits::kDs + (Traits::kSplitDqRows ? group * kPanelBytes : 0), kPanelBytes);
    const uint64_t k_dq = operand_depth_across_rows<Traits::kRowBytes>(
        shared + Traits::kK + (Traits::kSplitDqRows ? 0 : group * (Traits::kDqColumns / Traits::kPanel) * kPanelBytes),
        kPanelBytes);

    // Swizzled: the 16-byte unit of a row is exclusive-or'ed with the row.
    const uint32_t ds_row = shared + Traits::kDs + (group_key + warp * 16 + lane % 16) * Traits::kRowBytes +
                            ((lane / 16 ^ lane % 8 ^ group_query / 8) << 4);
    const uint32_t dq_to = shared + Traits::kDq + group * Traits::kDqBytes + threadIdx.x % kWarpgroup * 16;
    const float scale = shape.scale * 1.44269504088896f;

    float dk[kGradients], dv[kGradients];
    RingPlace<Traits::kStages> place;
    RingPlace<2> slot;
    RingPlace<1> kv_place, dq_place, place_of_ds;

    auto arrive = [&](int barrier) {
        if (lane == 0) mbarrier_arrive(shared + barrier);
    };
    auto multiply_scores = [&](float (&scores)[kScores], uint64_t a, uint64_t b) {
        wgmma_fence();
#pragma unroll
        for (int d = 0; d < HeadDim; d += 16) {
            const int panel = d / Traits::kPanel, within = d % Traits::kPanel * 2;
            Wgmma<Traits::kScoreColumns, T, false, false>::multiply(scores, a + (panel * kPanelBytes + within >> 4),
                                                                    b + (panel * kQPanelBytes + within >> 4), d > 0);
        }
        wgmma_commit();
    };
    // a: the registers, or else the shared memory, that hold keys by queries
    auto multiply_gradient = [&](float (&gradient)[kGradients], const uint32_t* a, uint64_t shared_a, uint64_t b) {
        wgmma_fence();
#pragma unroll
        for (int m = 0; m < Traits::kBlockM; m += 16) {
            using Multiply = Wgmma<Traits::kGradientColumns, T, false, true>;
            const uint64_t depth = b + (m * Traits::kRowBytes >> 4);
            if constexpr (Traits::kSplitColumns)
                Multiply::multiply(gradient, shared_a + (m * 2 >> 4), depth, true);
            else
                Multiply::multiply(gradient, a + m / 4, depth, true);
        }
        wgmma_commit();
    };
    auto store_scores = [&](uint32_t row, const uint32_t (&packed)[kScores / 2]) {
#pragma unroll
        for (int j = 0; j < kScores / 2; j += 4)
            stmatrix_x4((row ^ (j / 2 % 8 << 4)) + j / 16 * kPanelBytes, packed[j], packed[j + 1], packed[j + 2],
                        packed[j + 3]);
    };
    auto store_rows = [&](const float (&gradient)[kGradients], float factor, const AttentionOutput& to,
                          const AttentionTile& tile) {
        bulk_wait_read();
        __syncwarp();
        const int row = tile.block * Traits::kBlockN + group_key + warp * 16;
        store_warp_rows<T, Traits::kPanel>(
            gradient, {factor, factor},
            base + Traits::kOut + group * Traits::kOutBytes + warp * (Traits::kOutBytes / 4), to, shape, tile,
            tile.k_row + row, tile.k_len - row, group_column);
    };

    // The order of the accumulator's registers is as good as any: the last pass adds the shares up and sorts them out.
    auto store_share = [&](const float (&gradient)[kGradients], float* shares, const AttentionTile& tile) {
        float4* to = reinterpret_cast<float4*>(
                         shares + (2 * key_slot<Traits::kBlockN>(shape, args.workspace, tile, tile.head) + group) *
                                      (Traits::kBlockN * HeadDim / 2)) +
                     threadIdx.x % kWarpgroup;
#pragma unroll
        for (int j = 0; j < kGradients; j += 4)
            to[j / 4 * kWarpgroup] = float4{gradient[j], gradient[j + 1], gradient[j + 2], gradient[j + 3]};
    };

    // In the order of the accumulator's registers, too. Where the order of additions is fixed, each warp keeps it for its
    // own part.
    auto add_dq = [&](const float (&dq)[Traits::kDqRegisters], int64_t dq_slot, int before) {
        constexpr int kWarps = 4 * Traits::kConsumers;
        int* added = args.workspace.added + dq_slot;
        while (before > 0 && load_acquire(added) < kWarps * before) {
        }
        float4* to = reinterpret_cast<float4*>(args.workspace.dq + (2 * dq_slot + group) * (Traits::kDqBytes / 4)) +
                     threadIdx.x % kWarpgroup;
        auto each_float4 = [&](auto put) {
#pragma unroll
            for (int j = 0; j < Traits::kDqRegisters; j += 4)
                put(to + j / 4 * kWarpgroup, float4{dq[j], dq[j + 1], dq[j + 2], dq[j + 3]});
        };
        if (before == 0)
            each_float4([](float4* at, float4 x) { *at = x; });
        else
            each_float4([](float4* at, float4 x) { red_add(at, x); });
        __syncwarp();
        if (before >= 0 && lane == 0) red_release_add(added, 1);
    };
    // To the warp that adds it.
    auto hand_over_dq = [&](const float (&dq)[Traits::kDqRegisters]) {
        mbarrier_wait(shared + Traits::kDqEmpty + 8 * group, dq_place.parity() ^ 1);
        dq_place.advance();
#pragma unroll
        for (int j = 0; j < Traits::kDqRegisters; j += 4)
            *reinterpret_cast<float4*>(base + (dq_to - shared) + j * 4 * kWarpgroup) =
                float4{dq[j], dq[j + 1], dq[j + 2], dq[j + 3]};
        fence_async_proxy();
        __syncwarp();
        arrive(Traits::kDqFull + 8 * group);
    };

    while (true) {
        mbarrier_wait(shared + Traits::kTileFull + 8 * slot.stage(), slot.parity());
        // Stays in shared memory: the loop has no registers for it.
        const AttentionTile& tile = reinterpret_cast<const AttentionTile*>(base + Traits::kTiles)[slot.stage()];
        if (tile.block < 0) break;

        const BlockRange blocks = query_blocks<Traits::kBlockM, Traits::kBlockN>(shape, tile);
        const int first_key = tile.block * Traits::kBlockN + group_key;
        // Queries that see every key of the warpgroup: blocks within need no mask.
        const KeyRange common = {
            max(visible_queries(shape, tile, first_key).first, visible_queries(shape, tile, first_key + 63).first),
            visible_queries(shape, tile, first_key).last};
#pragma unroll
        for (int i = 0; i < kGradients; ++i) dk[i] = dv[i] = 0.f;

        mbarrier_wait(shared + Traits::kKvFull, kv_place.parity());
        kv_place.advance();
        if (shape.cu_seqlens && (tile.block + 1) * Traits::kBlockN > tile.k_len) {
            const int from = tile.k_len - tile.block * Traits::kBlockN, thread = threadIdx.x - kWarpgroup;
            clear_rows<Traits::kPanels, Traits::kBlockN, Traits::kRowBytes>(base + Traits::kK, from, thread,
                                                                            2 * kWarpgroup);
            clear_rows<Traits::kPanels, Traits::kBlockN, Traits::kRowBytes>(base + Traits::kV, from, thread,
                                                                            2 * kWarpgroup);
            fence_async_proxy();
            named_barrier_sync(kEveryGroup, 2 * kWarpgroup);
        }
        const int iterations = (blocks.end - blocks.begin) * args.group;
        int m = blocks.begin;
        int64_t dq_slot = first_slot<Traits::kBlockM>(shape, args.workspace, tile, tile.head * args.group) + m;
        for (int i = 0; i < iterations; ++i) {
            float scores[kScores], dscores[kScores], dq[Traits::kDqRegisters];
            uint32_t probabilities[kScores / 2], packed[kScores / 2];
            auto pack_probabilities = [&] {
#pragma unroll
                for (int j = 0; j < kScores; j += 2) probabilities[j / 2] = pack<T>(scores[j], scores[j + 1]);
            };
            const uint64_t stage = place.stage() * (Traits::kQBytes >> 4);
            mbarrier_wait(shared + Traits::kQFull + 8 * place.stage(), place.parity());
            if (shape.cu_seqlens && (m + 1) * Traits::kBlockM > tile.q_len) {
                const int from = tile.q_len - m * Traits::kBlockM, thread = threadIdx.x - kWarpgroup;
                mbarrier_wait(shared + Traits::kDoutFull + 8 * place.stage(), place.parity());
                clear_rows<Traits::kPanels, Traits::kBlockM, Traits::kRowBytes>(
                    base + Traits::kQ + place.stage() * Traits::kQBytes, from, thread, 2 * kWarpgroup);
                clear_rows<Traits::kPanels, Traits::kBlockM, Traits::kRowBytes>(
                    base + Traits::kDout + place.stage() * Traits::kQBytes, from, thread, 2 * kWarpgroup);
                fence_async_proxy();
                named_barrier_sync(kEveryGroup, 2 * kWarpgroup);
            }
            multiply_scores(scores, k_scores, q_scores + stage);
            mbarrier_wait(shared + Traits::kDoutFull + 8 * place.stage(), place.parity());
            multiply_scores(dscores, v_scores, dout_scores + stage);
            wgmma_wait<1>();
            pin(scores);

            const int query = m * Traits::kBlockM + group_query;
            if (query < common.first || query + Traits::kScoreColumns - 1 > common.last) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int key = tile.block * Traits::kBlockN + group_key + warp * 16 + lane / 4 + 8 * h;
                    const KeyRange queries = visible_queries(shape, tile, key);
                    mask_row(scores, h, queries.first - query - queries_at, queries.last - query - queries_at);
                }
            }
            const float2* minus_lse = reinterpret_cast<const float2*>(
                base + Traits::kLse + place.stage() * Traits::kStatisticsBytes + (group_query + queries_at) * 4);
            const float2* delta = reinterpret_cast<const float2*>(
                base + Traits::kDelta + place.stage() * Traits::kStatisticsBytes + (group_query + queries_at) * 4);
#pragma unroll
            for (int j = 0; j < kScores; j += 4) {
                const float2 l = minus_lse[j];
                scores[j] = exp2_approx(fmaf(scores[j], scale, l.x));
                scores[j + 1] = exp2_approx(fmaf(scores[j + 1], scale, l.y));
                scores[j + 2] = exp2_approx(fmaf(scores[j + 2], scale, l.x));
                scores[j + 3] = exp2_approx(fmaf(scores[j + 3], scale, l.y));
            }
            if constexpr (Traits::kDvFirst) {
                pack_probabilities();
                multiply_gradient(dv, probabilities, probabilities_dv, dout_dv + stage);
                wgmma_wait<1>();
            } else {
                wgmma_wait<0>();
            }
            pin(dscores);
            if constexpr (!Traits::kDvFirst) pack_probabilities();
#pragma unroll
            for (int j = 0; j < kScores; j += 4) {
                const float2 d = delta[j];
                packed[j / 2] = pack<T>(scores[j] * (dscores[j] - d.x), scores[j + 1] * (dscores[j + 1] - d.y));
                packed[j / 2 + 1] =
                    pack<T>(scores[j + 2] * (dscores[j + 2] - d.x), scores[j + 3] * (dscores[j + 3] - d.y));
            }
            constexpr bool kDvLast = Traits::kSplitColumns;
            if constexpr (!Traits::kDvFirst && !kDvLast)
                multiply_gradient(dv, probabilities, probabilities_dv, dout_dv + stage);
            mbarrier_wait(shared + Traits::kDsEmpty, place_of_ds.parity() ^ 1);
            place_of_ds.advance();
            store_scores(ds_row, packed);
            if constexpr (Traits::kSplitColumns)
                store_scores(ds_row + Traits::kProbabilities - Traits::kDs, probabilities);
            fence_async_proxy();
            named_barrier_sync(kEveryGroup, 2 * kWarpgroup);
            wgmma_fence();
#pragma unroll
            for (int n = 0; n < Traits::kBlockN; n += 16)
                Wgmma<Traits::kDqColumns, T, true, true>::multiply(dq, ds_dq + (n * Traits::kRowBytes >> 4),
                                                                   k_dq + (n * Traits::kRowBytes >> 4), n > 0);
            wgmma_commit();
            if constexpr (kDvLast) multiply_gradient(dv, probabilities, probabilities_dv, dout_dv + stage);
            multiply_gradient(dk, packed, ds_dk, q_dk + stage);

            auto release_dout = [&] {
                pin(dv);
                pin(probabilities);
                arrive(Traits::kDsEmpty);
                arrive(Traits::kDoutEmpty + 8 * place.stage());
            };
            wgmma_wait<kDvLast ? 2 : 1>();
            pin(dq);
            if constexpr (!kDvLast) release_dout();
            if constexpr (Traits::kDirectDq)
                add_dq(dq, dq_slot, adding_before<HeadDim>(args, tile, m));
            else
                hand_over_dq(dq);

            wgmma_wait<0>();
            if constexpr (kDvLast) release_dout();
            pin(dk);
            pin(packed);
            arrive(Traits::kQEmpty + 8 * place.stage());
            place.advance();
            ++dq_slot;
            if (++m == blocks.end) {
                dq_slot += args.workspace.slots_per_head - (m - blocks.begin);
                m = blocks.begin;
            }
        }
        if constexpr (Traits::kSplitColumns)
            named_barrier_sync(kEveryGroup, 2 * kWarpgroup);  // rows go out over K and V
        else
            arrive(Traits::kKvEmpty);
        if (args.workspace.splits > 1) {
            store_share(dv, args.workspace.dv_shares, tile);
            store_share(dk, args.workspace.dk_shares, tile);
        } else {
            store_rows(dv, 1.f, args.dv, tile);
            store_rows(dk, shape.scale, args.dk, tile);
        }
        if constexpr (Traits::kSplitColumns) bulk_wait_read();
        __syncwarp();
        if constexpr (Traits::kSplitColumns) arrive(Traits::kKvEmpty);
        arrive(Traits::kTileEmpty + 8 * slot.stage());
        slot.advance();
    }
    bulk_wait_read();
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
    __syncthreads();
    if (warp < 4) {
        give_registers<Traits::kProducerRegisters>();
        if (warp == 0) attention_bwd_produce<HeadDim>(args, base);
        if (!Traits::kDirectDq && warp == 1 && elect_one()) attention_bwd_add_dq<HeadDim>(args, base);
    } else {
        take_registers<Traits::kConsumerRegisters>();
        attention_bwd_consume<T, HeadDim>(args, base, warp / 4 - 1);
    }
}
