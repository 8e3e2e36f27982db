#include "attention/attention_bwd_passes.cuh"

template void attention_bwd_launch<__half, 256>(const AttentionBwdParams&, cudaStream_t);
template void attention_bwd_launch<__nv_bfloat16, 256>(const AttentionBwdParams&, cudaStream_t);
