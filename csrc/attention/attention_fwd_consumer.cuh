// What the forward pass's kernel keeps in shared memory, and what a warpgroup of it does with each tile.
#pragma once
#include "attention/attention_bend.cuh"
#include "attention/attention_softmax.cuh"

template <int HeadDim>  // 64, 96, 128, 192 or 256: what smaller heads are padded to, in shared memory
struct AttentionFwdTraits : AttentionPanels<HeadDim> {
    static constexpr int kConsumers = HeadDim == 64 ? 3 : 2;
    static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
    static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 40;
    static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 232;
    static constexpr int kBlockM = 64 * kConsumers;
    static constexpr int kBlockN = HeadDim == 256 ? 80 : HeadDim == 192 ? 112 : 128;
    static constexpr int kStages = 2;
    static constexpr bool kOutOverQ = HeadDim >= 192;  // no shared memory left for both
    static constexpr int kQStages = kOutOverQ ? 1 : 2;
    static constexpr bool kPingpong = HeadDim <= 128;

    static constexpr int kKvBytes = 2 * kBlockN * HeadDim;
    static constexpr int kQBytes = 2 * 64 * HeadDim;  // of one warpgroup, as its output

    struct Shared {
        alignas(1024) char k[kStages][kKvBytes];
        char v[kStages][kKvBytes];
        char q[kQStages][kConsumers][kQBytes];
        char out[kOutOverQ ? 1 : kConsumers][kOutOverQ ? 16 : kQBytes];
        AttentionTile tiles[2];
        uint64_t q_full[kQStages], q_empty[kQStages];
        uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
        uint64_t tile_full[2], tile_empty[2];
    };
    static_assert(sizeof(Shared) <= 232448 && kKvBytes % 1024 == 0 && kQBytes % 1024 == 0, "");
};

struct AttentionFwdArguments {
    AttentionFwdParams params;
    AttentionTileOrder order;
    AttentionBend bend;
    CUtensorMap q, k, v;
    AttentionOutput out;
};

// A warpgroup owns 64 queries, and multiplies the next scores while it exponentiates the last ones.
template <class T, int HeadDim, bool kBent>  // kBent: whether there is a softcap, or ALiBi
struct AttentionFwdConsumer {
    using Traits = AttentionFwdTraits<HeadDim>;
    static constexpr int kScores = Traits::kBlockN / 2, kOutputs = HeadDim / 2;  // accumulator registers
    static constexpr int kTurn = 1, kGroup = 4, kEveryGroup = 7;  // named barriers; of the first two one per group

    const AttentionFwdArguments& args;
    typename Traits::Shared& shared;
    const int group;
    const AttentionShape& shape = args.params.shape;
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const uint64_t k_operand = operand_depth_in_rows<Traits::kRowBytes>(shared_address(shared.k));
    const uint64_t v_operand =
        operand_depth_across_rows<Traits::kRowBytes>(shared_address(shared.v), Traits::kBlockN * Traits::kRowBytes);
    const uint64_t q_operand = operand_depth_in_rows<Traits::kRowBytes>(shared_address(shared.q[0][group]));

    float scores[kScores], output[kOutputs];
    uint32_t probabilities[kScores / 2];  // exponentials, packed: operand A of the second product
    RingPlace<Traits::kStages> k_place, v_place;
    RingPlace<Traits::kQStages> q_place;
    RingPlace<2> slot;

    GK_DEVICE void run() {
        if (Traits::kPingpong && group == Traits::kConsumers - 1) pass_turn();
        while (true) {
            mbarrier_wait(slot.of(shared.tile_full), slot.parity());
            const AttentionTile tile = shared.tiles[slot.stage()];
            __syncwarp();
            warp_arrive(slot.of(shared.tile_empty));
            slot.advance();
            if (tile.block < 0) break;
            AttentionSoftmax softmax = {kBent ? args.bend.unit : shape.scale * kLog2E};
            attend(tile, softmax);
            if (!Traits::kOutOverQ) warp_arrive(q_place.of(shared.q_empty));
            softmax.finish();
            store(tile, softmax);
            q_place.advance();
        }
        bulk_wait_read();
    }

    // The first of the warpgroup's queries, and the first of this thread's two, which are 8 apart.
    GK_DEVICE int group_row(const AttentionTile& tile) { return tile.block * Traits::kBlockM + group * 64; }
    GK_DEVICE int thread_row(const AttentionTile& tile) { return group_row(tile) + warp * 16 + lane / 4; }

    // Output of a tile, not yet divided by the sums, from the last block of keys to the first.
    GK_DEVICE void attend(const AttentionTile& tile, AttentionSoftmax& softmax) {
        const int row = thread_row(tile);
        const BlockRange blocks =
            key_blocks<Traits::kBlockN>(shape, tile, tile.block * Traits::kBlockM, Traits::kBlockM);
        const KeyRange keys[2] = {visible_keys(shape, tile, row), visible_keys(shape, tile, row + 8)};
        // Keys that all rows of the warpgroup see: blocks within need no mask.
        const KeyRange common = {visible_keys(shape, tile, group_row(tile) + 63).first,
                                 visible_keys(shape, tile, group_row(tile)).last};
        const float slope = kBent ? alibi_slope(args.bend, shape, tile, tile.head) : 0.f;
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) output[i] = 0.f;

        mbarrier_wait(q_place.of(shared.q_full), q_place.parity());
        if (blocks.begin >= blocks.end) return;
        mbarrier_wait(k_place.of(shared.k_full), k_place.parity());
        multiply_scores();
        wgmma_wait<0>();
        pin(scores);
        release(shared.k_empty, k_place);
        bend(blocks.end - 1, tile, slope);
        mask(blocks.end - 1, keys, common);
        softmax.update(scores);
        pack<T>(probabilities, scores);
        if (shape.cu_seqlens && blocks.end * Traits::kBlockN > tile.k_len)
            clear_values(tile.k_len - (blocks.end - 1) * Traits::kBlockN);
        for (int n = blocks.end - 2; n >= blocks.begin; --n) {
            mbarrier_wait(k_place.of(shared.k_full), k_place.parity());
            wait_turn();
            multiply_scores();
            mbarrier_wait(v_place.of(shared.v_full), v_place.parity());
            multiply_output();
            pass_turn();
            wgmma_wait<1>();
            pin(scores);
            release(shared.k_empty, k_place);
            bend(n, tile, slope);
            mask(n, keys, common);
            const bool rescale = softmax.update(scores);
            wgmma_wait<0>();
            pin(output);
            pin(probabilities);
            release(shared.v_empty, v_place);
            if (rescale) {
#pragma unroll
                for (int i = 0; i < kOutputs; ++i) output[i] *= softmax.factor[i / 2 % 2];
            }
            pack<T>(probabilities, scores);
        }
        mbarrier_wait(v_place.of(shared.v_full), v_place.parity());
        multiply_output();
        wgmma_wait<0>();
        pin(output);
        release(shared.v_empty, v_place);
    }

    GK_DEVICE void multiply_scores() {
        multiply_tiles<T, HeadDim, Traits::kBlockN, 64, Traits::kBlockN>(
            scores, q_operand + (q_place.stage() * Traits::kConsumers * Traits::kQBytes >> 4),
            k_operand + (k_place.stage() * Traits::kKvBytes >> 4));
    }

    GK_DEVICE void multiply_output() {
        const uint64_t b = v_operand + (v_place.stage() * Traits::kKvBytes >> 4);
        wgmma_fence();
#pragma unroll
        for (int n = 0; n < Traits::kBlockN; n += 16)
            Wgmma<HeadDim, T, false, true>::multiply(output, &probabilities[n / 4], b + (n * Traits::kRowBytes >> 4),
                                                     true);
        wgmma_commit();
    }

    GK_DEVICE void release(const uint64_t (&empty)[Traits::kStages], RingPlace<Traits::kStages>& place) {
        warp_arrive(place.of(empty));
        place.advance();
    }

    // The warpgroups take turns to issue their products, so that one multiplies while another exponentiates.
    GK_DEVICE void wait_turn() {
        if constexpr (Traits::kPingpong) named_barrier_sync(kTurn + group, 2 * kWarpgroup);
    }

    GK_DEVICE void pass_turn() {
        if constexpr (Traits::kPingpong)
            named_barrier_arrive(kTurn + (group + 1 == Traits::kConsumers ? 0 : group + 1), 2 * kWarpgroup);
    }

    GK_DEVICE void bend(int n, const AttentionTile& tile, float slope) {
        if constexpr (kBent) {
            cap_scores<T>(scores, args.bend);
            const int first = thread_row(tile) + tile.k_len - tile.q_len - n * Traits::kBlockN - lane % 4 * 2;
            subtract_distances(scores, slope, {float(first), float(first + 8)});
        }
    }

    GK_DEVICE void mask(int n, const KeyRange (&keys)[2], KeyRange common) {
        const int first = n * Traits::kBlockN;
        if (first >= common.first && first + Traits::kBlockN - 1 <= common.last) return;
        const int column = first + lane % 4 * 2;
        mask_row(scores, 0, keys[0].first - column, keys[0].last - column);
        mask_row(scores, 1, keys[1].first - column, keys[1].last - column);
    }

    // Of the block of values at hand from row `from` on: another sequence's.
    GK_DEVICE void clear_values(int from) {
        mbarrier_wait(v_place.of(shared.v_full), v_place.parity());
        clear_rows<HeadDim, Traits::kBlockN, Traits::kConsumers>(shared.v[v_place.stage()], from);
        fence_async_proxy();
        named_barrier_sync(kEveryGroup, Traits::kConsumers * kWarpgroup);
    }

    GK_DEVICE void store(const AttentionTile& tile, const AttentionSoftmax& softmax) {
        if (Traits::kOutOverQ)
            named_barrier_sync(kGroup + group, kWarpgroup);  // all four warps have read Q
        else
            bulk_wait_read();
        __syncwarp();
        float inverse[2] = {softmax.inverse_sum(0), softmax.inverse_sum(1)}, lse[2] = {softmax.lse(0), softmax.lse(1)};
        if (args.params.sinks) {
            const float sink = args.params.sinks_are_float ? static_cast<const float*>(args.params.sinks)[tile.head]
                                                           : float(static_cast<const T*>(args.params.sinks)[tile.head]);
            add_sink(sink, inverse[0], lse[0]);
            add_sink(sink, inverse[1], lse[1]);
        }
        const int first_row = group_row(tile) + warp * 16, row = thread_row(tile);
        char* rows = (Traits::kOutOverQ ? shared.q[0][group] : shared.out[group]) + warp * (Traits::kQBytes / 4);
        store_warp_rows<T, Traits::kPanel>(output, inverse, rows, args.out, shape, tile, tile.q_row + first_row,
                                           tile.q_len - first_row, 0);
        const int64_t lse_row = shape.cu_seqlens ? int64_t(tile.head) * shape.q_len + tile.q_row
                                                 : (int64_t(tile.batch) * shape.heads + tile.head) * shape.q_len;
#pragma unroll
        for (int h = 0; h < 2; ++h)
            if (lane % 4 == 0 && row + 8 * h < tile.q_len) args.params.lse[lse_row + row + 8 * h] = lse[h];
        if (Traits::kOutOverQ) {
            bulk_wait_read();
            __syncwarp();
            warp_arrive(q_place.of(shared.q_empty));
        }
    }
};
