// What comes between the products of queries and keys and their softmax: a softcap, then ALiBi.
#pragma once
#include <type_traits>

#include "attention/attention_tile.cuh"

// tanh(x / kTanhUnit<T>). The special function unit's own is off by up to 2^-11, which is little beside what bfloat16
// rounds scores by, but not beside float16.
template <class T>
constexpr float kTanhUnit = std::is_same_v<T, __half> ? 2.f * kLog2E : 1.f;

template <class T>
GK_DEVICE float tanh_in_units(float x) {
    if constexpr (std::is_same_v<T, __half>)
        return fmaf(-2.f, reciprocal_approx(1.f + exp2_approx(x)), 1.f);
    else
        return tanh_approx(x);
}

// Scores in base 2 are `unit` times what this makes of products: tanh(product * scale / softcap), or the product itself
// without a softcap, less distances times slopes in these units.
struct AttentionBend {
    float unit;
    float tanh_factor;   // of products, before tanh_in_units; 0: there is no softcap
    float slope_factor;  // from slopes to these units
};

template <class T>
AttentionBend attention_bend(const AttentionShape& shape) {
    const float largest = shape.softcap > 0.f ? shape.softcap : shape.scale;
    return {largest * kLog2E, shape.softcap > 0.f ? shape.scale / shape.softcap * kTanhUnit<T> : 0.f, 1.f / largest};
}

// Of a head of a tile's sequence
GK_DEVICE float alibi_slope(const AttentionBend& bend, const AttentionShape& shape, const AttentionTile& tile,
                            int head) {
    if (!shape.alibi_slopes) return 0.f;
    return shape.alibi_slopes[int64_t(tile.batch) * shape.slope_stride + head] * bend.slope_factor;
}

template <class T, int R>
GK_DEVICE void cap_scores(float (&s)[R], const AttentionBend& bend) {
    if (bend.tanh_factor == 0.f) return;
#pragma unroll
    for (int i = 0; i < R; ++i) s[i] = tanh_in_units<T>(s[i] * bend.tanh_factor);
}

// How far score i of a thread is from the diagonal; the first columns of its two rows are `first` from there.
GK_DEVICE float diagonal_distance(float2 first, int i) {
    return fabsf((i / 2 % 2 ? first.y : first.x) - float(i / 4 * 8 + i % 2));
}

template <int R>
GK_DEVICE void subtract_distances(float (&s)[R], float slope, float2 first) {
    if (slope == 0.f) return;
#pragma unroll
    for (int i = 0; i < R; ++i) s[i] = fmaf(-slope, diagonal_distance(first, i), s[i]);
}
