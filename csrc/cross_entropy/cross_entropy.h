// Cross-entropy of rows of logits, and its gradient in their place.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"

struct CrossEntropyParams {
    void* logits;            // (R, V), rows stride apart; replaced by their gradient if with_grad
    const int64_t* targets;  // (R,)
    float* losses;           // (R,)
    float* lse;              // (R,)
    const float* scale;      // what the loss of each row counts for in the gradient, scale_stride (0 or more) apart
    int64_t rows, stride, scale_stride, ignore_index;
    int vocabulary;
    DType dtype;
    bool with_grad;
};

void cross_entropy(const CrossEntropyParams& params, cudaStream_t stream);
