// Every Hopper instruction that the kernels use, wrapped once: barriers, TMA, wgmma and register budgets.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include <type_traits>

#include "common/math.cuh"

// Threads, warps and registers.

constexpr int kWarpgroup = 128;

GK_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// The same value in every lane, which the compiler cannot know of threadIdx.
GK_DEVICE int warp_index() { return __shfl_sync(~0u, threadIdx.x / 32, 0); }

GK_DEVICE bool elect_one() {
    uint32_t elected;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}\n" : "=r"(elected));
    return elected;
}

// To all lanes what the elected one has, 0 or more; which of them that is, nobody promises.
GK_DEVICE int from_leader(int value, bool leader) { return __reduce_or_sync(~0u, leader ? value : 0); }

template <int Registers>
GK_DEVICE void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

template <int Registers>
GK_DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

// Programmatic dependent launch: lets the next kernel of the stream start, once all CTAs have said so; and waits until
// the kernel before has ended and what it wrote is there to see.

GK_DEVICE void let_dependents_start() { asm volatile("griddepcontrol.launch_dependents;"); }
GK_DEVICE void wait_for_prerequisite() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Named barriers; 0 is __syncthreads. `threads` counts those that sync and those that arrive.

GK_DEVICE void named_barrier_sync(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

GK_DEVICE void named_barrier_arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// mbarriers, by shared address.

GK_DEVICE void mbarrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Of a ring of buffers: `full` counts what writes to them, `empty` what has read them.
template <int Stages>
GK_DEVICE void init_ring(uint64_t (&full)[Stages], int writers, uint64_t (&empty)[Stages], int readers) {
    for (int i = 0; i < Stages; ++i) {
        mbarrier_init(shared_address(&full[i]), writers);
        mbarrier_init(shared_address(&empty[i]), readers);
    }
}

GK_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

GK_DEVICE void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Of a warp, once for all its lanes.
GK_DEVICE void warp_arrive(uint32_t barrier) {
    if (threadIdx.x % 32 == 0) mbarrier_arrive(barrier);
}

GK_DEVICE void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

GK_DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\nretry:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra retry;\n}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// A place in a ring of buffers: which buffer, and the parity of its current round.
template <int Stages>
struct RingPlace {
    uint32_t count = 0;
    GK_DEVICE uint32_t stage() const { return count % Stages; }
    GK_DEVICE uint32_t parity() const { return count / Stages & 1; }
    GK_DEVICE void advance() { ++count; }

    // The shared address of the buffer's barrier.
    GK_DEVICE uint32_t of(const uint64_t (&barriers)[Stages]) const { return shared_address(barriers) + 8 * stage(); }
};

// Clusters.

GK_DEVICE uint32_t cluster_rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// Of all threads of all CTAs of the cluster.
GK_DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Arrives at the barrier that another CTA of the cluster has at the same place. Without a scope of its own: what it
// releases are reads that have finished, and release.cluster would make every arrival wait for a fence of the GPU.
GK_DEVICE void mbarrier_arrive_remote(uint32_t barrier, uint32_t rank) {
    asm volatile(
        "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}\n" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

// The bulk copy engine.

// Orders ordinary shared-memory writes before the copies and wgmmas that read them.
GK_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

template <class... Map>
GK_DEVICE void prefetch_tensor_maps(const Map&... maps) {
    (..., [](const CUtensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }(maps));
}

GK_DEVICE void tma_load_2d(uint32_t to, const CUtensorMap* map, uint32_t barrier, int c0, int c1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
        "[%2];" ::"r"(to),
        "l"(map), "r"(barrier), "r"(c0), "r"(c1)
        : "memory");
}

// Into the same place of every CTA in the mask, each of which has its own barrier told.
GK_DEVICE void tma_multicast_2d(uint32_t to, const CUtensorMap* map, uint32_t barrier, int c0, int c1, uint16_t ctas) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%3, %4}], [%2], %5;" ::"r"(to),
        "l"(map), "r"(barrier), "r"(c0), "r"(c1), "h"(ctas)
        : "memory");
}

GK_DEVICE void tma_store_2d(const CUtensorMap* map, uint32_t from, int c0, int c1) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
                 "r"(from), "r"(c0), "r"(c1)
                 : "memory");
}

GK_DEVICE void tma_load_4d(uint32_t to, const CUtensorMap* map, uint32_t barrier, int c0, int c1, int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
        "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}

GK_DEVICE void tma_store_4d(const CUtensorMap* map, uint32_t from, int c0, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
                 "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
                 : "memory");
}

GK_DEVICE void bulk_load(uint32_t to, const void* from, int bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

GK_DEVICE void bulk_store(void* to, uint32_t from, int bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
                 : "memory");
}

GK_DEVICE void bulk_reduce_add(float* to, uint32_t from, int bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from),
                 "r"(bytes)
                 : "memory");
}

GK_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until the sources of this thread's copies, but those of the `Pending` newest groups, may be overwritten.
template <int Pending = 0>
GK_DEVICE void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}

// Until this thread's copies are written.
GK_DEVICE void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Orders writes of the bulk copy engine to global memory before later ordinary ones, and the other way round.
GK_DEVICE void fence_async_proxy_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

GK_DEVICE void red_add(float4* at, float4 x) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(at), "f"(x.x), "f"(x.y), "f"(x.z),
                 "f"(x.w)
                 : "memory");
}

GK_DEVICE void red_release_add(int* at, int value) {
    asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}

GK_DEVICE int load_acquire(const int* at) {
    int value;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
    return value;
}

// Four 8x8 blocks of 16-bit elements; lane i addresses row i % 8 of block i / 8.
GK_DEVICE void stmatrix_x4(uint32_t to, const uint32_t* r) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

// What stmatrix_x4 wrote.
GK_DEVICE void ldmatrix_x4(uint32_t from, uint32_t* r) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared::cta.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
}

GK_DEVICE uint32_t load_shared(uint32_t from) {
    uint32_t word;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(from) : "memory");
    return word;
}

// Two elements in a register.

template <class T>
GK_DEVICE uint32_t pack(float low, float high) {
    uint32_t packed;
    if constexpr (std::is_same_v<T, __half>)
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    else
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

template <class T, int N>
GK_DEVICE void pack(uint32_t (&packed)[N], const float (&values)[2 * N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) packed[i] = pack<T>(values[2 * i], values[2 * i + 1]);
}

template <class T>
GK_DEVICE float2 unpack(uint32_t packed) {
    if constexpr (std::is_same_v<T, __half>)
        return __half22float2(reinterpret_cast<const __half2&>(packed));
    else
        return {__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000)};
}

// wgmma. Tiles lie in shared memory as panels of `Rows` rows of 128 or 64 bytes, swizzled as wide as their rows.

// An operand whose rows are its depth (K): M or N runs along the rows, then from panel to panel.
template <int RowBytes>
GK_DEVICE uint64_t operand_depth_across_rows(uint32_t address, int panel_bytes) {
    constexpr uint64_t kSwizzle = RowBytes == 128 ? 1 : 2;
    return uint64_t((address & 0x3ffff) >> 4) | uint64_t(panel_bytes >> 4) << 16 | uint64_t(8 * RowBytes >> 4) << 32 |
           kSwizzle << 62;
}

// An operand whose depth runs along its rows, of one panel. A step of 16 in depth is 32 bytes further, within the row.
template <int RowBytes>
GK_DEVICE uint64_t operand_depth_in_rows(uint32_t address) {
    return operand_depth_across_rows<RowBytes>(address, 16);
}

GK_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
GK_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most `Pending` groups are in flight.
template <int Pending>
GK_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// Keeps the compiler from moving uses of registers that a wgmma owns across this point.
template <class R, int N>
GK_DEVICE void pin(R (&registers)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
        if constexpr (std::is_same_v<R, float>)
            asm volatile("" : "+f"(registers[i])::"memory");
        else
            asm volatile("" : "+r"(registers[i])::"memory");
    }
}

template <int N, class T, bool TransposeA, bool TransposeB>
struct Wgmma;

#define GK_TEN(t) "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9,"
#define GK_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define GK_F16(i) GK_F4(i), GK_F4(i + 4), GK_F4(i + 8), GK_F4(i + 12)
#define GK_F32(i) GK_F16(i), GK_F16(i + 16)
#define GK_F64(i) GK_F32(i), GK_F32(i + 32)

#define GK_LIST_16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define GK_LIST_32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9," GK_TEN(1) GK_TEN(2) "%30,%31"
#define GK_LIST_40 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9," GK_TEN(1) GK_TEN(2) "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39"
#define GK_LIST_48 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9," GK_TEN(1) GK_TEN(2) GK_TEN(3) "%40,%41,%42,%43,%44,%45,%46,%47"
#define GK_LIST_56 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9," GK_TEN(1) GK_TEN(2) GK_TEN(3) GK_TEN(4) "%50,%51,%52,%53,%54,%55"
#define GK_LIST_64 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9," GK_TEN(1) GK_TEN(2) GK_TEN(3) GK_TEN(4) GK_TEN(5) "%60,%61,%62,%63"
#define GK_LIST_90 \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9," GK_TEN(1) GK_TEN(2) GK_TEN(3) GK_TEN(4) GK_TEN(5) GK_TEN(6) GK_TEN(7) GK_TEN(8)
#define GK_LIST_96 GK_LIST_90 "%90,%91,%92,%93,%94,%95"
#define GK_LIST_128 GK_LIST_90 GK_TEN(9) GK_TEN(10) GK_TEN(11) "%120,%121,%122,%123,%124,%125,%126,%127"

#define GK_ACCUMULATOR_16 GK_F16(0)
#define GK_ACCUMULATOR_32 GK_F32(0)
#define GK_ACCUMULATOR_40 GK_F32(0), GK_F4(32), GK_F4(36)
#define GK_ACCUMULATOR_48 GK_F32(0), GK_F16(32)
#define GK_ACCUMULATOR_56 GK_F32(0), GK_F16(32), GK_F4(48), GK_F4(52)
#define GK_ACCUMULATOR_64 GK_F64(0)
#define GK_ACCUMULATOR_96 GK_F64(0), GK_F32(64)
#define GK_ACCUMULATOR_128 GK_F64(0), GK_F64(64)

// d (64 x N, R registers) = a * b + (accumulate ? d : 0), a from shared memory or from registers. o0 ... o6 name the
// operands after the accumulator.
#define GK_WGMMA_OF(N, R, TYPE, PTX_TYPE, o0, o1, o2, o3, o4, o5, o6)                                             \
    template <bool TransposeA, bool TransposeB>                                                                   \
    struct Wgmma<N, TYPE, TransposeA, TransposeB> {                                                               \
        static GK_DEVICE void multiply(float (&d)[R], uint64_t a, uint64_t b, bool accumulate) {                  \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " o2                                                   \
                         ", 0;\n"                                                                                 \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." PTX_TYPE "." PTX_TYPE " {" GK_LIST_##R \
                         "}, " o0 ", " o1 ", p, 1, 1, " o3 ", " o4 ";\n}\n"                                       \
                         : GK_ACCUMULATOR_##R                                                                     \
                         : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(TransposeA)), "n"(int(TransposeB)));     \
        }                                                                                                         \
        static GK_DEVICE void multiply(float (&d)[R], const uint32_t* a, uint64_t b, bool accumulate) {           \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " o5                                                   \
                         ", 0;\n"                                                                                 \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." PTX_TYPE "." PTX_TYPE " {" GK_LIST_##R \
                         "}, {" o0 "," o1 "," o2 "," o3 "}, " o4 ", p, 1, 1, " o6 ";\n}\n"                        \
                         : GK_ACCUMULATOR_##R                                                                     \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)),              \
                           "n"(int(TransposeB)));                                                                 \
        }                                                                                                         \
    };
#define GK_WGMMA(N, R, ...)                               \
    GK_WGMMA_OF(N, R, __nv_bfloat16, "bf16", __VA_ARGS__) \
    GK_WGMMA_OF(N, R, __half, "f16", __VA_ARGS__)

GK_WGMMA(32, 16, "%16", "%17", "%18", "%19", "%20", "%21", "%22")
GK_WGMMA(64, 32, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
GK_WGMMA(80, 40, "%40", "%41", "%42", "%43", "%44", "%45", "%46")
GK_WGMMA(96, 48, "%48", "%49", "%50", "%51", "%52", "%53", "%54")
GK_WGMMA(112, 56, "%56", "%57", "%58", "%59", "%60", "%61", "%62")
GK_WGMMA(128, 64, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
GK_WGMMA(192, 96, "%96", "%97", "%98", "%99", "%100", "%101", "%102")
GK_WGMMA(256, 128, "%128", "%129", "%130", "%131", "%132", "%133", "%134")
