// What each warp of a launch executed, for the clock: PTX in order, with what memory and barriers saw of it.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "../machine.hpp"

namespace ptxemu::timing {

enum class Kind : uint8_t {
  Run,       // `count` instructions from `pc` on
  Op,        // one instruction that uses memory, barriers or tensor cores; the items that follow say more
  Back,      // a branch to a lower pc, taken
  Init,      // an mbarrier (cta, address) starts over, with `expected` arrivals
  Arrive,    // an mbarrier (cta, address) gets arrivals and bytes, of `expected` arrivals in all
  Landed,    // the same by a bulk copy, when it lands
  Wait,      // an mbarrier's phase `parity` has completed
  Barrier,   // named barrier `address` of `expected` threads (0: all), `count` of them now; parity: whether it waits
};

// Instructions that ptxas keeps in their order among each other.
enum class Anchor : uint8_t { None, Product, ProductWait, Barrier, MbarrierInit, MbarrierWait, MbarrierArrive, Bulk, BulkCommit, CopyCommit, CopyWait, Registers };
Anchor anchor_of(const std::string& opcode);

struct Item {
  Kind kind = Kind::Run;
  uint8_t parity = 0;
  uint16_t cta = 0;          // rank in the cluster
  uint32_t pc = 0;
  uint32_t count = 1;        // Run: instructions; Op: active lanes; Arrive: arrivals
  uint32_t address = 0;
  uint32_t expected = 0;
  uint32_t bytes = 0;        // Arrive, Landed: transaction bytes, signed; Op: bytes that a bulk copy moved
  uint32_t load_sectors = 0, store_sectors = 0, wavefronts = 0;
  uint32_t first_sectors = 0, near_sectors = 0;   // of load_sectors: never loaded before; loaded so lately that L1 has them
};

struct CtaTrace {
  uint32_t cluster = 0, rank = 0;
  std::vector<std::vector<Item>> warps;
};

struct Recording {
  std::string kernel, ptx;
  uint32_t grid[3], block[3], cluster_size = 1;
  uint32_t shared_bytes = 0;
  ptxemu_stats stats{};
  std::vector<uint32_t> lines;       // of each decoded instruction
  std::vector<Anchor> anchors;
  std::vector<uint8_t> operation;    // recorded as Op
  std::vector<int32_t> groups;       // N of a wait_group, else -1
  std::vector<std::string> opcodes;
  std::vector<uint32_t> source_lines, source_files;   // of the .loc in effect
  std::vector<std::pair<uint32_t, std::string>> files;
  std::vector<CtaTrace> ctas;

  explicit Recording(const Launch& launch);
  std::vector<Item>& of(const Warp& warp);

  // What an instruction did, between before() and after().
  void before(const World& world);
  void after(Warp& warp, uint32_t pc, uint32_t lanes, const World& world);
  void step(Warp& warp, uint32_t pc);
  void back(Warp& warp, uint32_t pc);
  void arrival(const Cta& cta, uint32_t offset, int32_t arrivals, int64_t tx, int32_t expected, bool landed);
  void init(const Cta& cta, uint32_t offset, uint32_t expected);
  void wait(const Cta& cta, uint32_t offset, uint32_t parity);
  void barrier(uint32_t id, uint32_t expected, bool waits);
  void load(const uint64_t* sectors, int count);

 private:
  ptxemu_stats before_{};
  uint32_t first_ = 0, near_ = 0;
  uint64_t loads_ = 0;                            // sectors loaded so far
  std::unordered_map<uint64_t, uint64_t> loaded_; // sector -> loads_ when it was loaded last
  std::vector<Item> pending_;
};

bool recording();
void set_recording(bool value);
std::map<int, Recording>& recordings();   // by number, in the order of their launches; until they are forgotten
int next_recording();
Recording& add_recording(const Launch& launch);

}  // namespace ptxemu::timing
