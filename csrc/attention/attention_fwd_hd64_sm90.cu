#include "attention/attention_fwd_kernel.cuh"

template void attention_fwd_launch<__half, 64>(const AttentionFwdParams&, cudaStream_t);
template void attention_fwd_launch<__nv_bfloat16, 64>(const AttentionFwdParams&, cudaStream_t);
