// Forward: the row is read once, its mean and centred variance are summed from registers, and it is written once.
#pragma once

#include <type_traits>

#include "common/launch.h"
#include "common/philox.cuh"
#include "common/vector.cuh"
#include "layer_norm/layer_norm.h"
#include "layer_norm/layer_norm_shape.cuh"

// CTAs that an SM holds at least: few enough registers that the loads of all of them keep HBM busy. With a residual
// each thread has twice as many under way.
constexpr int fwd_min_ctas(int vectors, bool light) {
    return vectors == 0 || vectors == kMaxVectors ? (light ? 2 : 1) : (light ? 8 : 5);
}

// T: x, y and, unless they are float32, the parameters. H: residual and h. kWhole: rows are of whole 16-byte words.
template <typename T, typename H, int kVectors, bool kResidual, bool kWhole>
__global__ void __launch_bounds__(max_threads(kVectors), fwd_min_ctas(kVectors, kWhole && !kResidual))
    layer_norm_fwd_kernel(const LayerNormFwdParams p) {
    __shared__ float2 scratch[kMaxWarps];
    constexpr bool kInRegisters = kVectors > 0;
    constexpr int kHeld = kInRegisters ? kVectors : 1;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    const bool row_exists = row < p.rows;
    // Rows past the end take part in the barriers, with nothing to read or write.
    const int columns = row_exists ? p.columns : 0;
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    const H* residual = static_cast<const H*>(p.residual) + row * p.residual_stride;
    H* h_out = static_cast<H*>(p.h) + row * p.columns;
    T* y = static_cast<T*>(p.y) + row * p.columns;

    Packed<T> xs[kHeld];
    Packed<H> residuals[kResidual ? kHeld : 1];
    using Row = std::conditional_t<kResidual, H, T>;
    Packed<Row> h[kHeld];

    auto start_reading = [&](int i, int column) {
        xs[i] = load_packed<kWhole>(x, column, columns);
        if constexpr (kResidual) residuals[i] = load_packed<kWhole>(residual, column, columns);
    };
    // h = dropout(x) + residual, rounded to what backward will read.
    auto make_h = [&](int i, int column) {
        if constexpr (kResidual) {
            const uint64_t seed = p.seed ? *p.seed : 0;
#pragma unroll
            for (int j = 0; j < kElements; ++j) {
                float value = xs[i][j];
                if (p.seed) value = is_kept(seed, row, column + j, p.drop_below) ? value * p.keep_scale : 0.0f;
                h[i].set(j, value + residuals[i][j]);
            }
            store_packed<kWhole>(h_out, h[i], column, columns);
        } else {
            h[i] = xs[i];
        }
    };
    auto read_again = [&](int i, int column) {
        if constexpr (kInRegisters) return;
        if constexpr (kResidual)
            h[i] = load_packed<kWhole>(h_out, column, columns);
        else
            h[i] = load_packed<kWhole>(x, column, columns);
    };
    auto inside = [&](int column, int j) { return column + (kWhole ? 0 : j) < columns; };

    if constexpr (kInRegisters) for_each_vector<kVectors>(columns, start_reading);
    float sum = 0.0f;
    for_each_vector<kVectors>(columns, [&](int i, int column) {
        if constexpr (!kInRegisters) start_reading(i, column);
        make_h(i, column);
#pragma unroll
        for (int j = 0; j < kElements; ++j) sum += inside(column, j) ? h[i][j] : 0.0f;
    });
    const float mean = row_sum(make_float2(sum, 0.0f), blockDim.x, scratch).x / p.columns;

    float squares = 0.0f;
    for_each_vector<kVectors>(columns, [&](int i, int column) {
        read_again(i, column);
#pragma unroll
        for (int j = 0; j < kElements; ++j) {
            const float centred = inside(column, j) ? h[i][j] - mean : 0.0f;
            squares += centred * centred;
        }
    });
    const float variance = row_sum(make_float2(squares, 0.0f), blockDim.x, scratch).x / p.columns;
    const float rstd = rsqrtf(variance + p.eps);

    with_parameters<T>(p.weight_is_float, [&](auto parameter) {
        using P = decltype(parameter);
        for_each_vector<kVectors>(columns, [&](int i, int column) {
            read_again(i, column);
            const Packed<P> weight = load_packed<kWhole>(static_cast<const P*>(p.weight), column, columns);
            Packed<P> bias = {};
            if (p.bias) bias = load_packed<kWhole>(static_cast<const P*>(p.bias), column, columns);
            Packed<T> out;
#pragma unroll
            for (int j = 0; j < kElements; ++j) out.set(j, (h[i][j] - mean) * rstd * weight[j] + bias[j]);
            store_packed<kWhole>(y, out, column, columns);
        });
    });
    if (row_exists && threadIdx.x == 0) {
        p.mean[row] = mean;
        p.rstd[row] = rstd;
    }
}

template <typename T, typename H, bool kResidual, bool kWhole>
void launch_layer_norm_fwd_rows(const LayerNormFwdParams& p, cudaStream_t stream) {
    const RowShape shape = row_shape(p.columns);
    const LaunchShape launch_shape = {static_cast<unsigned>(ceil_div(p.rows, shape.rows_per_cta)),
                                      dim3(shape.threads_per_row, shape.rows_per_cta), 0, stream};
    with_vectors(shape.vectors, [&](auto vectors) {
        launch<layer_norm_fwd_kernel<T, H, vectors.value, kResidual, kWhole>>("layer_norm_fwd_kernel", launch_shape, p);
    });
}

template <typename T, typename H>
void launch_layer_norm_fwd(const LayerNormFwdParams& p, cudaStream_t stream) {
    const bool whole = p.columns % kElements == 0 && rows_aligned(p.x, p.x_stride, sizeof(T)) &&
                       rows_aligned(p.residual, p.residual_stride, sizeof(H)) && rows_aligned(p.weight, 0, 4) &&
                       rows_aligned(p.bias, 0, 4) && rows_aligned(p.y, p.columns, sizeof(T)) &&
                       rows_aligned(p.h, p.columns, sizeof(H));
    with_bool(whole, [&](auto is_whole) {
        if (p.residual)
            launch_layer_norm_fwd_rows<T, H, true, is_whole.value>(p, stream);
        else
            launch_layer_norm_fwd_rows<T, T, false, is_whole.value>(p, stream);
    });
}
