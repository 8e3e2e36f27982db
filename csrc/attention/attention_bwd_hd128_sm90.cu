#include "attention/attention_bwd_passes.cuh"

template void attention_bwd_launch<__half, 128>(const AttentionBwdParams&, cudaStream_t);
template void attention_bwd_launch<__nv_bfloat16, 128>(const AttentionBwdParams&, cudaStream_t);
