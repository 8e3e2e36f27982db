// The activations and their derivatives, in float32.
#pragma once
#include "common/hopper.cuh"
#include "mlp/mlp.h"

// 1 / (1 + 2^x)
GK_DEVICE float sigmoid_of_log2(float x) { return reciprocal_approx(1.f + exp2_approx(x)); }

GK_DEVICE float sigmoid(float x) { return sigmoid_of_log2(-kLog2E * x); }

// (1 + tanh(u)) / 2 is sigmoid(2 u); 2 sqrt(2 / pi) = 1.5957...
GK_DEVICE float gelu_tanh_sigmoid(float x) {
    constexpr float kLinear = -1.59576912160573f * kLog2E;
    return sigmoid_of_log2(x * (kLinear + kLinear * 0.044715f * (x * x)));
}

template <Activation A>
GK_DEVICE float activate_and_slope(float x, float* slope) {
    if constexpr (A == Activation::kGeluTanh) {
        const float s = gelu_tanh_sigmoid(x), act = x * s;
        *slope = s + (act - act * s) * (1.59576912160573f + 3.f * 0.0713548162726f * (x * x));
        return act;
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

template <Activation A>
GK_DEVICE float activate(float x) {
    float slope;
    return activate_and_slope<A>(x, &slope);
}

// activation(gate) * up, or gpt-oss's product of both, and its derivatives by gate and by up. Comparisons that keep NaNs.
template <Activation A>
GK_DEVICE float gated_and_slopes(float gate, float up, float* slope, float* up_slope) {
    if constexpr (A == Activation::kGptOss) {
        constexpr float kLimit = 7.f, kSharpness = 1.702f;
        const float g = gate > kLimit ? kLimit : gate, u = 1.f + (up > kLimit ? kLimit : up < -kLimit ? -kLimit : up);
        const float s = sigmoid(kSharpness * g), act = g * s;
        *slope = gate <= kLimit ? u * (s + kSharpness * (act - act * s)) : 0.f;
        *up_slope = up >= -kLimit && up <= kLimit ? act : 0.f;
        return act * u;
    } else {
        *up_slope = activate_and_slope<A>(gate, slope);
        *slope *= up;
        return *up_slope * up;
    }
}

template <Activation A>
GK_DEVICE float gated(float gate, float up) {
    float slope, up_slope;
    return gated_and_slopes<A>(gate, up, &slope, &up_slope);
}
