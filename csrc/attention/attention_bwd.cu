// The instantiation for a call's dtype and head dimension.
#include "attention/attention_bwd_tile.cuh"
#include "common/launch.h"

template <class T, int HeadDim>
void attention_bwd_launch(const AttentionBwdParams& params, cudaStream_t stream);

void attention_bwd(const AttentionBwdParams& params, cudaStream_t stream) {
    with_half_type(params.dtype, [&](auto type) {
        using T = decltype(type);
        const int head_dim = params.shape.head_dim;
        head_dim <= 64    ? attention_bwd_launch<T, 64>(params, stream)
        : head_dim <= 96  ? attention_bwd_launch<T, 96>(params, stream)
        : head_dim <= 128 ? attention_bwd_launch<T, 128>(params, stream)
                          : attention_bwd_launch<T, 256>(params, stream);
    });
}

int64_t attention_bwd_workspace_bytes(const AttentionShape& shape, int sm_count) {
    AttentionBwdWorkspace unused;
    return shape.head_dim <= 64    ? attention_bwd_workspace<64>(shape, sm_count, nullptr, &unused)
           : shape.head_dim <= 96  ? attention_bwd_workspace<96>(shape, sm_count, nullptr, &unused)
           : shape.head_dim <= 128 ? attention_bwd_workspace<128>(shape, sm_count, nullptr, &unused)
                                   : attention_bwd_workspace<256>(shape, sm_count, nullptr, &unused);
}
