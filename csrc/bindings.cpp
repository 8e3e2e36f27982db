// The whole C++ surface of gptkernels: every launcher takes the numbers of its params struct by name, and gives a
// function of the tensors and the stream.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <cstring>
#include <string>
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
    std::vector<ptrdiff_t> offsets = std::vector<ptrdiff_t>(tensors.size());  // in params, where addresses go
    size_t taken = 0;

    template <class Value>
    Fields& operator()(const char* name, Value& field) {
        if (!(std::is_pointer_v<Value> ? tensors.contains(name) : numbers.contains(name)))
            throw py::key_error(std::string("there is no ") + name);
        ++taken;
        if constexpr (std::is_pointer_v<Value>) {
            const auto index = tensors.attr("index")(name).template cast<size_t>();
            offsets[index] = reinterpret_cast<char*>(&field) - static_cast<char*>(params);
        } else if constexpr (std::is_enum_v<Value>) {
            field = static_cast<Value>(numbers[name].template cast<int>());
        } else if constexpr (std::is_same_v<Value, AttentionTensor>) {
            const auto strides = numbers[name].template cast<py::tuple>();
            field = {nullptr, strides[0].template cast<int64_t>(), strides[1].template cast<int64_t>(),
                     strides[2].template cast<int64_t>()};
            (*this)(name, field.data);
        } else {
            field = numbers[name].template cast<Value>();
        }
        return *this;
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

#define FIELD(name) (#name, p.name)

void read(Fields& fields, AttentionShape& p) {
    fields FIELD(batch) FIELD(heads) FIELD(kv_heads) FIELD(q_len) FIELD(k_len) FIELD(head_dim) FIELD(left) FIELD(right)
        FIELD(scale) FIELD(softcap) FIELD(slope_stride) FIELD(key_start) FIELD(cu_seqlens) FIELD(cu_seqlens_k)
            FIELD(alibi_slopes);
}

void read(Fields& fields, AttentionFwdParams& p) {
    read(fields, p.shape);
    fields FIELD(dtype) FIELD(sm_count) FIELD(q) FIELD(k) FIELD(v) FIELD(out) FIELD(lse) FIELD(sinks)
        FIELD(sinks_are_float) FIELD(tile_counter);
}

void read(Fields& fields, AttentionBwdParams& p) {
    read(fields, p.shape);
    fields FIELD(dtype) FIELD(sm_count) FIELD(dq_in_order) FIELD(dout) FIELD(q) FIELD(k) FIELD(v) FIELD(out) FIELD(lse)
        FIELD(dlse) FIELD(delta) FIELD(dq) FIELD(dk) FIELD(dv) FIELD(workspace);
}

void read(Fields& fields, CrossEntropyParams& p) {
    fields FIELD(logits) FIELD(targets) FIELD(losses) FIELD(lse) FIELD(scale) FIELD(bias) FIELD(class_weight)
        FIELD(factors) FIELD(rows) FIELD(stride) FIELD(scale_stride) FIELD(ignore_index) FIELD(label_smoothing)
            FIELD(softcap) FIELD(temperature) FIELD(vocabulary) FIELD(dtype) FIELD(with_grad) FIELD(plain);
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

void read(Fields& fields, GatedMlpFwdParams& p) {
    fields FIELD(a) FIELD(gate_weight) FIELD(up_weight) FIELD(gate_bias) FIELD(up_bias) FIELD(gate) FIELD(up) FIELD(out)
        FIELD(M) FIELD(N) FIELD(K) FIELD(a_stride) FIELD(gate_stride) FIELD(up_stride) FIELD(activation) FIELD(dtype)
            FIELD(sm_count);
}

void read(Fields& fields, GatedMlpBwdParams& p) {
    fields FIELD(dout) FIELD(weight) FIELD(gate) FIELD(up) FIELD(act) FIELD(grad_gate) FIELD(grad_up) FIELD(partials)
        FIELD(M) FIELD(N) FIELD(K) FIELD(dout_stride) FIELD(activation) FIELD(dtype) FIELD(sm_count);
}

// -> what makes the params of tensors, in the order of their names
template <class Params>
auto prepared(const py::tuple& names, const py::dict& numbers) {
    Params params = {};
    Fields fields = {names, numbers, &params};
    read(fields, params);
    if (fields.taken != names.size() + numbers.size()) throw py::key_error("there are more fields than these");
    return [params, offsets = fields.offsets](const py::tuple& tensors) {
        if (tensors.size() != offsets.size()) throw py::value_error("these are not the tensors that were named");
        Params filled = params;
        for (size_t i = 0; i < offsets.size(); ++i) {
            const uintptr_t found = address(tensors[i]);
            std::memcpy(reinterpret_cast<char*>(&filled) + offsets[i], &found, sizeof found);
        }
        return filled;
    };
}

template <class Params>
void define(py::module_& m, const char* name, void (*launcher)(const Params&, cudaStream_t)) {
    m.def(name, [launcher](const py::tuple& names, const py::dict& numbers) {
        return py::cpp_function(
            [launcher, params = prepared<Params>(names, numbers)](const py::tuple& tensors, uintptr_t stream) {
                launcher(params(tensors), reinterpret_cast<cudaStream_t>(stream));
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
              return attention_bwd_workspace_bytes(prepared<AttentionShape>(names, shape)(tensors), sm_count);
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
    define(m, "gated_mlp_fwd", &gated_mlp_fwd);
    define(m, "gated_mlp_bwd", &gated_mlp_bwd);
}
