// One CTA a row: a running maximum and sum of exponentials, the loss, and the gradient over the logits themselves. The
// second reading of the row comes from L2.
#include <cmath>

#include "common/launch.h"
#include "common/math.cuh"
#include "common/vector.cuh"
#include "cross_entropy/cross_entropy.h"

// Two CTAs to an SM: 264 rows of 50,000 logits fit L2, where the second reading looks for them.
constexpr int kCrossEntropyThreads = 256, kCrossEntropyCtas = 2;

GK_DEVICE float exp_approx(float x) { return exp2_approx(x * kLog2E); }

// sum of exp(x - peak) over some x, peak being the largest of them; -inf and 0 of none.
struct ExpSum {
    float peak, total;

    // Of nothing but -inf the sum is 0, not exp(-inf + inf).
    GK_DEVICE float base() const { return peak == -INFINITY ? 0.0f : peak; }

    GK_DEVICE void add(const ExpSum& other) {
        const float earlier = peak;
        peak = fmaxf(peak, other.peak);
        total = total * exp_approx(earlier - base()) + other.total * exp_approx(other.peak - base());
    }

    // The first `count` elements of each vector.
    template <typename T, int kVectors>
    GK_DEVICE void add(const Packed<T> (&vectors)[kVectors], int count) {
        const float earlier = peak;
#pragma unroll
        for (int i = 0; i < kVectors; ++i)
#pragma unroll
            for (int j = 0; j < kElements; ++j)
                if (j < count) peak = fmaxf(peak, vectors[i][j]);
        float sums[kVectors] = {};
#pragma unroll
        for (int i = 0; i < kVectors; ++i)
#pragma unroll
            for (int j = 0; j < kElements; ++j)
                if (j < count) sums[i] += exp_approx(vectors[i][j] - base());
        total *= exp_approx(earlier - base());
#pragma unroll
        for (int i = 0; i < kVectors; ++i) total += sums[i];
    }
};

GK_DEVICE ExpSum sum_over_warp(ExpSum sum) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
        sum.add({__shfl_xor_sync(0xffffffffu, sum.peak, offset), __shfl_xor_sync(0xffffffffu, sum.total, offset)});
    return sum;
}

// Calls work(vectors, column of the first, elements of each that there are) for this thread's share of a row: several
// vectors at a time, all of whose loads are under way before the first is used, then what is left one by one. Rows that
// are not aligned are read element by element, which are as many loads.
constexpr int kVectorStep = kCrossEntropyThreads * kElements;

template <bool kAligned, typename T, typename Work>
GK_DEVICE void for_each_vectors(const T* row, int columns, Work work) {
    constexpr int kUnderWay = kAligned ? 4 : 1;
    int column = threadIdx.x * kElements;
    for (; column + (kUnderWay - 1) * kVectorStep + kElements <= columns; column += kUnderWay * kVectorStep) {
        Packed<T> vectors[kUnderWay];
#pragma unroll
        for (int i = 0; i < kUnderWay; ++i) {
            const int at = column + i * kVectorStep;
            vectors[i] = load_packed(row, at, at + kElements, kAligned);
        }
        work(vectors, column, kElements);
    }
    for (; column < columns; column += kVectorStep) {
        Packed<T> vector[1] = {load_packed(row, column, columns, kAligned)};
        work(vector, column, columns - column);
    }
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kCrossEntropyThreads, kCrossEntropyCtas)
    cross_entropy_kernel(const CrossEntropyParams p) {
    constexpr int kWarps = kCrossEntropyThreads / 32;
    __shared__ ExpSum warp_sums[kWarps];
    const int64_t row = blockIdx.x;
    T* logits = static_cast<T*>(p.logits) + row * p.stride;
    const int64_t target = p.targets[row];
    const bool counted = target != p.ignore_index;
    const bool valid = target >= 0 && target < p.vocabulary;

    ExpSum sum = {-INFINITY, 0.0f};
    for_each_vectors<kAligned>(logits, p.vocabulary, [&](auto& vectors, int, int count) { sum.add(vectors, count); });
    sum = sum_over_warp(sum);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
    const float right = valid ? to_float(logits[target]) : NAN;
    // Also: everybody has read the logit of the target before anybody overwrites it.
    __syncthreads();
    sum = sum_over_warp(threadIdx.x % 32 < kWarps ? warp_sums[threadIdx.x % 32] : ExpSum{-INFINITY, 0.0f});
    const float lse = sum.base() + logf(sum.total);
    if (threadIdx.x == 0) {
        p.lse[row] = lse;
        p.losses[row] = counted ? lse - right : 0.0f;
    }
    if (!p.with_grad) return;

    const float scale = valid ? p.scale[row * p.scale_stride] : NAN;
    const int target_column = valid ? int(target) : -1;
    for_each_vectors<kAligned>(logits, p.vocabulary, [&](auto& vectors, int column, int) {
#pragma unroll
        for (int i = 0; i < int(sizeof(vectors) / sizeof(vectors[0])); ++i) {
            const int at = column + i * kVectorStep;
#pragma unroll
            for (int j = 0; j < kElements; ++j) {
                const float one = at + j == target_column ? 1.0f : 0.0f;
                vectors[i].set(j, counted ? (exp_approx(vectors[i][j] - lse) - one) * scale : 0.0f);
            }
            store_packed(logits, vectors[i], at, p.vocabulary, kAligned);
        }
    });
}

void cross_entropy(const CrossEntropyParams& p, cudaStream_t stream) {
    const LaunchShape shape = {static_cast<unsigned>(p.rows), kCrossEntropyThreads, 0, stream};
    with_type(p.dtype, [&](auto type) {
        using T = decltype(type);
        if (rows_aligned(p.logits, p.stride, sizeof(T)))
            launch<cross_entropy_kernel<T, true>>("cross_entropy_kernel", shape, p);
        else
            launch<cross_entropy_kernel<T, false>>("cross_entropy_kernel", shape, p);
    });
}
