#include "mlp/mlp_kernel.cuh"

void mlp_bwd(const MlpBwdParams& params, cudaStream_t stream) {
    with_half_type(params.dtype, [&](auto type) { mlp_bwd_launch<decltype(type)>(params, stream); });
}
