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
constexpr int max_threads(int vectors) { return vectors == 0 ? 512 : vectors == kMaxVectors ? 384 : kThreadsPerCta; }

// The fewest threads that hold the row: then most of it is under way at once, and least is left to add up.
inline RowShape row_shape(int columns, int most_vectors = kMaxVectors, int most_threads = max_threads(kMaxVectors)) {
    for (int vectors = 1; vectors <= most_vectors; vectors *= 2) {
        const int threads = (columns + vectors * kElements - 1) / (vectors * kElements);
        const int rounded = (threads + 31) / 32 * 32;
        if (rounded > (vectors < most_vectors ? 32 : most_threads)) continue;
        return {rounded, rounded >= kThreadsPerCta ? 1 : kThreadsPerCta / rounded, vectors};
    }
    return {max_threads(0), 1, 0};
}

// The sum of both values over the threads of a row, given to all of them. Every thread of the CTA must call it.
// scratch: shared, 2 * (warps of the CTA) floats, not used by anything else until the next barrier.
__device__ __forceinline__ float2 row_sum(float2 value, int threads_per_row, float2* scratch) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        value.x += __shfl_xor_sync(0xffffffffu, value.x, offset);
        value.y += __shfl_xor_sync(0xffffffffu, value.y, offset);
    }
    if (threads_per_row == 32) return value;
    const int thread = threadIdx.y * threads_per_row + threadIdx.x;
    if (thread % 32 == 0) scratch[thread / 32] = value;
    __syncthreads();
    const int warps = threads_per_row / 32;
    value = make_float2(0.0f, 0.0f);
    for (int warp = 0; warp < warps; ++warp) {
        const float2 other = scratch[threadIdx.y * warps + warp];
        value.x += other.x;
        value.y += other.y;
    }
    // The next sum may write where another warp still reads this one.
    __syncthreads();
    return value;
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
