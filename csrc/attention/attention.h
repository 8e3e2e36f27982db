// Attention on sm_90a: what the launchers take. No torch, no pybind.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"

// Query i of a row sees key j when key_start <= j and i + offset - left <= j <= i + offset + right, where
// offset = k_len - q_len aligns the mask bottom-right. kUnbounded on either side: no limit there.
constexpr int kUnbounded = 1 << 30;

struct AttentionShape {
    int batch;            // documents, with cu_seqlens
    int heads, kv_heads;  // kv_heads divides heads
    int q_len, k_len;     // rows of all documents together, with cu_seqlens
    int head_dim;         // a multiple of 8, at most 256
    int left, right;
    float scale;                // positive
    float softcap;              // of scores; 0: none
    const int* key_start;       // (batch,) or null
    const int* cu_seqlens;      // (batch + 1,) or null
    const int* cu_seqlens_k;    // as cu_seqlens, or null: the same
    const float* alibi_slopes;  // (heads,), or (batch, heads), or null
    int slope_stride;           // from one batch entry to the next
};

// Strides are elements from one batch entry (0 with cu_seqlens), head and row to the next; multiples of 8.
struct AttentionTensor {
    void* data;
    int64_t batch_stride, head_stride, row_stride;
};

struct AttentionFwdParams {
    AttentionShape shape;
    DType dtype;  // float16 or bfloat16
    int sm_count;
    AttentionTensor q, k, v;  // (batch, heads, q_len, head_dim), (batch, kv_heads, k_len, head_dim) twice
    AttentionTensor out;      // as q
    float* lse;               // (batch, heads, q_len) or (heads, q_len), natural logarithm
    const void* sinks;        // (heads,) or null
    bool sinks_are_float;     // else as q
    int* tile_counter;  // (2,), zeros, which the kernel leaves as zeros; not shared with launches at the same time
};

struct AttentionBwdParams {
    AttentionShape shape;
    DType dtype;
    int sm_count;
    bool dq_in_order;  // whether dq is added up in one order, so that it has the same bits on every run
    AttentionTensor dout, q, k, v, out;
    const float* lse;            // as the forward pass left it
    const float* dlse;           // its gradient, or null
    float* delta;                // as lse, or null: row sums of out * dout, less dlse
    AttentionTensor dq, dk, dv;  // as q, k and v
    void* workspace;             // attention_bwd_workspace_bytes of it, aligned to 16 bytes
};

void attention_fwd(const AttentionFwdParams& params, cudaStream_t stream);
void attention_bwd(const AttentionBwdParams& params, cudaStream_t stream);

int64_t attention_bwd_workspace_bytes(const AttentionShape& shape, int sm_count);
