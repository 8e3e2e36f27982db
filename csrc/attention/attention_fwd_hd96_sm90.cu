#include "attention/attention_fwd_kernel.cuh"

template void attention_fwd_launch<__half, 96>(const AttentionFwdParams&, cudaStream_t);
template void attention_fwd_launch<__nv_bfloat16, 96>(const AttentionFwdParams&, cudaStream_t);
