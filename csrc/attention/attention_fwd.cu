// The instantiation for a call's dtype and head dimension.
#include "attention/attention.h"
#include "common/launch.h"

template <class T, int HeadDim>
void attention_fwd_launch(const AttentionFwdParams& params, cudaStream_t stream);

void attention_fwd(const AttentionFwdParams& params, cudaStream_t stream) {
    with_half_type(params.dtype, [&](auto type) {
        using T = decltype(type);
        const int head_dim = params.shape.head_dim;
        head_dim <= 64    ? attention_fwd_launch<T, 64>(params, stream)
        : head_dim <= 96  ? attention_fwd_launch<T, 96>(params, stream)
        : head_dim <= 128 ? attention_fwd_launch<T, 128>(params, stream)
        : head_dim <= 192 ? attention_fwd_launch<T, 192>(params, stream)
                          : attention_fwd_launch<T, 256>(params, stream);
    });
}
