// The products of the MLP on sm_90a. A producer warp brings operands in through TMA; two consumer warpgroups take turns
// with tiles of 128 x 128, so that one multiplies while the other activates. Clusters of two CTAs, one below the other,
// share the weight's tiles, which halves what those cost in L2 traffic.
#pragma once
#include "common/tensor_map.h"
#include "mlp/mlp_activation.cuh"

template <bool Backward>
struct MlpTraits {
    static constexpr int kConsumers = 2, kCluster = 2;
    static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
    static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
    static constexpr int kBlock = 128, kBlockK = 64;  // rows and columns of a tile; depth of a step
    static constexpr int kGroupM = 8;                 // tiles of a cluster below each other that come first, for L2
    static constexpr int kStages = Backward ? 4 : 5;
    static constexpr int kOperandBytes = kBlock * kBlockK * 2;
    static constexpr int kHalfBytes = kOperandBytes / 2;
    // What goes in and out with the epilogue, for each warp: 16 x 64 boxes of its rows, by half and panel of columns.
    static constexpr int kBoxRows = 16, kBoxColumns = 64, kBoxBytes = kBoxRows * kBoxColumns * 2;
    static constexpr int kBoxes = 4, kWarps = 4 * kConsumers;

    // Shared memory, from a base aligned to 1024 bytes.
    static constexpr int kA = 0;
    static constexpr int kB = kA + kStages * kOperandBytes;
    static constexpr int kBoxesAt = kB + kStages * kOperandBytes;
    static constexpr int kSums = kBoxesAt + kWarps * kBoxes * kBoxBytes;  // of columns, (warps, kBlock) float32
    static constexpr int kFull = kSums + (Backward ? kWarps * kBlock * 4 : 0);
    static constexpr int kEmpty = kFull + 8 * kStages;
    static constexpr int kBoxesFull = kEmpty + 8 * kStages;  // one for each warp
    static constexpr int kSharedBytes = kBoxesFull + 8 * kWarps;
    static_assert(kSharedBytes <= 232448, "");
};

struct MlpArguments {
    CUtensorMap a;       // (M, K)
    CUtensorMap b;       // (N, K) forward, (K, N) backward
    CUtensorMap aux;     // (M, N), read: residual forward, preact backward
    CUtensorMap beside;  // (M, N), written beside out: preact forward, act backward
    CUtensorMap out;     // (M, N): out forward, grad backward
    const void* bias;
    float* partials;
    bool has_aux, has_beside;
    int M, N, K;
    int tiles_m, tiles_n;  // of a cluster
    Activation activation;
};

struct MlpTile {
    int row, column;  // of its corner
};

// The tile of this CTA among the `index`th of the clusters.
template <bool Backward>
__device__ __forceinline__ MlpTile mlp_tile(const MlpArguments& args, int index) {
    using C = MlpTraits<Backward>;
    const int in_group = C::kGroupM * args.tiles_n, first = index / in_group * C::kGroupM;
    const int height = min(args.tiles_m - first, C::kGroupM), within = index % in_group;
    return {((first + within % height) * C::kCluster + int(cluster_rank())) * C::kBlock, within / height * C::kBlock};
}

template <bool Backward>
__device__ __forceinline__ void mlp_produce(const MlpArguments& args, uint32_t shared) {
    using C = MlpTraits<Backward>;
    const int rank = cluster_rank();
    RingPlace<C::kStages> place;
    for (int index = blockIdx.x / C::kCluster; index < args.tiles_m * args.tiles_n; index += gridDim.x / C::kCluster) {
        const MlpTile tile = mlp_tile<Backward>(args, index);
        const int half_column = tile.column + rank * (C::kBlock / 2);
        for (int k = 0; k < args.K; k += C::kBlockK) {
            const uint32_t full = shared + C::kFull + 8 * place.stage();
            const uint32_t a = shared + C::kA + place.stage() * C::kOperandBytes;
            const uint32_t b = shared + C::kB + place.stage() * C::kOperandBytes + rank * C::kHalfBytes;
            mbarrier_wait(shared + C::kEmpty + 8 * place.stage(), place.parity() ^ 1);
            mbarrier_arrive_expect(full, 2 * C::kOperandBytes);
            tma_load_2d(a, &args.a, full, k, tile.row);
            tma_multicast_2d(b, &args.b, full, Backward ? half_column : k, Backward ? k : half_column,
                             (1 << C::kCluster) - 1);
            place.advance();
        }
    }
}

template <class T, bool Backward>
__device__ __forceinline__ void mlp_consume(const MlpArguments& args, uint32_t shared, int group) {
    using C = MlpTraits<Backward>;
    constexpr int kTurn = 1, kGroup = 3;       // named barriers, one of each per group
    constexpr int kRegisters = C::kBlock / 2;  // of one half of the tile's rows
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int steps = (args.K + C::kBlockK - 1) / C::kBlockK;
    const uint64_t a_operand = operand_depth_in_rows<128>(shared + C::kA);
    const uint64_t b_operand = Backward ? operand_depth_across_rows<128>(shared + C::kB, C::kHalfBytes)
                                        : operand_depth_in_rows<128>(shared + C::kB);
    const uint32_t boxes = shared + C::kBoxesAt + (group * 4 + warp) * C::kBoxes * C::kBoxBytes;
    const uint32_t boxes_full = shared + C::kBoxesFull + 8 * (group * 4 + warp);

    float total[2][kRegisters];
    RingPlace<C::kStages> place;
    RingPlace<1> boxes_place;

    // Where this lane's row of 16 columns from 16 * j is, of the boxes of one half.
    auto block_at = [&](int half, int j) {
        return boxes + (half * 2 + j / 4) * C::kBoxBytes + lane % 16 * 128 + ((j % 4 * 2 + lane / 16) ^ lane % 8) * 16;
    };
    auto each_box = [&](MlpTile tile, auto work) {
#pragma unroll
        for (int i = 0; i < C::kBoxes; ++i)
            work(boxes + i * C::kBoxBytes, tile.column + i % 2 * C::kBoxColumns, tile.row + i / 2 * 64 + warp * 16);
    };
    auto store_boxes = [&](const CUtensorMap* map, MlpTile tile) {
        fence_async_proxy();
        __syncwarp();
        if (lane == 0) {
            each_box(tile, [&](uint32_t box, int column, int row) {
                if (row < args.M && column < args.N) tma_store_2d(map, box, column, row);
            });
            bulk_commit();
        }
    };
    auto wait_stored = [&] {
        if (lane == 0) bulk_wait_read();
        __syncwarp();
    };
    uint32_t packed[2][kRegisters / 2];
    auto pack_totals = [&] {
#pragma unroll
        for (int i = 0; i < kRegisters; ++i)
            packed[i % 2][i / 2] = pack<T>(total[i % 2][i / 2 * 2], total[i % 2][i / 2 * 2 + 1]);
    };
    auto put_packed = [&] {
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int j = 0; j < C::kBlock / 16; ++j) {
                const uint32_t* p = &packed[half][4 * j];
                stmatrix_x4(block_at(half, j), p[0], p[1], p[2], p[3]);
            }
    };

    // The ring is in the order of tiles: a warpgroup waits for its stages only after the other has taken those before.
    if (group == 1) named_barrier_arrive(kTurn, 2 * kWarpgroup);

    int turn = 0;
    for (int index = blockIdx.x / C::kCluster; index < args.tiles_m * args.tiles_n;
         index += gridDim.x / C::kCluster, turn ^= 1) {
        if (turn != group) {
            place.advance(steps);
            continue;
        }
        const MlpTile tile = mlp_tile<Backward>(args, index);
        wait_stored();
        if (args.has_aux && lane == 0) {
            mbarrier_arrive_expect(boxes_full, C::kBoxes * C::kBoxBytes);
            each_box(tile, [&](uint32_t box, int column, int row) {
                tma_load_2d(box, &args.aux, boxes_full, column, row);
            });
        }

        auto release = [&](uint32_t stage) {
            if (lane < C::kCluster) mbarrier_arrive_remote(shared + C::kEmpty + 8 * stage, lane);
        };
        named_barrier_sync(kTurn + group, 2 * kWarpgroup);
        uint32_t last_stage = 0;
        for (int step = 0; step < steps; ++step) {
            mbarrier_wait(shared + C::kFull + 8 * place.stage(), place.parity());
            const uint64_t a = a_operand + (place.stage() * C::kOperandBytes >> 4);
            const uint64_t b = b_operand + (place.stage() * C::kOperandBytes >> 4);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < C::kBlockK; k += 16)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    Wgmma<C::kBlock, T, false, Backward>::multiply(total[half], a + (half * C::kHalfBytes + 2 * k >> 4),
                                                                   b + (Backward ? k * 128 >> 4 : 2 * k >> 4),
                                                                   step > 0 || k > 0);
            wgmma_commit();
            if (step > 0) {
                wgmma_wait<1>();
                release(last_stage);
            }
            last_stage = place.stage();
            place.advance();
        }
        named_barrier_arrive(kTurn + (group ^ 1), 2 * kWarpgroup);
        wgmma_wait<0>();
        pin(total[0]);
        pin(total[1]);
        release(last_stage);

        if (args.has_aux) {
            mbarrier_wait(boxes_full, boxes_place.parity());
            boxes_place.advance();
            __syncwarp();
        }
        if constexpr (Backward) {
            float* const sums =
                static_cast<float*>(__cvta_shared_to_generic(shared + C::kSums)) + group * 4 * C::kBlock;
            with_activation(args.activation, [&](auto tag) {
#pragma unroll
                for (int j = 0; j < C::kBlock / 16; ++j) {
                    float sum[4] = {};
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const float* const t = &total[half][8 * j];
                        uint32_t preact[4], act[4];
                        ldmatrix_x4(block_at(half, j), preact);
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            const float2 x = unpack<T>(preact[i]);
                            float2 slope;
                            const float low = activate_and_slope<tag.value>(x.x, &slope.x);
                            const float high = activate_and_slope<tag.value>(x.y, &slope.y);
                            act[i] = pack<T>(low, high);
                            // Rounded before it is summed: the bias's gradient is made of what the others are.
                            packed[half][4 * j + i] = pack<T>(t[2 * i] * slope.x, t[2 * i + 1] * slope.y);
                            const float2 grad = unpack<T>(packed[half][4 * j + i]);
                            sum[i / 2 * 2] += grad.x, sum[i / 2 * 2 + 1] += grad.y;
                        }
                        if (args.has_beside) stmatrix_x4(block_at(half, j), act[0], act[1], act[2], act[3]);
                    }
                    if (args.partials) {
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
#pragma unroll
                            for (int step = 4; step < 32; step *= 2) sum[i] += __shfl_xor_sync(~0u, sum[i], step);
                            if (lane < 4) sums[warp * C::kBlock + j * 16 + i / 2 * 8 + lane * 2 + i % 2] = sum[i];
                        }
                    }
                }
            });
            if (args.partials) {
                named_barrier_sync(kGroup + group, kWarpgroup);
                const int n = threadIdx.x % kWarpgroup;
                const float sum = (sums[n] + sums[C::kBlock + n]) + (sums[2 * C::kBlock + n] + sums[3 * C::kBlock + n]);
                if (tile.row < args.M && tile.column + n < args.N)
                    args.partials[int64_t(tile.row / C::kBlock) * args.N + tile.column + n] = sum;
                named_barrier_sync(kGroup + group, kWarpgroup);
            }
            if (args.has_beside) {
                store_boxes(&args.beside, tile);
                wait_stored();
            }
        } else {
            if (args.bias) {
                const T* const bias = static_cast<const T*>(args.bias);
#pragma unroll
                for (int i = 0; i < kRegisters; i += 4) {
                    const int column = tile.column + i * 2 + lane % 4 * 2;
                    if (column >= args.N) continue;
                    const float low = float(bias[column]), high = float(bias[column + 1]);
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        total[half][i] += low, total[half][i + 1] += high;
                        total[half][i + 2] += low, total[half][i + 3] += high;
                    }
                }
            }
            if (args.has_beside) {
                pack_totals();
                put_packed();
                store_boxes(&args.beside, tile);
            }
            with_activation(args.activation, [&](auto tag) {
#pragma unroll
                for (int half = 0; half < 2; ++half)
#pragma unroll
                    for (int i = 0; i < kRegisters; ++i) total[half][i] = activate<tag.value>(total[half][i]);
            });
            if (args.has_aux) {
#pragma unroll
                for (int half = 0; half < 2; ++half)
#pragma unroll
                    for (int j = 0; j < C::kBlock / 16; ++j) {
                        uint32_t residual[4];
                        ldmatrix_x4(block_at(half, j), residual);
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            const float2 r = unpack<T>(residual[i]);
                            total[half][8 * j + 2 * i] += r.x, total[half][8 * j + 2 * i + 1] += r.y;
                        }
                    }
            }
            pack_totals();
            if (args.has_beside) wait_stored();
        }
        put_packed();
        store_boxes(&args.out, tile);
    }
    if (lane == 0) bulk_wait_read();
}

template <class T, bool Backward>
__global__ void __cluster_dims__(MlpTraits<Backward>::kCluster, 1, 1)
    __launch_bounds__(MlpTraits<Backward>::kThreads, 1) mlp_kernel(const __grid_constant__ MlpArguments args) {
    using C = MlpTraits<Backward>;
    extern __shared__ __align__(1024) char base[];
    const uint32_t shared = shared_address(base);
    const int warp = warp_index();
    if (warp == 0 && elect_one()) {
        prefetch_tensor_map(&args.a);
        prefetch_tensor_map(&args.b);
        for (int i = 0; i < C::kStages; ++i) {
            mbarrier_init(shared + C::kFull + 8 * i, 1);
            mbarrier_init(shared + C::kEmpty + 8 * i, 4 * C::kCluster);
        }
        for (int i = 0; i < C::kWarps; ++i) mbarrier_init(shared + C::kBoxesFull + 8 * i, 1);
        fence_mbarrier_init();
    }
    cluster_sync();
    if (warp < 4) {
        give_registers<C::kProducerRegisters>();
        if (warp == 0 && elect_one()) mlp_produce<Backward>(args, shared);
    } else {
        take_registers<C::kConsumerRegisters>();
        mlp_consume<T, Backward>(args, shared, warp / 4 - 1);
    }
    // Neither CTA leaves while the other still copies into its shared memory or arrives at its barriers.
    __syncwarp();
    cluster_sync();
}

// (rows, columns), rows `stride` apart; null gives a map that is never used.
template <class T>
CUtensorMap mlp_tensor_map(const char* tensor, const void* data, int rows, int columns, int64_t stride, int box_rows) {
    if (!data) return {};
    // A single row may have any stride in torch; the driver wants a multiple of 16 bytes.
    const cuuint64_t step = rows > 1 ? 2 * stride : 16;
    return encode_tensor_map<T>(tensor, data,
                                {2, {cuuint64_t(columns), cuuint64_t(rows)}, {step}, {64, cuuint32_t(box_rows)}});
}

template <class T, bool Backward>
void mlp_launch(MlpArguments& args, int sm_count, cudaStream_t stream) {
    using C = MlpTraits<Backward>;
    args.tiles_m = int(ceil_div(args.M, C::kCluster * C::kBlock));
    args.tiles_n = int(ceil_div(args.N, C::kBlock));
    const int64_t tiles = int64_t(args.tiles_m) * args.tiles_n, clusters = sm_count / C::kCluster;
    const unsigned ctas = C::kCluster * unsigned(tiles < clusters ? tiles : clusters);
    launch<mlp_kernel<T, Backward>>("mlp_kernel", {ctas, C::kThreads, C::kSharedBytes, stream}, args);
}

template <class T>
void mlp_fwd_launch(const MlpFwdParams& p, cudaStream_t stream) {
    using C = MlpTraits<false>;
    if (p.residual && p.preact) throw LaunchError("residual and preact cannot go together");
    bind_device();
    MlpArguments args = {};
    args.a = mlp_tensor_map<T>("a", p.a, p.M, p.K, p.a_stride, C::kBlock);
    args.b = mlp_tensor_map<T>("weight", p.weight, p.N, p.K, p.K, C::kBlock / 2);
    args.aux = mlp_tensor_map<T>("residual", p.residual, p.M, p.N, p.residual_stride, C::kBoxRows);
    args.beside = mlp_tensor_map<T>("preact", p.preact, p.M, p.N, p.N, C::kBoxRows);
    args.out = mlp_tensor_map<T>("out", p.out, p.M, p.N, p.N, C::kBoxRows);
    args.bias = p.bias;
    args.has_aux = p.residual, args.has_beside = p.preact;
    args.M = p.M, args.N = p.N, args.K = p.K;
    args.activation = p.activation;
    mlp_launch<T, false>(args, p.sm_count, stream);
}

template <class T>
void mlp_bwd_launch(const MlpBwdParams& p, cudaStream_t stream) {
    using C = MlpTraits<true>;
    bind_device();
    MlpArguments args = {};
    args.a = mlp_tensor_map<T>("dout", p.dout, p.M, p.K, p.dout_stride, C::kBlock);
    args.b = mlp_tensor_map<T>("weight", p.weight, p.K, p.N, p.N, C::kBlockK);
    args.aux = mlp_tensor_map<T>("preact", p.preact, p.M, p.N, p.N, C::kBoxRows);
    args.beside = mlp_tensor_map<T>("act", p.act, p.M, p.N, p.N, C::kBoxRows);
    args.out = mlp_tensor_map<T>("grad", p.grad, p.M, p.N, p.N, C::kBoxRows);
    args.partials = p.partials;
    args.has_aux = true, args.has_beside = p.act;
    args.M = p.M, args.N = p.N, args.K = p.K;
    args.activation = p.activation;
    mlp_launch<T, true>(args, p.sm_count, stream);
}
