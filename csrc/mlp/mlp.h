// The products of the MLP on sm_90a, with their epilogues: what the launchers take. No torch, no pybind.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"

// By the numbers that gptkernels/ops/mlp/cuda_kernels.py passes.
enum class Activation : int { kNone = 0, kGeluTanh = 1, kGelu = 2, kRelu = 3, kRelu2 = 4, kSilu = 5, kGptOss = 6 };

// out = activation(a @ weight.T + bias) + residual
struct MlpFwdParams {
    const void* a;         // (M, K), rows a_stride apart
    const void* weight;    // (N, K)
    const void* bias;      // (N,) or null
    const void* residual;  // (M, N), rows residual_stride apart, or null; not together with preact
    void* preact;          // (M, N) or null: what goes into the activation
    void* out;             // (M, N)
    int M, N, K;           // N and K multiples of 8
    int64_t a_stride, residual_stride;  // multiples of 8
    Activation activation;
    DType dtype;  // float16 or bfloat16
    int sm_count;
};

// grad = dout @ weight * activation'(preact)
struct MlpBwdParams {
    const void* dout;    // (M, K), rows dout_stride apart
    const void* weight;  // (K, N)
    const void* preact;  // (M, N)
    void* act;           // (M, N) or null: activation(preact), once more
    void* grad;          // (M, N)
    float* partials;     // (ceil(M / 64), N) or null: column sums of grad over 64 rows each
    int M, N, K;
    int64_t dout_stride;
    Activation activation;
    DType dtype;
    int sm_count;
};

// gate = a @ gate_weight.T + gate_bias, up likewise, out = activation(gate) * up, or gpt-oss's product of them
struct GatedMlpFwdParams {
    const void* a;            // (M, K), rows a_stride apart
    const void* gate_weight;  // (N, K), rows gate_stride apart
    const void* up_weight;    // (N, K), rows up_stride apart
    const void* gate_bias;    // (N,) or null
    const void* up_bias;      // (N,) or null
    void* gate;               // (M, N), or null together with up
    void* up;                 // (M, N)
    void* out;                // (M, N)
    int M, N, K;              // N and K multiples of 8
    int64_t a_stride, gate_stride, up_stride;  // multiples of 8
    Activation activation;
    DType dtype;  // float16 or bfloat16
    int sm_count;
};

// Of the gradient dout @ weight of what the forward pass gives: those of gate and up
struct GatedMlpBwdParams {
    const void* dout;    // (M, K), rows dout_stride apart
    const void* weight;  // (K, N)
    const void* gate;    // (M, N)
    const void* up;      // (M, N)
    void* act;           // (M, N) or null: what the forward pass gives, once more
    void* grad_gate;     // (M, N)
    void* grad_up;       // (M, N)
    float* partials;     // (2, ceil(M / 64), N) or null: column sums of grad_gate, and of grad_up, over 64 rows each
    int M, N, K;
    int64_t dout_stride;
    Activation activation;
    DType dtype;
    int sm_count;
};

void mlp_fwd(const MlpFwdParams& params, cudaStream_t stream);
void mlp_bwd(const MlpBwdParams& params, cudaStream_t stream);
void gated_mlp_fwd(const GatedMlpFwdParams& params, cudaStream_t stream);
void gated_mlp_bwd(const GatedMlpBwdParams& params, cudaStream_t stream);
