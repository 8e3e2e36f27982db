// Backward: a fixed number of CTAs walk over the rows; each keeps its own share of the parameters' gradients and leaves
// it as one partial row, and a second kernel adds the partial rows up in a fixed order. No atomics, so the same bits
// every time.
#pragma once

#include "common/launch.h"
#include "common/philox.cuh"
#include "common/vector.cuh"
#include "layer_norm/layer_norm.h"
#include "layer_norm/layer_norm_shape.cuh"

// grads, added up over the rows of the CTA one after the other, become `partial`: (columns,).
template <bool kWhole, int kVectors>
__device__ __forceinline__ void store_partial(float* partial, int columns, Packed<float> (&grads)[kVectors]) {
    constexpr int kMost = kThreadsPerCta / 2 * kMaxVectors * kElements;  // columns, where a CTA has several rows
    __shared__ __align__(16) float totals[kMost];
    // Of the rows that share a warp the first gets the sum.
    const int rows_per_warp = blockDim.x < 32 ? 32 / blockDim.x : 1;
    for (int offset = 16; offset >= static_cast<int>(blockDim.x); offset /= 2)
#pragma unroll
        for (int i = 0; i < kVectors; ++i)
#pragma unroll
            for (int j = 0; j < kElements; ++j)
                grads[i].set(j, grads[i][j] + __shfl_xor_sync(0xffffffffu, grads[i][j], offset));
    for (int row = 0; row < blockDim.y; row += rows_per_warp) {
        __syncthreads();
        if (threadIdx.y != row) continue;
        for_each_vector<kVectors>(columns, [&](int i, int column) {
            if (column >= columns) return;
            const Packed<float> before = row > 0 ? load_packed(totals, column, kMost, true) : Packed<float>{};
#pragma unroll
            for (int j = 0; j < kElements; ++j) grads[i].set(j, grads[i][j] + before[j]);
            if (row + rows_per_warp < blockDim.y)
                store_packed(totals, grads[i], column, kMost, true);
            else
                store_packed<kWhole>(partial, grads[i], column, columns);
        });
    }
}

// How many threads of these kernels an SM holds, and a CTA has at most: they bound the registers, and the grid is made
// for them. Light: 16-bit h in whole words, which takes the fewest registers, of RMSNorm still fewer.
constexpr int bwd_threads_per_sm(int vectors, bool light, bool rms) {
    if (vectors == 0) return 512;
    if (!light) return 256;
    if (vectors == kMaxVectors) return rms ? 512 : 384;
    return !rms ? 640 : vectors == 1 ? 1024 : 768;
}
constexpr int bwd_max_threads(int vectors, bool light, bool rms) {
    if (vectors > 0 && !light) return 256;
    return rms && vectors == kMaxVectors ? 512 : max_threads(vectors);
}

// T: dy, grad_x and, unless they are float32, the parameters. H: h, dh and grad_h. kRms: RMSNorm. kWhole: rows are of
// whole 16-byte words. `blockDim.y` rows at a time.
template <typename T, typename H, bool kRms, int kVectors, bool kWhole, bool kLight = kWhole && sizeof(H) == 2>
__global__ void __launch_bounds__(bwd_max_threads(kVectors, kLight, kRms), bwd_threads_per_sm(kVectors, kLight, kRms) /
                                                                               bwd_max_threads(kVectors, kLight, kRms))
    layer_norm_bwd_kernel(const BwdParams<kRms> p) {
    constexpr int kSums = kRms ? 1 : 2;
    __shared__ float scratch[kSums * kMaxWarps];
    // The parameters' gradients: in registers, and where the row is not, in the CTA's partial row itself.
    constexpr bool kInRegisters = kVectors > 0;
    constexpr int kHeld = kInRegisters ? kVectors : 1;
    Packed<float> weight_grads[kHeld] = {}, bias_grads[kRms ? 1 : kHeld] = {};
    float* const weight_partial = p.partials + static_cast<int64_t>(blockIdx.x) * p.columns;
    float* const bias_partial = p.partials + static_cast<int64_t>(p.partial_rows + blockIdx.x) * p.columns;
    const uint64_t seed = p.seed ? *p.seed : 0;

    if (!kInRegisters && p.partials) {
        for_each_vector<kVectors>(p.columns, [&](int, int column) {
            store_packed<kWhole>(weight_partial, weight_grads[0], column, p.columns);
            if (!kRms) store_packed<kWhole>(bias_partial, bias_grads[0], column, p.columns);
        });
    }
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
    // All rows of a CTA go round together: they share its barriers.
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < p.rows; first += step) {
        const int64_t row = first + threadIdx.y;
        const int columns = row < p.rows ? p.columns : 0;
        const T* dy_row = static_cast<const T*>(p.dy);
        const H* h_row = static_cast<const H*>(p.h);
        if constexpr (kRms) {
            dy_row += row_offset(row, p.dy_stride, p.dy_group_stride, p.group_rows);
            h_row += row_offset(row, p.h_stride, p.h_group_stride, p.group_rows);
        } else {
            dy_row += row * p.dy_stride;
            h_row += row * p.h_stride;
        }
        const H* dh_row = static_cast<const H*>(p.dh) + row * p.dh_stride;

        Packed<T> dy[kHeld];
        Packed<H> h[kHeld];
        auto start_reading = [&](int i, int column) {
            dy[i] = load_packed<kWhole>(dy_row, column, columns);
            h[i] = load_packed<kWhole>(h_row, column, columns);
        };
        if constexpr (kInRegisters) for_each_vector<kVectors>(columns, start_reading);
        const float mean = columns && !kRms ? p.mean[row] : 0.0f;
        const float rstd = columns ? p.rstd[row] : 0.0f;
        auto x_hat = [&](int i, int j) { return (h[i][j] - mean) * rstd; };

        auto scaled = [&](float dy, float weight) {
            if constexpr (kRms) weight += p.offset;
            return dy * weight;
        };

        float sums[kSums] = {};
        with_parameters<T>(p.weight_is_float, [&](auto parameter) {
            using P = decltype(parameter);
            for_each_vector<kVectors>(columns, [&](int i, int column) {
                if constexpr (!kInRegisters) start_reading(i, column);
                const Packed<P> weight = load_weight<kWhole, kRms, P>(p.weight, column, columns);
#pragma unroll
                for (int j = 0; j < kElements; ++j) {
                    // Past the end of the row dy is 0.
                    const float weighted = scaled(dy[i][j], weight[j]);
                    sums[0] += weighted * x_hat(i, j);
                    if constexpr (!kRms) sums[1] += weighted;
                }
            });
        });
        row_sum<kVectors>(sums, blockDim.x, scratch);
        const float along_x_hat = sums[0] / p.columns, along_one = kRms ? 0.0f : sums[kSums - 1] / p.columns;

        with_parameters<T>(p.weight_is_float, [&](auto parameter) {
            using P = decltype(parameter);
            for_each_vector<kVectors>(columns, [&](int i, int column) {
                if constexpr (!kInRegisters) start_reading(i, column);
                const Packed<P> weight = load_weight<kWhole, kRms, P>(p.weight, column, columns);
                Packed<H> dh = {};
                if (p.dh) dh = load_packed<kWhole>(dh_row, column, columns);
                float grad[kElements];
                Packed<H> grad_h;
                if (!kInRegisters && p.partials) {
                    weight_grads[i] = load_packed<kWhole>(weight_partial, column, columns);
                    if constexpr (!kRms) bias_grads[i] = load_packed<kWhole>(bias_partial, column, columns);
                }
#pragma unroll
                for (int j = 0; j < kElements; ++j) {
                    const float x = x_hat(i, j);
                    grad[j] = (scaled(dy[i][j], weight[j]) - x * along_x_hat - along_one) * rstd + dh[j];
                    grad_h.set(j, grad[j]);
                    weight_grads[i].set(j, weight_grads[i][j] + dy[i][j] * x);
                    if constexpr (!kRms) bias_grads[i].set(j, bias_grads[i][j] + dy[i][j]);
                }
                store_packed<kWhole>(static_cast<H*>(p.grad_h) + row * p.columns, grad_h, column, columns);
                if (!kInRegisters && p.partials) {
                    store_packed<kWhole>(weight_partial, weight_grads[i], column, columns);
                    if constexpr (!kRms) store_packed<kWhole>(bias_partial, bias_grads[i], column, columns);
                }
                if (!p.grad_x) return;
                Packed<T> grad_x;
#pragma unroll
                for (int j = 0; j < kElements; ++j) {
                    const bool kept = !p.seed || is_kept(seed, row, column + j, p.drop_below);
                    grad_x.set(j, kept ? grad[j] * p.keep_scale : 0.0f);
                }
                store_packed<kWhole>(static_cast<T*>(p.grad_x) + row * p.columns, grad_x, column, columns);
            });
        });
    }
    if (!kInRegisters || !p.partials) return;
    store_partial<kWhole>(weight_partial, p.columns, weight_grads);
    if constexpr (!kRms) store_partial<kWhole>(bias_partial, p.columns, bias_grads);
}

// grad[n] = sum over the partial rows: 32 columns by as many partial rows at a time, and each thread a few of those.
constexpr int kReduceRows = 32;

template <typename T>
__global__ void __launch_bounds__(32 * kReduceRows) layer_norm_bwd_reduce_kernel(const LayerNormBwdParams p) {
    __shared__ float sums[kReduceRows][33];
    const int column = blockIdx.x * 32 + threadIdx.x;
    void* out = blockIdx.y == 0 ? p.grad_weight : p.grad_bias;
    if (!out) return;
    const float* partials = p.partials + static_cast<int64_t>(blockIdx.y) * p.partial_rows * p.columns;
    float sum = 0.0f;
    if (column < p.columns)
#pragma unroll 4
        for (int row = threadIdx.y; row < p.partial_rows; row += kReduceRows)
            sum += partials[static_cast<int64_t>(row) * p.columns + column];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    // Warp y has one of the columns now, a lane for each row.
    sum = sums[threadIdx.x][threadIdx.y];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    const int summed = blockIdx.x * 32 + threadIdx.y;
    if (threadIdx.x != 0 || summed >= p.columns) return;
    if (p.weight_is_float)
        static_cast<float*>(out)[summed] = sum;
    else
        static_cast<T*>(out)[summed] = from_float<T>(sum);
}

inline int bwd_ctas_per_sm(const RowShape& shape, bool light, bool rms) {
    return bwd_threads_per_sm(shape.vectors, light, rms) / (shape.threads_per_row * shape.rows_per_cta);
}

// As many as an SM holds of the light kernels. The others use fewer of the partial rows.
inline int norm_bwd_ctas(int64_t rows, int columns, int sm_count, bool rms) {
    const RowShape shape = row_shape(columns, kMaxVectors, bwd_max_threads(kMaxVectors, true, rms));
    const int64_t resident = static_cast<int64_t>(sm_count) * bwd_ctas_per_sm(shape, true, rms);
    const int64_t needed = ceil_div(rows, shape.rows_per_cta);
    return static_cast<int>(needed < resident ? needed : resident);
}

template <typename T, typename H, bool kRms, bool kWhole>
void launch_layer_norm_bwd_rows(BwdParams<kRms> p, cudaStream_t stream) {
    constexpr bool kLight = kWhole && sizeof(H) == 2;
    constexpr int kMost = kWhole ? kMaxVectors : 2;
    const RowShape light = row_shape(p.columns, kMaxVectors, bwd_max_threads(kMaxVectors, true, kRms));
    const RowShape shape = row_shape(p.columns, kMost, bwd_max_threads(kMost, kLight, kRms));
    const int fewer = p.partial_rows * bwd_ctas_per_sm(shape, kLight, kRms) / bwd_ctas_per_sm(light, true, kRms);
    p.partial_rows = fewer > 0 ? fewer : 1;
    const LaunchShape launch_shape = {static_cast<unsigned>(p.partial_rows),
                                      dim3(shape.threads_per_row, shape.rows_per_cta), 0, stream};
    with_vectors(shape.vectors, [&](auto vectors) {
        if constexpr (vectors.value <= kMost)
            launch<layer_norm_bwd_kernel<T, H, kRms, vectors.value, kWhole>>("layer_norm_bwd_kernel", launch_shape, p);
    });
    if (!p.partials) return;
    const LaunchShape reduce_shape = {dim3(static_cast<unsigned>(ceil_div(p.columns, 32)), kRms ? 1 : 2), dim3(32, kReduceRows), 0,
                                      stream};
    launch<layer_norm_bwd_reduce_kernel<T>>("layer_norm_bwd_reduce_kernel", reduce_shape, p);
}

template <typename T, typename H, bool kRms>
void launch_layer_norm_bwd(const BwdParams<kRms>& p, cudaStream_t stream) {
    bool whole = p.columns % kElements == 0 && rows_aligned(p.dy, p.dy_stride, sizeof(T)) &&
                 rows_aligned(p.dh, p.dh_stride, sizeof(H)) && rows_aligned(p.h, p.h_stride, sizeof(H)) &&
                 rows_aligned(p.weight, 0, 4) && rows_aligned(p.grad_h, p.columns, sizeof(H)) &&
                 rows_aligned(p.grad_x, p.columns, sizeof(T)) && rows_aligned(p.partials, p.columns, 4);
    if constexpr (kRms)
        whole = whole && rows_aligned(p.dy, p.dy_group_stride, sizeof(T)) &&
                rows_aligned(p.h, p.h_group_stride, sizeof(H));
    with_bool(whole, [&](auto is_whole) { launch_layer_norm_bwd_rows<T, H, kRms, is_whole.value>(p, stream); });
}

template <bool kRms>
void launch_norm_bwd(const BwdParams<kRms>& p, cudaStream_t stream) {
    with_type(p.x_dtype, [&](auto type) {
        using T = decltype(type);
        p.h_is_float ? launch_layer_norm_bwd<T, float, kRms>(p, stream) : launch_layer_norm_bwd<T, T, kRms>(p, stream);
    });
}
