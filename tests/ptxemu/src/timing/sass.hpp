// Machine code as the clock sees it, and the path that a recorded warp took through it.
#pragma once
#include <cstdint>
#include <vector>

#include "trace.hpp"

namespace ptxemu::timing {

// The order is that of sass.py's OPERATIONS.
enum class Op : uint16_t {
  Control, Fma, FmaHeavy, Alu, Xu, Uniform, Branch, Shuffle, SharedLoad, SharedStore, GlobalLoad, GlobalStore, Atomic, Hgmma, WarpgroupArrive,
  WarpgroupWait, Barrier, MbarrierArrive, MbarrierWait, MbarrierInit, TmaLoad, TmaStore, TmaCommit, AsyncCopy, AsyncCommit, AsyncWait, Mma,
  ConstantLoad, Fence, Exit, Special, Registers, Local, Count
};

struct Sass {       // as _native.SassStruct
  uint32_t line;    // of the PTX instruction it came from; 0: unknown
  Op op;
  uint8_t stall, yield;
  uint8_t write, read;        // scoreboards that it sets; 7: none
  uint8_t wait;               // mask of scoreboards it waits for
  uint8_t guarded;
  uint8_t reads;              // 32-bit registers that it fetches for each lane
  int32_t target;             // of a branch, else -1
  uint32_t argument;          // Hgmma: N | A in registers << 9 | commits << 10; WarpgroupWait: N; Mma: tensor cycles;
                              // TmaLoad, TmaStore: whether each lane makes a copy
};

struct Jump { int32_t from, to; };   // of branches with several targets

struct Program {
  std::vector<Sass> code;
  std::vector<Jump> jumps;
};

struct Step {
  uint32_t sass;    // kNoSass: an effect of which no instruction was found
  int32_t item;     // of the trace: what memory and barriers saw; -1: nothing
};
constexpr uint32_t kNoSass = ~0u;

struct WalkStats {
  uint64_t steps = 0, anchors = 0, lost = 0;   // lost: anchors without an instruction
};

class Walker {
 public:
  Walker(const Recording& recording, const Program& program);
  std::vector<Step> walk(const std::vector<Item>& items);
  const std::vector<Sass>& code() const { return code_; }
  WalkStats stats;

 private:
  struct Path { bool found = false; std::vector<uint32_t> nodes; uint32_t next = 0; };
  struct Goal { enum { Reach, Back, Exit } kind; Anchor anchor; uint32_t line; };

  template <class F> void successors(uint32_t node, F f) const;
  void order();
  void find_polls();
  double weight(uint32_t node) const;
  Path find(uint32_t from, const Goal& goal);
  void mark(const std::vector<Item>& items, size_t begin, size_t end, uint8_t value);

  const Recording& recording_;
  std::vector<Sass> code_;
  std::unordered_multimap<uint32_t, uint32_t> jumps_;
  std::vector<uint32_t> rank_;                // reverse postorder
  std::vector<uint8_t> polls_;
  std::vector<uint8_t> seen_;                 // by line: 2 in this window, 1 in a neighbouring one
  std::vector<uint32_t> touched_;
  std::unordered_map<uint64_t, Path> known_;
};

}  // namespace ptxemu::timing
