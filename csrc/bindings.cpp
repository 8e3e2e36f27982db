// The whole C++ surface of gptkernels: every launcher takes the numbers of its params struct by name, and gives a
// function of the tensors and the stream.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <cstring>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "attention/attention.h"
#include "cross_entropy/cross_entropy.h"
#include "layer_norm/layer_norm.h"
#include "mlp/mlp.h"

namespace py = pybind11;

extern const char* const kSourceHash;
extern const char* const kArchs;

namespace {

// What Python passes: numbers, and three strides of tensors that have heads, by name; and the names of tensors, whose
// addresses come later.
struct Fields {
    const py::tuple& tensors;
    const py::dict& numbers;
    void* params;
    std::vector<ptrdiff_t> offsets = std::vector<ptrdiff_t>(tensors.size(), -1);  // in params, where addresses go
    size_t taken = 0;

    // name: a str, which is looked up faster than characters
    template <class Value>
    Fields& operator()(PyObject* name, Value& field) {
        if constexpr (std::is_pointer_v<Value>) {
            const Py_ssize_t index = PySequence_Index(tensors.ptr(), name);
            if (index < 0) {
                PyErr_Clear();
                throw missing(name);
            }
            offsets[index] = reinterpret_cast<char*>(&field) - static_cast<char*>(params);
        } else {
            const py::handle value = PyDict_GetItemWithError(numbers.ptr(), name);
            if (!value) throw missing(name);
            if constexpr (std::is_enum_v<Value>)
                field = static_cast<Value>(value.cast<int>());
            else if constexpr (std::is_same_v<Value, AttentionTensor>) {
                std::tie(field.batch_stride, field.head_stride, field.row_stride) = value.cast<Strides>();
                (*this)(name, field.data);
            } else
                field = value.cast<Value>();
        }
        ++taken;
        return *this;
    }

    const std::vector<ptrdiff_t>& end() const {
        if (taken != tensors.size() + numbers.size()) throw py::key_error("there are more fields than these");
        return offsets;
    }

    using Strides = std::tuple<int64_t, int64_t, int64_t>;

    static py::key_error missing(PyObject* name) {
        return py::key_error("there is no " + py::cast<std::string>(py::handle(name)));
    }
};

// tensor: or None
uintptr_t address(py::handle tensor) {
    static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
    if (tensor.is_none()) return 0;
    const auto found = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.ptr(), data_ptr));
    if (!found) throw py::error_already_set();
    return found.cast<uintptr_t>();
}

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
class Prepared {
  public:
    Prepared(const py::tuple& tensors, const py::dict& numbers) {
        Fields fields = {tensors, numbers, &params_};
        read(fields, params_);
        offsets_ = fields.end();
    }

    Params with(const py::tuple& tensors) const {
        if (tensors.size() != offsets_.size()) throw py::value_error("these are not the tensors that were named");
        Params params = params_;
        for (size_t i = 0; i < offsets_.size(); ++i) {
            const uintptr_t found = address(tensors[i]);
            std::memcpy(reinterpret_cast<char*>(&params) + offsets_[i], &found, sizeof found);
        }
        return params;
    }

  private:
    Params params_ = {};
    std::vector<ptrdiff_t> offsets_;
};

template <class Params>
void define(py::module_& m, const char* name, void (*launcher)(const Params&, cudaStream_t)) {
    m.def(name, [launcher](const py::tuple& names, const py::dict& numbers) {
        return py::cpp_function(
            [launcher, prepared = Prepared<Params>(names, numbers)](const py::tuple& tensors, uintptr_t stream) {
                launcher(prepared.with(tensors), reinterpret_cast<cudaStream_t>(stream));
            });
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
          [](const py::tuple& names, const py::dict& shape, const py::tuple& tensors, int sm_count) {
              return attention_bwd_workspace_bytes(Prepared<AttentionShape>(names, shape).with(tensors), sm_count);
          });
    define(m, "cross_entropy", &cross_entropy);
    define(m, "layer_norm_fwd", &layer_norm_fwd);
    define(m, "layer_norm_bwd", &layer_norm_bwd);
    m.def("layer_norm_bwd_partial_rows", &layer_norm_bwd_partial_rows);
    define(m, "mlp_fwd", &mlp_fwd);
    define(m, "mlp_bwd", &mlp_bwd);
}
