// Recording what warps execute. Recorded launches run on one thread, with asynchronous work done at once: what a race-free
// kernel executes does not depend on timing, but for how often it polls.
#include "trace.hpp"

#include <algorithm>
#include <bit>

namespace ptxemu::timing {
namespace {

bool on = false;

bool starts_with(const std::string& text, const char* prefix) { return text.rfind(prefix, 0) == 0; }

bool is_operation(const std::string& opcode) {
  for (auto prefix : {"ld.", "st.", "atom.", "red.", "ldmatrix", "stmatrix", "cp.", "mma.", "ldu."})
    if (starts_with(opcode, prefix)) return !starts_with(opcode, "ld.param");
  return anchor_of(opcode) != Anchor::None;
}

}  // namespace

Anchor anchor_of(const std::string& opcode) {
  static const std::pair<const char*, Anchor> kPrefixes[] = {   // the first that fits
      {"wgmma.mma_async", Anchor::Product}, {"wgmma.wait_group", Anchor::ProductWait}, {"bar.warp", Anchor::None}, {"bar.", Anchor::Barrier},
      {"barrier.cluster", Anchor::None}, {"barrier.", Anchor::Barrier}, {"mbarrier.init", Anchor::MbarrierInit}, {"mbarrier.inval", Anchor::None},
      {"mbarrier.pending", Anchor::None}, {"mbarrier.test_wait", Anchor::MbarrierWait}, {"mbarrier.try_wait", Anchor::MbarrierWait},
      {"mbarrier.", Anchor::MbarrierArrive}, {"cp.async.mbarrier", Anchor::MbarrierArrive}, {"cp.async.bulk.commit", Anchor::BulkCommit},
      {"cp.async.bulk.wait", Anchor::CopyWait}, {"cp.async.bulk.prefetch", Anchor::None}, {"cp.async.bulk", Anchor::Bulk},
      {"cp.reduce.async.bulk", Anchor::Bulk}, {"setmaxnreg", Anchor::Registers}, {"cp.async.commit", Anchor::CopyCommit},
      {"cp.async.wait", Anchor::CopyWait}};
  for (auto& [prefix, anchor] : kPrefixes)
    if (starts_with(opcode, prefix)) return anchor;
  return Anchor::None;
}

bool recording() { return on; }
std::map<int, Recording>& recordings() {
  static std::map<int, Recording> all;
  return all;
}
static int next_number = 0;
int next_recording() { return next_number; }
Recording& add_recording(const Launch& launch) { return recordings().try_emplace(next_number++, launch).first->second; }
void set_recording(bool value) { on = value; }

Recording::Recording(const Launch& launch) : kernel(launch.kernel->function->name), ptx(launch.module->text) {
  for (int k = 0; k < 3; ++k) {
    grid[k] = launch.config.grid[k];
    block[k] = launch.config.block[k];
  }
  cluster_size = launch.cluster_size;
  shared_bytes = launch.shared_bytes;
  for (const Instr& in : launch.kernel->code) {
    const Instruction& raw = *launch.kernel->sources[in.source];
    lines.push_back(raw.line);
    source_lines.push_back(raw.loc_line);
    source_files.push_back(raw.loc_file);
    opcodes.push_back(raw.opcode);
    anchors.push_back(anchor_of(raw.opcode));
    operation.push_back(is_operation(raw.opcode));
    bool waits = raw.opcode.find("wait_group") != raw.opcode.npos && !raw.operands.empty();
    groups.push_back(waits ? int32_t(raw.operands[0].integer) : raw.opcode.find("wait_all") != raw.opcode.npos ? 0 : -1);
  }
  for (auto& [id, name] : launch.module->files) files.push_back({id, name});
  ctas.resize(size_t(launch.cluster_count) * launch.cluster_size);
  for (size_t i = 0; i < ctas.size(); ++i) {
    ctas[i].cluster = uint32_t(i / launch.cluster_size);
    ctas[i].rank = uint32_t(i % launch.cluster_size);
    ctas[i].warps.resize(launch.warps_per_cta);
  }
}

std::vector<Item>& Recording::of(const Warp& warp) {
  const Launch& launch = warp.world->launch;
  const Cta& cta = *warp.cta;
  uint64_t cluster = 0;
  for (int k = 2; k >= 0; --k) cluster = cluster * launch.clusters[k] + cta.id[k] / launch.cluster[k];
  return ctas[size_t(cluster) * cluster_size + cta.rank].warps[warp.index];
}

void Recording::step(Warp& warp, uint32_t pc) {
  auto& items = of(warp);
  if (!items.empty() && items.back().kind == Kind::Run && items.back().pc + items.back().count == pc) ++items.back().count;
  else items.push_back({.kind = Kind::Run, .pc = pc});
}
void Recording::back(Warp& warp, uint32_t pc) { of(warp).push_back({.kind = Kind::Back, .pc = pc}); }

void Recording::before(const World& world) {
  before_ = world.stats;
  pending_.clear();
  first_ = near_ = 0;
}
void Recording::after(Warp& warp, uint32_t pc, uint32_t lanes, const World& world) {
  auto& items = of(warp);
  const ptxemu_stats& s = world.stats;
  items.push_back({.kind = Kind::Op,
                   .pc = pc,
                   .count = uint32_t(std::popcount(lanes)),
                   .bytes = uint32_t(s.tma_load_bytes - before_.tma_load_bytes + s.tma_store_bytes - before_.tma_store_bytes),
                   .load_sectors = uint32_t(s.global_load_sectors - before_.global_load_sectors),
                   .store_sectors = uint32_t(s.global_store_sectors - before_.global_store_sectors),
                   .wavefronts = uint32_t(s.shared_wavefronts - before_.shared_wavefronts),
                   .first_sectors = first_,
                   .near_sectors = near_});
  items.insert(items.end(), pending_.begin(), pending_.end());
}
void Recording::arrival(const Cta& cta, uint32_t offset, int32_t arrivals, int64_t tx, int32_t expected, bool landed) {
  for (Item& item : pending_)
    if (item.kind == (landed ? Kind::Landed : Kind::Arrive) && item.address == offset && item.cta == cta.rank) {
      item.count += uint32_t(arrivals);
      item.bytes += uint32_t(tx);
      return;
    }
  pending_.push_back({.kind = landed ? Kind::Landed : Kind::Arrive, .cta = uint16_t(cta.rank), .count = uint32_t(arrivals), .address = offset,
                      .expected = uint32_t(expected), .bytes = uint32_t(tx)});
}
void Recording::init(const Cta& cta, uint32_t offset, uint32_t expected) {
  pending_.push_back({.kind = Kind::Init, .cta = uint16_t(cta.rank), .address = offset, .expected = expected});
}
void Recording::wait(const Cta& cta, uint32_t offset, uint32_t parity) {
  for (const Item& item : pending_)
    if (item.kind == Kind::Wait && item.address == offset) return;
  pending_.push_back({.kind = Kind::Wait, .parity = uint8_t(parity), .cta = uint16_t(cta.rank), .address = offset});
}
void Recording::load(const uint64_t* sectors, int count) {
  constexpr uint64_t kNear = 128 * 1024 / 32;   // about what L1 keeps beside shared memory
  for (int i = 0; i < count; ++i) {
    auto [at, fresh] = loaded_.try_emplace(sectors[i], ++loads_);
    first_ += fresh;
    if (!fresh && loads_ - at->second < kNear) ++near_;
    at->second = loads_;
  }
}
void Recording::barrier(uint32_t id, uint32_t expected, bool waits) {
  pending_.push_back({.kind = Kind::Barrier, .parity = waits, .count = 32, .address = id, .expected = expected});
}

}  // namespace ptxemu::timing

namespace ptxemu {

// As World::run_warp, writing down what runs.
void World::record_warp(Warp& w, uint32_t budget) {
  timing::Recording& to = *launch.recording;
  const Instr* code = w.kernel->code.data();
  const Instr* in = code;
  if (w.current.wait != Wait::None || w.current.mask == 0) w.regroup();
  w.stop = false;
  try {
    for (; budget; --budget) {
      uint32_t pc = w.current.pc;
      in = &code[pc];
      uint32_t m = w.current.mask;
      if (in->guard != kNone) {
        uint32_t p = *w.at<uint32_t>(in->guard);
        m &= in->guard_negated ? ~p : p;
      }
      ++w.current.pc;
      ++time;
      ++stats.warp_instructions;
      stats.thread_instructions += uint32_t(std::popcount(m));
      bool operation = to.operation[pc];
      if (operation) to.before(*this);
      w.retried = false;
      if (m) in->run(w, *in, m);
      if (!w.retried) {
        if (operation) to.after(w, pc, m, *this);
        else to.step(w, pc);
        if (m && in->target <= pc && to.opcodes[pc].rfind("bra", 0) == 0) to.back(w, pc);
      }
      if (w.stop) break;
      if (w.current.pc >= w.merge_pc) {
        w.regroup();
        if (w.stop) break;
      }
    }
  } catch (Fault& fault) {
    if (fault.located) throw;
    locate(fault, w, *in);
  }
}

}  // namespace ptxemu
