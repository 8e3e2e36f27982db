#include "mlp/mlp_kernel.cuh"

void mlp_fwd(const MlpFwdParams& params, cudaStream_t stream) {
    with_half_type(params.dtype, [&](auto type) { mlp_fwd_launch<decltype(type)>(params, stream); });
}
