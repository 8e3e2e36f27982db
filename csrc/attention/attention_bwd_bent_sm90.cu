// Compiled for each HEAD_DIM of 64 96 128 256.
#include "attention/attention_bwd_passes.cuh"

template void attention_bwd_launch<__half, HEAD_DIM, true>(const AttentionBwdParams&, cudaStream_t);
template void attention_bwd_launch<__nv_bfloat16, HEAD_DIM, true>(const AttentionBwdParams&, cudaStream_t);
