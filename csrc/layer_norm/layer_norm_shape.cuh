// How rows are shared out among threads, and sums over a row.
#pragma once

#include <cstdint>

#include "common/vector.cuh"

// A CTA holds `rows_per_cta` rows of `threads_per_row` threads each; a thread holds kVectors vectors of kElements
// elements of its row in registers. kVectors 0: the row is longer than that, and is read again whenever it is needed.
struct RowShape {
    int threads_per_row, rows_per_cta, vectors;
};

constexpr int max_threads(int vectors) { return vectors == 0 ? 512 : vectors == 4 ? 384 : 256; }

inline RowShape row_shape(int columns) {
    constexpr int kThreadsPerCta = 128;
    for (int vectors : {1, 2, 4}) {
        const int threads = (columns + vectors * kElements - 1) / (vectors * kElements);
        const int rounded = (threads + 31) / 32 * 32;
        if (rounded <= max_threads(vectors))
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
