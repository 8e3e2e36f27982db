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

GK_DEVICE float tanh_quick(float x) { return 1.0f - 2.0f * reciprocal_approx(1.0f + exp2_approx(2.0f * kLog2E * x)); }

// What a row's logits become before the softmax: see Options in gptkernels/ops/linear_cross_entropy/chunks.py.
template <typename T, bool kPlain>
struct Scores {
    const CrossEntropyParams& p;

    // capped: tanh of the softcap, where there is one
    GK_DEVICE float operator()(float logit, int column, float* capped) const {
        if constexpr (kPlain) return logit;
        float score = logit + (p.bias != nullptr && column < p.vocabulary ? p.bias[column] : 0.0f);
        if (p.softcap > 0.0f) {
            // The quick one is as good as 16-bit logits are.
            *capped = sizeof(T) == 4 ? tanhf(score / p.softcap) : tanh_quick(score / p.softcap);
            score = p.softcap * *capped;
        }
        return score / p.temperature;
    }

    GK_DEVICE float class_weight(int column) const {
        return p.class_weight == nullptr ? 1.0f : column < p.vocabulary ? p.class_weight[column] : 0.0f;
    }
};

// sum of exp(x - peak) over some x, peak being the largest of them; -inf and 0 of none.
struct ExpSum {
    float peak, total;
    float weighted;  // sum of the class weights times x, where labels are smoothed

    // Of nothing but -inf the sum is 0, not exp(-inf + inf).
    GK_DEVICE float base() const { return peak == -INFINITY ? 0.0f : peak; }

    GK_DEVICE void add(const ExpSum& other) {
        const float earlier = peak;
        peak = fmaxf(peak, other.peak);
        total = total * exp_approx(earlier - base()) + other.total * exp_approx(other.peak - base());
        weighted += other.weighted;
    }

    // The first `count` elements of each vector.
    template <int kVectors>
    GK_DEVICE void add(const float (&vectors)[kVectors][kElements], int count) {
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
        sum.add({__shfl_xor_sync(0xffffffffu, sum.peak, offset), __shfl_xor_sync(0xffffffffu, sum.total, offset),
                 __shfl_xor_sync(0xffffffffu, sum.weighted, offset)});
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

template <typename T, bool kPlain, bool kAligned>
__global__ void __launch_bounds__(kCrossEntropyThreads, kCrossEntropyCtas)
    cross_entropy_kernel(const CrossEntropyParams p) {
    constexpr int kWarps = kCrossEntropyThreads / 32;
    __shared__ ExpSum warp_sums[kWarps];
    const int64_t row = blockIdx.x;
    T* logits = static_cast<T*>(p.logits) + row * p.stride;
    const int64_t target = p.targets[row];
    const bool counted = target != p.ignore_index;
    const bool valid = target >= 0 && target < p.vocabulary;
    const int target_column = valid ? int(target) : -1;
    const Scores<T, kPlain> scores = {p};
    const bool smoothed = !kPlain && p.label_smoothing > 0.0f;

    ExpSum sum = {-INFINITY, 0.0f, 0.0f};
    for_each_vectors<kAligned>(logits, p.vocabulary, [&](auto& vectors, int column, int count) {
        constexpr int kVectors = sizeof(vectors) / sizeof(vectors[0]);
        float values[kVectors][kElements], capped;
#pragma unroll
        for (int i = 0; i < kVectors; ++i)
#pragma unroll
            for (int j = 0; j < kElements; ++j) {
                const int at = column + i * kVectorStep + j;
                values[i][j] = scores(vectors[i][j], at, &capped);
                if (smoothed && j < count) sum.weighted += scores.class_weight(at) * values[i][j];
            }
        sum.add(values, count);
    });
    sum = sum_over_warp(sum);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
    float capped;
    const float right = valid ? scores(to_float(logits[target_column]), target_column, &capped) : NAN;
    // Also: everybody has read the logit of the target before anybody overwrites it.
    __syncthreads();
    sum = sum_over_warp(threadIdx.x % 32 < kWarps ? warp_sums[threadIdx.x % 32] : ExpSum{-INFINITY, 0.0f, 0.0f});
    const float lse = sum.base() + logf(sum.total);
    // What the probabilities, the target's one and the class weights count for in the gradient.
    float loss = lse - right, of_all = 1.0f, of_right = 1.0f, of_weights = 0.0f;
    if (!kPlain && p.factors != nullptr) {
        const float mean_weight = p.factors[0];
        of_right = (1.0f - p.label_smoothing) * (valid ? scores.class_weight(target_column) : 0.0f);
        of_weights = p.label_smoothing / p.vocabulary;
        of_all = of_right + p.label_smoothing * mean_weight + 2.0f * p.factors[1] * lse;
        loss *= of_right;
        if (smoothed) loss += p.label_smoothing * mean_weight * lse - of_weights * sum.weighted;
    }
    if (threadIdx.x == 0) {
        p.lse[row] = lse;
        p.losses[row] = counted ? loss : 0.0f;
    }
    if (!p.with_grad) return;

    const float scale = valid ? p.scale[row * p.scale_stride] / (kPlain ? 1.0f : p.temperature) : NAN;
    for_each_vectors<kAligned>(logits, p.vocabulary, [&](auto& vectors, int column, int) {
#pragma unroll
        for (int i = 0; i < int(sizeof(vectors) / sizeof(vectors[0])); ++i) {
            const int at = column + i * kVectorStep;
#pragma unroll
            for (int j = 0; j < kElements; ++j) {
                const float one = at + j == target_column ? of_right : 0.0f;
                float grad = of_all * exp_approx(scores(vectors[i][j], at + j, &capped) - lse) - one;
                if (smoothed) grad -= of_weights * scores.class_weight(at + j);
                if (!kPlain && p.softcap > 0.0f) grad *= 1.0f - capped * capped;
                vectors[i].set(j, counted ? grad * scale : 0.0f);
            }
            store_packed(logits, vectors[i], at, p.vocabulary, kAligned);
        }
    });
}

template <typename T, bool kPlain>
void launch_cross_entropy(const CrossEntropyParams& p, const LaunchShape& shape) {
    if (rows_aligned(p.logits, p.stride, sizeof(T)))
        launch<cross_entropy_kernel<T, kPlain, true>>("cross_entropy_kernel", shape, p);
    else
        launch<cross_entropy_kernel<T, kPlain, false>>("cross_entropy_kernel", shape, p);
}

void cross_entropy(const CrossEntropyParams& p, cudaStream_t stream) {
    const LaunchShape shape = {static_cast<unsigned>(p.rows), kCrossEntropyThreads, 0, stream};
    with_type(p.dtype, [&](auto type) {
        using T = decltype(type);
        p.plain ? launch_cross_entropy<T, true>(p, shape) : launch_cross_entropy<T, false>(p, shape);
    });
}
