// The C interface of the clock.
#include <algorithm>
#include <cstring>

#include "../fault.hpp"
#include "clock.hpp"
#include "ptxemu.h"

#define PTXEMU_API extern "C" __attribute__((visibility("default")))

namespace ptxemu {
void set_last_error(const std::string& message);
}

using namespace ptxemu;
using namespace ptxemu::timing;

PTXEMU_API void ptxemu_clock_record(int on) { set_recording(on != 0); }
PTXEMU_API int ptxemu_clock_next(void) { return next_recording(); }
PTXEMU_API void ptxemu_clock_forget(int recording) { recordings().erase(recording); }
PTXEMU_API const char* ptxemu_clock_kernel(int recording) { return recordings().at(recording).kernel.c_str(); }
PTXEMU_API const char* ptxemu_clock_ptx(int recording) { return recordings().at(recording).ptx.c_str(); }
PTXEMU_API void ptxemu_clock_launch(int recording, uint32_t* out, ptxemu_stats* stats) {
  const Recording& r = recordings().at(recording);
  std::memcpy(out, r.grid, 12);
  std::memcpy(out + 3, r.block, 12);
  out[6] = r.cluster_size;
  out[7] = r.shared_bytes;
  *stats = r.stats;
}
PTXEMU_API int ptxemu_clock_run(int recording, const void* code, size_t instructions, const int32_t* jumps, size_t jump_count, const double* units, double* result, double* waits,
                                size_t waits_room, size_t* wait_count, double* ctas, size_t ctas_room) {
  try {
    const Recording& r = recordings().at(recording);
    auto* sass = static_cast<const Sass*>(code);
    Program program{{sass, sass + instructions}, {}};
    for (size_t i = 0; i < jump_count; ++i) program.jumps.push_back({jumps[2 * i], jumps[2 * i + 1]});
    Units u;
    std::memcpy(&u, units, sizeof u);
    std::vector<Waited> waited;
    std::vector<CtaTimes> times;
    ClockResult answer = run_clock(r, program, u, waited, times);
    std::memcpy(result, &answer, sizeof answer);
    *wait_count = std::min(waited.size(), waits_room / 4);
    for (size_t i = 0; i < *wait_count; ++i) {
      waits[4 * i] = r.lines[waited[i].pc];
      waits[4 * i + 1] = r.source_lines[waited[i].pc];
      waits[4 * i + 2] = double(waited[i].reason);
      waits[4 * i + 3] = waited[i].cycles;
    }
    for (size_t i = 0; i < std::min(times.size(), ctas_room / 2); ++i) {
      ctas[2 * i] = times[i].start;
      ctas[2 * i + 1] = times[i].end;
    }
    return 0;
  } catch (Fault& fault) {
    set_last_error(fault.message);
  } catch (std::exception& e) {
    set_last_error(std::string("internal error: ") + e.what());
  }
  return 1;
}
