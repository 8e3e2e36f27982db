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
    return vectors == 0 || vectors == kMaxVectors ? (light ? 2 : 1) : (light ? 8 : 4);
}

// T: x, y and, unless they are float32, the parameters. H: residual and h. kRms: RMSNorm. kWhole: rows are of whole
// 16-byte words.
template <typename T, typename H, bool kRms, int kVectors, bool kResidual, bool kWhole>
__global__ void __launch_bounds__(max_threads(kVectors), fwd_min_ctas(kVectors, kWhole && !kResidual))
    layer_norm_fwd_kernel(const FwdParams<kRms> p) {
    __shared__ float scratch[kMaxWarps];
    constexpr bool kInRegisters = kVectors > 0;
    constexpr int kHeld = kInRegisters ? kVectors : 1;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    const bool row_exists = row < p.rows;
    // Rows past the end take part in the barriers, with nothing to read or write.
    const int columns = row_exists ? p.columns : 0;
    const T* x = static_cast<const T*>(p.x);
    if constexpr (kRms)
        x += row_offset(row, p.x_stride, p.x_group_stride, p.group_rows);
    else
        x += row * p.x_stride;
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
    auto read_again = [&](int i, int column) {
        if constexpr (kInRegisters) return;
        if constexpr (kResidual)
            h[i] = load_packed<kWhole>(h_out, column, columns);
        else
            h[i] = load_packed<kWhole>(x, column, columns);
    };
    auto inside = [&](int column, int j) { return column + (kWhole ? 0 : j) < columns; };

    if constexpr (kInRegisters) for_each_vector<kVectors>(columns, start_reading);
    // h = dropout(x) + residual, rounded to what backward will read.
    auto make_h = [&](int i, int column) {
        if constexpr (kResidual) {
            float values[kElements];
#pragma unroll
            for (int j = 0; j < kElements; ++j) values[j] = xs[i][j];
            if (p.seed) {
                const uint64_t seed = *p.seed;
#pragma unroll
                for (int j = 0; j < kElements; ++j)
                    values[j] = is_kept(seed, row, column + j, p.drop_below) ? values[j] * p.keep_scale : 0.0f;
            }
#pragma unroll
            for (int j = 0; j < kElements; ++j) h[i].set(j, values[j] + residuals[i][j]);
            store_packed<kWhole>(h_out, h[i], column, columns);
        } else {
            h[i] = xs[i];
        }
    };
    float moment[1] = {};  // of RMSNorm the squares, of LayerNorm the elements
    for_each_vector<kVectors>(columns, [&](int i, int column) {
        if constexpr (!kInRegisters) start_reading(i, column);
        make_h(i, column);
#pragma unroll
        for (int j = 0; j < kElements; ++j) {
            const float value = inside(column, j) ? h[i][j] : 0.0f;
            moment[0] += kRms ? value * value : value;
        }
    });
    row_sum<kVectors>(moment, blockDim.x, scratch);
    float variance = moment[0] / p.columns;
    const float mean = kRms ? 0.0f : variance;
    if constexpr (!kRms) {
        float squares[1] = {};
        for_each_vector<kVectors>(columns, [&](int i, int column) {
            read_again(i, column);
#pragma unroll
            for (int j = 0; j < kElements; ++j) {
                const float centred = inside(column, j) ? h[i][j] - mean : 0.0f;
                squares[0] += centred * centred;
            }
        });
        row_sum<kVectors>(squares, blockDim.x, scratch);
        variance = squares[0] / p.columns;
    }
    const float rstd = rsqrtf(variance + p.eps);

    with_parameters<T>(p.weight_is_float, [&](auto parameter) {
        using P = decltype(parameter);
        for_each_vector<kVectors>(columns, [&](int i, int column) {
            read_again(i, column);
            const Packed<P> weight = load_weight<kWhole, kRms, P>(p.weight, column, columns);
            Packed<P> bias = {};
            if constexpr (!kRms)
                if (p.bias) bias = load_packed<kWhole>(static_cast<const P*>(p.bias), column, columns);
            Packed<T> out;
#pragma unroll
            for (int j = 0; j < kElements; ++j) {
                float value = (h[i][j] - mean) * rstd;
                if constexpr (kRms) {
                    if (p.cast_first) value = to_float(from_float<T>(value));
                    out.set(j, value * (weight[j] + p.offset));
                } else {
                    out.set(j, value * weight[j] + bias[j]);
                }
            }
            store_packed<kWhole>(y, out, column, columns);
        });
    });
    if (row_exists && threadIdx.x == 0) {
        if constexpr (!kRms) p.mean[row] = mean;
        p.rstd[row] = rstd;
    }
}

template <typename T, typename H, bool kRms, bool kResidual, bool kWhole>
void launch_layer_norm_fwd_rows(const FwdParams<kRms>& p, cudaStream_t stream) {
    const RowShape shape = row_shape(p.columns);
    const LaunchShape launch_shape = {static_cast<unsigned>(ceil_div(p.rows, shape.rows_per_cta)),
                                      dim3(shape.threads_per_row, shape.rows_per_cta), 0, stream};
    with_vectors(shape.vectors, [&](auto vectors) {
        launch<layer_norm_fwd_kernel<T, H, kRms, vectors.value, kResidual, kWhole>>("layer_norm_fwd_kernel",
                                                                                    launch_shape, p);
    });
}

template <typename T, typename H, bool kRms>
void launch_layer_norm_fwd(const FwdParams<kRms>& p, cudaStream_t stream) {
    bool whole = p.columns % kElements == 0 && rows_aligned(p.x, p.x_stride, sizeof(T)) &&
                 rows_aligned(p.residual, p.residual_stride, sizeof(H)) && rows_aligned(p.weight, 0, 4) &&
                 rows_aligned(p.y, p.columns, sizeof(T)) && rows_aligned(p.h, p.columns, sizeof(H));
    if constexpr (kRms)
        whole = whole && rows_aligned(p.x, p.x_group_stride, sizeof(T));
    else
        whole = whole && rows_aligned(p.bias, 0, 4);
    with_bool(whole, [&](auto is_whole) {
        if (p.residual)
            launch_layer_norm_fwd_rows<T, H, kRms, true, is_whole.value>(p, stream);
        else
            launch_layer_norm_fwd_rows<T, T, kRms, false, is_whole.value>(p, stream);
    });
}

template <bool kRms>
void launch_norm_fwd(const FwdParams<kRms>& p, cudaStream_t stream) {
    with_type(p.x_dtype, [&](auto type) {
        using T = decltype(type);
        p.residual_is_float ? launch_layer_norm_fwd<T, float, kRms>(p, stream)
                            : launch_layer_norm_fwd<T, T, kRms>(p, stream);
    });
}
