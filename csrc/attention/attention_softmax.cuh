// Online softmax over the scores that a consumer thread of the forward pass holds.
#pragma once
#include "common/hopper.cuh"

// Row statistics of a thread's two rows, base 2. `max` may lag behind the true maximum by up to kLag: as both the sum
// and the output are relative to it that is exact, and most blocks need not rescale the output.
struct AttentionSoftmax {
    static constexpr float kLag = 8.f;
    const float scale;  // of the scores, times log2(e)
    float max[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f}, factor[2];

    // Turns scores into exponentials; true if what was summed before must be multiplied by `factor`.
    template <int R>
    GK_DEVICE bool update(float (&s)[R]) {
        // Two chains for each row: one alone would wait for its own last result most of the time.
        float block_max[2] = {max[0], max[1]}, other_max[2] = {s[0], s[2]};
#pragma unroll
        for (int i = 0; i < R; i += 4) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                block_max[h] = fmaxf(block_max[h], s[i + 2 * h]);
                other_max[h] = fmaxf(other_max[h], s[i + 2 * h + 1]);
            }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            block_max[h] = fmaxf(block_max[h], other_max[h]);
            block_max[h] = fmaxf(block_max[h], __shfl_xor_sync(~0u, block_max[h], 1));
            block_max[h] = fmaxf(block_max[h], __shfl_xor_sync(~0u, block_max[h], 2));
        }
        const bool rescale =
            __any_sync(~0u, (block_max[0] - max[0]) * scale > kLag || (block_max[1] - max[1]) * scale > kLag);
        if (rescale) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                factor[h] = exp2_approx((max[h] - reference(block_max[h])) * scale);
                sum[h] *= factor[h];
                max[h] = block_max[h];
            }
        }
        const float base[2] = {reference(max[0]) * scale, reference(max[1]) * scale};
#pragma unroll
        for (int i = 0; i < R; ++i) {
            s[i] = exp2_approx(fmaf(s[i], scale, -base[i / 2 % 2]));
            sum[i / 2 % 2] += s[i];
        }
        return rescale;
    }

    // What a row's scores are relative to: a row that has seen no key yet must not compute -inf - -inf.
    static GK_DEVICE float reference(float max) { return max == -INFINITY ? 0.f : max; }

    // Sums over the four threads that share a row.
    GK_DEVICE void finish() {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
            sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
        }
    }

    // A row that sees no key has output 0.
    GK_DEVICE float inverse_sum(int h) const { return sum[h] == 0.f ? 0.f : 1.f / sum[h]; }

    GK_DEVICE float lse(int h) const {
        constexpr float kLn2 = 0.693147180559945f;
        return sum[h] == 0.f ? -INFINITY : kLn2 * fmaf(reference(max[h]), scale, log2f(sum[h]));
    }
};

// One more score in a row, of no value: from what the row would have without. It may be far above all others.
GK_DEVICE void add_sink(float sink, float& inverse_sum, float& lse) {
    constexpr float kLn2 = 0.693147180559945f;
    const float top = fmaxf(lse, sink);
    if (top == -INFINITY) return;
    const float keys = exp2_approx((lse - top) * kLog2E), sum = keys + exp2_approx((sink - top) * kLog2E);
    inverse_sum *= keys / sum;
    lse = fmaf(kLn2, log2f(sum), top);
}
