// Small helpers of the launchers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"

// Calls launch with a value of the C++ type that a DType stands for.
template <typename Launch>
cudaError_t with_type(DType dtype, Launch launch) {
    switch (dtype) {
        case DType::kFloat32: return launch(float{});
        case DType::kFloat16: return launch(__half{});
        case DType::kBFloat16: return launch(__nv_bfloat16{});
    }
    return cudaErrorInvalidValue;
}

// Whether rows `stride` elements apart, starting at `base`, can be read in 16-byte words. Null pointers can.
inline bool rows_aligned(const void* base, int64_t stride, int element_bytes) {
    return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride * element_bytes % 16 == 0;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// More than 48 KB of dynamic shared memory has to be asked for, per kernel and device.
template <typename Kernel>
cudaError_t allow_shared_memory(Kernel kernel, int bytes) {
    if (bytes <= 48 * 1024) return cudaSuccess;
    return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}
