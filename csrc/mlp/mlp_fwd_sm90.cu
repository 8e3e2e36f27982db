#include "mlp/mlp_kernel.cuh"

void mlp_fwd(const MlpFwdParams& params, cudaStream_t stream) {
    with_half_type(params.dtype, [&](auto type) {
        with_activation<Activation::kNone, Activation::kSilu>(params.activation, [&](auto activation) {
            mlp_fwd_launch<decltype(type), activation.value>(params, stream);
        });
    });
}
