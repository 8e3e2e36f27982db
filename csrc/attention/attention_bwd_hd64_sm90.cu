#include "attention/attention_bwd_passes.cuh"

template void attention_bwd_launch<__half, 64>(const AttentionBwdParams&, cudaStream_t);
template void attention_bwd_launch<__nv_bfloat16, 64>(const AttentionBwdParams&, cudaStream_t);
