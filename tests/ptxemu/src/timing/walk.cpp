// From recorded PTX to the SASS that the hardware would have issued.
//
// ptxas keeps barriers, bulk copies and wgmmas in their order. Between two of them a warp takes the path through the
// control-flow graph that holds most of the instructions whose PTX ran, and fewest of others.
#include <algorithm>
#include <cstring>
#include <queue>

#include "sass.hpp"

namespace ptxemu::timing {

Walker::Walker(const Recording& recording, const Program& program) : recording_(recording), code_(program.code) {
  for (Jump jump : program.jumps) jumps_.emplace(uint32_t(jump.from), uint32_t(jump.to));
  uint32_t last = 0;
  for (uint32_t line : recording.lines) last = std::max(last, line);
  for (const Sass& s : code_) last = std::max(last, s.line);
  seen_.assign(last + 1, 0);
  order();
  find_polls();
}

static Anchor anchor_of(Op op) {
  switch (op) {
    case Op::Hgmma: return Anchor::Product;
    case Op::WarpgroupWait: return Anchor::ProductWait;
    case Op::Barrier: return Anchor::Barrier;
    case Op::MbarrierArrive: return Anchor::MbarrierArrive;
    case Op::MbarrierWait: return Anchor::MbarrierWait;
    case Op::MbarrierInit: return Anchor::MbarrierInit;
    case Op::TmaLoad: case Op::TmaStore: return Anchor::Bulk;
    case Op::TmaCommit: return Anchor::BulkCommit;
    case Op::AsyncCommit: return Anchor::CopyCommit;
    case Op::AsyncWait: return Anchor::CopyWait;
    case Op::Registers: return Anchor::Registers;
    default: return Anchor::None;
  }
}

template <class F>
void Walker::successors(uint32_t node, F f) const {
  const Sass& s = code_[node];
  bool falls = s.op != Op::Exit && s.op != Op::Branch;
  if ((falls || s.guarded) && node + 1 < code_.size()) f(node + 1);
  if (s.target >= 0) f(uint32_t(s.target));
  if (s.op == Op::Branch && s.target < 0)
    for (auto [at, end] = jumps_.equal_range(node); at != end; ++at) f(at->second);
}

void Walker::order() {
  std::vector<uint8_t> state(code_.size(), 0);
  rank_.assign(code_.size(), 0);
  std::vector<std::pair<uint32_t, size_t>> stack;
  uint32_t next = uint32_t(code_.size());
  if (code_.empty()) return;
  stack.push_back({0, 0});
  state[0] = 1;
  while (!stack.empty()) {
    auto& [node, at] = stack.back();
    std::vector<uint32_t> options;
    successors(node, [&](uint32_t to) { options.push_back(to); });
    if (at < options.size()) {
      // The branch first, so that the fall-through comes earlier in reverse postorder.
      uint32_t to = options[options.size() - 1 - at++];
      if (!state[to]) { state[to] = 1; stack.push_back({to, 0}); }
    } else {
      rank_[node] = --next;
      stack.pop_back();
    }
  }
}

// ptxas puts the loops that poll an mbarrier after its first try in blocks of their own.
void Walker::find_polls() {
  polls_.assign(code_.size(), 0);
  for (uint32_t node = 0; node < code_.size(); ++node) {
    int32_t to = code_[node].target;
    if (to < 0 || uint32_t(to) > node || node - uint32_t(to) > 8 || code_[uint32_t(to)].op != Op::MbarrierWait) continue;
    for (uint32_t i = uint32_t(to); i <= node; ++i) polls_[i] = 1;
  }
}

double Walker::weight(uint32_t node) const {
  const Sass& s = code_[node];
  if (polls_[node]) return 6;
  if (s.line == 0 || s.op == Op::Control) return 0.01;
  switch (seen_[s.line]) {
    case 2: return -1;
    case 1: return 0.05;
    default: return s.guarded ? 0.5 : 1;
  }
}

Walker::Path Walker::find(uint32_t from, const Goal& goal) {
  struct Entry { double cost; uint32_t before; bool done; };
  constexpr double kRetreat = 8, kCrossing = 15;   // of a back edge; of an anchor that did not run
  std::unordered_map<uint64_t, Entry> best;   // key: node * 2 + retreats
  using Waiting = std::pair<uint64_t, uint64_t>;   // (retreats, rank), key
  std::priority_queue<Waiting, std::vector<Waiting>, std::greater<>> queue;
  auto reach = [&](uint64_t key, double cost, uint64_t before) {
    auto [it, fresh] = best.try_emplace(key, Entry{cost, uint32_t(before), false});
    if (fresh) queue.push({(key & 1) << 32 | rank_[key >> 1], key});
    else if (!it->second.done && cost < it->second.cost) { it->second.cost = cost; it->second.before = uint32_t(before); }
  };
  reach(uint64_t(from) * 2, 0, ~0u);
  double found = 1e30;
  uint64_t goal_key = 0;
  Path path;
  while (!queue.empty()) {
    uint64_t key = queue.top().second;
    queue.pop();
    Entry& entry = best[key];
    if (entry.done) continue;
    entry.done = true;
    uint32_t node = uint32_t(key >> 1);
    const Sass& s = code_[node];
    double cost = entry.cost + weight(node);
    bool accepted = false;
    if (goal.kind == Goal::Reach) accepted = anchor_of(s.op) == goal.anchor;
    if (goal.kind == Goal::Exit) accepted = s.op == Op::Exit;
    if (accepted) {
      // ptxas gives no line of its own to some anchors: they have that of an instruction close by.
      double far = goal.kind == Goal::Reach ? std::min(20.0, std::abs(double(s.line) - double(goal.line)) / 10) : 0;
      cost += far;
      if (cost < found) { found = cost; goal_key = key; path.next = node + 1; }
      cost -= far;
      if (goal.kind == Goal::Reach && !s.guarded) continue;
      if (goal.kind == Goal::Exit && !s.guarded) continue;
    }
    if (goal.kind == Goal::Back && s.target >= 0 && rank_[uint32_t(s.target)] <= rank_[node]) {
      double total = cost + (s.line == goal.line ? -20 : 0);
      bool known = false;
      for (uint32_t i = uint32_t(s.target), n = 0; n < 40 && i < code_.size(); ++i, ++n) known |= code_[i].line && seen_[code_[i].line];
      total += known ? -20 : 20;
      if (total < found) { found = total; goal_key = key; path.next = uint32_t(s.target); }
    }
    if (anchor_of(s.op) != Anchor::None) cost += s.guarded ? 2 : kCrossing;
    successors(node, [&](uint32_t to) {
      bool retreats = rank_[to] <= rank_[node];
      if (retreats && ((key & 1) || goal.kind == Goal::Back)) return;
      reach(uint64_t(to) * 2 + (retreats || (key & 1)), cost + (retreats ? kRetreat : 0), key);
    });
  }
  if (found > 1e29) return path;
  path.found = true;
  for (uint64_t key = goal_key;;) {
    path.nodes.push_back(uint32_t(key >> 1));
    uint32_t before = best[key].before;
    if (before == ~0u) break;
    key = before;
  }
  std::reverse(path.nodes.begin(), path.nodes.end());
  return path;
}

void Walker::mark(const std::vector<Item>& items, size_t begin, size_t end, uint8_t value) {
  for (size_t i = begin; i < end; ++i) {
    const Item& item = items[i];
    if (item.kind != Kind::Run && item.kind != Kind::Op) continue;
    uint32_t count = item.kind == Kind::Run ? item.count : 1;
    for (uint32_t pc = item.pc; pc < item.pc + count; ++pc) {
      uint32_t line = recording_.lines[pc];
      if (!seen_[line]) touched_.push_back(line);
      seen_[line] = std::max(seen_[line], value);
    }
  }
}

std::vector<Step> Walker::walk(const std::vector<Item>& items) {
  std::vector<Step> steps;
  std::unordered_map<uint32_t, std::vector<uint32_t>> records;   // memory accesses by line
  std::vector<uint32_t> goals;                                   // items that are waypoints
  for (uint32_t i = 0; i < items.size(); ++i) {
    const Item& item = items[i];
    if (item.kind == Kind::Op && recording_.anchors[item.pc] == Anchor::None) records[recording_.lines[item.pc]].push_back(i);
    if (item.kind == Kind::Back || (item.kind == Kind::Op && recording_.anchors[item.pc] != Anchor::None && item.count)) goals.push_back(i);
  }
  if (items.empty()) return steps;
  uint32_t position = 0, begin = 0;      // begin: the window's first item
  std::vector<uint32_t> lost;
  std::unordered_map<uint32_t, uint32_t> uses;
  auto neighbour = [&](size_t g) { return g < goals.size() ? size_t(goals[g]) + 1 : items.size(); };

  auto emit = [&](const Path& path, uint32_t end, int32_t waypoint) {
    uses.clear();
    for (uint32_t node : path.nodes) {
      if (node == path.nodes.back()) {   // after what waits for the last waypoint's result
        for (uint32_t i : lost) steps.push_back({kNoSass, int32_t(i)});
        lost.clear();
      }
      const Sass& s = code_[node];
      int32_t item = -1;
      switch (s.op) {
        case Op::SharedLoad: case Op::SharedStore: case Op::GlobalLoad: case Op::GlobalStore: case Op::Atomic: case Op::AsyncCopy: {
          auto it = records.find(s.line);
          if (it == records.end()) break;
          auto& all = it->second;
          auto at = std::lower_bound(all.begin(), all.end(), begin);
          uint32_t k = uses[s.line]++;
          if (all.end() - at > int64_t(k)) at += k;
          else if (at == all.end()) --at;
          if (s.guarded && *at > end + 400) break;
          item = int32_t(*at);
          break;
        }
        default: break;
      }
      steps.push_back({node, item});
    }
    if (waypoint >= 0) steps.back().item = waypoint;
    position = path.next;
    begin = end;
  };

  for (size_t g = 0; g <= goals.size(); ++g) {
    bool last = g == goals.size();
    uint32_t at = last ? uint32_t(items.size()) : goals[g];
    Goal goal{Goal::Exit, Anchor::None, 0};
    if (!last) goal = {items[at].kind == Kind::Back ? Goal::Back : Goal::Reach, recording_.anchors[items[at].pc], recording_.lines[items[at].pc]};
    uint64_t hash = position * 0x9e3779b97f4a7c15ull + uint64_t(goal.kind) * 77 + uint64_t(goal.anchor) * 7777 + goal.line;
    auto mix = [&](size_t i) {
      const Item& item = items[i];
      if (item.kind == Kind::Run || item.kind == Kind::Op) hash = (hash ^ item.pc ^ uint64_t(item.kind == Kind::Run ? item.count : 0) << 32) * 0x100000001b3ull + (hash >> 29);
    };
    for (size_t i = begin; i < at; ++i) mix(i);
    if (goal.kind == Goal::Back)
      for (size_t i = at; i < neighbour(g + 1) && i < at + 50; ++i) mix(i);
    auto found = known_.find(hash);
    if (found == known_.end()) {
      mark(items, begin, at, 2);
      mark(items, at, std::min<size_t>(neighbour(g + 1), at + 4000), 1);
      found = known_.emplace(hash, find(position, goal)).first;
      for (uint32_t line : touched_) seen_[line] = 0;
      touched_.clear();
    }
    bool real = goal.kind == Goal::Reach;
    stats.anchors += real;
    if (found->second.found) {
      emit(found->second, last ? at : at + 1, real ? int32_t(at) : -1);
    } else if (real) {
      ++stats.lost;
      lost.push_back(at);
    }
  }
  for (uint32_t i : lost) steps.push_back({kNoSass, int32_t(i)});
  stats.steps += steps.size();
  return steps;
}

}  // namespace ptxemu::timing
