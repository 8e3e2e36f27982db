// Kernels whose time is known by hand, for the clock's tests.
#include <cuda_runtime.h>

#include <cstdint>

__device__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// 8 x 8 core matrices one after another, no swizzle.
__device__ uint64_t descriptor(const void* p, uint32_t leading, uint32_t stride) {
    return uint64_t(shared_address(p) >> 4 & 0x3fff) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32;
}

template <int N>
__device__ void multiply(float (&c)[N / 2], uint64_t a, uint64_t b);
template <>
__device__ void multiply<32>(float (&c)[16], uint64_t a, uint64_t b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, "
        "%15}, %16, %17, p, 1, 1, 0, 0;\n}\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]), "+f"(c[8]), "+f"(c[9]),
          "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15])
        : "l"(a), "l"(b));
}
template <>
__device__ void multiply<64>(float (&c)[32], uint64_t a, uint64_t b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, 0;\n}\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]), "+f"(c[8]), "+f"(c[9]),
          "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), "+f"(c[16]), "+f"(c[17]), "+f"(c[18]),
          "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]),
          "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31])
        : "l"(a), "l"(b));
}

// Each warpgroup multiplies ones (64 x 16) by ones (16 x N) `count` times into one accumulator. out: (threads,)
template <int N>
__global__ void products(float* out, int count) {
    __shared__ alignas(128) uint16_t tiles[2][256 * 16];
    for (int i = threadIdx.x; i < 2 * 256 * 16; i += blockDim.x) tiles[0][i] = 0x3f80;
    asm volatile("fence.proxy.async;" ::: "memory");
    __syncthreads();
    float c[N / 2] = {};
    const uint64_t a = descriptor(tiles[0], 128, 256), b = descriptor(tiles[1], 128, 256);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    for (int i = 0; i < count; i += 8) {
#pragma unroll
        for (int j = 0; j < 8; ++j) multiply<N>(c, a, b);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    float sum = 0;
    for (int i = 0; i < N / 2; ++i) sum += c[i];
    out[threadIdx.x] = sum;
}

// A warp copies `chunks` of 8 KiB with bulk copies through `kStages` buffers; the others stand by. data, out: (chunks, 2048)
__global__ void bulk_copy(const float* data, float* out, int chunks) {
    constexpr int kStages = 4, kBytes = 8192;
    extern __shared__ __align__(128) char buffers[];
    __shared__ alignas(8) uint64_t full[kStages];
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&full[i])));
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        auto load = [&](int i) {
            const uint32_t barrier = shared_address(&full[i % kStages]);
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(kBytes) : "memory");
            asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                             shared_address(buffers + i % kStages * kBytes)),
                         "l"(data + i * int64_t(kBytes / 4)), "r"(kBytes), "r"(barrier)
                         : "memory");
        };
        for (int i = 0; i < kStages - 1 && i < chunks; ++i) load(i);
        for (int i = 0; i < chunks; ++i) {
            asm volatile(
                "{\n.reg .pred done;\nretry:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra retry;\n}\n" ::"r"(
                    shared_address(&full[i % kStages])),
                "r"(i / kStages & 1)
                : "memory");
            asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(out + i * int64_t(kBytes / 4)),
                         "r"(shared_address(buffers + i % kStages * kBytes)), "r"(kBytes)
                         : "memory");
            asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
            if (i + kStages - 1 < chunks) load(i + kStages - 1);
        }
        asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    }
}

// out = 2 * x, four floats a thread. x, out: (count,)
__global__ void scale(const float4* x, float4* out, int count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count / 4) {
        float4 v = x[i];
        out[i] = make_float4(2 * v.x, 2 * v.y, 2 * v.z, 2 * v.w);
    }
}

// Exponentials, `count` in a chain in each thread. out: (threads,)
__global__ void exponentials(float* out, int count) {
    float v = out[threadIdx.x];
#pragma unroll 1
    for (int i = 0; i < count; i += 8) {
#pragma unroll
        for (int j = 0; j < 8; ++j) asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(v));
    }
    out[threadIdx.x] = v;
}

#define EXPORT extern "C" __attribute__((visibility("default"))) int
EXPORT run_products(float* out, int n, int count, int warpgroups) {
    if (n == 32) products<32><<<1, 128 * warpgroups>>>(out, count);
    else products<64><<<1, 128 * warpgroups>>>(out, count);
    return cudaGetLastError();
}
EXPORT run_bulk_copy(const float* data, float* out, int chunks) {
    bulk_copy<<<1, 32, 32768>>>(data, out, chunks);
    return cudaGetLastError();
}
EXPORT run_scale(const float* x, float* out, int count, int ctas) {
    scale<<<ctas, 256>>>(reinterpret_cast<const float4*>(x), reinterpret_cast<float4*>(out), count);
    return cudaGetLastError();
}
EXPORT run_exponentials(float* out, int count, int threads) {
    exponentials<<<1, threads>>>(out, count);
    return cudaGetLastError();
}
