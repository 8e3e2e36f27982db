// LayerNorm and RMSNorm over rows of N elements, with the residual addition and dropout before them folded in. RMSNorm
// has neither a mean nor a bias.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

#include "common/dtype.h"

// Of either norm. No more than 128 bytes with what each adds: the compiler makes slower kernels of larger ones.
struct NormFwdParams {
    const void* x;         // (M, N), rows x_stride apart
    const void* residual;  // (M, N), rows residual_stride apart, or null
    const void* weight;    // (N,)
    const int64_t* seed;   // (1,) or null
    void* y;               // (M, N) of x's dtype
    void* h;               // (M, N) of residual's dtype: dropout(x) + residual; null without a residual
    float* rstd;           // (M,)
    int64_t rows;
    int64_t x_stride, residual_stride;
    int columns;
    float eps, keep_scale;
    uint32_t drop_below;
    DType x_dtype;
    bool residual_is_float, weight_is_float;
};

struct LayerNormFwdParams : NormFwdParams {
    const void* bias;  // (N,) or null
    float* mean;       // (M,)
};

struct RMSNormFwdParams : NormFwdParams {
    int64_t x_group_stride;
    int group_rows;   // 0: rows of x are evenly spaced. Else groups of so many are, the groups x_group_stride apart
    float offset;     // is added to the weight, which may be null: then it is 0, and the offset 1
    bool cast_first;  // the normalised row is rounded to x's dtype before the product with the weight too
};

static_assert(sizeof(LayerNormFwdParams) <= 128 && sizeof(RMSNormFwdParams) <= 128);

struct LayerNormBwdParams {
    const void* dy;      // (M, N) of x's dtype, rows dy_stride apart
    const void* dh;      // (M, N) of h's dtype, rows dh_stride apart, or null
    const void* h;       // (M, N), rows h_stride apart
    const void* weight;  // (N,)
    const float* mean;   // (M,)
    const float* rstd;   // (M,)
    const int64_t* seed; // (1,) or null
    void* grad_h;        // (M, N) of h's dtype
    void* grad_x;        // (M, N) of x's dtype, or null where it is grad_h
    float* partials;     // (2, P, N): each CTA's share of the weight's and the bias's gradient; null: neither is wanted
    void* grad_weight;   // (N,) or null
    void* grad_bias;     // (N,) or null
    int64_t rows;
    int columns, partial_rows;
    int64_t dy_stride, dh_stride, h_stride;
    float keep_scale;
    uint32_t drop_below;
    DType x_dtype;
    bool h_is_float, weight_is_float;
};

struct RMSNormBwdParams : LayerNormBwdParams {
    int64_t dy_group_stride, h_group_stride;  // as RMSNormFwdParams has them
    int group_rows;
    float offset;
};

template <bool kRms>
using FwdParams = std::conditional_t<kRms, RMSNormFwdParams, LayerNormFwdParams>;
template <bool kRms>
using BwdParams = std::conditional_t<kRms, RMSNormBwdParams, LayerNormBwdParams>;

void layer_norm_fwd(const LayerNormFwdParams& params, cudaStream_t stream);
void layer_norm_bwd(const LayerNormBwdParams& params, cudaStream_t stream);
void rms_norm_fwd(const RMSNormFwdParams& params, cudaStream_t stream);
void rms_norm_bwd(const RMSNormBwdParams& params, cudaStream_t stream);

// The CTAs that backward launches: the P of its partials.
int layer_norm_bwd_partial_rows(int64_t rows, int columns, int sm_count);
int rms_norm_bwd_partial_rows(int64_t rows, int columns, int sm_count);
