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
    const float* bias;          // (V,) or null
    const float* class_weight;  // (V,) or null
    const float* factors;       // (2,) or null: the mean class weight, and what lse^2 counts for beside the loss
    int64_t rows, stride, scale_stride, ignore_index;
    float label_smoothing, softcap /* 0: none */, temperature;
    int vocabulary;
    DType dtype;
    bool with_grad;
    bool plain;  // no tensors that may be null, no softcap, a temperature of 1
};

void cross_entropy(const CrossEntropyParams& params, cudaStream_t stream);
