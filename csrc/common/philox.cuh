// Which elements dropout keeps: the rule of gptkernels/ops/dropout.py.
#pragma once

#include <cstdint>

#include "common/device.cuh"

// Word 0 of Philox4x32-10.
GK_DEVICE uint32_t philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint32_t high_a = __umulhi(0xD2511F53u, c0), low_a = 0xD2511F53u * c0;
        const uint32_t high_b = __umulhi(0xCD9E8D57u, c2), low_b = 0xCD9E8D57u * c2;
        c0 = high_b ^ c1 ^ k0;
        c1 = low_b;
        c2 = high_a ^ c3 ^ k1;
        c3 = low_a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c0;
}

GK_DEVICE bool is_kept(uint64_t seed, int64_t row, int column, uint32_t drop_below) {
    return philox(seed, column, static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), 0) >= drop_below;
}
