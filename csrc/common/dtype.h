// The element types of tensors, by the numbers that gptkernels/cuda_library.py passes.
#pragma once

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
