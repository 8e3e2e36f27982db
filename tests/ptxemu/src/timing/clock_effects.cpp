// What instructions do to memory, barriers and the tensor cores, and when that is done.
#include "clock_state.hpp"

namespace ptxemu::timing {

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

void Clock::commit_or_wait(Lane& lane, const std::string& opcode, int32_t keep) {
  auto wait_for = [&](const std::vector<double>& groups, Reason reason) {
    for (size_t i = 0; i + size_t(std::max(keep, 0)) < groups.size(); ++i)
      if (groups[i] > lane.wake) { lane.wake = groups[i]; lane.why = reason; }
  };
  bool bulk = opcode.rfind("cp.async.bulk", 0) == 0;
  if (opcode.find("wait") != opcode.npos) {
    if (!bulk) wait_for(lane.copies, Reason::Scoreboard);
    else wait_for(opcode.find(".read") != opcode.npos ? lane.bulk_read : lane.bulk_done, Reason::Bulk);
  } else if (bulk) {
    lane.bulk_read.push_back(std::exchange(lane.bulk_read_open, 0));
    lane.bulk_done.push_back(std::exchange(lane.bulk_done_open, 0));
  } else {
    lane.copies.push_back(std::exchange(lane.copies_open, 0));
  }
}

// targets: CTAs that a load goes to, for which L2 is read once. -> when a load lands
double Clock::bulk_copy(Lane& lane, const Item& op, const Sass* s, uint32_t targets) {
  Sm& sm = *lane.sm;
  bool each_lane = s && s->argument;
  double copies = each_lane ? op.count : 1, bytes = op.bytes / (each_lane ? 1.0 : std::max(op.count, 1u));
  double start = std::max(sm.tma_free, now_ + units_.tma_issue);
  sm.tma_free = start + units_.tma_interval * copies;
  result_.tma_busy += units_.tma_interval * copies;
  if (targets) return fetch(sm, start + units_.tma_latency, bytes / targets, bytes / targets);
  sm.store_free = std::max(sm.store_free, start) + bytes / units_.shared_bytes;
  result_.shared_busy += bytes / units_.shared_bytes;
  double done = store(sm, sm.store_free, bytes, recording_.opcodes[op.pc].rfind("cp.reduce", 0) == 0);
  lane.bulk_read_open = std::max(lane.bulk_read_open, done + units_.tma_issue);
  lane.bulk_done_open = std::max(lane.bulk_done_open, done + units_.l2_latency);
  return now_;
}

// board: that the result of the wait sets; 7: none, and the warp itself waits
void Clock::mbarrier_wait(Lane& lane, const Item& item, int board) {
  Mbar& bar = lane.block->mbars[item.address];
  double issued = std::max(now_, lane.sm->mbarrier_free);
  lane.sm->mbarrier_free = issued + units_.mbarrier_interval;
  if ((bar.phase & 1) != item.parity) {
    double known = std::max(issued + units_.mbarrier_wait, bar.done + units_.mbarrier_wake);
    set_board(lane, board, known);
    if (board >= 7) { lane.wake = std::max(lane.wake, known); lane.why = Reason::Mbarrier; }
    return;
  }
  set_board(lane, board, issued + units_.mbarrier_wait);
  bar.waiters.push_back({&lane, board, item.parity});
  if (board < 7) ++lane.boards[board].open;
  else { lane.blocked = true; lane.why = Reason::Mbarrier; }
}

// What an instruction does to barriers. -> whether it waited on an mbarrier, which then sets its scoreboard
bool Clock::synchronise(Lane& lane, size_t first, double landed, int board) {
  const std::vector<Item>& items = *lane.items;
  bool waited = false;
  for (size_t i = first; i < items.size() && items[i].kind > Kind::Back; ++i) {
    const Item& item = items[i];
    if (item.kind == Kind::Init) {
      Mbar& bar = lane.block->mbars[item.address];
      bar.pending = bar.expected = item.expected;
      bar.phase = 0;
      bar.bytes = 0;
    } else if (item.kind == Kind::Wait) {
      mbarrier_wait(lane, item, board);
      waited = true;
    } else if (item.kind == Kind::Barrier) {
      barrier(lane, item);
    } else {
      Block* block = lane.block;
      double time = item.kind == Kind::Landed ? landed : now_ + units_.mbarrier_arrive;
      at(time, [this, block, &item](double when) { arrive(*block, item, when); });
    }
  }
  return waited;
}

// -> when the result of a load or store is there
double Clock::memory_access(Lane& lane, const Item& op, const Sass& s) {
  Sm& sm = *lane.sm;
  constexpr double kToL2 = 30;   // address translation and the way there
  switch (s.op) {
    case Op::SharedLoad: case Op::SharedStore: {
      double waves = std::max(1u, op.wavefronts);
      sm.shared_free = std::max(sm.shared_free, now_) + waves;
      result_.shared_busy += waves;
      return now_ + waves + units_.shared_latency;
    }
    case Op::GlobalLoad: case Op::AsyncCopy: {
      double done = now_ + units_.l1_latency;
      if (uint32_t sectors = op.load_sectors - std::min(op.load_sectors, op.near_sectors))
        done = fetch(sm, now_ + kToL2, 32.0 * sectors, 32.0 * op.first_sectors);
      lane.copies_open = std::max(lane.copies_open, done);
      return s.op == Op::GlobalLoad ? done : now_;
    }
    case Op::GlobalStore: store(sm, now_ + kToL2, 32.0 * op.store_sectors, false); return now_;
    case Op::Atomic: store(sm, now_ + kToL2, 32.0 * std::max(op.store_sectors, op.load_sectors), true); return now_ + units_.atomic_latency;
    default: return now_;
  }
}

double Clock::latency(const Sass& s) const {
  switch (s.op) {
    case Op::Xu: return units_.xu_latency;
    case Op::Shuffle: return units_.shuffle_latency;
    case Op::ConstantLoad: return units_.constant_latency;
    case Op::Special: return units_.special_latency;
    // Their accesses say when they are done; predicated off, they are done at once.
    case Op::SharedLoad: case Op::SharedStore: case Op::GlobalLoad: case Op::Atomic: case Op::AsyncCopy: return kReadOperands;
    default: return units_.other_latency;
  }
}

// What an instruction does beyond taking its pipe, at now_.
void Clock::effects(Lane& lane, const Step& step, const Sass* s) {
  const std::vector<Item>& items = *lane.items;
  const Item* op = step.item >= 0 ? &items[size_t(step.item)] : nullptr;
  bool board_is_set = false;
  double done = now_;
  if (op) {
    double landed = now_;
    Anchor anchor = recording_.anchors[op->pc];
    if (anchor == Anchor::BulkCommit || anchor == Anchor::CopyCommit || anchor == Anchor::CopyWait)
      commit_or_wait(lane, recording_.opcodes[op->pc], recording_.groups[op->pc]);
    if (anchor == Anchor::Bulk) {
      uint32_t targets = 0;
      for (size_t i = size_t(step.item) + 1; i < items.size() && items[i].kind == Kind::Landed; ++i) ++targets;
      landed = bulk_copy(lane, *op, s, targets);
    }
    board_is_set = synchronise(lane, size_t(step.item) + 1, landed, s ? s->write : 7);
    if (s) done = memory_access(lane, *op, *s);
  }
  if (!s) return;
  if (!board_is_set) set_board(lane, s->write, std::max(done, now_ + latency(*s)));
  set_board(lane, s->read, now_ + kReadOperands);
}

}  // namespace ptxemu::timing
