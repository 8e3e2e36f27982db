// One CTA a row: a running maximum and sum of exponentials, the loss, and the gradient over the logits themselves. The
// second reading of the row comes from L2.
#pragma once

#include <cmath>

#include "common/launch.h"
#include "common/vector.cuh"
#include "cross_entropy/cross_entropy.h"

constexpr int kCrossEntropyThreads = 512;

// sum of exp(x - peak) over some x, peak being the largest of them; -inf and 0 of none.
struct ExpSum {
    float peak, total;

    __device__ __forceinline__ void add(const ExpSum& other) {
        const float higher = fmaxf(peak, other.peak);
        // Of nothing but -inf the sum is 0, not exp(-inf + inf).
        const float base = higher == -INFINITY ? 0.0f : higher;
        total = total * expf(peak - base) + other.total * expf(other.peak - base);
        peak = higher;
    }
};

__device__ __forceinline__ ExpSum sum_over_warp(ExpSum sum) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
        sum.add({__shfl_xor_sync(0xffffffffu, sum.peak, offset), __shfl_xor_sync(0xffffffffu, sum.total, offset)});
    return sum;
}

template <typename T>
__global__ void __launch_bounds__(kCrossEntropyThreads) cross_entropy_kernel(const CrossEntropyParams p, bool aligned) {
    constexpr int kWarps = kCrossEntropyThreads / 32;
    __shared__ ExpSum warp_sums[kWarps];
    const int64_t row = blockIdx.x;
    T* logits = static_cast<T*>(p.logits) + row * p.stride;
    const int64_t target = p.targets[row];
    const bool counted = target != p.ignore_index;
    const bool valid = target >= 0 && target < p.vocabulary;
    constexpr int kStep = kCrossEntropyThreads * kElements;

    ExpSum sum = {-INFINITY, 0.0f};
    for (int column = threadIdx.x * kElements; column < p.vocabulary; column += kStep) {
        float scores[kElements];
        load_vector(scores, logits, column, p.vocabulary, aligned);
        float peak = sum.peak;
#pragma unroll
        for (int j = 0; j < kElements; ++j)
            if (column + j < p.vocabulary) peak = fmaxf(peak, scores[j]);
        const float base = peak == -INFINITY ? 0.0f : peak;
        float total = sum.total * expf(sum.peak - base);
#pragma unroll
        for (int j = 0; j < kElements; ++j)
            if (column + j < p.vocabulary) total += expf(scores[j] - base);
        sum = {peak, total};
    }
    sum = sum_over_warp(sum);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
    const float right = valid ? to_float(logits[target]) : NAN;
    // Also: everybody has read the logit of the target before anybody overwrites it.
    __syncthreads();
    sum = sum_over_warp(threadIdx.x % 32 < kWarps ? warp_sums[threadIdx.x % 32] : ExpSum{-INFINITY, 0.0f});
    const float lse = (sum.peak == -INFINITY ? 0.0f : sum.peak) + logf(sum.total);
    if (threadIdx.x == 0) {
        p.lse[row] = lse;
        p.losses[row] = counted ? lse - right : 0.0f;
    }
    if (!p.with_grad) return;

    const float scale = valid ? p.scale[row * p.scale_stride] : NAN;
    for (int column = threadIdx.x * kElements; column < p.vocabulary; column += kStep) {
        float scores[kElements];
        load_vector(scores, logits, column, p.vocabulary, aligned);
#pragma unroll
        for (int j = 0; j < kElements; ++j) {
            const float one = column + j == target ? 1.0f : 0.0f;
            scores[j] = counted ? (expf(scores[j] - lse) - one) * scale : 0.0f;
        }
        store_vector(logits, scores, column, p.vocabulary, aligned);
    }
}

template <typename T>
void launch_cross_entropy(const CrossEntropyParams& p, cudaStream_t stream) {
    const bool aligned = rows_aligned(p.logits, p.stride, sizeof(T));
    const LaunchShape shape = {static_cast<unsigned>(p.rows), kCrossEntropyThreads, 0, stream};
    launch<cross_entropy_kernel<T>>("cross_entropy_kernel", shape, p, aligned);
}
