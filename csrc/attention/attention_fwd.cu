// The instantiation for a call's dtype and head dimension.
#include "attention/attention.h"
#include "common/dtype.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

template <class T, int HeadDim>
cudaError_t attention_fwd_launch(const AttentionFwdParams& params, cudaStream_t stream);

template <class T>
static cudaError_t attention_fwd_of(const AttentionFwdParams& params, cudaStream_t stream) {
    const int head_dim = params.shape.head_dim;
    return head_dim <= 64    ? attention_fwd_launch<T, 64>(params, stream)
           : head_dim <= 96  ? attention_fwd_launch<T, 96>(params, stream)
           : head_dim <= 128 ? attention_fwd_launch<T, 128>(params, stream)
                             : attention_fwd_launch<T, 256>(params, stream);
}

cudaError_t attention_fwd(const AttentionFwdParams& params, cudaStream_t stream) {
    return params.dtype == DType::kFloat16 ? attention_fwd_of<__half>(params, stream)
                                           : attention_fwd_of<__nv_bfloat16>(params, stream);
}
