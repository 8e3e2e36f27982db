// Forward: the row is read once, its mean and centred variance are summed from registers, and it is written once.
#pragma once

#include "common/launch.h"
#include "common/philox.cuh"
#include "common/vector.cuh"
#include "layer_norm/layer_norm.h"
#include "layer_norm/layer_norm_shape.cuh"

// T: x, y and, unless they are float32, the parameters. H: residual and h.
template <typename T, typename H, int kVectors>
__global__ void __launch_bounds__(max_threads(kVectors), 1) layer_norm_fwd_kernel(const LayerNormFwdParams p, bool aligned) {
    __shared__ float2 scratch[kMaxWarps];
    constexpr bool kInRegisters = kVectors > 0;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    const bool row_exists = row < p.rows;
    // Rows past the end take part in the barriers, with nothing to read or write.
    const int columns = row_exists ? p.columns : 0;
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    const H* residual = static_cast<const H*>(p.residual) + row * p.residual_stride;
    H* h_out = static_cast<H*>(p.h) + row * p.columns;
    T* y = static_cast<T*>(p.y) + row * p.columns;
    const uint64_t seed = p.seed ? *p.seed : 0;

    float h[kInRegisters ? kVectors : 1][kElements];

    // h = dropout(x) + residual, rounded to what backward will read.
    auto read_first = [&](float (&vector)[kElements], int column) {
        load_vector(vector, x, column, columns, aligned);
        if (!p.residual) return;
        if (p.seed) {
#pragma unroll
            for (int j = 0; j < kElements; ++j)
                vector[j] = is_kept(seed, row, column + j, p.drop_below) ? vector[j] * p.keep_scale : 0.0f;
        }
        const Packed<H> other = load_packed(residual, column, columns, aligned);
        Packed<H> sum;
#pragma unroll
        for (int j = 0; j < kElements; ++j) {
            sum.set(j, vector[j] + other[j]);
            vector[j] = sum[j];
        }
        store_packed(h_out, sum, column, columns, aligned);
    };
    auto read_again = [&](float (&vector)[kElements], int column) {
        if constexpr (kInRegisters) return;
        if (p.residual)
            load_vector(vector, h_out, column, columns, aligned);
        else
            load_vector(vector, x, column, columns, aligned);
    };

    float sum = 0.0f;
    for_each_vector<kVectors>(columns, [&](int i, int column) {
        read_first(h[i], column);
#pragma unroll
        for (int j = 0; j < kElements; ++j) sum += column + j < columns ? h[i][j] : 0.0f;
    });
    const float mean = row_sum(make_float2(sum, 0.0f), blockDim.x, scratch).x / p.columns;

    float squares = 0.0f;
    for_each_vector<kVectors>(columns, [&](int i, int column) {
        read_again(h[i], column);
#pragma unroll
        for (int j = 0; j < kElements; ++j) {
            const float centred = column + j < columns ? h[i][j] - mean : 0.0f;
            squares += centred * centred;
        }
    });
    const float variance = row_sum(make_float2(squares, 0.0f), blockDim.x, scratch).x / p.columns;
    const float rstd = rsqrtf(variance + p.eps);

    for_each_vector<kVectors>(columns, [&](int i, int column) {
        read_again(h[i], column);
        float weight[kElements], bias[kElements] = {};
        load_vector_as<T>(weight, p.weight, p.weight_is_float, column, columns, aligned);
        if (p.bias) load_vector_as<T>(bias, p.bias, p.weight_is_float, column, columns, aligned);
        float out[kElements];
#pragma unroll
        for (int j = 0; j < kElements; ++j) out[j] = (h[i][j] - mean) * rstd * weight[j] + bias[j];
        store_vector(y, out, column, columns, aligned);
    });
    if (row_exists && threadIdx.x == 0) {
        p.mean[row] = mean;
        p.rstd[row] = rstd;
    }
}

template <typename T, typename H>
void launch_layer_norm_fwd(const LayerNormFwdParams& p, cudaStream_t stream) {
    const RowShape shape = row_shape(p.columns);
    const bool aligned = p.columns % kElements == 0 && rows_aligned(p.x, p.x_stride, sizeof(T)) &&
                         rows_aligned(p.residual, p.residual_stride, sizeof(H)) && rows_aligned(p.weight, 0, 4) &&
                         rows_aligned(p.bias, 0, 4) && rows_aligned(p.y, p.columns, sizeof(T)) &&
                         rows_aligned(p.h, p.columns, sizeof(H));
    const LaunchShape launch_shape = {static_cast<unsigned>(ceil_div(p.rows, shape.rows_per_cta)),
                                      dim3(shape.threads_per_row, shape.rows_per_cta), 0, stream};
    constexpr const char* kName = "layer_norm_fwd_kernel";
    switch (shape.vectors) {
        case 1: launch<layer_norm_fwd_kernel<T, H, 1>>(kName, launch_shape, p, aligned); break;
        case 2: launch<layer_norm_fwd_kernel<T, H, 2>>(kName, launch_shape, p, aligned); break;
        case 4: launch<layer_norm_fwd_kernel<T, H, 4>>(kName, launch_shape, p, aligned); break;
        default: launch<layer_norm_fwd_kernel<T, H, 0>>(kName, launch_shape, p, aligned); break;
    }
}
