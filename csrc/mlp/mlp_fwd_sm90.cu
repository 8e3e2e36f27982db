#include "mlp/mlp_kernel.cuh"

cudaError_t mlp_fwd(const MlpFwdParams& params, cudaStream_t stream) {
    return params.dtype == DType::kFloat16 ? mlp_fwd_launch<__half>(params, stream)
                                           : mlp_fwd_launch<__nv_bfloat16>(params, stream);
}
