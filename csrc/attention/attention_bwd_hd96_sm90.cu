#include "attention/attention_bwd_passes.cuh"

template void attention_bwd_launch<__half, 96>(const AttentionBwdParams&, cudaStream_t);
template void attention_bwd_launch<__nv_bfloat16, 96>(const AttentionBwdParams&, cudaStream_t);
