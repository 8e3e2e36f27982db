// How rows are shared out among threads, and sums over a row.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/vector.cuh"

// A CTA holds `rows_per_cta` rows of `threads_per_row` threads each; a thread holds kVectors vectors of kElements
// elements of its row in registers. kVectors 0: the row is longer than that, and is read again whenever it is needed.
struct RowShape {
    int threads_per_row, rows_per_cta, vectors;
};

constexpr int kMaxVectors = 4;
constexpr int kThreadsPerCta = 128;
constexpr int kFewestThreads = 8;  // of a row
constexpr int max_threads(int vectors) { return vectors == 0 ? 512 : vectors == kMaxVectors ? 384 : kThreadsPerCta; }

// The fewest threads that hold the row: then most of it is under way at once, and least is left to add up. Several rows
// share a warp where they are short.
inline RowShape row_shape(int columns, int most_vectors = kMaxVectors, int most_threads = max_threads(kMaxVectors)) {
    for (int vectors = 1; vectors <= most_vectors; vectors *= 2) {
        const int threads = (columns + vectors * kElements - 1) / (vectors * kElements);
        int rounded = (threads + 31) / 32 * 32;
        while (rounded > kFewestThreads && rounded / 2 >= threads) rounded /= 2;
        if (rounded > (vectors < most_vectors ? 32 : most_threads)) continue;
        return {rounded, rounded >= kThreadsPerCta ? 1 : kThreadsPerCta / rounded, vectors};
    }
    return {max_threads(0), 1, 0};
}

// Makes each of `sums` its sum over the threads of a row, for all of them. Every thread of the CTA must call it.
// scratch: shared, kSums * (warps of the CTA) floats, not used by anything else until the next barrier. Only rows of one
// vector a thread share warps.
template <int kVectors, int kSums>
__device__ __forceinline__ void row_sum(float (&sums)[kSums], int threads_per_row, float* scratch) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
            const float other = __shfl_xor_sync(0xffffffffu, sums[i], offset);
            sums[i] += kVectors != 1 || offset < threads_per_row ? other : 0.0f;
        }
    }
    if (threads_per_row <= 32) return;
    const int warps = threads_per_row / 32, first = threadIdx.y * warps;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
        if (threadIdx.x % 32 == 0) scratch[(first + threadIdx.x / 32) * kSums + i] = sums[i];
        sums[i] = 0.0f;
    }
    __syncthreads();
    for (int warp = 0; warp < warps; ++warp)
#pragma unroll
        for (int i = 0; i < kSums; ++i) sums[i] += scratch[(first + warp) * kSums + i];
    // The next sum may write where another warp still reads this one.
    __syncthreads();
}

// Where a row starts.
__device__ __forceinline__ int64_t row_offset(int64_t row, int64_t stride, int64_t group_stride, int group_rows) {
    if (group_rows == 0) return row * stride;
    const uint32_t group = static_cast<uint32_t>(row) / group_rows;
    return group * group_stride + (row - static_cast<int64_t>(group) * group_rows) * stride;
}

constexpr int kMaxWarps = 16;

// Calls body(vector index, column) for each of this thread's vectors.
template <int kVectors, typename Body>
__device__ __forceinline__ void for_each_vector(int columns, Body body) {
    if constexpr (kVectors > 0) {
#pragma unroll
        for (int i = 0; i < kVectors; ++i) body(i, (i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * kElements);
    } else {
        for (int column = threadIdx.x * kElements; column < columns; column += blockDim.x * kElements) body(0, column);
    }
}

// Calls work with a value of the parameters' type: float32 or T, known only at run time.
template <typename T, typename Work>
__device__ __forceinline__ void with_parameters(bool is_float, Work work) {
    if constexpr (std::is_same_v<T, float>)
        work(float{});
    else if (is_float)
        work(float{});
    else
        work(T{});
}

// The weight's part of a row; of RMSNorm it may be null.
template <bool kWhole, bool kRms, typename P>
__device__ __forceinline__ Packed<P> load_weight(const void* weight, int column, int columns) {
    if (kRms && !weight) return {};
    return load_packed<kWhole>(static_cast<const P*>(weight), column, columns);
}

// Calls work with a constant of compile time.
template <typename Work>
void with_bool(bool value, Work work) {
    value ? work(std::true_type{}) : work(std::false_type{});
}

template <typename Work>
void with_vectors(int vectors, Work work) {
    switch (vectors) {
        case 1: return work(std::integral_constant<int, 1>{});
        case 2: return work(std::integral_constant<int, 2>{});
        case 4: return work(std::integral_constant<int, 4>{});
        default: return work(std::integral_constant<int, 0>{});
    }
}
