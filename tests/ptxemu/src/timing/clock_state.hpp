// What the clock keeps of one SM (of each SM of a cluster) while it replays a recording.
#pragma once
#include <algorithm>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <queue>
#include <utility>

#include "../fault.hpp"
#include "clock.hpp"

namespace ptxemu::timing {

constexpr double kNever = 1e300;
constexpr double kReadOperands = 8;   // estimate: until an instruction has read the registers it stores

struct Sm;
struct Block;

struct Scoreboard { double time = 0; int open = 0; };   // open: releases whose time is not known yet

struct Lane {   // one warp
  Block* block = nullptr;
  Sm* sm = nullptr;
  const std::vector<Item>* items = nullptr;
  std::vector<Step> steps;
  size_t at = 0;
  uint32_t index = 0;
  double ready = 0;              // stall counts
  Reason why = Reason::Stall;
  bool blocked = false;          // until something wakes it
  double wake = 0;
  Scoreboard boards[8];
  uint64_t products = 0, groups = 0;       // wgmmas and their groups that it issued
  std::vector<double> bulk_read, bulk_done;   // of each committed bulk group
  double bulk_read_open = 0, bulk_done_open = 0;
  std::vector<double> copies;              // of each committed cp.async group
  double copies_open = 0;
  bool finished() const { return at >= steps.size(); }
};

struct Product {
  uint32_t arrived = 0;
  double time = 0, done = kNever;
  bool dispatched = false;
};

struct Warpgroup {
  std::deque<Product> products;
  uint64_t first = 0;                    // number of products.front()
  std::vector<uint64_t> group_ends;      // products issued up to each commit
  std::vector<double> group_done;        // kNever until dispatched
  std::vector<Lane*> waiting;
};

struct Mbar {
  int64_t pending = -1, expected = 0, bytes = 0;
  uint64_t phase = 0;
  double done = 0;
  struct Waiter { Lane* lane; int board; uint32_t parity; };
  std::vector<Waiter> waiters;
};

struct NamedBar { uint32_t arrived = 0; double last = 0; std::vector<Lane*> waiters; };

struct Block {
  const CtaTrace* trace = nullptr;
  size_t number = 0;
  std::vector<Block*> peers;             // by rank in the cluster
  std::vector<std::unique_ptr<Lane>> lanes;
  std::vector<Warpgroup> warpgroups;
  std::map<uint32_t, Mbar> mbars;
  NamedBar bars[16];
  uint32_t live = 0;
  double start = 0;
};

struct Pipes { double fma = 0, heavy = 0, alu = 0, xu = 0, uniform = 0, lsu = 0; };

struct Sm {
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Lane*> schedulers[4];
  Lane* last[4] = {};
  double issue_free[4] = {}, register_free[4] = {};
  Pipes pipes[4];
  double tensor_free = 0, shared_free = 0, tma_free = 0, store_free = 0, mbarrier_free = 0, barrier_free = 0;
  double l2_free = 0, l2_write_free = 0, dram_free = 0;
  std::deque<double> tensor_starts;      // of products that all four warps issued
  size_t tensor_open = 0;                // products that some warps of their warpgroup issued, not all
};

struct Event {
  double time;
  uint64_t order;
  std::function<void(double)> act;
  bool operator>(const Event& other) const { return time != other.time ? time > other.time : order > other.order; }
};

class Clock {
 public:
  Clock(const Recording& recording, const Program& program, const Units& units)
      : recording_(recording), units_(units), walker_(recording, program), code_(walker_.code()), sms_(recording.cluster_size) {
    waits_.assign(recording.lines.size() * size_t(Reason::Count), 0);
    for (uint32_t pc = 0; pc < recording.lines.size(); ++pc) pc_of_line_.try_emplace(recording.lines[pc], pc);
  }

  ClockResult run(std::vector<Waited>& waited, std::vector<CtaTimes>& times);

 private:
  const Recording& recording_;
  const Units units_;
  Walker walker_;
  const std::vector<Sass>& code_;
  std::vector<Sm> sms_;
  size_t next_cluster_ = 0;
  double now_ = 0, finish_ = 0;
  std::priority_queue<Event, std::vector<Event>, std::greater<>> events_;
  uint64_t order_ = 0;
  ClockResult result_;
  std::vector<double> waits_;
  std::unordered_map<uint32_t, uint32_t> pc_of_line_;
  std::vector<CtaTimes> times_;

  void at(double time, std::function<void(double)> act) { events_.push({time, order_++, std::move(act)}); }
  bool start_cluster(double time);
  void end_block(Block& block);
  void wait(const Lane& lane, const Step& step, Reason reason, double cycles) {
    if (cycles <= 0) return;
    uint32_t pc = 0;
    if (step.item >= 0) pc = (*lane.items)[size_t(step.item)].pc;
    else if (auto it = pc_of_line_.find(code_[step.sass].line); it != pc_of_line_.end()) pc = it->second;
    waits_[pc * size_t(Reason::Count) + size_t(reason)] += cycles;
  }
  double* pipe(Lane& lane, const Sass& s, double& interval);
  double available(Lane& lane, const Sass& s, Reason& reason);
  void issue(Lane& lane);
  void commit_or_wait(Lane& lane, const std::string& opcode, int32_t keep);
  double bulk_copy(Lane& lane, const Item& op, const Sass* s, uint32_t targets);
  void mbarrier_wait(Lane& lane, const Item& item, int board);
  bool synchronise(Lane& lane, size_t first, double landed, int board);
  double memory_access(Lane& lane, const Item& op, const Sass& s);
  double latency(const Sass& s) const;
  void effects(Lane& lane, const Step& step, const Sass* s);
  void set_board(Lane& lane, int board, double time) {
    if (board < 7) lane.boards[board].time = std::max(lane.boards[board].time, time);
  }
  double fetch(Sm& sm, double time, double bytes, double fresh);   // fresh: of the bytes, those nobody loaded before
  double store(Sm& sm, double time, double bytes, bool reduce);
  void dispatch(Sm& sm, Block& block, uint32_t group, uint64_t number, const Sass& s);
  void arrive(Block& block, const Item& item, double time);
  void complete(Mbar& bar, double time);
  void barrier(Lane& lane, const Item& item);
  double group_time(Lane& lane, uint32_t keep, bool& known);
  bool step(double& next);
  [[noreturn]] void stuck() const;
};

}  // namespace ptxemu::timing
