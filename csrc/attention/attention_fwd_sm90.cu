// Compiled for each HEAD_DIM of 64 96 128 192 256.
#include "attention/attention_fwd_kernel.cuh"

template void attention_fwd_launch<__half, HEAD_DIM, false>(const AttentionFwdParams&, cudaStream_t);
template void attention_fwd_launch<__nv_bfloat16, HEAD_DIM, false>(const AttentionFwdParams&, cudaStream_t);
