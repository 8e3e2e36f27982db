"""A clock for recorded launches: how long they would have taken on a Hopper GPU, and on what.

with timing.recording() as launches:
    my_wrapper(x)
for launch in launches:
    print(launch.kernel, launch.time().cycles)
"""

import ctypes
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_double, c_int, c_int32, c_size_t, c_uint32, c_void_p
from dataclasses import dataclass, field

from .._native import StatsStruct, last_error, library
from . import sass as _sass
from .units import CALIBRATION_MHZ, PARAMETERS, units

REASONS = ("stall", "scoreboard", "pipe", "tensor queue", "tensor result", "barrier", "mbarrier", "bulk copy")
RESULTS = (
    "cycles issued tensor_busy fma_busy alu_busy xu_busy shared_busy tma_busy l2_busy dram_busy loaded_bytes stored_bytes "
    "reduced_bytes steps anchors lost ctas"
).split()

for _name, (_result, _arguments) in {
    "ptxemu_clock_record": (None, [c_int]),
    "ptxemu_clock_next": (c_int, []),
    "ptxemu_clock_forget": (None, [c_int]),
    "ptxemu_clock_kernel": (c_char_p, [c_int]),
    "ptxemu_clock_ptx": (c_char_p, [c_int]),
    "ptxemu_clock_launch": (None, [c_int, POINTER(c_uint32), POINTER(StatsStruct)]),
    "ptxemu_clock_run": (c_int, [c_int, c_void_p, c_size_t, POINTER(c_int32), c_size_t, POINTER(c_double), POINTER(c_double),
                                 POINTER(c_double), c_size_t, POINTER(c_size_t), POINTER(c_double), c_size_t]),
}.items():  # fmt: skip
    _function = getattr(library, _name)
    _function.restype, _function.argtypes = _result, _arguments


@dataclass(frozen=True)
class Waits:
    """Cycles that warps waited at one place, for one reason; all warps added up."""

    line: int  # of the PTX
    source_line: int  # of what the PTX was made from, 0 if it does not say
    reason: str
    cycles: float


@dataclass(frozen=True)
class Timed:
    """What the clock says of one launch on one SM."""

    cycles: float
    busy: dict[str, float]  # unit -> cycles
    counts: dict[str, float]
    waits: list[Waits] = field(repr=False)
    ctas: list[tuple[float, float]] = field(repr=False)  # start and end of each CTA

    @property
    def lost(self) -> float:
        """Share of the ordered PTX instructions for which no machine instruction was found"""
        return self.counts["lost"] / max(self.counts["anchors"], 1)


class Recorded:
    """One launch, as it was recorded."""

    def __init__(self, index: int):
        self._index = index
        shape, stats = (c_uint32 * 8)(), StatsStruct()
        library.ptxemu_clock_launch(index, shape, byref(stats))
        self.kernel = library.ptxemu_clock_kernel(index).decode()
        self.ptx = library.ptxemu_clock_ptx(index).decode().rstrip("\0")
        self.grid, self.block = tuple(shape[:3]), tuple(shape[3:6])
        self.cluster_size, self.shared_bytes = shape[6], shape[7]
        self.stats = {name: getattr(stats, name) for name, _ in StatsStruct._fields_}

    def __del__(self):
        library.ptxemu_clock_forget(self._index)

    @property
    def sass(self) -> _sass.Sass:
        return _sass.assemble(self.ptx, self.kernel)

    @property
    def resident_ctas(self) -> int:
        """How many CTAs an SM holds at once"""
        threads = self.block[0] * self.block[1] * self.block[2]
        registers = -(-self.sass.registers // 8) * 8 * -(-threads // 32) * 32
        shared = -(-self.shared_bytes // 1024) * 1024
        return max(1, min(32, 2048 // threads, 65536 // max(registers, 1), 228 * 1024 // max(shared, 1)))

    def time(self, mhz: float = CALIBRATION_MHZ, **changes: float) -> Timed:
        """On one SM, all CTAs of the launch. changes: parameters of units.PARAMETERS."""
        table = self.sass.table()
        filled = units(mhz, **{"resident_ctas": self.resident_ctas, **changes})
        values = (c_double * len(PARAMETERS))(*(filled[name] for name in PARAMETERS))
        result, waits, count = (c_double * len(RESULTS))(), (c_double * 80000)(), c_size_t()
        ctas = (c_double * (2 * self.grid[0] * self.grid[1] * self.grid[2]))()
        jumps = (c_int32 * max(2 * len(self.sass.jumps), 1))(*(place for jump in self.sass.jumps for place in jump))
        if library.ptxemu_clock_run(self._index, table, len(table), jumps, len(self.sass.jumps), values, result, waits, len(waits),
                                    byref(count), ctas, len(ctas)):  # fmt: skip
            raise last_error()
        counts = dict(zip(RESULTS, result))
        busy = {name[: -len("_busy")]: value for name, value in counts.items() if name.endswith("_busy")}
        busy["issue"] = counts["issued"] / 4
        return Timed(
            counts["cycles"],
            busy,
            {name: value for name, value in counts.items() if not name.endswith("_busy")},
            [
                Waits(int(waits[4 * i]), int(waits[4 * i + 1]), REASONS[int(waits[4 * i + 2])], waits[4 * i + 3])
                for i in range(count.value)
            ],
            list(zip(ctas[::2], ctas[1::2])),
        )


@contextmanager
def recording():
    """Launches inside are recorded: run at once and in order, as if asynchronous work took no time. Yields a list that
    holds them, as `Recorded`, when the block ends."""
    launches: list[Recorded] = []
    first = library.ptxemu_clock_next()
    library.ptxemu_clock_record(1)
    try:
        yield launches
    finally:
        library.ptxemu_clock_record(0)
    launches.extend(map(Recorded, range(first, library.ptxemu_clock_next())))
