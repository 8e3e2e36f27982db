// FlashAttention-3's kernels behind plain C functions, for the clock's calibration. Built by fa3.py against a checkout of
// flash-attention's hopper/ folder with -DFA3_HEAD_DIM, -DFA3_CAUSAL and one of -DFA3_FORWARD, -DFA3_BACKWARD.
#ifdef FA3_FORWARD
#include "flash_fwd_launch_template.h"
#else
#include "flash_bwd_launch_template.h"
#endif

using Element = cutlass::half_t;

#if defined(FA3_FORWARD) || FA3_HEAD_DIM == 64
constexpr int kBlockM = 128;
#else
constexpr int kBlockM = FA3_CAUSAL ? 64 : 80;
#endif

struct Call {
    void *q, *k, *v, *out, *lse;                              // (batch, tokens, heads, head_dim), lse (batch, heads, tokens)
    void *dout, *dq, *dk, *dv, *dq_accum, *delta, *lse_log2;  // of the backward pass
    int* counter;
    int batch, heads, tokens, sms;
};

static Flash_bwd_params parameters(const Call& call) {
    Flash_bwd_params p{};
    const int64_t row = int64_t(call.heads) * FA3_HEAD_DIM, entry = row * call.tokens;
    p.q_ptr = call.q, p.k_ptr = call.k, p.v_ptr = call.v, p.o_ptr = call.out, p.softmax_lse_ptr = call.lse;
    p.q_batch_stride = p.k_batch_stride = p.v_batch_stride = p.o_batch_stride = entry;
    p.q_row_stride = p.k_row_stride = p.v_row_stride = p.o_row_stride = row;
    p.q_head_stride = p.k_head_stride = p.v_head_stride = p.o_head_stride = FA3_HEAD_DIM;
    p.v_dim_stride = 1;
    p.h = p.h_k = call.heads;
    p.b = p.b_k = call.batch;
    p.seqlen_q = p.seqlen_k = call.tokens;
    p.seqlen_q_rounded = (call.tokens + kBlockM - 1) / kBlockM * kBlockM;
    p.seqlen_k_rounded = (call.tokens + 127) / 128 * 128;
    p.total_q = p.total_k = call.batch * call.tokens;
    p.d = p.d_rounded = p.dv = p.dv_rounded = FA3_HEAD_DIM;
    p.scale_softmax = 1.f / std::sqrt(float(FA3_HEAD_DIM));
    p.p_dropout = p.rp_dropout = 1.f;
    p.window_size_left = -1, p.window_size_right = FA3_CAUSAL ? 0 : -1;
    p.is_causal = FA3_CAUSAL;
    p.num_splits = 1;
    p.tile_count_semaphore = call.counter;
    p.arch = 90;
    p.num_sm = call.sms;
    p.do_ptr = call.dout, p.dq_ptr = call.dq, p.dk_ptr = call.dk, p.dv_ptr = call.dv;
    p.do_batch_stride = p.dq_batch_stride = p.dk_batch_stride = p.dv_batch_stride = entry;
    p.do_row_stride = p.dq_row_stride = p.dk_row_stride = p.dv_row_stride = row;
    p.do_head_stride = p.dq_head_stride = p.dk_head_stride = p.dv_head_stride = FA3_HEAD_DIM;
    p.dq_accum_ptr = call.dq_accum, p.dsoftmax_sum = call.delta, p.softmax_lse_log2_ptr = call.lse_log2;
    return p;
}

extern "C" __attribute__((visibility("default"))) int fa3_run(const Call* call) {
    cudaFree(nullptr);  // binds a context to this thread, which encoding a tensor map needs
    Flash_bwd_params params = parameters(*call);
#ifdef FA3_FORWARD
    run_flash_fwd<90, FA3_HEAD_DIM, FA3_HEAD_DIM, 1, Element, Element, FA3_CAUSAL, false, false, false, false, false, false,
                  false, false, false>(params, nullptr);
#elif FA3_HEAD_DIM == 64
    run_flash_bwd<90, 64, kBlockM, 128, Element, FA3_CAUSAL, false, false, false, false, false, 2, 2, true, false, false, 2, 1,
                  2, 2, false>(params, nullptr);
#else
    run_flash_bwd<90, 128, kBlockM, 128, Element, FA3_CAUSAL, false, false, false, false, false, 2, 2, true, false,
                  !FA3_CAUSAL, 2, 1, 2, 1, false>(params, nullptr);
#endif
    return int(cudaGetLastError());
}
