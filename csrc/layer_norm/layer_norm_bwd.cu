#include "layer_norm/layer_norm_bwd_kernel.cuh"

void layer_norm_bwd(const LayerNormBwdParams& params, cudaStream_t stream) { launch_norm_bwd<false>(params, stream); }

int layer_norm_bwd_partial_rows(int64_t rows, int columns, int sm_count) {
    return norm_bwd_ctas(rows, columns, sm_count, false);
}
