#include "layer_norm/layer_norm_bwd_kernel.cuh"

void rms_norm_bwd(const RMSNormBwdParams& params, cudaStream_t stream) { launch_norm_bwd<true>(params, stream); }

int rms_norm_bwd_partial_rows(int64_t rows, int columns, int sm_count) {
    return norm_bwd_ctas(rows, columns, sm_count, true);
}
