// The instantiation for a call's dtype and head dimension.
#include "attention/attention_bwd_tile.cuh"
#include "common/launch.h"

template <class T, int HeadDim, bool kBent>
void attention_fwd_launch(const AttentionFwdParams& params, cudaStream_t stream);

template <class T, int HeadDim, bool kBent>
void attention_bwd_launch(const AttentionBwdParams& params, cudaStream_t stream);

// Calls work with the first of the sizes that holds head_dim.
template <int Size, int... Larger, class Work>
auto with_head_dim(int head_dim, Work work) {
    if constexpr (sizeof...(Larger) > 0)
        if (head_dim > Size) return with_head_dim<Larger...>(head_dim, work);
    return work(std::integral_constant<int, Size>());
}

// Whether something comes between products and softmax.
bool bends(const AttentionShape& shape) { return shape.softcap > 0.f || shape.alibi_slopes; }

void attention_fwd(const AttentionFwdParams& params, cudaStream_t stream) {
    const AttentionShape& shape = params.shape;
    with_half_type(params.dtype, [&](auto type) {
        using T = decltype(type);
        if (bends(shape))
            with_head_dim<64, 96, 128, 256>(
                shape.head_dim, [&](auto size) { attention_fwd_launch<T, size.value, true>(params, stream); });
        else
            with_head_dim<64, 96, 128, 192, 256>(
                shape.head_dim, [&](auto size) { attention_fwd_launch<T, size.value, false>(params, stream); });
    });
}

void attention_bwd(const AttentionBwdParams& params, cudaStream_t stream) {
    with_half_type(params.dtype, [&](auto type) {
        with_head_dim<64, 96, 128, 256>(params.shape.head_dim, [&](auto size) {
            if (bends(params.shape))
                attention_bwd_launch<decltype(type), size.value, true>(params, stream);
            else
                attention_bwd_launch<decltype(type), size.value, false>(params, stream);
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
