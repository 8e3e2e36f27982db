// Copies float4s, four floats a thread, for the clock's calibration.
#include <cuda_runtime.h>

__global__ void copy(const float4* from, float4* to, int count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) to[i] = from[i];
}

extern "C" __attribute__((visibility("default"))) int copy_run(const float4* from, float4* to, int floats) {
    copy<<<(floats / 4 + 255) / 256, 256>>>(from, to, floats / 4);
    return cudaGetLastError();
}
