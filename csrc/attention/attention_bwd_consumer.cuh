// What a warpgroup of the backward pass's main kernel does with each tile: five products for every block of queries.
#pragma once
#include "attention/attention_bwd_tile.cuh"

template <class T, int HeadDim>
struct AttentionBwdConsumer {
    using Traits = AttentionBwdTraits<HeadDim>;
    static constexpr int kScores = Traits::kScoreColumns / 2, kGradients = Traits::kGradientColumns / 2;  // registers
    static constexpr int kEveryGroup = 1, kGroup = 2;  // named barriers; of the second one per group
    static constexpr int kPanelBytes = Traits::kBlockN * Traits::kRowBytes;
    static constexpr int kQPanelBytes = Traits::kBlockM * Traits::kRowBytes;

    const AttentionBwdArguments& args;
    char* const base;
    const int group;
    const AttentionShape& shape = args.shape;
    const uint32_t shared = shared_address(base);
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const float scale = shape.scale * 1.44269504088896f;
    // What of the keys and of the queries this warpgroup computes scores of, and which columns of dk and dv.
    const int group_key = Traits::kSplitColumns ? 0 : group * 64;
    const int group_query = Traits::kSplitColumns ? group * Traits::kScoreColumns : 0;
    const int group_column = Traits::kSplitColumns ? group * Traits::kGradientColumns : 0;
    const int queries_at = lane % 4 * 2;  // this thread's columns of the scores are 8 i + queries_at + {0, 1}

    // Operands, by what they multiply. Depth in rows, or across the rows of panels of keys, of queries or of scores.
    static constexpr auto in_rows = operand_depth_in_rows<Traits::kRowBytes>;
    static constexpr auto across_rows = operand_depth_across_rows<Traits::kRowBytes>;
    const uint32_t columns_of_q = group_column / Traits::kPanel * kQPanelBytes;
    const uint32_t columns_of_k = Traits::kSplitDqRows ? 0 : group * Traits::kDqColumns / Traits::kPanel * kPanelBytes;
    const uint64_t k_scores = in_rows(shared + Traits::kK + group_key * Traits::kRowBytes);
    const uint64_t v_scores = in_rows(shared + Traits::kV + group_key * Traits::kRowBytes);
    const uint64_t q_scores = in_rows(shared + Traits::kQ + group_query * Traits::kRowBytes);
    const uint64_t dout_scores = in_rows(shared + Traits::kDout + group_query * Traits::kRowBytes);
    const uint64_t q_dk = across_rows(shared + Traits::kQ + columns_of_q, kQPanelBytes);
    const uint64_t dout_dv = across_rows(shared + Traits::kDout + columns_of_q, kQPanelBytes);
    const uint64_t k_dq = across_rows(shared + Traits::kK + columns_of_k, kPanelBytes);
    const uint64_t ds_dk = operand_depth_in_rows<Traits::kDsRowBytes>(shared + Traits::kDs);
    const uint64_t probabilities_dv = operand_depth_in_rows<Traits::kDsRowBytes>(shared + Traits::kProbabilities);
    const uint64_t ds_dq = operand_depth_across_rows<Traits::kDsRowBytes>(
        shared + Traits::kDs + (Traits::kSplitDqRows ? group * Traits::kDsPanelBytes : 0), Traits::kDsPanelBytes);

    float dk[kGradients], dv[kGradients];
    RingPlace<Traits::kStages> place;
    RingPlace<2> slot;
    RingPlace<1> kv_place, dq_place, place_of_ds;

    __device__ __forceinline__ void run() {
        while (true) {
            mbarrier_wait(shared + Traits::kTileFull + 8 * slot.stage(), slot.parity());
            // Stays in shared memory: the loop has no registers for it.
            const AttentionTile& tile = reinterpret_cast<const AttentionTile*>(base + Traits::kTiles)[slot.stage()];
            if (tile.block < 0) break;
            add_up(tile);
            store(tile);
            arrive(Traits::kTileEmpty + 8 * slot.stage());
            __syncwarp();  // else the other lanes go round before the one that arrives
            slot.advance();
        }
        bulk_wait_read();
    }

    // dk and dv of a tile.
    __device__ __forceinline__ void add_up(const AttentionTile& tile) {
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
        if (shape.cu_seqlens && (tile.block + 1) * Traits::kBlockN > tile.k_len)
            clear_after<Traits::kBlockN>(Traits::kK, Traits::kV, tile.k_len - tile.block * Traits::kBlockN);
        const int iterations = (blocks.end - blocks.begin) * args.group;
        int m = blocks.begin;
        int64_t dq_slot = first_slot<Traits::kBlockM>(shape, args.workspace, tile, tile.head * args.group) + m;
        for (int i = 0; i < iterations; ++i) {
            work_on(tile, m, dq_slot, common);
            ++dq_slot;
            if (++m == blocks.end) {
                dq_slot += args.workspace.slots_per_head - (m - blocks.begin);
                m = blocks.begin;
            }
        }
    }

    // One block of queries.
    __device__ __forceinline__ void work_on(const AttentionTile& tile, int m, int64_t dq_slot, KeyRange common) {
        float scores[kScores], dscores[kScores], dq[Traits::kDqRegisters];
        uint32_t probabilities[kScores / 2], packed[kScores / 2];
        auto pack_probabilities = [&] {
#pragma unroll
            for (int j = 0; j < kScores; j += 2) probabilities[j / 2] = pack<T>(scores[j], scores[j + 1]);
        };
        const uint64_t stage = place.stage() * (Traits::kQBytes >> 4);
        mbarrier_wait(shared + Traits::kQFull + 8 * place.stage(), place.parity());
        if (shape.cu_seqlens && (m + 1) * Traits::kBlockM > tile.q_len) {
            const uint32_t of_stage = place.stage() * Traits::kQBytes;
            mbarrier_wait(shared + Traits::kDoutFull + 8 * place.stage(), place.parity());
            clear_after<Traits::kBlockM>(Traits::kQ + of_stage, Traits::kDout + of_stage,
                                         tile.q_len - m * Traits::kBlockM);
        }
        multiply_scores(scores, k_scores, q_scores + stage);
        mbarrier_wait(shared + Traits::kDoutFull + 8 * place.stage(), place.parity());
        multiply_scores(dscores, v_scores, dout_scores + stage);
        wgmma_wait<1>();
        pin(scores);
        mask(scores, tile, m * Traits::kBlockM + group_query, common);
        exponentiate(scores);
        if constexpr (Traits::kDvFirst) {
            pack_probabilities();
            multiply_gradient(dv, probabilities, probabilities_dv, dout_dv + stage);
            wgmma_wait<1>();
        } else {
            wgmma_wait<0>();
        }
        pin(dscores);
        if constexpr (!Traits::kDvFirst) pack_probabilities();
        times_gradients(packed, scores, dscores);
        constexpr bool kDvLast = Traits::kSplitColumns;
        if constexpr (!Traits::kDvFirst && !kDvLast)
            multiply_gradient(dv, probabilities, probabilities_dv, dout_dv + stage);
        mbarrier_wait(shared + Traits::kDsEmpty, place_of_ds.parity() ^ 1);
        place_of_ds.advance();
        store_scores(Traits::kDs, packed);
        if constexpr (Traits::kSplitColumns) store_scores(Traits::kProbabilities, probabilities);
        fence_async_proxy();
        named_barrier_sync(kEveryGroup, 2 * kWarpgroup);
        multiply_dq(dq);
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
    }

    __device__ __forceinline__ void arrive(uint32_t barrier) {
        if (lane == 0) mbarrier_arrive(shared + barrier);
    }

    // Rows of two tiles of `Rows` rows that are not the sequence's, by all consumers together.
    template <int Rows>
    __device__ __forceinline__ void clear_after(uint32_t one, uint32_t other, int row) {
        const int thread = threadIdx.x - kWarpgroup;
        clear_rows<Traits::kPanels, Rows, Traits::kRowBytes>(base + one, row, thread, 2 * kWarpgroup);
        clear_rows<Traits::kPanels, Rows, Traits::kRowBytes>(base + other, row, thread, 2 * kWarpgroup);
        fence_async_proxy();
        named_barrier_sync(kEveryGroup, 2 * kWarpgroup);
    }

    __device__ __forceinline__ void multiply_scores(float (&scores)[kScores], uint64_t a, uint64_t b) {
        wgmma_fence();
#pragma unroll
        for (int d = 0; d < HeadDim; d += 16) {
            const int panel = d / Traits::kPanel, within = d % Traits::kPanel * 2;
            Wgmma<Traits::kScoreColumns, T, false, false>::multiply(scores, a + (panel * kPanelBytes + within >> 4),
                                                                    b + (panel * kQPanelBytes + within >> 4), d > 0);
        }
        wgmma_commit();
    }

    // a: the registers, or else the shared memory, that hold keys by queries
    __device__ __forceinline__ void multiply_gradient(float (&gradient)[kGradients], const uint32_t* a,
                                                      uint64_t shared_a, uint64_t b) {
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
    }

    __device__ __forceinline__ void multiply_dq(float (&dq)[Traits::kDqRegisters]) {
        wgmma_fence();
#pragma unroll
        for (int n = 0; n < Traits::kBlockN; n += 16)
            Wgmma<Traits::kDqColumns, T, true, true>::multiply(dq, ds_dq + (n * Traits::kDsRowBytes >> 4),
                                                               k_dq + (n * Traits::kRowBytes >> 4), n > 0);
        wgmma_commit();
    }

    __device__ __forceinline__ void mask(float (&scores)[kScores], const AttentionTile& tile, int query,
                                         KeyRange common) {
        if (query >= common.first && query + Traits::kScoreColumns - 1 <= common.last) return;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int key = tile.block * Traits::kBlockN + group_key + warp * 16 + lane / 4 + 8 * h;
            const KeyRange queries = visible_queries(shape, tile, key);
            mask_row(scores, h, queries.first - query - queries_at, queries.last - query - queries_at);
        }
    }

    // This thread's queries in a block's statistics.
    __device__ __forceinline__ const float2* statistics(uint32_t of) {
        return reinterpret_cast<const float2*>(base + of + place.stage() * Traits::kStatisticsBytes +
                                               (group_query + queries_at) * 4);
    }

    __device__ __forceinline__ void exponentiate(float (&scores)[kScores]) {
        const float2* minus_lse = statistics(Traits::kLse);
#pragma unroll
        for (int j = 0; j < kScores; j += 4) {
            const float2 l = minus_lse[j];
            scores[j] = exp2_approx(fmaf(scores[j], scale, l.x));
            scores[j + 1] = exp2_approx(fmaf(scores[j + 1], scale, l.y));
            scores[j + 2] = exp2_approx(fmaf(scores[j + 2], scale, l.x));
            scores[j + 3] = exp2_approx(fmaf(scores[j + 3], scale, l.y));
        }
    }

    // Gradients of the scores: p (dp - delta)
    __device__ __forceinline__ void times_gradients(uint32_t (&packed)[kScores / 2], const float (&p)[kScores],
                                                    const float (&dp)[kScores]) {
        const float2* delta = statistics(Traits::kDelta);
#pragma unroll
        for (int j = 0; j < kScores; j += 4) {
            const float2 d = delta[j];
            packed[j / 2] = pack<T>(p[j] * (dp[j] - d.x), p[j + 1] * (dp[j + 1] - d.y));
            packed[j / 2 + 1] = pack<T>(p[j + 2] * (dp[j + 2] - d.x), p[j + 3] * (dp[j + 3] - d.y));
        }
    }

    // Swizzled: the 16-byte unit of a row is exclusive-or'ed with the row.
    __device__ __forceinline__ void store_scores(uint32_t to, const uint32_t (&packed)[kScores / 2]) {
        const uint32_t row = shared + to + (group_key + warp * 16 + lane % 16) * Traits::kDsRowBytes +
                             ((lane / 16 ^ lane % 8 ^ group_query / 8) << 4);
#pragma unroll
        for (int j = 0; j < kScores / 2; j += 4)
            stmatrix_x4((row ^ (j / 2 % 8 << 4)) + j / 16 * Traits::kDsPanelBytes, packed[j], packed[j + 1],
                        packed[j + 2], packed[j + 3]);
    }

    // In the order of the accumulator's registers. A fixed order of additions is kept by each warp for its part.
    __device__ __forceinline__ void add_dq(const float (&dq)[Traits::kDqRegisters], int64_t dq_slot, int before) {
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
    }

    // To the warp that adds it.
    __device__ __forceinline__ void hand_over_dq(const float (&dq)[Traits::kDqRegisters]) {
        mbarrier_wait(shared + Traits::kDqEmpty + 8 * group, dq_place.parity() ^ 1);
        dq_place.advance();
        char* rows = base + Traits::kDq + group * Traits::kDqBytes;
        float4* to = reinterpret_cast<float4*>(rows) + threadIdx.x % kWarpgroup;
#pragma unroll
        for (int j = 0; j < Traits::kDqRegisters; j += 4)
            to[j / 4 * kWarpgroup] = float4{dq[j], dq[j + 1], dq[j + 2], dq[j + 3]};
        fence_async_proxy();
        __syncwarp();
        arrive(Traits::kDqFull + 8 * group);
    }

    // What was added up, and K and V are not needed any more.
    __device__ __forceinline__ void store(const AttentionTile& tile) {
        // Rows go out over those columns of K that only this warpgroup multiplied after the last barrier of all.
        static_assert(!Traits::kSplitColumns || Traits::kOutBytes == 2 * Traits::kBlockN * Traits::kDqColumns, "");
        if constexpr (Traits::kSplitColumns)
            named_barrier_sync(kGroup + group, kWarpgroup);
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
    }

    __device__ __forceinline__ void store_rows(const float (&gradient)[kGradients], float factor,
                                               const AttentionOutput& to, const AttentionTile& tile) {
        bulk_wait_read();
        __syncwarp();
        const int row = tile.block * Traits::kBlockN + group_key + warp * 16;
        char* rows = base + Traits::kOut + group * Traits::kOutBytes + warp * (Traits::kOutBytes / 4);
        store_warp_rows<T, Traits::kPanel>(gradient, {factor, factor}, rows, to, shape, tile, tile.k_row + row,
                                           tile.k_len - row, group_column);
    }

    // The order of the accumulator's registers is as good as any: the last pass adds the shares up and sorts them out.
    __device__ __forceinline__ void store_share(const float (&gradient)[kGradients], float* shares,
                                                const AttentionTile& tile) {
        const int64_t half = 2 * key_slot<Traits::kBlockN>(shape, args.workspace, tile, tile.head) + group;
        float4* to =
            reinterpret_cast<float4*>(shares + half * (Traits::kBlockN * HeadDim / 2)) + threadIdx.x % kWarpgroup;
#pragma unroll
        for (int j = 0; j < kGradients; j += 4)
            to[j / 4 * kWarpgroup] = float4{gradient[j], gradient[j + 1], gradient[j + 2], gradient[j + 3]};
    }
};
