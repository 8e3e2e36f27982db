// Attention forward on sm_90a. A producer warp brings tiles of Q, K and V in through TMA; each consumer warpgroup owns
// 64 queries, and multiplies the next scores while it exponentiates the last ones.
#pragma once
#include "attention/attention_softmax.cuh"
#include "attention/attention_tile.cuh"

template <int HeadDim>  // 64, 96, 128, 192 or 256: what smaller heads are padded to, in shared memory
struct AttentionFwdTraits {
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

    static constexpr int kPanel = HeadDim % 64 ? 32 : 64;  // columns of a swizzled panel
    static constexpr int kPanels = HeadDim / kPanel;
    static constexpr int kRowBytes = 2 * kPanel;
    static constexpr int kKvBytes = 2 * kBlockN * HeadDim;
    static constexpr int kQBytes = 2 * 64 * HeadDim;  // of one warpgroup, as its output

    struct Shared {
        alignas(1024) char k[kStages][kKvBytes];
        char v[kStages][kKvBytes];
        char q[kQStages][kConsumers][kQBytes];
        char out[kOutOverQ ? 16 : kConsumers * kQBytes];
        AttentionTile tiles[2];
        uint64_t q_full[kQStages], q_empty[kQStages];
        uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
        uint64_t tile_full[2], tile_empty[2];
    };
    static constexpr uint32_t kK = offsetof(Shared, k), kV = offsetof(Shared, v), kQ = offsetof(Shared, q);
    static constexpr uint32_t kOut = kOutOverQ ? kQ : offsetof(Shared, out);
    static constexpr uint32_t kTiles = offsetof(Shared, tiles);
    static constexpr uint32_t kQFull = offsetof(Shared, q_full), kQEmpty = offsetof(Shared, q_empty);
    static constexpr uint32_t kKFull = offsetof(Shared, k_full), kKEmpty = offsetof(Shared, k_empty);
    static constexpr uint32_t kVFull = offsetof(Shared, v_full), kVEmpty = offsetof(Shared, v_empty);
    static constexpr uint32_t kTileFull = offsetof(Shared, tile_full), kTileEmpty = offsetof(Shared, tile_empty);
    static constexpr int kSharedBytes = sizeof(Shared);
    static_assert(kSharedBytes <= 232448 && kKvBytes % 1024 == 0 && kQBytes % 1024 == 0, "");
};

struct AttentionFwdArguments {
    CUtensorMap q, k, v;
    AttentionOutput out;
    AttentionShape shape;
    AttentionTileOrder order;
    float* lse;
    int* tile_counter;
};

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
__device__ __forceinline__ void attention_fwd_consume(const AttentionFwdArguments& args, char* base, int group) {
    using Traits = AttentionFwdTraits<HeadDim>;
    constexpr int kScores = Traits::kBlockN / 2, kOutputs = HeadDim / 2;  // accumulator registers
    constexpr int kTurn = 1, kGroup = 4, kEveryGroup = 7;  // named barriers; of the first two one per group
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

    auto arrive = [&](int barrier) {
        if (lane == 0) mbarrier_arrive(shared + barrier);
    };
    auto multiply_scores = [&] {
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
    };
    auto multiply_output = [&] {
        const uint64_t b = v_operand + (v_place.stage() * Traits::kKvBytes >> 4);
        wgmma_fence();
#pragma unroll
        for (int n = 0; n < Traits::kBlockN; n += 16)
            Wgmma<HeadDim, T, false, true>::multiply(output, &probabilities[n / 4], b + (n * Traits::kRowBytes >> 4),
                                                     true);
        wgmma_commit();
    };
    auto release_k = [&] {
        arrive(Traits::kKEmpty + 8 * k_place.stage());
        k_place.advance();
    };
    auto release_v = [&] {
        arrive(Traits::kVEmpty + 8 * v_place.stage());
        v_place.advance();
    };
    auto pack_probabilities = [&] {
#pragma unroll
        for (int i = 0; i < kScores; i += 2) probabilities[i / 2] = pack<T>(scores[i], scores[i + 1]);
    };

    // The warpgroups take turns to issue their products, so that one multiplies while another exponentiates.
    auto wait_turn = [&] {
        if constexpr (Traits::kPingpong) named_barrier_sync(kTurn + group, 2 * kWarpgroup);
    };
    auto pass_turn = [&] {
        if constexpr (Traits::kPingpong)
            named_barrier_arrive(kTurn + (group + 1 == Traits::kConsumers ? 0 : group + 1), 2 * kWarpgroup);
    };
    if (Traits::kPingpong && group == Traits::kConsumers - 1) pass_turn();

    while (true) {
        mbarrier_wait(shared + Traits::kTileFull + 8 * slot.stage(), slot.parity());
        const AttentionTile tile = reinterpret_cast<AttentionTile*>(base + Traits::kTiles)[slot.stage()];
        __syncwarp();
        arrive(Traits::kTileEmpty + 8 * slot.stage());
        slot.advance();
        if (tile.block < 0) break;

        const int group_row = tile.block * Traits::kBlockM + group * 64;
        const int row = group_row + warp * 16 + lane / 4;  // and row + 8
        const BlockRange blocks =
            key_blocks<Traits::kBlockN>(shape, tile, tile.block * Traits::kBlockM, Traits::kBlockM);
        const KeyRange keys[2] = {visible_keys(shape, tile, row), visible_keys(shape, tile, row + 8)};
        // Keys that all rows of the warpgroup see: blocks within need no mask.
        const KeyRange common = {visible_keys(shape, tile, group_row + 63).first,
                                 visible_keys(shape, tile, group_row).last};
        auto mask = [&](int n) {
            const int first = n * Traits::kBlockN;
            if (first >= common.first && first + Traits::kBlockN - 1 <= common.last) return;
            const int column = first + lane % 4 * 2;
            mask_row(scores, 0, keys[0].first - column, keys[0].last - column);
            mask_row(scores, 1, keys[1].first - column, keys[1].last - column);
        };
        AttentionSoftmax softmax(shape.scale * 1.44269504088896f);

#pragma unroll
        for (int i = 0; i < kOutputs; ++i) output[i] = 0.f;

        mbarrier_wait(shared + Traits::kQFull + 8 * q_place.stage(), q_place.parity());
        if (blocks.begin < blocks.end) {
            mbarrier_wait(shared + Traits::kKFull + 8 * k_place.stage(), k_place.parity());
            multiply_scores();
            wgmma_wait<0>();
            pin(scores);
            release_k();
            mask(blocks.end - 1);
            softmax.update(scores);
            pack_probabilities();
            if (shape.cu_seqlens && blocks.end * Traits::kBlockN > tile.k_len) {
                mbarrier_wait(shared + Traits::kVFull + 8 * v_place.stage(), v_place.parity());
                clear_rows<Traits::kPanels, Traits::kBlockN, Traits::kRowBytes>(
                    base + Traits::kV + v_place.stage() * Traits::kKvBytes,
                    tile.k_len - (blocks.end - 1) * Traits::kBlockN, threadIdx.x - kWarpgroup,
                    Traits::kConsumers * kWarpgroup);
                fence_async_proxy();
                named_barrier_sync(kEveryGroup, Traits::kConsumers * kWarpgroup);
            }
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
                mask(n);
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
        if (!Traits::kOutOverQ) arrive(Traits::kQEmpty + 8 * q_place.stage());
        softmax.finish();

        if (Traits::kOutOverQ)
            named_barrier_sync(kGroup + group, kWarpgroup);  // all four warps have read Q
        else
            bulk_wait_read();
        __syncwarp();
        const float inverse[2] = {softmax.inverse_sum(0), softmax.inverse_sum(1)};
        const int out_row = group_row + warp * 16;
        store_warp_rows<T, Traits::kPanel>(output, inverse,
                                           base + Traits::kOut + group * Traits::kQBytes + warp * 32 * HeadDim, args.out,
                                           shape, tile, tile.q_row + out_row, tile.q_len - out_row, 0);
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
        q_place.advance();
    }
    bulk_wait_read();
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
        attention_fwd_consume<T, HeadDim>(args, base, warp / 4 - 1);
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
    args.out = {map("out", params.out, params.out_strides, shape.heads, shape.q_len, 16), params.out, params.out_strides};
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
