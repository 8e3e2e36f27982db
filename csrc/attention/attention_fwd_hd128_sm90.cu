#include "attention/attention_fwd_kernel.cuh"

template void attention_fwd_launch<__half, 128>(const AttentionFwdParams&, cudaStream_t);
template void attention_fwd_launch<__nv_bfloat16, 128>(const AttentionFwdParams&, cudaStream_t);
