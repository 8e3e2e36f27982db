"""The units of one SM of an H100 and what is beyond it: how fast each is, and who says so.

Cycles of the SM clock, or bytes per cycle. [fit]: fitted to FlashAttention-3's forward pass at head size 128 (see
calibrate.py), nothing else is. The order is that of src/timing/clock.hpp's Units.
"""

SMS = 132
MMA_FLOPS_PER_CYCLE = 4096  # dense 16-bit, one SM; NVIDIA H100 white paper: 989.4 TFLOP/s at 1,830 MHz
HBM_BYTES_PER_S = 3.35e12  # data sheet of the H100 SXM
HBM_EFFICIENCY = 0.90  # a copy kernel reaches 3.0 TB/s
L2_BYTES_PER_S = 7.68e12  # at 1.5 GHz, FlashGPU-Sim's L2 model; Chips and Cheese measured 5.5 to 5.7 through LSU loads
CALIBRATION_MHZ = 1500  # FlashGPU-Sim's measurements (NCU, locked)
POWER_LIMIT_MHZ = 1476  # where large bfloat16 products settle under 700 W: 798 TFLOP/s

PARAMETERS = {
    # between issues of one scheduler's pipe: CUDA Programming Guide, throughput table for 9.0, over four schedulers
    "fma": 1,  # 128 float32 results per cycle
    "fma_heavy": 2,  # 64 integer multiply-adds
    "alu": 2,  # 64 comparisons, minima, logical operations, conversions to 16 bits
    "xu": 8,  # 16 exponentials, reciprocals
    "uniform": 2,  # FlashGPU-Sim
    "lsu": 2,  # 64 lanes' addresses per cycle and SM, four schedulers share them
    # from issue to the scoreboard's release
    "xu_latency": 18.9,  # FlashGPU-Sim, a dependent chain of EX2
    "shared_latency": 28,  # FlashGPU-Sim: 29 with one wavefront
    "shuffle_latency": 23,  # Luo et al. 2024, "Benchmarking and Dissecting the Nvidia Hopper GPU"
    "constant_latency": 30,  # estimate
    "special_latency": 20,  # estimate
    "other_latency": 12,  # estimate
    "branch_back": 12,  # FlashGPU-Sim: a taken back edge, beyond its stall
    "branch_forward": 6,  # estimate
    "mbarrier_arrive": 29,  # FlashGPU-Sim
    "mbarrier_wait": 36,  # FlashGPU-Sim, try_wait that succeeds: 32 to 43
    "mbarrier_wake": 20,  # estimate: from completion to the waiting warp
    "mbarrier_interval": 2,  # FlashGPU-Sim
    "barrier_release": 30,  # FlashGPU-Sim: 15 to 30
    "barrier_interval": 2,  # FlashGPU-Sim
    "tensor_issue": 17,  # FlashGPU-Sim
    "tensor_tail_shared": 66,  # FlashGPU-Sim
    "tensor_tail_registers": 64,  # FlashGPU-Sim
    "tensor_depth_shared": 6,  # FlashGPU-Sim
    "tensor_depth_registers": 5,  # FlashGPU-Sim
    "tensor_group_wait": 10,  # estimate
    "register_reads": 2,  # two banks with one port of 32 lanes each
    "register_reads_tensor": 0.6,  # [fit] FlashGPU-Sim has 1: a wgmma in flight takes 512 of 1,024 bytes per cycle and SM
    "shared_bytes": 128,  # 32 banks of four bytes
    "tma_issue": 33,  # FlashGPU-Sim
    "tma_interval": 33,  # the same: one bulk copy after another
    "tma_latency": 175,  # so that two 16-KiB loads on every SM land after 1,280 cycles from L2 (FlashGPU-Sim)
    "l1_latency": 39,  # FlashGPU-Sim
    "l2_latency": 260,  # FlashGPU-Sim
    "dram_latency": 254,  # FlashGPU-Sim
    "l2_read_bytes": None,  # of L2_BYTES_PER_S, an SM's share
    "l2_write_bytes": None,  # as l2_read_bytes
    "l2_reduce_bytes": None,  # half of it: each adds a read; estimate
    "dram_bytes": None,  # of HBM_BYTES_PER_S * HBM_EFFICIENCY, an SM's share
    "dram_read_share": 1.0,
    "dram_write_share": 1.0,
    "atomic_latency": 600,  # estimate
    "cta_start": 600,  # estimate
    "proxy_fence": 12,  # estimate
    "memory_fence": 500,  # estimate, MEMBAR beyond the CTA
    "register_change": 20,  # estimate
    "resident_ctas": 1,
}
LAUNCH_US = 2.0  # estimate: a kernel's start and end as NCU's duration counts them


def units(mhz: float, **changes: float) -> dict[str, float]:
    """The table with what depends on the clock filled in."""
    cycles_per_s = mhz * 1e6
    share = 1 / SMS / cycles_per_s
    filled = {
        **PARAMETERS,
        "l2_read_bytes": L2_BYTES_PER_S * mhz / CALIBRATION_MHZ * share,
        "l2_write_bytes": L2_BYTES_PER_S * mhz / CALIBRATION_MHZ * share,
        "l2_reduce_bytes": L2_BYTES_PER_S * mhz / CALIBRATION_MHZ * share / 2,
        "dram_bytes": HBM_BYTES_PER_S * HBM_EFFICIENCY * share,
    }
    unknown = set(changes) - set(filled)
    if unknown:
        raise ValueError(f"no unit is called {', '.join(sorted(unknown))}; there are {', '.join(filled)}")
    return {**filled, **changes}
