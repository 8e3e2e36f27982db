"""How long a call takes.

GPU: every call finds a cold L2 and inputs that it did not have the last time. A kernel below 200 us is replayed from a
CUDA graph of many calls, each on inputs of its own, together larger than the L2 several times over; the graph's time is
divided by their number. A longer call is timed by events, after a flush of the L2, and behind a delay in which the host
can enqueue it whole. What the host needs for a call is measured apart.
CPU: the wall time of each call, on inputs that rotate, after the last level cache was filled with something else.
Caches are flushed by reading: lines that were written would have to be written back while the call runs.
"""

import ctypes
import functools
import math
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .. import parity
from .cases import DTYPES, Case
from .telemetry import Nvml
from .truth import wants_gradients

ROUNDS = 5  # contenders take turns, so that a drift of the clocks meets all of them
FEWEST_PER_ROUND, MOST_PER_ROUND = 2, 20
SHORT_US, SLOW_US = 200.0, 3e5
CYCLES_PER_US = 2000  # at a clock of about 2 GHz
COLD_L2S = 4  # how many times the L2 the inputs of a graph are
MOST_CALLS_IN_GRAPH = 256


@dataclass
class Timing:
    timer: str  # graph, events or wall
    calls_per_sample: int
    input_sets: int
    cold: bool
    samples_us: list[float] = field(default_factory=list)
    host_us: list[float] = field(default_factory=list)
    sm_mhz: list[int] = field(default_factory=list)
    throttle: set[str] = field(default_factory=set)


def make_thunk(call: Callable, case: Case, which: str, tensors: dict[str, Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """What is timed: () -> its outputs. Forward keeps what backward needs, as in training, but for the loss, which
    makes its gradients in the same pass and is timed without them."""
    leaves = [x for x in tensors.values() if x.requires_grad]
    keep = case.has_gradients and case.op != "linear_cross_entropy"

    def forward() -> tuple[Tensor, ...]:
        with nullcontext() if keep else torch.no_grad():
            return parity.as_tuple(call(**tensors))

    if which == "fwd":
        return forward
    outputs = parity.as_tuple(call(**tensors))
    cotangents = [torch.randn_like(out) if out.ndim else torch.ones_like(out) for out in outputs]
    if which == "bwd":
        return functools.partial(torch.autograd.grad, outputs, leaves, cotangents, retain_graph=True)
    return lambda: torch.autograd.grad(parity.as_tuple(call(**tensors)), leaves, cotangents)


class CpuBench:
    """Makes and takes timings on the CPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.flush = torch.zeros(last_level_cache_bytes() // 4)

    def input_sets(self, case: Case, seed: int) -> list[dict[str, Tensor]]:
        return [case.tensors(self.device, seed + i, wants_gradients(case)) for i in range(2)]

    def prepare(self, call: Callable, case: Case, which: str, sets: list[dict[str, Tensor]]) -> "CpuTimed":
        return CpuTimed([make_thunk(call, case, which, tensors) for tensors in sets], self.flush)

    def peak_bytes(self, thunk: Callable) -> int | None:
        """Beyond what is there before; None where the kernel does not let a process reset its peak."""
        try:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            before = peak_kib()
        except (OSError, AttributeError):
            return None
        kept = thunk()
        after = peak_kib()
        del kept
        return (after - before) * 1024

    def ceilings(self, dtypes: set[str]) -> dict:
        return {
            "gemm_tflops": {
                dtype: gemm_tflops(self.device, DTYPES[dtype], 2048, cpu_seconds) for dtype in sorted(dtypes)
            },
            "copy_gbps": copy_gbps(self.device, 2**28, cpu_seconds),
            "timer_floor_us": None,
        }


def peak_kib() -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0])


def last_level_cache_bytes() -> int:
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(
        (int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]] for size in sizes if size[-1:] in "KM"), default=2**25
    )


class CpuTimed:
    def __init__(self, thunks: list[Callable], flush: Tensor):
        self.thunks, self.turn, self.flush = thunks, 0, flush
        self.timing = Timing("wall", 1, len(thunks), cold=True)
        began = time.perf_counter()
        for _ in thunks:
            self.once()
        # The flush is part of what a sample costs, though not of what it says.
        self.sample_costs_us = (time.perf_counter() - began) * 1e6 / len(thunks)

    def once(self) -> float:
        thunk = self.thunks[self.turn % len(self.thunks)]
        self.turn += 1
        self.flush.sum()
        started = time.perf_counter()
        kept = thunk()
        elapsed = time.perf_counter() - started
        del kept
        return elapsed * 1e6

    def round(self, count: int) -> None:
        self.timing.samples_us += [self.once() for _ in range(count)]


class GpuBench:
    """Makes and takes timings on a GPU."""

    def __init__(self, device: torch.device):
        self.device, self.nvml = device, Nvml(device)
        self.l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.zeros(2 * self.l2_bytes // 4, device=device)
        # Graphs cannot be captured on the default stream, nor can a backward pass whose forward pass ran there.
        torch.cuda.set_stream(torch.cuda.Stream(device))

    def input_sets(self, case: Case, seed: int) -> list[dict[str, Tensor]]:
        """Two; short calls get more of them when they turn out to be short."""
        return [case.tensors(self.device, seed + i, wants_gradients(case)) for i in range(2)]

    def prepare(self, call: Callable, case: Case, which: str, sets: list[dict[str, Tensor]]) -> "GpuTimed":
        timed = GpuTimed(self, [make_thunk(call, case, which, tensors) for tensors in sets[:2]])
        if timed.estimate_us >= SHORT_US:
            return timed
        wanted = self.calls_for_cold_inputs(case)
        while len(sets) < wanted:
            sets.append(case.tensors(self.device, len(sets), wants_gradients(case)))
        thunks = [make_thunk(call, case, which, tensors) for tensors in sets[:wanted]]
        cold = wanted * input_bytes(sets[0]) >= 2 * self.l2_bytes
        return GraphTimed.capture(self, thunks, cold, timed) or timed

    def calls_for_cold_inputs(self, case: Case) -> int:
        size = case.bytes("fwd")
        free, _ = torch.cuda.mem_get_info(self.device)
        wanted = min(MOST_CALLS_IN_GRAPH, max(10, math.ceil(COLD_L2S * self.l2_bytes / size)))
        return max(2, min(wanted, int(free / 8 / size)))

    def peak_bytes(self, thunk: Callable) -> int:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        kept = thunk()
        torch.cuda.synchronize(self.device)
        del kept
        return torch.cuda.max_memory_allocated(self.device) - before

    def seconds(self, thunk: Callable) -> float:
        """Median of events, cold"""
        timed = GpuTimed(self, [thunk])
        timed.round(10)
        return statistics.median(timed.timing.samples_us) / 1e6

    def ceilings(self, dtypes: set[str]) -> dict:
        free, _ = torch.cuda.mem_get_info(self.device)
        tiny = torch.zeros(1, device=self.device)
        found = {
            "gemm_tflops": {
                dtype: gemm_tflops(self.device, DTYPES[dtype], 8192, self.seconds) for dtype in sorted(dtypes)
            },
            "copy_gbps": copy_gbps(self.device, min(2**31, free // 8), self.seconds),
            "timer_floor_us": self.seconds(lambda: tiny.add_(1)) * 1e6,
        }
        torch.cuda.empty_cache()
        return found


class GpuTimed:
    """Timed by events, one call at a time, with a flush of the L2 in between."""

    def __init__(self, bench: GpuBench, thunks: list[Callable]):
        self.bench, self.thunks, self.turn = bench, thunks, 0
        self.timing = Timing("events", 1, len(thunks), cold=True)
        for thunk in thunks:  # compiles, loads and makes handles
            thunk()
        torch.cuda.synchronize(bench.device)
        began = time.perf_counter()
        while len(self.timing.host_us) < 20 and (len(self.timing.host_us) < 3 or time.perf_counter() - began < 0.2):
            self.timing.host_us.append(self.host_us())
        delay_us = min(50_000, 3 * statistics.median(self.timing.host_us) + 20)
        self.delay_cycles = int(delay_us * CYCLES_PER_US)
        self.round(3)
        self.estimate_us = statistics.median(self.timing.samples_us)
        self.sample_costs_us = self.estimate_us + delay_us
        self.timing.samples_us.clear()

    def next(self) -> Callable:
        self.turn += 1
        return self.thunks[self.turn % len(self.thunks)]

    def host_us(self) -> float:
        thunk = self.next()
        started = time.perf_counter()
        thunk()
        elapsed = time.perf_counter() - started
        torch.cuda.synchronize(self.bench.device)
        return elapsed * 1e6

    def round(self, count: int) -> None:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for begin, end in pairs:
            self.enqueue(begin, end)
        reading = self.bench.nvml.read()
        torch.cuda.synchronize(self.bench.device)
        calls = self.timing.calls_per_sample
        self.timing.samples_us += [begin.elapsed_time(end) * 1e3 / calls for begin, end in pairs]
        self.timing.throttle.update(reading["throttle"])
        if reading["sm_mhz"] is not None:
            self.timing.sm_mhz.append(reading["sm_mhz"])

    def enqueue(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> None:
        thunk = self.next()
        self.bench.flush.sum()
        torch.cuda._sleep(self.delay_cycles)
        begin.record()
        thunk()
        end.record()


class GraphTimed(GpuTimed):
    """Timed by replaying a CUDA graph of many calls on different inputs."""

    def __init__(self, bench: GpuBench, graph: torch.cuda.CUDAGraph, calls: int, cold: bool, by_events: GpuTimed):
        self.bench, self.graph = bench, graph
        self.timing = Timing("graph", calls, calls, cold, host_us=by_events.timing.host_us)
        self.round(2)
        self.sample_costs_us = statistics.median(self.timing.samples_us) * calls
        self.timing.samples_us.clear()

    @classmethod
    def capture(cls, bench: GpuBench, thunks: list[Callable], cold: bool, by_events: GpuTimed) -> "GraphTimed | None":
        """None where the calls cannot be captured, or a replay does not do their work."""
        graph = torch.cuda.CUDAGraph()
        try:
            for thunk in thunks:
                thunk()
            torch.cuda.synchronize(bench.device)
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream(bench.device)):
                for thunk in thunks[:-1]:
                    thunk()
                last = thunks[-1]()
        except RuntimeError:
            torch.cuda.synchronize(bench.device)
            return None
        for out in last:
            out.detach().fill_(math.nan)
        torch.cuda.synchronize(bench.device)
        graph.replay()
        torch.cuda.synchronize(bench.device)
        if not all(out.isfinite().all() for out in last):
            return None
        return cls(bench, graph, len(thunks), cold, by_events)

    def enqueue(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> None:
        self.bench.flush.sum()
        begin.record()
        self.graph.replay()
        end.record()


def bench_for(device: torch.device) -> CpuBench | GpuBench:
    return GpuBench(device) if device.type == "cuda" else CpuBench(device)


def per_round(sample_costs_us: float, seconds: float) -> int:
    """How many samples to take in each of ROUNDS rounds, to spend about `seconds` in all."""
    count = int(seconds * 1e6 / ROUNDS / max(sample_costs_us, 1.0))
    return max(1 if sample_costs_us > SLOW_US else FEWEST_PER_ROUND, min(MOST_PER_ROUND, count))


def input_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors.values())


def cpu_seconds(thunk: Callable) -> float:
    """The best of a few: a ceiling is what the CPU does where nobody else uses it."""
    thunk()
    times = []
    for _ in range(10):
        started = time.perf_counter()
        thunk()
        times.append(time.perf_counter() - started)
    return min(times)


def gemm_tflops(device: torch.device, dtype: torch.dtype, size: int, seconds: Callable) -> float:
    """A square product of random matrices, which is what attention, MLP and loss are made of."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b) / 1e12


def copy_gbps(device: torch.device, size: int, seconds: Callable) -> float:
    """A copy within the device's memory: bytes read and written."""
    source = torch.randint(0, 100, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source)) / 1e9
