// The whole C++ surface of gptkernels: addresses, sizes, strides, and the stream at the end. Launchers return a
// cudaError_t; gptkernels/cuda_library.py turns it into an exception.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "attention/attention.h"
#include "cross_entropy/cross_entropy.h"
#include "layer_norm/layer_norm.h"
#include "mlp/mlp.h"

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

using Strides = std::array<int64_t, 3>;  // from one batch entry, head and row to the next

AttentionStrides attention_strides(const Strides& strides) { return {strides[0], strides[1], strides[2]}; }

AttentionShape attention_shape(int batch, int heads, int kv_heads, int q_len, int k_len, int head_dim, int left,
                               int right, float scale, Address key_start, Address cu_seqlens) {
    return {batch, heads, kv_heads, q_len, k_len, head_dim, left, right, scale, pointer<int>(key_start),
            pointer<int>(cu_seqlens)};
}

int attention_fwd_binding(Address q, Address k, Address v, Address out, Address lse, Address tile_counter,
                          Strides q_strides, Strides k_strides, Strides v_strides, Strides out_strides, int dtype,
                          int sm_count, int batch, int heads, int kv_heads, int q_len, int k_len, int head_dim,
                          int left, int right, float scale, Address key_start, Address cu_seqlens, Address stream) {
    return attention_fwd({attention_shape(batch, heads, kv_heads, q_len, k_len, head_dim, left, right, scale,
                                          key_start, cu_seqlens),
                          static_cast<DType>(dtype), sm_count, pointer<void>(q), pointer<void>(k), pointer<void>(v),
                          pointer<void>(out), attention_strides(q_strides), attention_strides(k_strides),
                          attention_strides(v_strides), attention_strides(out_strides), pointer<float>(lse),
                          pointer<int>(tile_counter)},
                         pointer<CUstream_st>(stream));
}

int attention_bwd_binding(Address dout, Address q, Address k, Address v, Address out, Address lse, Address dq,
                          Address dk, Address dv, Address workspace, Strides dout_strides, Strides q_strides,
                          Strides k_strides, Strides v_strides, Strides out_strides, Strides dq_strides,
                          Strides dk_strides, Strides dv_strides, int dtype, int sm_count, bool deterministic,
                          int batch, int heads, int kv_heads, int q_len, int k_len, int head_dim, int left, int right,
                          float scale, Address key_start, Address cu_seqlens, Address stream) {
    return attention_bwd({attention_shape(batch, heads, kv_heads, q_len, k_len, head_dim, left, right, scale,
                                          key_start, cu_seqlens),
                          static_cast<DType>(dtype), sm_count, deterministic, pointer<void>(dout), pointer<void>(q),
                          pointer<void>(k), pointer<void>(v), pointer<void>(out), pointer<float>(lse),
                          pointer<void>(dq), pointer<void>(dk), pointer<void>(dv), attention_strides(dout_strides),
                          attention_strides(q_strides), attention_strides(k_strides), attention_strides(v_strides),
                          attention_strides(out_strides), attention_strides(dq_strides), attention_strides(dk_strides),
                          attention_strides(dv_strides), pointer<void>(workspace)},
                         pointer<CUstream_st>(stream));
}

int64_t attention_bwd_workspace_binding(int batch, int heads, int kv_heads, int q_len, int k_len, int head_dim,
                                        int left, int right, float scale, Address key_start, Address cu_seqlens) {
    return attention_bwd_workspace_bytes(attention_shape(batch, heads, kv_heads, q_len, k_len, head_dim, left, right,
                                                         scale, key_start, cu_seqlens));
}

int cross_entropy_binding(Address logits, Address targets, Address losses, Address lse, Address scale, int64_t rows,
                          int64_t stride, int64_t scale_stride, int64_t ignore_index, int vocabulary, int dtype,
                          bool with_grad, Address stream) {
    return cross_entropy({pointer<void>(logits), pointer<int64_t>(targets), pointer<float>(losses), pointer<float>(lse),
                          pointer<float>(scale), rows, stride, scale_stride, ignore_index, vocabulary,
                          static_cast<DType>(dtype), with_grad},
                         pointer<CUstream_st>(stream));
}

int mlp_fwd_binding(Address a, Address weight, Address bias, Address residual, Address preact, Address out, int M, int N,
                    int K, int64_t a_stride, int64_t residual_stride, int activation, int dtype, int sm_count,
                    Address stream) {
    return mlp_fwd({pointer<void>(a), pointer<void>(weight), pointer<void>(bias), pointer<void>(residual),
                    pointer<void>(preact), pointer<void>(out), M, N, K, a_stride, residual_stride,
                    static_cast<Activation>(activation), static_cast<DType>(dtype), sm_count},
                   pointer<CUstream_st>(stream));
}

int mlp_bwd_binding(Address dout, Address weight, Address preact, Address act, Address grad, Address partials, int M,
                    int N, int K, int64_t dout_stride, int activation, int dtype, int sm_count, Address stream) {
    return mlp_bwd({pointer<void>(dout), pointer<void>(weight), pointer<void>(preact), pointer<void>(act),
                    pointer<void>(grad), pointer<float>(partials), M, N, K, dout_stride,
                    static_cast<Activation>(activation), static_cast<DType>(dtype), sm_count},
                   pointer<CUstream_st>(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.attr("source_hash") = kSourceHash;
    m.attr("archs") = kArchs;
    m.attr("cuda_version") = CUDART_VERSION;
    m.def("error_string", [](int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); });
    m.def("attention_fwd", &attention_fwd_binding);
    m.def("attention_bwd", &attention_bwd_binding);
    m.def("attention_bwd_workspace_bytes", &attention_bwd_workspace_binding);
    m.def("cross_entropy", &cross_entropy_binding);
    m.def("layer_norm_fwd", &layer_norm_fwd_binding);
    m.def("layer_norm_bwd", &layer_norm_bwd_binding);
    m.def("layer_norm_bwd_partial_rows", &layer_norm_bwd_partial_rows);
    m.def("mlp_fwd", &mlp_fwd_binding);
    m.def("mlp_bwd", &mlp_bwd_binding);
}
