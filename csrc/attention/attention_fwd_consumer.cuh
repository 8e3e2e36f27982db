// What a warpgroup of the forward pass does with each tile: it owns 64 queries, and multiplies the next scores while it
// exponentiates the last ones.
#pragma once
#include "attention/attention_fwd_tile.cuh"
#include "attention/attention_softmax.cuh"

template <class T, int HeadDim>
struct AttentionFwdConsumer {
    using Traits = AttentionFwdTraits<HeadDim>;
    static constexpr int kScores = Traits::kBlockN / 2, kOutputs = HeadDim / 2;  // accumulator registers
    static constexpr int kTurn = 1, kGroup = 4, kEveryGroup = 7;  // named barriers; of the first two one per group

    const AttentionFwdArguments& args;
    char* const base;
    const int group;
    const AttentionShape& shape = args.shape;
    const uint32_t shared = shared_address(base);
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const uint64_t k_operand = operand_depth_in_rows<Traits::kRowBytes>(shared + Traits::kK);
    const uint64_t v_operand =
        operand_depth_across_rows<Traits::kRowBytes>(shared + Traits::kV, Traits::kBlockN * Traits::kRowBytes);
    const uint64_t q_operand = operand_depth_in_rows<Traits::kRowBytes>(shared + Traits::kQ + group * Traits::kQBytes);

    float scores[kScores], output[kOutputs];
    uint32_t probabilities[kScores / 2];  // exponentials, packed: operand A of the second product
    RingPlace<Traits::kStages> k_place, v_place;
    RingPlace<Traits::kQStages> q_place;
    RingPlace<2> slot;

    __device__ __forceinline__ void run() {
        if (Traits::kPingpong && group == Traits::kConsumers - 1) pass_turn();
        while (true) {
            mbarrier_wait(shared + Traits::kTileFull + 8 * slot.stage(), slot.parity());
            const AttentionTile tile = reinterpret_cast<AttentionTile*>(base + Traits::kTiles)[slot.stage()];
            __syncwarp();
            arrive(Traits::kTileEmpty + 8 * slot.stage());
            slot.advance();
            if (tile.block < 0) break;
            AttentionSoftmax softmax(shape.scale * 1.44269504088896f);
            attend(tile, softmax);
            if (!Traits::kOutOverQ) arrive(Traits::kQEmpty + 8 * q_place.stage());
            softmax.finish();
            store(tile, softmax);
            q_place.advance();
        }
        bulk_wait_read();
    }

    // The first of the warpgroup's queries, and the first of this thread's two, which are 8 apart.
    __device__ __forceinline__ int group_row(const AttentionTile& tile) {
        return tile.block * Traits::kBlockM + group * 64;
    }
    __device__ __forceinline__ int thread_row(const AttentionTile& tile) {
        return group_row(tile) + warp * 16 + lane / 4;
    }

    // Output of a tile, not yet divided by the sums, from the last block of keys to the first.
    __device__ __forceinline__ void attend(const AttentionTile& tile, AttentionSoftmax& softmax) {
        const int row = thread_row(tile);
        const BlockRange blocks =
            key_blocks<Traits::kBlockN>(shape, tile, tile.block * Traits::kBlockM, Traits::kBlockM);
        const KeyRange keys[2] = {visible_keys(shape, tile, row), visible_keys(shape, tile, row + 8)};
        // Keys that all rows of the warpgroup see: blocks within need no mask.
        const KeyRange common = {visible_keys(shape, tile, group_row(tile) + 63).first,
                                 visible_keys(shape, tile, group_row(tile)).last};
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) output[i] = 0.f;

        mbarrier_wait(shared + Traits::kQFull + 8 * q_place.stage(), q_place.parity());
        if (blocks.begin >= blocks.end) return;
        mbarrier_wait(shared + Traits::kKFull + 8 * k_place.stage(), k_place.parity());
        multiply_scores();
        wgmma_wait<0>();
        pin(scores);
        release_k();
        mask(blocks.end - 1, keys, common);
        softmax.update(scores);
        pack_probabilities();
        if (shape.cu_seqlens && blocks.end * Traits::kBlockN > tile.k_len)
            clear_values(tile.k_len - (blocks.end - 1) * Traits::kBlockN);
        for (int n = blocks.end - 2; n >= blocks.begin; --n) {
            mbarrier_wait(shared + Traits::kKFull + 8 * k_place.stage(), k_place.parity());
            wait_turn();
            multiply_scores();
            mbarrier_wait(shared + Traits::kVFull + 8 * v_place.stage(), v_place.parity());
            multiply_output();
            pass_turn();
            wgmma_wait<1>();
            pin(scores);
            release_k();
            mask(n, keys, common);
            const bool rescale = softmax.update(scores);
            wgmma_wait<0>();
            pin(output);
            pin(probabilities);
            release_v();
            if (rescale) {
#pragma unroll
                for (int i = 0; i < kOutputs; ++i) output[i] *= softmax.factor[i / 2 % 2];
            }
            pack_probabilities();
        }
        mbarrier_wait(shared + Traits::kVFull + 8 * v_place.stage(), v_place.parity());
        multiply_output();
        wgmma_wait<0>();
        pin(output);
        release_v();
    }

    __device__ __forceinline__ void arrive(uint32_t barrier) {
        if (lane == 0) mbarrier_arrive(shared + barrier);
    }

    __device__ __forceinline__ void multiply_scores() {
        const uint64_t a = q_operand + (q_place.stage() * Traits::kConsumers * Traits::kQBytes >> 4);
        const uint64_t b = k_operand + (k_place.stage() * Traits::kKvBytes >> 4);
        wgmma_fence();
#pragma unroll
        for (int d = 0; d < HeadDim; d += 16) {
            const int panel = d / Traits::kPanel, within = d % Traits::kPanel * 2;
            Wgmma<Traits::kBlockN, T, false, false>::multiply(
                scores, a + (panel * 64 * Traits::kRowBytes + within >> 4),
                b + (panel * Traits::kBlockN * Traits::kRowBytes + within >> 4), d > 0);
        }
        wgmma_commit();
    }

    __device__ __forceinline__ void multiply_output() {
        const uint64_t b = v_operand + (v_place.stage() * Traits::kKvBytes >> 4);
        wgmma_fence();
#pragma unroll
        for (int n = 0; n < Traits::kBlockN; n += 16)
            Wgmma<HeadDim, T, false, true>::multiply(output, &probabilities[n / 4], b + (n * Traits::kRowBytes >> 4),
                                                     true);
        wgmma_commit();
    }

    __device__ __forceinline__ void release_k() {
        arrive(Traits::kKEmpty + 8 * k_place.stage());
        k_place.advance();
    }

    __device__ __forceinline__ void release_v() {
        arrive(Traits::kVEmpty + 8 * v_place.stage());
        v_place.advance();
    }

    __device__ __forceinline__ void pack_probabilities() {
#pragma unroll
        for (int i = 0; i < kScores; i += 2) probabilities[i / 2] = pack<T>(scores[i], scores[i + 1]);
    }

    // The warpgroups take turns to issue their products, so that one multiplies while another exponentiates.
    __device__ __forceinline__ void wait_turn() {
        if constexpr (Traits::kPingpong) named_barrier_sync(kTurn + group, 2 * kWarpgroup);
    }

    __device__ __forceinline__ void pass_turn() {
        if constexpr (Traits::kPingpong)
            named_barrier_arrive(kTurn + (group + 1 == Traits::kConsumers ? 0 : group + 1), 2 * kWarpgroup);
    }

    __device__ __forceinline__ void mask(int n, const KeyRange (&keys)[2], KeyRange common) {
        const int first = n * Traits::kBlockN;
        if (first >= common.first && first + Traits::kBlockN - 1 <= common.last) return;
        const int column = first + lane % 4 * 2;
        mask_row(scores, 0, keys[0].first - column, keys[0].last - column);
        mask_row(scores, 1, keys[1].first - column, keys[1].last - column);
    }

    // Of the block of values at hand from row `from` on: another sequence's.
    __device__ __forceinline__ void clear_values(int from) {
        mbarrier_wait(shared + Traits::kVFull + 8 * v_place.stage(), v_place.parity());
        clear_rows<Traits::kPanels, Traits::kBlockN, Traits::kRowBytes>(
            base + Traits::kV + v_place.stage() * Traits::kKvBytes, from, threadIdx.x - kWarpgroup,
            Traits::kConsumers * kWarpgroup);
        fence_async_proxy();
        named_barrier_sync(kEveryGroup, Traits::kConsumers * kWarpgroup);
    }

    __device__ __forceinline__ void store(const AttentionTile& tile, const AttentionSoftmax& softmax) {
        if (Traits::kOutOverQ)
            named_barrier_sync(kGroup + group, kWarpgroup);  // all four warps have read Q
        else
            bulk_wait_read();
        __syncwarp();
        const float inverse[2] = {softmax.inverse_sum(0), softmax.inverse_sum(1)};
        const int first_row = group_row(tile) + warp * 16, row = thread_row(tile);
        char* rows = base + Traits::kOut + group * Traits::kQBytes + warp * (Traits::kQBytes / 4);
        store_warp_rows<T, Traits::kPanel>(output, inverse, rows, args.out, shape, tile, tile.q_row + first_row,
                                           tile.q_len - first_row, 0);
        const int64_t lse_row = shape.cu_seqlens ? int64_t(tile.head) * shape.q_len + tile.q_row
                                                 : (int64_t(tile.batch) * shape.heads + tile.head) * shape.q_len;
#pragma unroll
        for (int h = 0; h < 2; ++h)
            if (lane % 4 == 0 && row + 8 * h < tile.q_len) args.lse[lse_row + row + 8 * h] = softmax.lse(h);
        if (Traits::kOutOverQ) {
            bulk_wait_read();
            __syncwarp();
            arrive(Traits::kQEmpty + 8 * q_place.stage());
        }
    }
};
