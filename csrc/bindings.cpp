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

// What Python passes: numbers, tensors (or None) where the struct has pointers, and tuples of a tensor and its strides.
struct Fields {
    const py::dict& values;
    size_t taken = 0;

    // name: a str, which is looked up faster than characters
    template <class Value>
    Fields& operator()(PyObject* name, Value& field) {
        const py::handle value = PyDict_GetItemWithError(values.ptr(), name);
        if (!value) throw py::key_error("there is no " + py::cast<std::string>(py::handle(name)));
        ++taken;
        if constexpr (std::is_pointer_v<Value>)
            field = reinterpret_cast<Value>(value.is_none() ? 0 : address(value));
        else if constexpr (std::is_enum_v<Value>)
            field = static_cast<Value>(value.cast<int>());
        else if constexpr (std::is_same_v<Value, AttentionTensor>)
            field = {reinterpret_cast<void*>(address(entry(value, 0))), entry(value, 1).cast<int64_t>(),
                     entry(value, 2).cast<int64_t>(), entry(value, 3).cast<int64_t>()};
        else
            field = value.cast<Value>();
        return *this;
    }

    void end() const {
        if (taken != values.size()) throw py::key_error("there are more fields than these");
    }

    static uintptr_t address(py::handle tensor) {
        static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
        const auto found = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.ptr(), data_ptr));
        if (!found) throw py::error_already_set();
        return found.cast<uintptr_t>();
    }
    static py::object entry(py::handle tuple, int i) { return tuple[py::int_(i)]; }
};

PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

#define FIELD(name) ([] { static PyObject* const key = interned(#name); return key; }(), p.name)

void read(Fields& fields, AttentionShape& p) {
    fields FIELD(batch) FIELD(heads) FIELD(kv_heads) FIELD(q_len) FIELD(k_len) FIELD(head_dim) FIELD(left) FIELD(right)
        FIELD(scale) FIELD(key_start) FIELD(cu_seqlens);
}

void read(Fields& fields, AttentionFwdParams& p) {
    read(fields, p.shape);
    fields FIELD(dtype) FIELD(sm_count) FIELD(q) FIELD(k) FIELD(v) FIELD(out) FIELD(lse) FIELD(tile_counter);
}

void read(Fields& fields, AttentionBwdParams& p) {
    read(fields, p.shape);
    fields FIELD(dtype) FIELD(sm_count) FIELD(dq_in_order) FIELD(dout) FIELD(q) FIELD(k) FIELD(v) FIELD(out) FIELD(lse)
        FIELD(dq) FIELD(dk) FIELD(dv) FIELD(workspace);
}

void read(Fields& fields, CrossEntropyParams& p) {
    fields FIELD(logits) FIELD(targets) FIELD(losses) FIELD(lse) FIELD(scale) FIELD(rows) FIELD(stride)
        FIELD(scale_stride) FIELD(ignore_index) FIELD(vocabulary) FIELD(dtype) FIELD(with_grad);
}

void read(Fields& fields, LayerNormFwdParams& p) {
    fields FIELD(x) FIELD(residual) FIELD(weight) FIELD(bias) FIELD(seed) FIELD(y) FIELD(h) FIELD(mean) FIELD(rstd)
        FIELD(rows) FIELD(columns) FIELD(x_stride) FIELD(residual_stride) FIELD(eps) FIELD(keep_scale) FIELD(drop_below)
        FIELD(x_dtype) FIELD(residual_is_float) FIELD(weight_is_float);
}

void read(Fields& fields, LayerNormBwdParams& p) {
    fields FIELD(dy) FIELD(dh) FIELD(h) FIELD(weight) FIELD(mean) FIELD(rstd) FIELD(seed) FIELD(grad_h) FIELD(grad_x)
        FIELD(partials) FIELD(grad_weight) FIELD(grad_bias) FIELD(rows) FIELD(columns) FIELD(partial_rows)
        FIELD(dy_stride) FIELD(dh_stride) FIELD(h_stride) FIELD(keep_scale) FIELD(drop_below) FIELD(x_dtype)
        FIELD(h_is_float) FIELD(weight_is_float);
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
    Fields fields = {values};
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

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.attr("source_hash") = kSourceHash;
    m.attr("archs") = kArchs;
    m.attr("cuda_version") = CUDART_VERSION;
    m.def("driver_version", [] {
        int version = 0;
        return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
    });
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
    define(m, "mlp_fwd", &mlp_fwd);
    define(m, "mlp_bwd", &mlp_bwd);
}
