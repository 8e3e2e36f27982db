#include "layer_norm/layer_norm_fwd_kernel.cuh"

void rms_norm_fwd(const RMSNormFwdParams& params, cudaStream_t stream) { launch_norm_fwd<true>(params, stream); }
