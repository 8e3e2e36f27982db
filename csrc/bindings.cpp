// The whole C++ surface of gptkernels: every launcher takes the fields of its params struct by name, and the stream.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <type_traits>

#include "attention/attention.h"
#include "cross_entropy/cross_entropy.h"
#include "layer_norm/layer_norm.h"
#include "mlp/mlp.h"

namespace py = pybind11;

extern const char* const kSourceHash;
extern const char* const kArchs;

namespace {

// What Python passes: numbers, tensors (or None) where the struct has pointers, and tuples of three strides.
class Fields {
  public:
    explicit Fields(const py::dict& values) : values_(values) {}

    // name: a str, which is looked up faster than characters
    template <class Value>
    Fields& operator()(PyObject* name, Value& field) {
        const py::handle value = PyDict_GetItemWithError(values_.ptr(), name);
        if (!value) throw py::key_error("there is no " + py::cast<std::string>(py::handle(name)));
        ++taken_;
        if constexpr (std::is_pointer_v<Value>)
            field = reinterpret_cast<Value>(value.is_none() ? 0 : address(value));
        else if constexpr (std::is_enum_v<Value>)
            field = static_cast<Value>(value.cast<int>());
        else if constexpr (std::is_same_v<Value, AttentionStrides>)
            field = {stride(value, 0), stride(value, 1), stride(value, 2)};
        else
            field = value.cast<Value>();
        return *this;
    }

    void end() const {
        if (taken_ != values_.size()) throw py::key_error("there are more fields than these");
    }

  private:
    static uintptr_t address(py::handle tensor) {
        static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
        const auto found = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.ptr(), data_ptr));
        if (!found) throw py::error_already_set();
        return found.cast<uintptr_t>();
    }
    static int64_t stride(py::handle strides, int i) { return strides[py::int_(i)].cast<int64_t>(); }

    const py::dict& values_;
    size_t taken_ = 0;
};

PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

#define FIELD(name) ([] { static PyObject* const key = interned(#name); return key; }(), p.name)

void read(Fields& fields, AttentionShape& p) {
    fields FIELD(batch) FIELD(heads) FIELD(kv_heads) FIELD(q_len) FIELD(k_len) FIELD(head_dim) FIELD(left) FIELD(right)
        FIELD(scale) FIELD(key_start) FIELD(cu_seqlens);
}

void read(Fields& fields, AttentionFwdParams& p) {
    read(fields, p.shape);
    fields FIELD(dtype) FIELD(sm_count) FIELD(q) FIELD(k) FIELD(v) FIELD(out) FIELD(lse) FIELD(tile_counter)
        FIELD(q_strides) FIELD(k_strides) FIELD(v_strides) FIELD(out_strides);
}

void read(Fields& fields, AttentionBwdParams& p) {
    read(fields, p.shape);
    fields FIELD(dtype) FIELD(sm_count) FIELD(dq_order) FIELD(dout) FIELD(q) FIELD(k) FIELD(v) FIELD(out) FIELD(lse)
        FIELD(dq) FIELD(dk) FIELD(dv) FIELD(dout_strides) FIELD(q_strides) FIELD(k_strides) FIELD(v_strides)
        FIELD(out_strides) FIELD(dq_strides) FIELD(dk_strides) FIELD(dv_strides) FIELD(workspace);
}

void read(Fields& fields, CrossEntropyParams& p) {
    fields FIELD(logits) FIELD(targets) FIELD(losses) FIELD(lse) FIELD(scale) FIELD(rows) FIELD(stride)
        FIELD(scale_stride) FIELD(ignore_index) FIELD(vocabulary) FIELD(dtype) FIELD(with_grad);
}

void read(Fields& fields, NormFwdParams& p) {
    fields FIELD(x) FIELD(residual) FIELD(weight) FIELD(seed) FIELD(y) FIELD(h) FIELD(rstd) FIELD(rows) FIELD(columns)
        FIELD(x_stride) FIELD(residual_stride) FIELD(eps) FIELD(keep_scale) FIELD(drop_below) FIELD(x_dtype)
        FIELD(residual_is_float) FIELD(weight_is_float);
}

void read(Fields& fields, LayerNormFwdParams& p) {
    read(fields, static_cast<NormFwdParams&>(p));
    fields FIELD(bias) FIELD(mean);
}

void read(Fields& fields, RMSNormFwdParams& p) {
    read(fields, static_cast<NormFwdParams&>(p));
    fields FIELD(x_group_stride) FIELD(group_rows) FIELD(offset) FIELD(cast_first);
}

void read(Fields& fields, LayerNormBwdParams& p) {
    fields FIELD(dy) FIELD(dh) FIELD(h) FIELD(weight) FIELD(mean) FIELD(rstd) FIELD(seed) FIELD(grad_h) FIELD(grad_x)
        FIELD(partials) FIELD(grad_weight) FIELD(grad_bias) FIELD(rows) FIELD(columns) FIELD(partial_rows)
        FIELD(dy_stride) FIELD(dh_stride) FIELD(h_stride) FIELD(keep_scale) FIELD(drop_below) FIELD(x_dtype)
        FIELD(h_is_float) FIELD(weight_is_float);
}

void read(Fields& fields, RMSNormBwdParams& p) {
    read(fields, static_cast<LayerNormBwdParams&>(p));
    fields FIELD(dy_group_stride) FIELD(h_group_stride) FIELD(group_rows) FIELD(offset);
}

void read(Fields& fields, MlpFwdParams& p) {
    fields FIELD(a) FIELD(weight) FIELD(bias) FIELD(residual) FIELD(preact) FIELD(out) FIELD(M) FIELD(N) FIELD(K)
        FIELD(a_stride) FIELD(residual_stride) FIELD(activation) FIELD(dtype) FIELD(sm_count);
}

void read(Fields& fields, MlpBwdParams& p) {
    fields FIELD(dout) FIELD(weight) FIELD(preact) FIELD(act) FIELD(grad) FIELD(partials) FIELD(M) FIELD(N) FIELD(K)
        FIELD(dout_stride) FIELD(activation) FIELD(dtype) FIELD(sm_count);
}

template <class Params>
Params params_of(const py::dict& values) {
    Fields fields(values);
    Params params = {};
    read(fields, params);
    fields.end();
    return params;
}

template <class Params>
void define(py::module_& m, const char* name, void (*launcher)(const Params&, cudaStream_t)) {
    m.def(name, [launcher](const py::dict& values, uintptr_t stream) {
        launcher(params_of<Params>(values), reinterpret_cast<cudaStream_t>(stream));
    });
}

int driver_version() {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.attr("source_hash") = kSourceHash;
    m.attr("archs") = kArchs;
    m.attr("cuda_version") = CUDART_VERSION;
    m.def("driver_version", &driver_version);
    define(m, "attention_fwd", &attention_fwd);
    define(m, "attention_bwd", &attention_bwd);
    m.def("attention_bwd_workspace_bytes",
          [](const py::dict& shape, int sm_count) {
              return attention_bwd_workspace_bytes(params_of<AttentionShape>(shape), sm_count);
          });
    define(m, "cross_entropy", &cross_entropy);
    define(m, "layer_norm_fwd", &layer_norm_fwd);
    define(m, "layer_norm_bwd", &layer_norm_bwd);
    m.def("layer_norm_bwd_partial_rows", &layer_norm_bwd_partial_rows);
    m.def("rms_norm_bwd_partial_rows", &rms_norm_bwd_partial_rows);
    define(m, "rms_norm_fwd", &rms_norm_fwd);
    define(m, "rms_norm_bwd", &rms_norm_bwd);
    define(m, "mlp_fwd", &mlp_fwd);
    define(m, "mlp_bwd", &mlp_bwd);
}
