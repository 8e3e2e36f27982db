// When recorded warps would have issued what they executed, on one SM of a Hopper GPU.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "sass.hpp"

namespace ptxemu::timing {

// The order is that of units.py's PARAMETERS. Cycles, or bytes per cycle of one SM, unless it says otherwise.
struct Units {
  double fma, fma_heavy, alu, xu, uniform, lsu;                        // between issues of one scheduler's pipes
  double xu_latency, shared_latency, shuffle_latency, constant_latency, special_latency, other_latency;
  double branch_back, branch_forward;
  double mbarrier_arrive, mbarrier_wait, mbarrier_wake, mbarrier_interval;
  double barrier_release, barrier_interval;
  double tensor_issue, tensor_tail_shared, tensor_tail_registers, tensor_depth_shared, tensor_depth_registers, tensor_group_wait;
  double register_reads, register_reads_tensor;                        // per cycle and scheduler: always, while the tensor cores run
  double shared_bytes;
  double tma_issue, tma_interval, tma_latency;
  double l1_latency, l2_latency, dram_latency, l2_read_bytes, l2_write_bytes, l2_reduce_bytes, dram_bytes;
  double dram_read_share, dram_write_share;                            // of the bytes that go on from L2 to HBM
  double atomic_latency, cta_start, proxy_fence, memory_fence, register_change;
  double resident_ctas;
};
constexpr int kUnitCount = sizeof(Units) / sizeof(double);

enum class Reason : uint8_t { Stall, Scoreboard, Pipe, Tensor, TensorResult, Barrier, Mbarrier, Bulk, Count };

struct ClockResult {       // as _native.ClockStruct
  double cycles = 0;
  double issued = 0, tensor_busy = 0, fma_busy = 0, alu_busy = 0, xu_busy = 0, shared_busy = 0, tma_busy = 0, l2_busy = 0, dram_busy = 0;
  double loaded_bytes = 0, stored_bytes = 0, reduced_bytes = 0;
  double steps = 0, anchors = 0, lost = 0, ctas = 0;
};

struct Waited { uint32_t pc; Reason reason; double cycles; };

struct CtaTimes { double start, end; };

ClockResult run_clock(const Recording& recording, const Program& program, const Units& units, std::vector<Waited>& waited,
                      std::vector<CtaTimes>& times);

}  // namespace ptxemu::timing
