// The whole C++ surface of gptkernels: addresses, sizes, strides, and the stream at the end. Launchers return a
// cudaError_t; gptkernels/cuda_library.py turns it into an exception.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include "layer_norm/layer_norm.h"

extern const char* const kSourceHash;
extern const char* const kArchs;

namespace {

using Address = uintptr_t;

template <typename T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

int layer_norm_fwd_binding(Address x, Address residual, Address weight, Address bias, Address seed, Address y, Address h,
                           Address mean, Address rstd, int64_t rows, int columns, int64_t x_stride,
                           int64_t residual_stride, float eps, float keep_scale, uint32_t drop_below, int x_dtype,
                           bool residual_is_float, bool weight_is_float, Address stream) {
    return layer_norm_fwd({pointer<void>(x), pointer<void>(residual), pointer<void>(weight), pointer<void>(bias),
                           pointer<int64_t>(seed), pointer<void>(y), pointer<void>(h), pointer<float>(mean),
                           pointer<float>(rstd), rows, columns, x_stride, residual_stride, eps, keep_scale, drop_below,
                           static_cast<DType>(x_dtype), residual_is_float, weight_is_float},
                          pointer<CUstream_st>(stream));
}

int layer_norm_bwd_binding(Address dy, Address dh, Address h, Address weight, Address mean, Address rstd, Address seed,
                           Address grad_h, Address grad_x, Address partials, Address grad_weight, Address grad_bias,
                           int64_t rows, int columns, int partial_rows, int64_t dy_stride, int64_t dh_stride,
                           int64_t h_stride, float keep_scale, uint32_t drop_below, int x_dtype, bool h_is_float,
                           bool weight_is_float, Address stream) {
    return layer_norm_bwd({pointer<void>(dy), pointer<void>(dh), pointer<void>(h), pointer<void>(weight),
                           pointer<float>(mean), pointer<float>(rstd), pointer<int64_t>(seed), pointer<void>(grad_h),
                           pointer<void>(grad_x), pointer<float>(partials), pointer<void>(grad_weight),
                           pointer<void>(grad_bias), rows, columns, partial_rows, dy_stride, dh_stride, h_stride,
                           keep_scale, drop_below, static_cast<DType>(x_dtype), h_is_float, weight_is_float},
                          pointer<CUstream_st>(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.attr("source_hash") = kSourceHash;
    m.attr("archs") = kArchs;
    m.attr("cuda_version") = CUDART_VERSION;
    m.def("error_string", [](int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); });
    m.def("layer_norm_fwd", &layer_norm_fwd_binding);
    m.def("layer_norm_bwd", &layer_norm_bwd_binding);
    m.def("layer_norm_bwd_partial_rows", &layer_norm_bwd_partial_rows);
}
