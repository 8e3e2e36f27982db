// The instantiation for a call's dtype and head dimension.
#include "attention/attention_bwd_tile.cuh"
#include "common/launch.h"

template <class T, int HeadDim>
void attention_fwd_launch(const AttentionFwdParams& params, cudaStream_t stream);

template <class T, int HeadDim>
void attention_bwd_launch(const AttentionBwdParams& params, cudaStream_t stream);

// Calls work with the first of the sizes that holds head_dim.
template <int Size, int... Larger, class Work>
auto with_head_dim(int head_dim, Work work) {
    if constexpr (sizeof...(Larger) > 0)
        if (head_dim > Size) return with_head_dim<Larger...>(head_dim, work);
    return work(std::integral_constant<int, Size>());
}

void attention_fwd(const AttentionFwdParams& params, cudaStream_t stream) {
    with_half_type(params.dtype, [&](auto type) {
        with_head_dim<64, 96, 128, 192, 256>(params.shape.head_dim, [&](auto size) {
            attention_fwd_launch<decltype(type), size.value>(params, stream);
        });
    });
}

void attention_bwd(const AttentionBwdParams& params, cudaStream_t stream) {
    with_half_type(params.dtype, [&](auto type) {
        with_head_dim<64, 96, 128, 256>(params.shape.head_dim, [&](auto size) {
            attention_bwd_launch<decltype(type), size.value>(params, stream);
        });
    });
}

int64_t attention_bwd_workspace_bytes(const AttentionShape& shape, int sm_count) {
    AttentionBwdParams params = {};
    params.shape = shape;
    params.sm_count = sm_count;
    AttentionBwdArguments unused;
    return with_head_dim<64, 96, 128, 256>(shape.head_dim,
                                           [&](auto size) { return attention_bwd_plan<size.value>(params, &unused); });
}
