// What a warpgroup of the backward pass's main kernel does with each tile: five products for every block of queries.
#pragma once
#include "attention/attention_bwd_tile.cuh"

template <class T, int HeadDim, bool kBent>  // kBent: whether there is a softcap, or ALiBi
struct AttentionBwdConsumer {
    using Traits = AttentionBwdTraits<HeadDim>;
    static constexpr int kScores = Traits::kScoreColumns / 2, kGradients = Traits::kGradientColumns / 2;  // registers
    static constexpr int kEveryGroup = 1, kGroup = 2;  // named barriers; of the second one per group
    static constexpr int kPanelBytes = Traits::kBlockN * Traits::kRowBytes;
    static constexpr int kQPanelBytes = Traits::kBlockM * Traits::kRowBytes;

    const AttentionBwdArguments& args;
    typename Traits::Shared& shared;
    const int group;
    const AttentionShape& shape = args.params.shape;
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const float scale = shape.scale * kLog2E;
    // What of the keys and of the queries this warpgroup computes scores of, and which columns of dk and dv.
    const int group_key = Traits::kSplitColumns ? 0 : group * 64;
    const int group_query = Traits::kSplitColumns ? group * Traits::kScoreColumns : 0;
    const int group_column = Traits::kSplitColumns ? group * Traits::kGradientColumns : 0;
    const int queries_at = lane % 4 * 2;  // this thread's columns of the scores are 8 i + queries_at + {0, 1}

    static constexpr auto multiply_scores =
        multiply_tiles<T, HeadDim, Traits::kScoreColumns, Traits::kBlockN, Traits::kBlockM>;
    // Operands, by what they multiply. Depth in rows, or across the rows of panels of keys, of queries or of scores.
    static constexpr auto in_rows = operand_depth_in_rows<Traits::kRowBytes>;
    static constexpr auto across_rows = operand_depth_across_rows<Traits::kRowBytes>;
    const uint32_t columns_of_q = group_column / Traits::kPanel * kQPanelBytes;
    const uint32_t columns_of_k = Traits::kSplitDqRows ? 0 : group * Traits::kDqColumns / Traits::kPanel * kPanelBytes;
    const uint64_t k_scores = in_rows(shared_address(shared.k) + group_key * Traits::kRowBytes);
    const uint64_t v_scores = in_rows(shared_address(shared.v) + group_key * Traits::kRowBytes);
    const uint64_t q_scores = in_rows(shared_address(shared.q) + group_query * Traits::kRowBytes);
    const uint64_t dout_scores = in_rows(shared_address(shared.dout) + group_query * Traits::kRowBytes);
    const uint64_t q_dk = across_rows(shared_address(shared.q) + columns_of_q, kQPanelBytes);
    const uint64_t dout_dv = across_rows(shared_address(shared.dout) + columns_of_q, kQPanelBytes);
    const uint64_t k_dq = across_rows(shared_address(shared.k) + columns_of_k, kPanelBytes);
    const uint64_t ds_dk = operand_depth_in_rows<Traits::kDsRowBytes>(shared_address(shared.ds));
    const uint64_t probabilities_dv =
        operand_depth_in_rows<Traits::kDsRowBytes>(shared_address(shared.exponentials_or_out));
    const uint64_t ds_dq = operand_depth_across_rows<Traits::kDsRowBytes>(
        shared_address(shared.ds) + (Traits::kSplitDqRows ? group * Traits::kDsPanelBytes : 0), Traits::kDsPanelBytes);

    float dk[kGradients], dv[kGradients];
    RingPlace<Traits::kStages> place;
    RingPlace<2> slot;
    RingPlace<1> kv_place, dq_place, place_of_ds;

    GK_DEVICE void run() {
        while (true) {
            mbarrier_wait(slot.of(shared.tile_full), slot.parity());
            const AttentionTile& tile = shared.tiles[slot.stage()];  // stays there: the loop has no registers for it
            if (tile.block < 0) break;
            add_up(tile);
            store(tile);
            warp_arrive(slot.of(shared.tile_empty));
            __syncwarp();  // else the other lanes go round before the one that arrives
            slot.advance();
        }
        bulk_wait_read();
    }

    // dk and dv of a tile.
    GK_DEVICE void add_up(const AttentionTile& tile) {
        const int first_key = tile.block * Traits::kBlockN + group_key;
        // Queries that see every key of the warpgroup: blocks within need no mask.
        const KeyRange common = {
            max(visible_queries(shape, tile, first_key).first, visible_queries(shape, tile, first_key + 63).first),
            visible_queries(shape, tile, first_key).last};
#pragma unroll
        for (int i = 0; i < kGradients; ++i) dk[i] = dv[i] = 0.f;

        mbarrier_wait(kv_place.of(shared.kv_full), kv_place.parity());
        kv_place.advance();
        if (shape.cu_seqlens && (tile.block + 1) * Traits::kBlockN > tile.k_len)
            clear_after<Traits::kBlockN>(shared.k, shared.v, tile.k_len - tile.block * Traits::kBlockN);
        for_each_query_block<HeadDim>(
            args, tile, [&](int head, int m, int64_t dq_slot) { work_on(tile, head, m, dq_slot, common); });
    }

    // One block of queries.
    GK_DEVICE void work_on(const AttentionTile& tile, int head, int m, int64_t dq_slot, KeyRange common) {
        float scores[kScores], dscores[kScores], dq[Traits::kDqRegisters];
        uint32_t probabilities[kScores / 2], packed[kScores / 2];
        const float slope = kBent ? alibi_slope(args.bend, shape, tile, head) : 0.f;
        const uint64_t stage = place.stage() * (Traits::kQBytes >> 4);
        mbarrier_wait(place.of(shared.q_full), place.parity());
        if (shape.cu_seqlens && (m + 1) * Traits::kBlockM > tile.q_len) {
            mbarrier_wait(place.of(shared.dout_full), place.parity());
            clear_after<Traits::kBlockM>(shared.q[place.stage()], shared.dout[place.stage()],
                                         tile.q_len - m * Traits::kBlockM);
        }
        multiply_scores(scores, k_scores, q_scores + stage);
        mbarrier_wait(place.of(shared.dout_full), place.parity());
        multiply_scores(dscores, v_scores, dout_scores + stage);
        wgmma_wait<1>();
        pin(scores);
        const int query = m * Traits::kBlockM + group_query;
        if constexpr (kBent) cap_scores<T>(scores, args.bend);
        mask(scores, tile, query, common);
        if constexpr (!kBent) exponentiate(scores);
        if constexpr (Traits::kDvFirst) {
            if constexpr (kBent)
                exponentiate_bent(probabilities, scores, first_distances(tile, query), slope);
            else
                pack<T>(probabilities, scores);
            multiply_gradient(dv, probabilities, probabilities_dv, dout_dv + stage);
            wgmma_wait<1>();
        } else {
            wgmma_wait<0>();
        }
        pin(dscores);
        if constexpr (kBent && !Traits::kDvFirst) {
            exponentiate_bent(probabilities, scores, first_distances(tile, query), slope, &packed, &dscores);
        } else {
            if constexpr (!Traits::kDvFirst) pack<T>(probabilities, scores);
            times_gradients(packed, scores, dscores);
        }
        constexpr bool kDvLast = Traits::kSplitColumns;
        if constexpr (!Traits::kDvFirst && !kDvLast)
            multiply_gradient(dv, probabilities, probabilities_dv, dout_dv + stage);
        mbarrier_wait(place_of_ds.of(shared.ds_empty), place_of_ds.parity() ^ 1);
        place_of_ds.advance();
        store_scores(shared.ds, packed);
        if constexpr (Traits::kSplitColumns) store_scores(shared.exponentials_or_out, probabilities);
        fence_async_proxy();
        named_barrier_sync(kEveryGroup, 2 * kWarpgroup);
        multiply_dq(dq);
        if constexpr (kDvLast) multiply_gradient(dv, probabilities, probabilities_dv, dout_dv + stage);
        multiply_gradient(dk, packed, ds_dk, q_dk + stage);

        auto release_dout = [&] {
            pin(dv);
            pin(probabilities);
            warp_arrive(place_of_ds.of(shared.ds_empty));
            warp_arrive(place.of(shared.dout_empty));
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
        warp_arrive(place.of(shared.q_empty));
        place.advance();
    }

    // Rows of two tiles of `Rows` rows that are not the sequence's, by all consumers together.
    template <int Rows>
    GK_DEVICE void clear_after(char* one, char* other, int row) {
        clear_rows<HeadDim, Rows, Traits::kConsumers>(one, row);
        clear_rows<HeadDim, Rows, Traits::kConsumers>(other, row);
        fence_async_proxy();
        named_barrier_sync(kEveryGroup, 2 * kWarpgroup);
    }

    // a: the registers, or else the shared memory, that hold keys by queries
    GK_DEVICE void multiply_gradient(float (&gradient)[kGradients], const uint32_t* a, uint64_t shared_a, uint64_t b) {
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

    GK_DEVICE void multiply_dq(float (&dq)[Traits::kDqRegisters]) {
        wgmma_fence();
#pragma unroll
        for (int n = 0; n < Traits::kBlockN; n += 16)
            Wgmma<Traits::kDqColumns, T, true, true>::multiply(dq, ds_dq + (n * Traits::kDsRowBytes >> 4),
                                                               k_dq + (n * Traits::kRowBytes >> 4), n > 0);
        wgmma_commit();
    }

    GK_DEVICE void mask(float (&scores)[kScores], const AttentionTile& tile, int query, KeyRange common) {
        if (query >= common.first && query + Traits::kScoreColumns - 1 <= common.last) return;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int key = tile.block * Traits::kBlockN + group_key + warp * 16 + lane / 4 + 8 * h;
            const KeyRange queries = visible_queries(shape, tile, key);
            mask_row(scores, h, queries.first - query - queries_at, queries.last - query - queries_at);
        }
    }

    // This thread's queries in a block's statistics.
    GK_DEVICE const float2* statistics(const float (&of)[Traits::kStages][Traits::kBlockM]) {
        return reinterpret_cast<const float2*>(of[place.stage()] + group_query + queries_at);
    }

    GK_DEVICE void exponentiate(float (&scores)[kScores]) {
        const float2* minus_lse = statistics(shared.lse);
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
    GK_DEVICE void times_gradients(uint32_t (&packed)[kScores / 2], const float (&p)[kScores],
                                   const float (&dp)[kScores]) {
#pragma unroll
        for (int j = 0; j < kScores; j += 4) times_gradients(packed, p, dp, j);
    }

    // Of four scores from j on.
    GK_DEVICE void times_gradients(uint32_t (&packed)[kScores / 2], const float (&p)[kScores],
                                   const float (&dp)[kScores], int j) {
        const float2 d = statistics(shared.delta)[j];
        packed[j / 2] = pack<T>(p[j] * (dp[j] - d.x), p[j + 1] * (dp[j + 1] - d.y));
        packed[j / 2 + 1] = pack<T>(p[j + 2] * (dp[j + 2] - d.x), p[j + 3] * (dp[j + 3] - d.y));
    }

    // Of this thread's two keys, from the first of its queries in the block that starts with `query`.
    GK_DEVICE float2 first_distances(const AttentionTile& tile, int query) {
        const int key = tile.block * Traits::kBlockN + group_key + warp * 16 + lane / 4;
        const int first = key - (tile.k_len - tile.q_len) - query - queries_at;
        return {float(first), float(first + 8)};
    }

    // Exponentials of capped scores less their distances, packed. Scores become what their gradients are multiplied by:
    // exponentials times the softcap's derivative. With dp these are done too, four at a time, for then few of them
    // are in registers together.
    template <bool kCapped, bool kAlibi>
    GK_DEVICE void exponentiate_bent(uint32_t (&probabilities)[kScores / 2], float (&scores)[kScores],
                                     float2 first, float slope, uint32_t (*packed)[kScores / 2],
                                     const float (*dp)[kScores]) {
        const float2* minus_lse = statistics(shared.lse);
#pragma unroll
        for (int j = 0; j < kScores; j += 4) {
            const float2 l = minus_lse[j];
            float p[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float capped = scores[j + i];
                const float score = kAlibi ? fmaf(-slope, diagonal_distance(first, j + i), capped) : capped;
                p[i] = exp2_approx(fmaf(score, args.bend.unit, i % 2 ? l.y : l.x));
                // Where there is a mask the score is -inf.
                scores[j + i] = kCapped ? p[i] * fmaxf(fmaf(-capped, capped, 1.f), 0.f) : p[i];
            }
            probabilities[j / 2] = pack<T>(p[0], p[1]);
            probabilities[j / 2 + 1] = pack<T>(p[2], p[3]);
            if (dp) times_gradients(*packed, scores, *dp, j);
        }
    }

    GK_DEVICE void exponentiate_bent(uint32_t (&probabilities)[kScores / 2], float (&scores)[kScores], float2 first,
                                     float slope, uint32_t (*packed)[kScores / 2] = nullptr,
                                     const float (*dp)[kScores] = nullptr) {
        if (args.bend.tanh_factor == 0.f)
            exponentiate_bent<false, true>(probabilities, scores, first, slope, packed, dp);
        else if (slope == 0.f)
            exponentiate_bent<true, false>(probabilities, scores, first, slope, packed, dp);
        else
            exponentiate_bent<true, true>(probabilities, scores, first, slope, packed, dp);
    }

    // Swizzled: the 16-byte unit of a row is exclusive-or'ed with the row.
    GK_DEVICE void store_scores(const char* to, uint32_t (&packed)[kScores / 2]) {
        const uint32_t row = shared_address(to) + (group_key + warp * 16 + lane % 16) * Traits::kDsRowBytes +
                             ((lane / 16 ^ lane % 8 ^ group_query / 8) << 4);
#pragma unroll
        for (int j = 0; j < kScores / 2; j += 4)
            stmatrix_x4((row ^ (j / 2 % 8 << 4)) + j / 16 * Traits::kDsPanelBytes, &packed[j]);
    }

    // In the order of the accumulator's registers. A fixed order of additions is kept by each warp for its part.
    GK_DEVICE void add_dq(const float (&dq)[Traits::kDqRegisters], int64_t dq_slot, int before) {
        constexpr int kWarps = 4 * Traits::kConsumers;
        int* added = args.workspace.added + dq_slot;
        while (before > 0 && load_acquire(added) < kWarps * before) {
        }
        float* to = args.workspace.dq + (2 * dq_slot + group) * (Traits::kDqBytes / 4);
        if (before == 0)
            put_accumulators(dq, to);
        else
            put_accumulators(dq, to, [](float4& at, float4 x) { red_add(&at, x); });
        __syncwarp();
        if (before >= 0 && lane == 0) red_release_add(added, 1);
    }

    // To the warp that adds it.
    GK_DEVICE void hand_over_dq(const float (&dq)[Traits::kDqRegisters]) {
        mbarrier_wait(shared_address(&shared.dq_empty[group]), dq_place.parity() ^ 1);
        dq_place.advance();
        put_accumulators(dq, shared.dq[group]);
        fence_async_proxy();
        __syncwarp();
        warp_arrive(shared_address(&shared.dq_full[group]));
    }

    // What was added up, and K and V are not needed any more.
    GK_DEVICE void store(const AttentionTile& tile) {
        // Rows go out over those columns of K that only this warpgroup multiplied after the last barrier of all.
        static_assert(!Traits::kSplitColumns || Traits::kOutBytes == 2 * Traits::kBlockN * Traits::kDqColumns, "");
        if constexpr (Traits::kSplitColumns)
            named_barrier_sync(kGroup + group, kWarpgroup);
        else
            warp_arrive(kv_place.of(shared.kv_empty));
        if (args.workspace.splits > 1) {
            store_share(dv, args.workspace.dv_shares, tile);
            store_share(dk, args.workspace.dk_shares, tile);
        } else {
            store_rows(dv, 1.f, args.dv, tile);
            store_rows(dk, shape.scale, args.dk, tile);
        }
        if constexpr (Traits::kSplitColumns) bulk_wait_read();
        __syncwarp();
        if constexpr (Traits::kSplitColumns) warp_arrive(kv_place.of(shared.kv_empty));
    }

    GK_DEVICE void store_rows(const float (&gradient)[kGradients], float factor, const AttentionOutput& to,
                              const AttentionTile& tile) {
        bulk_wait_read();
        __syncwarp();
        const int row = tile.block * Traits::kBlockN + group_key + warp * 16;
        store_warp_rows<T, Traits::kPanel>(gradient, {factor, factor},
                                           shared.out(group) + warp * (Traits::kOutBytes / 4), to, shape, tile,
                                           tile.k_row + row, tile.k_len - row, group_column);
    }

    // The order of the accumulator's registers is as good as any: the last pass adds the shares up and sorts them out.
    GK_DEVICE void store_share(const float (&gradient)[kGradients], float* shares, const AttentionTile& tile) {
        const int64_t first = first_slot<Traits::kBlockN>(shape, args.part_order, tile, tile.head, tile.k_row);
        put_accumulators(gradient, shares + (2 * (first + tile.block) + group) * (Traits::kBlockN * HeadDim / 2));
    }
};
