#include "cross_entropy/cross_entropy_kernel.cuh"

cudaError_t cross_entropy(const CrossEntropyParams& params, cudaStream_t stream) {
    return with_type(params.dtype, [&](auto type) { return launch_cross_entropy<decltype(type)>(params, stream); });
}
