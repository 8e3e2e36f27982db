#include "mlp/mlp_kernel.cuh"

cudaError_t mlp_bwd(const MlpBwdParams& params, cudaStream_t stream) {
    return params.dtype == DType::kFloat16 ? mlp_bwd_launch<__half>(params, stream)
                                           : mlp_bwd_launch<__nv_bfloat16>(params, stream);
}
