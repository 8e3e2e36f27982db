#include "mlp/mlp_kernel.cuh"

void gated_mlp_fwd(const GatedMlpFwdParams& params, cudaStream_t stream) {
    with_half_type(params.dtype, [&](auto type) {
        with_activation<Activation::kGeluTanh, Activation::kGptOss>(params.activation, [&](auto activation) {
            gated_mlp_fwd_launch<decltype(type), activation.value>(params, stream);
        });
    });
}
