#include "clock.hpp"

#include <algorithm>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <queue>

#include "../fault.hpp"

namespace ptxemu::timing {
namespace {

constexpr double kNever = 1e300;

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

double Clock::fetch(Sm& sm, double time, double bytes, double fresh) {
  sm.l2_free = std::max(sm.l2_free, time) + bytes / units_.l2_read_bytes;
  result_.l2_busy += bytes / units_.l2_read_bytes;
  double done = sm.l2_free + units_.l2_latency;
  double missed = fresh * units_.dram_read_share;
  if (missed > 0) {
    sm.dram_free = std::max(sm.dram_free, time) + missed / units_.dram_bytes;
    result_.dram_busy += missed / units_.dram_bytes;
    done = std::max(done, sm.dram_free + units_.l2_latency) + units_.dram_latency * std::min(1.0, units_.dram_read_share);
  }
  result_.loaded_bytes += bytes;
  return done;
}
double Clock::store(Sm& sm, double time, double bytes, bool reduce) {
  double rate = reduce ? units_.l2_reduce_bytes : units_.l2_write_bytes;
  sm.l2_write_free = std::max(sm.l2_write_free, time) + bytes / rate;
  double done = sm.l2_write_free;
  double missed = bytes * units_.dram_write_share;
  if (missed > 0) {
    sm.dram_free = std::max(sm.dram_free, time) + missed / units_.dram_bytes;
    result_.dram_busy += missed / units_.dram_bytes;
    done = std::max(done, sm.dram_free);
  }
  (reduce ? result_.reduced_bytes : result_.stored_bytes) += bytes;
  return done;
}

bool Clock::start_cluster(double time) {
  size_t size = recording_.cluster_size;
  if (next_cluster_ * size >= recording_.ctas.size()) return false;
  std::vector<Block*> peers;
  for (size_t rank = 0; rank < size; ++rank) {
    Sm& sm = sms_[rank];
    auto block = std::make_unique<Block>();
    block->number = next_cluster_ * size + rank;
    block->trace = &recording_.ctas[block->number];
    block->start = time;
    block->warpgroups.resize((block->trace->warps.size() + 3) / 4);
    for (size_t i = 0; i < block->trace->warps.size(); ++i) {
      auto lane = std::make_unique<Lane>();
      lane->block = block.get();
      lane->sm = &sm;
      lane->index = uint32_t(i);
      lane->items = &block->trace->warps[i];
      lane->steps = walker_.walk(*lane->items);
      lane->ready = time + units_.cta_start;
      if (!lane->steps.empty()) {
        ++block->live;
        sm.schedulers[i % 4].push_back(lane.get());
      }
      block->lanes.push_back(std::move(lane));
    }
    peers.push_back(block.get());
    sm.blocks.push_back(std::move(block));
  }
  for (Block* block : peers) block->peers = peers;
  ++next_cluster_;
  ++result_.ctas;
  return true;
}

void Clock::end_block(Block& block) {
  Sm& sm = *block.lanes[0]->sm;
  times_[block.number] = {block.start, now_};
  for (auto& list : sm.schedulers) std::erase_if(list, [&](Lane* lane) { return lane->block == &block; });
  for (Lane*& lane : sm.last)
    if (lane && lane->block == &block) lane = nullptr;
  // Late landings may still name the block, so it stays; its steps go.
  for (auto& lane : block.lanes) lane->steps = {};
  if (recording_.cluster_size == 1) start_cluster(now_);
  else {
    bool all = true;
    for (Block* peer : block.peers) all &= peer->live == 0;
    if (all) start_cluster(now_);
  }
}

double* Clock::pipe(Lane& lane, const Sass& s, double& interval) {
  Pipes& p = lane.sm->pipes[lane.index % 4];
  switch (s.op) {
    case Op::Fma: interval = units_.fma; return &p.fma;
    case Op::FmaHeavy: interval = units_.fma_heavy; return &p.heavy;
    case Op::Alu: interval = units_.alu; return &p.alu;
    case Op::Xu: interval = units_.xu; return &p.xu;
    case Op::Uniform: interval = units_.uniform; return &p.uniform;
    case Op::Shuffle: case Op::SharedLoad: case Op::SharedStore: case Op::GlobalLoad: case Op::GlobalStore: case Op::Atomic: case Op::AsyncCopy:
    case Op::ConstantLoad: case Op::Local: interval = units_.lsu; return &p.lsu;
    default: interval = 0; return nullptr;
  }
}

// When the lane's next instruction may issue; kNever if that depends on others.
double Clock::available(Lane& lane, const Sass& s, Reason& reason) {
  if (lane.blocked) { reason = lane.why; return kNever; }
  double time = lane.ready;
  reason = Reason::Stall;
  if (lane.wake > time) { time = lane.wake; reason = lane.why; }
  for (int b = 0; b < 6; ++b) {
    if (!(s.wait >> b & 1)) continue;
    if (lane.boards[b].open) { reason = Reason::Mbarrier; return kNever; }
    if (lane.boards[b].time > time) { time = lane.boards[b].time; reason = Reason::Scoreboard; }
  }
  double interval;
  if (double* free = pipe(lane, s, interval); free && *free > time) { time = *free; reason = Reason::Pipe; }
  if (s.op == Op::Hgmma) {
    Sm& sm = *lane.sm;
    Warpgroup& group = lane.block->warpgroups[lane.index / 4];
    bool first = lane.products >= group.first + group.products.size();
    size_t depth = size_t(s.argument >> 9 & 1 ? units_.tensor_depth_registers : units_.tensor_depth_shared);
    if (first) {
      double at = std::max(time, now_);
      while (!sm.tensor_starts.empty() && sm.tensor_starts.front() <= at) sm.tensor_starts.pop_front();
      if (sm.tensor_starts.size() + sm.tensor_open >= depth) {
        reason = Reason::Tensor;
        if (sm.tensor_starts.empty()) return kNever;
        size_t excess = sm.tensor_starts.size() + sm.tensor_open - depth;
        time = std::max(time, sm.tensor_starts[std::min(excess, sm.tensor_starts.size() - 1)]);
      }
    }
  }
  if (s.op == Op::WarpgroupWait) {
    bool known;
    double done = group_time(lane, s.argument, known);
    if (!known) { reason = Reason::TensorResult; return kNever; }
    if (done > time) { time = done; reason = Reason::TensorResult; }
  }
  return time;
}

double Clock::group_time(Lane& lane, uint32_t keep, bool& known) {
  known = true;
  if (lane.groups <= keep) return 0;
  Warpgroup& group = lane.block->warpgroups[lane.index / 4];
  uint64_t needed = lane.groups - keep - 1;
  if (needed >= group.group_done.size() || group.group_done[needed] == kNever) { known = false; return kNever; }
  return group.group_done[needed] + units_.tensor_group_wait;
}

void Clock::dispatch(Sm& sm, Block& block, uint32_t index, uint64_t number, const Sass& s) {
  Warpgroup& group = block.warpgroups[index];
  Product& product = group.products[number - group.first];
  bool registers = s.argument >> 9 & 1;
  double n = s.argument & 0x1ff;
  double operands = ((registers ? 0 : 2048) + n * 32) / units_.shared_bytes;
  double start = std::max(product.time + units_.tensor_issue, sm.tensor_free);
  double shared = std::max(sm.shared_free, start);
  double end = std::max(start + n / 2, shared + operands);
  sm.shared_free = shared + operands;
  result_.shared_busy += operands;
  sm.tensor_free = end;
  result_.tensor_busy += n / 2;
  sm.tensor_starts.push_back(start);
  product.dispatched = true;
  --sm.tensor_open;
  product.done = end + (registers ? units_.tensor_tail_registers : units_.tensor_tail_shared);
  for (size_t g = 0; g < group.group_ends.size(); ++g)
    if (group.group_ends[g] == number + 1) group.group_done[g] = product.done;
  while (!group.products.empty() && group.products.front().dispatched) {
    group.products.pop_front();
    ++group.first;
  }
}

void Clock::complete(Mbar& bar, double time) {
  if (bar.pending != 0 || bar.bytes != 0) return;
  ++bar.phase;
  bar.pending = bar.expected;
  bar.done = time;
  std::erase_if(bar.waiters, [&](Mbar::Waiter& w) {
    if ((bar.phase & 1) == w.parity) return false;
    double wake = time + units_.mbarrier_wake;
    if (w.board < 7) {
      --w.lane->boards[w.board].open;
      set_board(*w.lane, w.board, wake);
    } else {
      w.lane->blocked = false;
      w.lane->wake = wake;
      w.lane->why = Reason::Mbarrier;
    }
    return true;
  });
}

void Clock::arrive(Block& block, const Item& item, double time) {
  Block& target = block.peers.size() > item.cta ? *block.peers[item.cta] : block;
  Mbar& bar = target.mbars[item.address];
  if (item.expected && bar.expected != int64_t(item.expected) && (bar.pending < 0 || bar.pending == bar.expected)) bar.pending = bar.expected = item.expected;
  if (item.kind == Kind::Landed) bar.bytes += int32_t(item.bytes);
  else { bar.pending -= item.count; bar.bytes += int32_t(item.bytes); }
  complete(bar, time);
}

void Clock::barrier(Lane& lane, const Item& item) {
  Block& block = *lane.block;
  NamedBar& bar = block.bars[item.address & 15];
  double time = std::max(now_, lane.sm->barrier_free);
  lane.sm->barrier_free = time + units_.barrier_interval;
  bar.arrived += item.count;
  bar.last = std::max(bar.last, time);
  uint32_t expected = item.expected ? item.expected : uint32_t(block.live) * 32;
  if (item.parity) {
    bar.waiters.push_back(&lane);
    lane.blocked = true;
    lane.why = Reason::Barrier;
  }
  if (bar.arrived < expected) return;
  for (Lane* waiter : bar.waiters) {
    waiter->blocked = false;
    waiter->wake = bar.last + units_.barrier_release;
    waiter->why = Reason::Barrier;
  }
  bar = {};
}

// What an instruction does to memory and barriers, at now_.
void Clock::effects(Lane& lane, const Step& step, const Sass* s) {
  Sm& sm = *lane.sm;
  const std::vector<Item>& items = *lane.items;
  const Item* op = step.item >= 0 ? &items[size_t(step.item)] : nullptr;
  int write = s ? s->write : 7, read = s ? s->read : 7;
  double landed = now_;
  if (op) {
    const std::string& opcode = recording_.opcodes[op->pc];
    bool bulk_store = false, reduce = false;
    uint32_t targets = 0;      // CTAs that a bulk load goes to: L2 is read once for all of them
    if (opcode.rfind("cp.async.bulk", 0) == 0 || opcode.rfind("cp.reduce", 0) == 0) {
      bool group = opcode.find("commit_group") != opcode.npos || opcode.find("wait_group") != opcode.npos;
      for (size_t i = size_t(step.item) + 1; i < items.size() && items[i].kind == Kind::Landed; ++i) ++targets;
      reduce = opcode.rfind("cp.reduce", 0) == 0;
      bulk_store = !group && !targets && op->bytes > 0;
      if (group && opcode.find("commit") != opcode.npos) {
        lane.bulk_read.push_back(lane.bulk_read_open);
        lane.bulk_done.push_back(lane.bulk_done_open);
        lane.bulk_read_open = lane.bulk_done_open = 0;
      } else if (group && recording_.groups[op->pc] >= 0) {
        auto& times = opcode.find(".read") != opcode.npos ? lane.bulk_read : lane.bulk_done;
        size_t keep = size_t(recording_.groups[op->pc]);
        for (size_t i = 0; i + keep < times.size(); ++i)
          if (times[i] > lane.wake) { lane.wake = times[i]; lane.why = Reason::Bulk; }
        if (times.size() > keep && &times == &lane.bulk_done && keep == 0) { lane.bulk_done.clear(); lane.bulk_read.clear(); }
      }
    } else if (opcode.rfind("cp.async.commit", 0) == 0) {
      lane.copies.push_back(lane.copies_open);
      lane.copies_open = 0;
    } else if (opcode.rfind("cp.async.wait", 0) == 0) {
      size_t keep = size_t(std::max(0, recording_.groups[op->pc]));
      for (size_t i = 0; i + keep < lane.copies.size(); ++i)
        if (lane.copies[i] > lane.wake) { lane.wake = lane.copies[i]; lane.why = Reason::Scoreboard; }
    }
    if (targets || bulk_store) {
      bool each_lane = s && s->argument;
      double copies = each_lane ? op->count : 1, bytes = op->bytes / (each_lane ? 1.0 : std::max(op->count, 1u));
      double start = std::max(sm.tma_free, now_ + units_.tma_issue);
      sm.tma_free = start + units_.tma_interval * copies;
      result_.tma_busy += units_.tma_interval * copies;
      if (targets) landed = fetch(sm, start + units_.tma_latency, bytes / targets, bytes / targets);
      else {
        sm.store_free = std::max(sm.store_free, start) + bytes / units_.shared_bytes;
        result_.shared_busy += bytes / units_.shared_bytes;
        double done = store(sm, sm.store_free, bytes, reduce);
        lane.bulk_read_open = std::max(lane.bulk_read_open, std::max(sm.store_free, done) + units_.tma_issue);
        lane.bulk_done_open = std::max(lane.bulk_done_open, done + units_.l2_latency);
      }
    }
    for (size_t i = size_t(step.item) + 1; i < items.size(); ++i) {
      const Item& item = items[i];
      if (item.kind == Kind::Init) {
        Mbar& bar = lane.block->mbars[item.address];
        bar.pending = bar.expected = item.expected;
        bar.phase = 0;
        bar.bytes = 0;
      } else if (item.kind == Kind::Arrive || item.kind == Kind::Landed) {
        Block* block = lane.block;
        double time = item.kind == Kind::Landed ? landed : now_ + units_.mbarrier_arrive;
        at(time, [this, block, &item](double when) { arrive(*block, item, when); });
      } else if (item.kind == Kind::Wait) {
        Block& target = *lane.block;
        Mbar& bar = target.mbars[item.address];
        double issued = std::max(now_, sm.mbarrier_free);
        sm.mbarrier_free = issued + units_.mbarrier_interval;
        set_board(lane, write, issued + units_.mbarrier_wait);
        if ((bar.phase & 1) != item.parity) {
          set_board(lane, write, bar.done + units_.mbarrier_wake);
          if (write >= 7) { lane.wake = std::max(lane.wake, issued + units_.mbarrier_wait); lane.why = Reason::Mbarrier; }
        } else {
          bar.waiters.push_back({&lane, write, item.parity});
          if (write < 7) ++lane.boards[write].open;
          else { lane.blocked = true; lane.why = Reason::Mbarrier; }
        }
        write = 7;
      } else if (item.kind == Kind::Barrier) {
        barrier(lane, item);
      } else break;
    }
    if (s) {
      switch (s->op) {
        case Op::SharedLoad: case Op::SharedStore: case Op::Shuffle: {
          double waves = std::max(1u, op->wavefronts);
          sm.shared_free = std::max(sm.shared_free, now_) + waves;
          result_.shared_busy += waves;
          set_board(lane, write, now_ + waves + units_.shared_latency);
          set_board(lane, read, now_ + waves + 8);
          write = read = 7;
          break;
        }
        case Op::GlobalLoad: case Op::AsyncCopy: {
          double done = now_ + units_.l1_latency;
          if (uint32_t sectors = op->load_sectors - std::min(op->load_sectors, op->near_sectors))
            done = fetch(sm, now_ + 30, 32.0 * sectors, 32.0 * op->first_sectors);
          lane.copies_open = std::max(lane.copies_open, done);
          if (s->op == Op::GlobalLoad) set_board(lane, write, done);
          write = 7;
          break;
        }
        case Op::GlobalStore: store(sm, now_ + 30, 32.0 * op->store_sectors, false); break;
        case Op::Atomic:
          store(sm, now_ + 30, 32.0 * std::max(op->store_sectors, op->load_sectors), true);
          set_board(lane, write, now_ + units_.atomic_latency);
          write = 7;
          break;
        default: break;
      }
    }
  }
  if (!s) return;
  double latency = units_.other_latency;
  switch (s->op) {
    case Op::Xu: latency = units_.xu_latency; break;
    case Op::Shuffle: latency = units_.shuffle_latency; break;
    case Op::SharedLoad: case Op::SharedStore: latency = units_.shared_latency; break;
    case Op::ConstantLoad: latency = units_.constant_latency; break;
    case Op::Special: latency = units_.special_latency; break;
    case Op::GlobalLoad: latency = op ? units_.l2_latency : 8; break;
    case Op::Atomic: latency = op ? units_.atomic_latency : 8; break;
    default: break;
  }
  set_board(lane, write, now_ + latency);
  set_board(lane, read, now_ + 8);
}

void Clock::issue(Lane& lane) {
  const Step step = lane.steps[lane.at];
  if (step.sass == kNoSass) {
    ++lane.at;
    effects(lane, step, nullptr);
    return;
  }
  const Sass& s = code_[step.sass];
  Sm& sm = *lane.sm;
  ++result_.issued;
  double interval;
  if (double* free = pipe(lane, s, interval)) {
    *free = now_ + interval;
    switch (s.op) {
      case Op::Fma: case Op::FmaHeavy: result_.fma_busy += interval; break;
      case Op::Alu: result_.alu_busy += interval; break;
      case Op::Xu: result_.xu_busy += interval; break;
      default: break;
    }
  }
  lane.ready = now_ + std::max<double>(1, s.stall);
  ++lane.at;
  switch (s.op) {
    case Op::Branch:
      if (s.target >= 0 && lane.at < lane.steps.size() && lane.steps[lane.at].sass == uint32_t(s.target))
        lane.ready = now_ + s.stall + (uint32_t(s.target) <= step.sass ? units_.branch_back : units_.branch_forward);
      break;
    case Op::Hgmma: {
      uint32_t index = lane.index / 4;
      Warpgroup& group = lane.block->warpgroups[index];
      uint64_t number = lane.products++;
      if (number >= group.first + group.products.size()) {
        group.products.emplace_back();
        ++sm.tensor_open;
      }
      Product& product = group.products[number - group.first];
      product.time = std::max(product.time, now_);
      if (s.argument >> 10 & 1) {
        if (++lane.groups > group.group_ends.size()) {
          group.group_ends.push_back(number + 1);
          group.group_done.push_back(kNever);
        }
      }
      if (++product.arrived == 4) dispatch(sm, *lane.block, index, number, s);
      break;
    }
    case Op::Mma: {
      Pipes& p = sm.pipes[lane.index % 4];
      p.lsu = std::max(p.lsu, now_);
      result_.tensor_busy += s.argument / 4.0;
      break;
    }
    case Op::Fence: lane.ready = now_ + std::max<double>(s.stall, s.argument ? units_.memory_fence : units_.proxy_fence); break;
    case Op::Registers: lane.ready = now_ + units_.register_change; break;
    default: break;
  }
  effects(lane, step, &s);
  double& registers = sm.register_free[lane.index % 4];
  registers = std::max(registers, now_) + s.reads / (sm.tensor_free > now_ ? units_.register_reads_tensor : units_.register_reads);
  sm.issue_free[lane.index % 4] = std::max(now_ + 1, registers - 1);
}

// Issues what can issue now. -> whether anything did; next: when something might
bool Clock::step(double& next) {
  bool any = false;
  next = kNever;
  for (Sm& sm : sms_)
    for (int q = 0; q < 4; ++q) {
      if (sm.schedulers[q].empty()) continue;
      if (sm.issue_free[q] > now_) { next = std::min(next, sm.issue_free[q]); continue; }
      Lane* chosen = nullptr;
      Reason chosen_reason = Reason::Stall;
      for (Lane* lane : sm.schedulers[q]) {
        if (lane->finished()) continue;
        Step step = lane->steps[lane->at];
        Reason reason = Reason::Stall;
        double time;
        if (step.sass == kNoSass) time = lane->blocked ? kNever : std::max(lane->ready, lane->wake);
        else time = available(*lane, code_[step.sass], reason);
        if (time > now_) { next = std::min(next, time); continue; }
        // The warp that issued last goes on until it has to wait or yields; then the one that waits longest.
        bool greedy = lane == sm.last[q];
        if (!chosen || greedy || (chosen != sm.last[q] && lane->ready < chosen->ready)) { chosen = lane; chosen_reason = reason; }
      }
      (void)chosen_reason;
      if (!chosen) continue;
      any = true;
      Step step = chosen->steps[chosen->at];
      if (step.sass != kNoSass) {
        const Sass& s = code_[step.sass];
        double boards = 0;
        for (int b = 0; b < 6; ++b)
          if (s.wait >> b & 1) boards = std::max(boards, chosen->boards[b].time);
        double ready = chosen->ready;
        if (chosen->wake > ready) { wait(*chosen, step, chosen->why, chosen->wake - ready); ready = chosen->wake; }
        if (boards > ready) { wait(*chosen, step, Reason::Scoreboard, boards - ready); ready = boards; }
        if (now_ > ready) wait(*chosen, step, s.op == Op::Hgmma ? Reason::Tensor : s.op == Op::WarpgroupWait ? Reason::TensorResult : Reason::Pipe, now_ - ready);
        chosen->wake = 0;
      }
      sm.last[q] = chosen;
      issue(*chosen);
      if (chosen->finished()) {
        finish_ = std::max(finish_, now_);
        Block& block = *chosen->block;
        if (--block.live == 0) end_block(block);
        else
          for (NamedBar& bar : block.bars)
            if (!bar.waiters.empty() && bar.arrived >= block.live * 32) {
              for (Lane* waiter : bar.waiters) { waiter->blocked = false; waiter->wake = now_ + units_.barrier_release; waiter->why = Reason::Barrier; }
              bar = {};
            }
      }
    }
  return any;
}

void Clock::stuck() const {
  std::string text = format("the clock of %s stopped at cycle %.0f: every warp waits", recording_.kernel.c_str(), now_);
  for (const Sm& sm : sms_)
    for (auto& block : sm.blocks) {
      if (block->live == 0) continue;
      for (auto& lane : block->lanes) {
        if (lane->finished()) continue;
        Step s = lane->steps[lane->at];
        uint32_t line = s.sass != kNoSass ? code_[s.sass].line : recording_.lines[(*lane->items)[size_t(s.item)].pc];
        text += format("\n  CTA %zu warp %u, near PTX line %u", block->number, lane->index, line);
      }
      for (auto& [address, bar] : block->mbars)
        if (!bar.waiters.empty())
          text += format("\n  mbarrier 0x%x: phase %llu, %lld of %lld arrivals and %lld bytes are missing", address, (unsigned long long)bar.phase,
                         (long long)bar.pending, (long long)bar.expected, (long long)bar.bytes);
      for (int id = 0; id < 16; ++id)
        if (!block->bars[id].waiters.empty()) text += format("\n  barrier %d: %u threads arrived", id, block->bars[id].arrived);
    }
  fail(text);
}

ClockResult Clock::run(std::vector<Waited>& waited, std::vector<CtaTimes>& times) {
  times_.assign(recording_.ctas.size(), {0, 0});
  for (int i = 0; i < std::max(1, int(units_.resident_ctas)); ++i)
    if (!start_cluster(0)) break;
  while (true) {
    while (!events_.empty() && events_.top().time <= now_) {
      Event event = events_.top();
      events_.pop();
      event.act(event.time);
    }
    double next;
    bool any = step(next);
    bool left = false;
    for (Sm& sm : sms_)
      for (auto& list : sm.schedulers) left |= !list.empty();
    if (!left) break;
    double then = any ? now_ + 1 : next;
    if (!events_.empty()) then = std::min(then, std::max(events_.top().time, now_));
    if (any) then = std::max(then, now_ + 1);
    if (then >= 1e299) stuck();
    now_ = then > now_ ? then : now_;
  }
  for (Sm& sm : sms_) finish_ = std::max({finish_, sm.l2_write_free, sm.store_free, sm.dram_free, sm.shared_free, sm.tensor_free});
  result_.cycles = finish_;
  result_.steps = double(walker_.stats.steps);
  result_.anchors = double(walker_.stats.anchors);
  result_.lost = double(walker_.stats.lost);
  for (size_t i = 0; i < waits_.size(); ++i)
    if (waits_[i] > 0) waited.push_back({uint32_t(i / size_t(Reason::Count)), Reason(i % size_t(Reason::Count)), waits_[i]});
  times = times_;
  return result_;
}

}  // namespace

ClockResult run_clock(const Recording& recording, const Program& program, const Units& units, std::vector<Waited>& waited,
                      std::vector<CtaTimes>& times) {
  return Clock(recording, program, units).run(waited, times);
}

}  // namespace ptxemu::timing
