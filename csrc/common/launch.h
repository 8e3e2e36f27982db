// What launchers do around a launch: bind a context, allow shared memory, and say which step failed.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/dtype.h"

// A step of a launch that failed; Python sees a RuntimeError.
struct LaunchError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

inline void check(cudaError_t status, const std::string& step) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // said here, so that whoever asks next does not take it for their own
    throw LaunchError(step + ": " + cudaGetErrorName(status) + ", " + cudaGetErrorString(status));
}

// Binds the current device's context to this thread, where nothing may have done so yet.
inline void bind_device() {
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
}

// More than 48 KB of dynamic shared memory has to be asked for, once per kernel and device.
template <auto* kKernel>
void allow_shared_memory(const char* name, int bytes) {
    constexpr int kDevices = 64;  // those beyond ask every time
    static std::atomic<int> allowed[kDevices];
    if (bytes <= 48 * 1024) return;
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    if (device < kDevices && bytes <= allowed[device]) return;
    check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
          std::string(name) + " with " + std::to_string(bytes) + " bytes of shared memory");
    if (device < kDevices) allowed[device] = bytes;
}

struct LaunchShape {
    dim3 grid, block;
    int shared_bytes;
    cudaStream_t stream;
    bool dependent = false;  // may start before the kernel before it in the stream has ended: wait_for_prerequisite
};

// The launch's own status, not cudaGetLastError: that may be an error which another library left.
template <auto* kKernel, class... Arguments>
void launch(const char* name, const LaunchShape& shape, const Arguments&... arguments) {
    allow_shared_memory<kKernel>(name, shape.shared_bytes);
    cudaLaunchAttribute dependence = {};
    dependence.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    dependence.val.programmaticStreamSerializationAllowed = 1;
    const cudaLaunchConfig_t config = {shape.grid,   shape.block, size_t(shape.shared_bytes),
                                       shape.stream, &dependence, shape.dependent};
    check(cudaLaunchKernelEx(&config, kKernel, arguments...), std::string("launch of ") + name);
}

// Calls work with a value of the C++ type that a DType stands for, of those that tensor cores multiply.
template <typename Work>
auto with_half_type(DType dtype, Work work) {
    if (dtype == DType::kFloat16) return work(__half{});
    if (dtype == DType::kBFloat16) return work(__nv_bfloat16{});
    throw LaunchError("dtype " + std::to_string(int(dtype)) + " is none of csrc/common/dtype.h's that this kernel takes");
}

// Of all types.
template <typename Work>
auto with_type(DType dtype, Work work) {
    return dtype == DType::kFloat32 ? work(float{}) : with_half_type(dtype, work);
}

// Whether rows `stride` elements apart, starting at `base`, can be read in 16-byte words. Null pointers can.
inline bool rows_aligned(const void* base, int64_t stride, int element_bytes) {
    return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride * element_bytes % 16 == 0;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
