#include "mlp/mlp_kernel.cuh"

void mlp_bwd(const MlpBwdParams& params, cudaStream_t stream) {
    with_half_type(params.dtype, [&](auto type) {
        with_activation<Activation::kGeluTanh, Activation::kSilu>(params.activation, [&](auto activation) {
            mlp_bwd_launch<decltype(type), activation.value>(params, stream);
        });
    });
}
