// A bfloat16 product as CUTLASS's own builder makes it, for the clock's calibration. Built by cutlass.py with
// -DTILE_M, -DTILE_N, -DTILE_K, -DKERNEL and -DEPILOGUE, names of CUTLASS's schedules.
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"

using namespace cute;

using T = cutlass::bfloat16_t;
using BlockTile = Shape<Int<TILE_M>, Int<TILE_N>, Int<TILE_K>>;
using Cluster = Shape<_2, _1, _1>;
using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, BlockTile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float,
    float, void, cutlass::layout::RowMajor, 8, T, cutlass::layout::RowMajor, 8,
    cutlass::epilogue::EPILOGUE>::CollectiveOp;
using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, T, cutlass::layout::RowMajor, 8, T, cutlass::layout::ColumnMajor, 8, float,
    BlockTile, Cluster,
    cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
    cutlass::gemm::KERNEL>::CollectiveOp;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<
    cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue, cutlass::gemm::PersistentScheduler>>;

// c (m, n) = a (m, k) @ b (n, k)^T on a device of `sms` SMs
extern "C" __attribute__((visibility("default"))) int gemm_run(const T* a, const T* b, T* c, int m, int n, int k, int sms) {
    cudaFree(nullptr);  // binds a context to this thread, which encoding a tensor map needs
    typename Gemm::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {m, n, k, 1},
        {a, {k, _1{}, 0}, b, {k, _1{}, 0}},
        {{1.f, 0.f}, nullptr, {n, _1{}, 0}, c, {n, _1{}, 0}}};
    arguments.hw_info.device_id = 0;
    arguments.hw_info.sm_count = sms;
    arguments.hw_info.max_active_clusters = sms / 2;
    Gemm gemm;
    if (gemm.initialize(arguments) != cutlass::Status::kSuccess) return 1;
    return gemm.run() != cutlass::Status::kSuccess;
}
