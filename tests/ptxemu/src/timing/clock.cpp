// Who issues when.
#include "clock_state.hpp"

namespace ptxemu::timing {

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

ClockResult run_clock(const Recording& recording, const Program& program, const Units& units, std::vector<Waited>& waited,
                      std::vector<CtaTimes>& times) {
  return Clock(recording, program, units).run(waited, times);
}

}  // namespace ptxemu::timing
