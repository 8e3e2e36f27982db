// Backward: a fixed number of CTAs walk over the rows; each keeps its own share of the parameters' gradients and leaves
// it as one partial row, and a second kernel adds the partial rows up in a fixed order. No atomics, so the same bits
// every time.
#pragma once

#include "common/launch.h"
#include "common/philox.cuh"
#include "common/vector.cuh"
#include "layer_norm/layer_norm.h"
#include "layer_norm/layer_norm_shape.cuh"

// T: dy, grad_x and, unless they are float32, the parameters. H: h, dh and grad_h.
template <typename T, typename H, int kVectors>
__global__ void __launch_bounds__(max_threads(kVectors), 1) layer_norm_bwd_kernel(const LayerNormBwdParams p, bool aligned) {
    __shared__ float2 scratch[kMaxWarps];
    // Beyond one vector the gradients' accumulators live in shared memory (this thread's own columns, so no barrier),
    // and where even that is too small, in the CTA's partial row itself.
    constexpr bool kAccumulateInRegisters = kVectors == 1;
    constexpr bool kAccumulateInShared = kVectors > 1;
    extern __shared__ float shared_accumulators[];  // kAccumulateInShared: (blockDim.y, 2, blockDim.x * kVectors * kElements)
    constexpr int kHeld = kVectors > 0 ? kVectors : 1;

    float weight_registers[kElements] = {};
    float bias_registers[kElements] = {};
    const int partial = blockIdx.x * blockDim.y + threadIdx.y;
    float* weight_partial = p.partials + static_cast<int64_t>(partial) * p.columns;
    float* bias_partial = p.partials + static_cast<int64_t>(p.partial_rows + partial) * p.columns;
    const int accumulator_size = blockDim.x * kVectors * kElements;
    float* shared_row = shared_accumulators + 2 * threadIdx.y * accumulator_size;
    float* weight_accumulator = kAccumulateInShared ? shared_row : weight_partial;
    float* bias_accumulator = kAccumulateInShared ? shared_row + accumulator_size : bias_partial;
    const uint64_t seed = p.seed ? *p.seed : 0;
    if (p.partials && !kAccumulateInRegisters) {
        const float zeros[kElements] = {};
        for_each_vector<kVectors>(p.columns, [&](int, int column) {
            store_vector(weight_accumulator, zeros, column, p.columns, aligned);
            store_vector(bias_accumulator, zeros, column, p.columns, aligned);
        });
    }

    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
    // All rows of a CTA go round together: they share its barriers.
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < p.rows; first += step) {
        const int64_t row = first + threadIdx.y;
        const int columns = row < p.rows ? p.columns : 0;
        const T* dy_row = static_cast<const T*>(p.dy) + row * p.dy_stride;
        const H* h_row = static_cast<const H*>(p.h) + row * p.h_stride;
        const float mean = columns ? p.mean[row] : 0.0f;
        const float rstd = columns ? p.rstd[row] : 0.0f;

        Packed<T> dy[kHeld];
        Packed<H> h[kHeld];
        auto read = [&](int i, int column) {
            dy[i] = load_packed(dy_row, column, columns, aligned);
            h[i] = load_packed(h_row, column, columns, aligned);
        };
        auto x_hat = [&](int i, int j, int column) { return column + j < columns ? (h[i][j] - mean) * rstd : 0.0f; };

        float2 sums = make_float2(0.0f, 0.0f);
        for_each_vector<kVectors>(columns, [&](int i, int column) { if (kVectors > 0) read(i, column); });
        for_each_vector<kVectors>(columns, [&](int i, int column) {
            if (kVectors == 0) read(i, column);
            float weight[kElements];
            load_vector_as<T>(weight, p.weight, p.weight_is_float, column, columns, aligned);
#pragma unroll
            for (int j = 0; j < kElements; ++j) {
                const float weighted = dy[i][j] * weight[j];
                sums.x += weighted * x_hat(i, j, column);
                sums.y += weighted;
            }
        });
        sums = row_sum(sums, blockDim.x, scratch);
        const float along_x_hat = sums.x / p.columns, along_one = sums.y / p.columns;

        for_each_vector<kVectors>(columns, [&](int i, int column) {
            if (kVectors == 0) read(i, column);
            float grad[kElements];
            load_vector_as<T>(grad, p.weight, p.weight_is_float, column, columns, aligned);
#pragma unroll
            for (int j = 0; j < kElements; ++j)
                grad[j] = (dy[i][j] * grad[j] - x_hat(i, j, column) * along_x_hat - along_one) * rstd;
            if (p.dh) {
                const H* dh_row = static_cast<const H*>(p.dh) + row * p.dh_stride;
                const Packed<H> dh = load_packed(dh_row, column, columns, aligned);
#pragma unroll
                for (int j = 0; j < kElements; ++j) grad[j] += dh[j];
            }
            store_vector(static_cast<H*>(p.grad_h) + row * p.columns, grad, column, columns, aligned);
            if (p.grad_x) {
                if (p.seed) {
#pragma unroll
                    for (int j = 0; j < kElements; ++j)
                        grad[j] = is_kept(seed, row, column + j, p.drop_below) ? grad[j] * p.keep_scale : 0.0f;
                }
                store_vector(static_cast<T*>(p.grad_x) + row * p.columns, grad, column, columns, aligned);
            }
            if (!p.partials) return;
            if constexpr (kAccumulateInRegisters) {
#pragma unroll
                for (int j = 0; j < kElements; ++j) {
                    weight_registers[j] += dy[i][j] * x_hat(i, j, column);
                    bias_registers[j] += dy[i][j];
                }
            } else {
                float total[kElements];
                load_vector(total, weight_accumulator, column, columns, aligned);
#pragma unroll
                for (int j = 0; j < kElements; ++j) total[j] += dy[i][j] * x_hat(i, j, column);
                store_vector(weight_accumulator, total, column, columns, aligned);
                load_vector(total, bias_accumulator, column, columns, aligned);
#pragma unroll
                for (int j = 0; j < kElements; ++j) total[j] += dy[i][j];
                store_vector(bias_accumulator, total, column, columns, aligned);
            }
        });
    }

    if (!p.partials || kVectors == 0) return;
    for_each_vector<kVectors>(p.columns, [&](int i, int column) {
        if constexpr (kAccumulateInShared) {
            float total[kElements];
            load_vector(total, weight_accumulator, column, p.columns, aligned);
            store_vector(weight_partial, total, column, p.columns, aligned);
            load_vector(total, bias_accumulator, column, p.columns, aligned);
            store_vector(bias_partial, total, column, p.columns, aligned);
        } else {
            store_vector(weight_partial, weight_registers, column, p.columns, aligned);
            store_vector(bias_partial, bias_registers, column, p.columns, aligned);
        }
    });
}

// grad[n] = sum over the partial rows. One warp row of threads per 32 columns, 8 partial rows at a time.
constexpr int kReduceRows = 8;

template <typename T>
__global__ void __launch_bounds__(32 * kReduceRows) layer_norm_bwd_reduce_kernel(const LayerNormBwdParams p) {
    __shared__ float sums[kReduceRows][33];
    const int column = blockIdx.x * 32 + threadIdx.x;
    void* out = blockIdx.y == 0 ? p.grad_weight : p.grad_bias;
    if (!out) return;
    const float* partials = p.partials + static_cast<int64_t>(blockIdx.y) * p.partial_rows * p.columns;
    float sum = 0.0f;
    if (column < p.columns)
        for (int row = threadIdx.y; row < p.partial_rows; row += kReduceRows)
            sum += partials[static_cast<int64_t>(row) * p.columns + column];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y != 0 || column >= p.columns) return;
    sum = 0.0f;
#pragma unroll
    for (int row = 0; row < kReduceRows; ++row) sum += sums[row][threadIdx.x];
    if (p.weight_is_float)
        static_cast<float*>(out)[column] = sum;
    else
        static_cast<T*>(out)[column] = from_float<T>(sum);
}

inline int layer_norm_bwd_ctas(int64_t rows, const RowShape& shape, int sm_count) {
    const int threads = shape.threads_per_row * shape.rows_per_cta;
    const int64_t resident = static_cast<int64_t>(sm_count) * (threads >= 1024 ? 1 : 1024 / threads);
    const int64_t needed = ceil_div(rows, shape.rows_per_cta);
    return static_cast<int>(needed < resident ? needed : resident);
}

template <typename T, typename H, int kVectors>
void launch_layer_norm_bwd_rows(const LayerNormBwdParams& p, const RowShape& shape, bool aligned, cudaStream_t stream) {
    const dim3 block(shape.threads_per_row, shape.rows_per_cta);
    const int elements = shape.rows_per_cta * shape.threads_per_row * kVectors * kElements;
    const int shared = kVectors > 1 && p.partials ? 2 * elements * static_cast<int>(sizeof(float)) : 0;
    const unsigned ctas = p.partial_rows / shape.rows_per_cta;
    launch<layer_norm_bwd_kernel<T, H, kVectors>>("layer_norm_bwd_kernel", {ctas, block, shared, stream}, p, aligned);
}

template <typename T, typename H>
void launch_layer_norm_bwd(const LayerNormBwdParams& p, cudaStream_t stream) {
    const RowShape shape = row_shape(p.columns);
    const bool aligned = p.columns % kElements == 0 && rows_aligned(p.dy, p.dy_stride, sizeof(T)) &&
                         rows_aligned(p.dh, p.dh_stride, sizeof(H)) && rows_aligned(p.h, p.h_stride, sizeof(H)) &&
                         rows_aligned(p.weight, 0, 4) && rows_aligned(p.grad_h, p.columns, sizeof(H)) &&
                         rows_aligned(p.grad_x, p.columns, sizeof(T)) && rows_aligned(p.partials, p.columns, 4);
    switch (shape.vectors) {
        case 1: launch_layer_norm_bwd_rows<T, H, 1>(p, shape, aligned, stream); break;
        case 2: launch_layer_norm_bwd_rows<T, H, 2>(p, shape, aligned, stream); break;
        case 4: launch_layer_norm_bwd_rows<T, H, 4>(p, shape, aligned, stream); break;
        default: launch_layer_norm_bwd_rows<T, H, 0>(p, shape, aligned, stream); break;
    }
    if (!p.partials) return;
    const dim3 grid(static_cast<unsigned>(ceil_div(p.columns, 32)), 2);
    launch<layer_norm_bwd_reduce_kernel<T>>("layer_norm_bwd_reduce_kernel", {grid, dim3(32, kReduceRows), 0, stream}, p);
}
