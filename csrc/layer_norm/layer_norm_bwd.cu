#include "layer_norm/layer_norm_bwd_kernel.cuh"

void layer_norm_bwd(const LayerNormBwdParams& params, cudaStream_t stream) {
    with_type(params.x_dtype, [&](auto type) {
        using T = decltype(type);
        params.h_is_float ? launch_layer_norm_bwd<T, float>(params, stream)
                          : launch_layer_norm_bwd<T, T>(params, stream);
    });
}

int layer_norm_bwd_partial_rows(int64_t rows, int columns, int sm_count) {
    return layer_norm_bwd_ctas(rows, row_shape(columns), sm_count);
}
