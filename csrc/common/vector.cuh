// Reads and writes of a few consecutive elements, as float32 in registers and as any dtype in memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/device.cuh"

template <typename T>
GK_DEVICE float to_float(T value) {
    return float(value);
}

template <typename T>
GK_DEVICE T from_float(float value) {
    return T(value);
}

// The elements of a thread's share that lie at [column, column + kElements) of a row of `columns`.
constexpr int kElements = 8;

// kElements elements as they lie in memory: half the registers of float32 for 16-bit types.
template <typename T>
struct Packed {
    static constexpr int kPerWord = 16 / sizeof(T);
    uint4 words[kElements / kPerWord];

    GK_DEVICE float operator[](int i) const { return to_float(reinterpret_cast<const T*>(words)[i]); }
    GK_DEVICE void set(int i, float value) { reinterpret_cast<T*>(words)[i] = from_float<T>(value); }
};

// aligned: `row` and the row's length are multiples of 16 bytes, so that whole 16-byte words can be read.
// Elements past the end of the row read as 0.
template <typename T>
GK_DEVICE Packed<T> load_packed(const T* row, int column, int columns, bool aligned) {
    Packed<T> packed;
    constexpr int kPerWord = Packed<T>::kPerWord;
    if (aligned && column + kElements <= columns) {
#pragma unroll
        for (int i = 0; i < kElements / kPerWord; ++i)
            packed.words[i] = *reinterpret_cast<const uint4*>(row + column + i * kPerWord);
    } else {
#pragma unroll
        for (int i = 0; i < kElements; ++i) packed.set(i, column + i < columns ? to_float(row[column + i]) : 0.0f);
    }
    return packed;
}

// kWhole: the row and its length are multiples of kElements elements and of 16 bytes, else nothing is.
template <bool kWhole, typename T>
GK_DEVICE Packed<T> load_packed(const T* row, int column, int columns) {
    if constexpr (!kWhole) return load_packed(row, column, columns, false);
    Packed<T> packed = {};
    if (column < columns) packed = load_packed(row, column, column + kElements, true);
    return packed;
}

template <typename T>
GK_DEVICE void store_packed(T* row, const Packed<T>& packed, int column, int columns, bool aligned) {
    constexpr int kPerWord = Packed<T>::kPerWord;
    if (aligned && column + kElements <= columns) {
#pragma unroll
        for (int i = 0; i < kElements / kPerWord; ++i)
            *reinterpret_cast<uint4*>(row + column + i * kPerWord) = packed.words[i];
    } else {
#pragma unroll
        for (int i = 0; i < kElements; ++i)
            if (column + i < columns) row[column + i] = reinterpret_cast<const T*>(packed.words)[i];
    }
}

template <bool kWhole, typename T>
GK_DEVICE void store_packed(T* row, const Packed<T>& packed, int column, int columns) {
    if constexpr (!kWhole)
        store_packed(row, packed, column, columns, false);
    else if (column < columns)
        store_packed(row, packed, column, column + kElements, true);
}
