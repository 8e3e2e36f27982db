#include "layer_norm/layer_norm_fwd_kernel.cuh"

cudaError_t layer_norm_fwd(const LayerNormFwdParams& params, cudaStream_t stream) {
    return with_type(params.x_dtype, [&](auto type) {
        using T = decltype(type);
        return params.residual_is_float ? launch_layer_norm_fwd<T, float>(params, stream)
                                        : launch_layer_norm_fwd<T, T>(params, stream);
    });
}
