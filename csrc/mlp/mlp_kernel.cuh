// The products of the MLP on sm_90a. A producer warp brings operands in through TMA; two consumer warpgroups multiply
// the upper and the lower half of a tile of 128 x 256. Clusters of two CTAs, one below the other, share the weight's
// tiles. A step of 64 in depth is then 32 KiB from L2 and 128 KiB to and from shared memory per 1,024 cycles of the
// tensor cores, which both can give. The warpgroups wait for no one but the ring: one multiplies alone while the other
// is still in its epilogue.
#pragma once
#include "mlp/mlp_epilogue.cuh"

template <class Epilogue>
GK_DEVICE void mlp_produce(const MlpArguments& args, MlpShared& shared) {
    using Traits = MlpTraits;
    constexpr uint16_t kAll = (1 << Traits::kCluster) - 1;
    constexpr int kShare = Traits::kColumns / Traits::kCluster;  // of the weight's columns, that this CTA loads for all
    constexpr int kPanel = 64;
    const int share = cluster_rank() * kShare;
    // Of a gated MLP one CTA loads the gate's columns, the other those of up.
    const bool is_up = Epilogue::kGatedTile && share > 0;
    const CUtensorMap* const weight = is_up ? &args.up : &args.b;
    RingPlace<Traits::kStages> place;
    for_each_mlp_tile<Epilogue::kTileColumns>(args, [&](MlpTile tile) {
        for (int k = 0; k < args.K; k += Traits::kDepth, place.advance()) {
            const uint32_t stage = place.stage(), full = place.of(shared.full);
            const uint32_t b = shared_address(&shared.b[stage][share * Traits::kDepth]);
            mbarrier_wait(place.of(shared.empty), place.parity() ^ 1);
            mbarrier_arrive_expect(full, sizeof(shared.a[0]) + sizeof(shared.b[0]));
            tma_load_2d(shared_address(shared.a[stage]), &args.a, full, k, tile.row);
            if constexpr (Epilogue::kWeightAcross) {
                for (int i = 0; i < kShare; i += kPanel)
                    tma_multicast_2d(b + i * Traits::kDepth * 2, &args.b, full, tile.column + share + i, k, kAll);
            } else {
                tma_multicast_2d(b, weight, full, k, tile.column + (Epilogue::kGatedTile ? 0 : share), kAll);
            }
        }
    });
}

// total: this warpgroup's 64 rows of a tile. beside: called with each step while the tensor cores work at it.
template <class T, class Epilogue, class Beside>
GK_DEVICE void mlp_multiply(const MlpArguments& args, MlpShared& shared, int group,
                            RingPlace<MlpTraits::kStages>& place, float (&total)[MlpTraits::kColumns / 2],
                            Beside beside) {
    using Traits = MlpTraits;
    constexpr bool kAcross = Epilogue::kWeightAcross;
    constexpr int kRowBytes = Traits::kDepth * 2;
    const uint32_t a_address = shared_address(&shared.a[0][group * Traits::kGroupRows * Traits::kDepth]);
    const uint64_t a_operand = operand_depth_in_rows<128>(a_address);
    const uint32_t b_address = shared_address(shared.b);
    const uint64_t b_operand =
        kAcross ? operand_depth_across_rows<128>(b_address, 64 * kRowBytes) : operand_depth_in_rows<128>(b_address);
    auto release = [&](uint32_t stage) {
        const int lane = threadIdx.x % 32;
        if (lane < Traits::kCluster) mbarrier_arrive_remote(shared_address(&shared.empty[stage]), lane);
    };
    uint32_t last_stage = 0;
    for (int step = 0, steps = (args.K + Traits::kDepth - 1) / Traits::kDepth; step < steps; ++step, place.advance()) {
        const uint32_t stage = place.stage();
        mbarrier_wait(place.of(shared.full), place.parity());
        const uint64_t a = a_operand + (stage * sizeof(shared.a[0]) >> 4);
        const uint64_t b = b_operand + (stage * sizeof(shared.b[0]) >> 4);
        wgmma_fence();
#pragma unroll
        for (int depth = 0; depth < Traits::kDepth; depth += 16)
            Wgmma<Traits::kColumns, T, false, kAcross>::multiply(
                total, a + (2 * depth >> 4), b + (kAcross ? depth * 128 >> 4 : 2 * depth >> 4), step > 0 || depth > 0);
        wgmma_commit();
        if (step > 0) {
            wgmma_wait<1>();
            release(last_stage);
        }
        last_stage = stage;
        beside(step, steps);
    }
    wgmma_wait<0>();
    pin(total);
    release(last_stage);
}

template <class T, class Epilogue>
GK_DEVICE void mlp_consume(const MlpArguments& args, MlpShared& shared, int group) {
    using Traits = MlpTraits;
    const int warp = group * 4 + threadIdx.x / 32 % 4;
    Epilogue epilogue(args, shared, warp);
    RingPlace<Traits::kStages> place;
    float total[Traits::kColumns / 2];
    for_each_mlp_tile<Epilogue::kTileColumns>(args, [&](MlpTile tile) {
        const MlpTile rows = {tile.row + warp * Traits::kBoxRows, tile.column};
        mlp_multiply<T, Epilogue>(args, shared, group, place, total,
                                  [&](int step, int steps) { epilogue.during(step, steps, rows); });
        epilogue.end(rows, total);
    });
    epilogue.finish();
    if (threadIdx.x % 32 == 0) bulk_wait_read();
}

template <class T, class Epilogue>
__global__ void __cluster_dims__(MlpTraits::kCluster, 1, 1) __launch_bounds__(MlpTraits::kThreads, 1)
    mlp_kernel(const __grid_constant__ MlpArguments args) {
    using Traits = MlpTraits;
    extern __shared__ __align__(1024) char base[];
    MlpShared& shared = *reinterpret_cast<MlpShared*>(base);
    const int warp = warp_index();
    if (warp == 0 && elect_one()) {
        prefetch_tensor_maps(args.a, args.b);
        init_ring(shared.full, 1, shared.empty, Traits::kWarps * Traits::kCluster);
        for (uint64_t& loaded : shared.boxes_loaded) mbarrier_init(shared_address(&loaded), 1);
        fence_mbarrier_init();
    }
    cluster_sync();
    if (warp < 4) {
        give_registers<Traits::kProducerRegisters>();
        if (warp == 0 && elect_one()) mlp_produce<Epilogue>(args, shared);
    } else {
        take_registers<Traits::kConsumerRegisters>();
        mlp_consume<T, Epilogue>(args, shared, warp / 4 - 1);
    }
    // Neither CTA leaves while the other still copies into its shared memory or arrives at its barriers.
    __syncwarp();
    cluster_sync();
}

// (rows, columns), rows `stride` apart; null gives a map that is never used.
template <class T>
CUtensorMap mlp_tensor_map(const char* tensor, const void* data, int rows, int columns, int64_t stride, int box_rows) {
    if (!data) return {};
    return encode_tensor_map<T>(
        tensor, data, {2, {cuuint64_t(columns), cuuint64_t(rows)}, {cuuint64_t(stride)}, {64, cuuint32_t(box_rows)}});
}

template <class T, class Epilogue>
void mlp_launch(MlpArguments& args, int sm_count, cudaStream_t stream) {
    using Traits = MlpTraits;
    args.tiles_m = int(ceil_div(args.M, Traits::kCluster * Traits::kRows));
    args.tiles_n = int(ceil_div(args.N, Epilogue::kTileColumns));
    args.parts = int(ceil_div(args.M, Traits::kGroupRows));
    const int64_t tiles = int64_t(args.tiles_m) * args.tiles_n, clusters = sm_count / Traits::kCluster;
    const unsigned ctas = Traits::kCluster * unsigned(tiles < clusters ? tiles : clusters);
    launch<mlp_kernel<T, Epilogue>>("mlp_kernel", {ctas, Traits::kThreads, sizeof(MlpShared), stream}, args);
}

// Calls work with an activation of compile time, one from First to Last.
template <Activation First, Activation Last, class Work>
void with_activation(Activation activation, Work work) {
    if (activation == First) return work(std::integral_constant<Activation, First>());
    if constexpr (First != Last)
        with_activation<Activation(int(First) + 1), Last>(activation, work);
    else
        throw LaunchError("this kernel has no activation " + std::to_string(int(activation)));
}

template <class T, Activation A>
void mlp_fwd_launch(const MlpFwdParams& p, cudaStream_t stream) {
    using Traits = MlpTraits;
    if (A == Activation::kNone ? p.preact : p.residual)
        throw LaunchError("preact goes with an activation, residual without one");
    bind_device();
    MlpArguments args = {};
    args.a = mlp_tensor_map<T>("a", p.a, p.M, p.K, p.a_stride, Traits::kRows);
    args.b = mlp_tensor_map<T>("weight", p.weight, p.N, p.K, p.K, Traits::kColumns / Traits::kCluster);
    args.epilogue_in = mlp_tensor_map<T>("residual", p.residual, p.M, p.N, p.residual_stride, Traits::kBoxRows);
    args.side_out = mlp_tensor_map<T>("preact", p.preact, p.M, p.N, p.N, Traits::kBoxRows);
    args.out = mlp_tensor_map<T>("out", p.out, p.M, p.N, p.N, Traits::kBoxRows);
    args.bias = p.bias;
    args.has_epilogue_in = p.residual, args.has_side_out = p.preact;
    args.M = p.M, args.N = p.N, args.K = p.K;
    using Epilogue = std::conditional_t<A == Activation::kNone, MlpLinear<T>, MlpActivate<T, A>>;
    mlp_launch<T, Epilogue>(args, p.sm_count, stream);
}

template <class T, Activation A>
void mlp_bwd_launch(const MlpBwdParams& p, cudaStream_t stream) {
    using Traits = MlpTraits;
    bind_device();
    MlpArguments args = {};
    args.a = mlp_tensor_map<T>("dout", p.dout, p.M, p.K, p.dout_stride, Traits::kRows);
    args.b = mlp_tensor_map<T>("weight", p.weight, p.K, p.N, p.N, Traits::kDepth);
    args.epilogue_in = mlp_tensor_map<T>("preact", p.preact, p.M, p.N, p.N, Traits::kBoxRows);
    args.side_out = mlp_tensor_map<T>("act", p.act, p.M, p.N, p.N, Traits::kBoxRows);
    args.out = mlp_tensor_map<T>("grad", p.grad, p.M, p.N, p.N, Traits::kBoxRows);
    args.partials = p.partials;
    args.has_epilogue_in = true, args.has_side_out = p.act;
    args.M = p.M, args.N = p.N, args.K = p.K;
    mlp_launch<T, MlpBackward<T, A>>(args, p.sm_count, stream);
}

template <class T, Activation A>
void gated_mlp_fwd_launch(const GatedMlpFwdParams& p, cudaStream_t stream) {
    using Traits = MlpTraits;
    if (!p.gate != !p.up) throw LaunchError("gate and up go together");
    bind_device();
    constexpr int kWeightRows = Traits::kColumns / Traits::kCluster;
    MlpArguments args = {};
    args.a = mlp_tensor_map<T>("a", p.a, p.M, p.K, p.a_stride, Traits::kRows);
    args.b = mlp_tensor_map<T>("gate_weight", p.gate_weight, p.N, p.K, p.gate_stride, kWeightRows);
    args.up = mlp_tensor_map<T>("up_weight", p.up_weight, p.N, p.K, p.up_stride, kWeightRows);
    args.side_out = mlp_tensor_map<T>("gate", p.gate, p.M, p.N, p.N, Traits::kBoxRows);
    args.up_out = mlp_tensor_map<T>("up", p.up, p.M, p.N, p.N, Traits::kBoxRows);
    args.out = mlp_tensor_map<T>("out", p.out, p.M, p.N, p.N, Traits::kBoxRows);
    args.bias = p.gate_bias, args.up_bias = p.up_bias;
    args.has_side_out = p.gate;
    args.M = p.M, args.N = p.N, args.K = p.K;
    mlp_launch<T, MlpActivate<T, A, true>>(args, p.sm_count, stream);
}

template <class T, Activation A>
void gated_mlp_bwd_launch(const GatedMlpBwdParams& p, cudaStream_t stream) {
    using Traits = MlpTraits;
    bind_device();
    MlpArguments args = {};
    args.a = mlp_tensor_map<T>("dout", p.dout, p.M, p.K, p.dout_stride, Traits::kRows);
    args.b = mlp_tensor_map<T>("weight", p.weight, p.K, p.N, p.N, Traits::kDepth);
    args.epilogue_in = mlp_tensor_map<T>("gate", p.gate, p.M, p.N, p.N, Traits::kBoxRows);
    args.up = mlp_tensor_map<T>("up", p.up, p.M, p.N, p.N, Traits::kBoxRows);
    args.side_out = mlp_tensor_map<T>("act", p.act, p.M, p.N, p.N, Traits::kBoxRows);
    args.out = mlp_tensor_map<T>("grad_gate", p.grad_gate, p.M, p.N, p.N, Traits::kBoxRows);
    args.up_out = mlp_tensor_map<T>("grad_up", p.grad_up, p.M, p.N, p.N, Traits::kBoxRows);
    args.partials = p.partials;
    args.has_side_out = p.act;
    args.M = p.M, args.N = p.N, args.K = p.K;
    mlp_launch<T, MlpGatedBackward<T, A>>(args, p.sm_count, stream);
}
