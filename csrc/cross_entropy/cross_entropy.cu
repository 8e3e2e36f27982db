#include "cross_entropy/cross_entropy_kernel.cuh"

void cross_entropy(const CrossEntropyParams& params, cudaStream_t stream) {
    with_type(params.dtype, [&](auto type) { launch_cross_entropy<decltype(type)>(params, stream); });
}
