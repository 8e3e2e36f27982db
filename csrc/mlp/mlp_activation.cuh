// The activations and their derivatives, in float32.
#pragma once
#include "common/hopper.cuh"
#include "mlp/mlp.h"

__device__ __forceinline__ float sigmoid(float x) {
    return reciprocal_approx(1.f + exp2_approx(-1.44269504088896f * x));
}

template <Activation A>
__device__ __forceinline__ float activate(float x) {
    // (1 + tanh(u)) / 2 is sigmoid(2 u); 2 sqrt(2 / pi) = 1.5957...
    if constexpr (A == Activation::kGeluTanh)
        return x * sigmoid(1.59576912160573f * x * (1.f + 0.044715f * x * x));
    else if constexpr (A == Activation::kGelu)
        return 0.5f * x * (1.f + erff(0.707106781186548f * x));
    else if constexpr (A == Activation::kRelu)
        return x < 0.f ? 0.f : x;
    else if constexpr (A == Activation::kRelu2)
        return x < 0.f ? 0.f : x * x;
    else if constexpr (A == Activation::kSilu)
        return x * sigmoid(x);
    else
        return x;
}

template <Activation A>
__device__ __forceinline__ float activate_and_slope(float x, float* slope) {
    if constexpr (A == Activation::kGeluTanh) {
        const float square = x * x;
        const float s = sigmoid(1.59576912160573f * x * (1.f + 0.044715f * square));
        *slope = s + x * s * (1.f - s) * (1.59576912160573f + 3.f * 0.0713548162726f * square);
        return x * s;
    } else if constexpr (A == Activation::kGelu) {
        const float phi = 0.5f * (1.f + erff(0.707106781186548f * x));
        *slope = phi + x * 0.398942280401433f * exp2_approx(-0.721347520444482f * x * x);
        return x * phi;
    } else if constexpr (A == Activation::kRelu) {
        *slope = x <= 0.f ? 0.f : 1.f;
        return x < 0.f ? 0.f : x;
    } else if constexpr (A == Activation::kRelu2) {
        *slope = x < 0.f ? 0.f : 2.f * x;
        return x < 0.f ? 0.f : x * x;
    } else {
        const float s = sigmoid(x);
        *slope = s * (1.f + x * (1.f - s));
        return x * s;
    }
}

// Calls work with an Activation of compile time.
template <Activation A>
struct ActivationTag {
    static constexpr Activation value = A;
};

template <class Work>
__device__ __forceinline__ void with_activation(Activation activation, Work work) {
    switch (activation) {
        case Activation::kNone: return work(ActivationTag<Activation::kNone>{});
        case Activation::kGeluTanh: return work(ActivationTag<Activation::kGeluTanh>{});
        case Activation::kGelu: return work(ActivationTag<Activation::kGelu>{});
        case Activation::kRelu: return work(ActivationTag<Activation::kRelu>{});
        case Activation::kRelu2: return work(ActivationTag<Activation::kRelu2>{});
        case Activation::kSilu: return work(ActivationTag<Activation::kSilu>{});
    }
}
