// Descriptions of tensors for the bulk copy engine, encoded on the host.
#pragma once

#include <cuda.h>

#include <type_traits>

#include "common/launch.h"

// Of the driver, asked for at run time so that nothing links against it.
template <class Function>
Function* driver_function(const char* name) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found), name);
    if (found != cudaDriverEntryPointSuccess || !function)
        throw LaunchError(std::string(name) + ": the driver has none");
    return reinterpret_cast<Function*>(function);
}

struct TensorMapShape {
    int rank;
    cuuint64_t sizes[4];    // innermost first
    cuuint64_t strides[3];  // elements, of the dimensions beyond the innermost
    cuuint32_t box[4];
};

[[noreturn]] inline void tensor_map_failed(CUresult status, const char* tensor, const void* data,
                                           const TensorMapShape& shape) {
    const char* error = "";
    driver_function<CUresult(CUresult, const char**)>("cuGetErrorName")(status, &error);
    auto list = [&](const auto* values, int count) {
        std::string text;
        for (int i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
        return "(" + text + ")";
    };
    throw LaunchError("cuTensorMapEncodeTiled of " + std::string(tensor) + ": " + (error ? error : "") + " (" +
                      std::to_string(status) + ") for sizes " + list(shape.sizes, shape.rank) + ", strides in bytes " +
                      list(shape.strides, shape.rank - 1) + ", box " + list(shape.box, shape.rank) + ", address " +
                      std::to_string(reinterpret_cast<uintptr_t>(data)));
}

// Of 16-bit elements; the swizzle is as wide as the box's rows. The thread must have a context: bind_device.
template <class T>
CUtensorMap encode_tensor_map(const char* tensor, const void* data, TensorMapShape shape) {
    static std::atomic<decltype(&cuTensorMapEncodeTiled)> cached;
    auto encode = cached.load();
    if (!encode) cached = encode = driver_function<decltype(cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
    const auto type = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const auto swizzle = shape.box[0] == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
    const cuuint32_t ones[4] = {1, 1, 1, 1};
    // To bytes. A dimension of one entry may have any stride in torch; the driver wants a multiple of 16 bytes.
    for (int i = 0; i + 1 < shape.rank; ++i) shape.strides[i] = shape.sizes[i + 1] > 1 ? 2 * shape.strides[i] : 16;
    CUtensorMap map;
    const CUresult status = encode(&map, type, shape.rank, const_cast<void*>(data), shape.sizes, shape.strides,
                                   shape.box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS) tensor_map_failed(status, tensor, data, shape);
    return map;
}
