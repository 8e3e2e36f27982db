// Three kernels, the later two of which may start before the one before them has ended.
#include <cuda_runtime.h>

enum Bug { kNone, kSecondDoesNotWait, kThirdDoesNotWait, kOverwritesBeforeItWaits };

__device__ void wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ void let_dependents_start() { asm volatile("griddepcontrol.launch_dependents;"); }

// middle = 2 in
__global__ void first(const float* in, float* middle) {
    let_dependents_start();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    middle[i] = 2 * in[i];
}

// last = middle + 1, in = 0
__global__ void second(float* in, const float* middle, float* last, Bug bug) {
    let_dependents_start();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (bug == kOverwritesBeforeItWaits) in[i] = 0;
    if (bug != kSecondDoesNotWait) wait();
    last[i] = middle[i] + 1;
    in[i] = 0;
}

// out = 3 last
__global__ void third(const float* last, float* out, Bug bug) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (bug != kThirdDoesNotWait) wait();
    out[i] = 3 * last[i];
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int blocks, bool dependent, Arguments... arguments) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = blocks;
    config.blockDim = 64;
    config.attrs = &attribute;
    config.numAttrs = dependent;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

extern "C" int dependent_chain(float* in, float* middle, float* last, float* out, int blocks, int dependent, Bug bug) {
    if (cudaError_t error = launch(first, blocks, false, in, middle)) return error;
    if (cudaError_t error = launch(second, blocks, dependent, in, middle, last, bug)) return error;
    return launch(third, blocks, dependent, last, out, bug);
}

// The first kernel alone: it has run when a later call says so.
extern "C" int dependent_first(float* in, float* middle, int blocks) {
    if (cudaError_t error = launch(first, blocks, false, in, middle)) return error;
    return cudaDeviceSynchronize();
}
