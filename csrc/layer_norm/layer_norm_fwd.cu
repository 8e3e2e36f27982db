#include "layer_norm/layer_norm_fwd_kernel.cuh"

void layer_norm_fwd(const LayerNormFwdParams& params, cudaStream_t stream) {
    with_type(params.x_dtype, [&](auto type) {
        using T = decltype(type);
        params.residual_is_float ? launch_layer_norm_fwd<T, float>(params, stream)
                                 : launch_layer_norm_fwd<T, T>(params, stream);
    });
}
