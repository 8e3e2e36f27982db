"""The timers of a GPU: on one where there is one, else against a stand-in for torch.cuda whose clock is known."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from gptkernels.bench import measure, peers, run, schema
from gptkernels.bench.cases import Case

CPU = torch.device("cpu")
ON_GPU = torch.cuda.is_available()


class Clock:
    """What a GPU would have done so far, in microseconds; each call of the timed function takes `call_us`."""

    def __init__(self):
        self.now, self.call_us, self.calls, self.graphs_work = 0.0, 10.0, 0, True
        self.recording, self.sleeps = None, []


class Event:
    def __init__(self, clock, enable_timing):
        self.clock, self.time = clock, None

    def record(self):
        self.time = self.clock.now

    def elapsed_time(self, end):
        return (end.time - self.time) / 1e3


class Graph:
    def __init__(self, clock):
        self.clock, self.functions = clock, []

    def replay(self):
        for function in self.functions if self.clock.graphs_work else ():
            function()


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()

    @contextlib.contextmanager
    def capture(graph, stream):
        clock.recording = graph.functions
        yield
        clock.recording = None

    properties = SimpleNamespace(L2_cache_size=2**16, uuid="0")
    fakes = {
        "get_device_properties": lambda device: properties,
        "set_stream": lambda stream: None,
        "Stream": lambda device: None,
        "current_stream": lambda device: None,
        "synchronize": lambda device=None: None,
        "mem_get_info": lambda device: (2**28, 2**28),
        "Event": lambda enable_timing: Event(clock, enable_timing),
        "CUDAGraph": lambda: Graph(clock),
        "graph": capture,
        "_sleep": clock.sleeps.append,
        "reset_peak_memory_stats": lambda device: None,
        "memory_allocated": lambda device: 100,
        "max_memory_allocated": lambda device: 300,
        "empty_cache": lambda: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return clock


def counted(clock):
    """A function that takes its time on the clock, and fills the same outputs again when a graph replays it."""

    def function(x, weight, bias):
        out = torch.empty_like(x)

        def work():
            clock.now += clock.call_us
            clock.calls += 1
            out.detach().copy_(x.detach())

        work()
        if clock.recording is not None:
            clock.recording.append(work)
        return out

    return function


def prepared(clock, which="fwd"):
    bench = measure.GpuBench(CPU)
    case = Case.of("layer_norm", M=64, N=64)
    sets = bench.input_sets(case, 0)
    return bench, bench.prepare(counted(clock), case, which, sets)


def test_long_calls_are_timed_by_events(clock):
    clock.call_us = 500.0
    _, timed = prepared(clock)
    assert timed.timing.timer == "events"
    timed.round(4)
    assert timed.timing.samples_us == pytest.approx([500.0] * 4)
    assert timed.timing.host_us
    assert clock.sleeps  # the host gets the time to enqueue a call


def test_short_calls_are_timed_in_a_graph(clock):
    clock.call_us = 5.0
    _, timed = prepared(clock)
    assert timed.timing.timer == "graph"
    assert timed.timing.calls_per_sample >= 10
    assert timed.timing.cold
    before = clock.calls
    timed.round(3)
    assert clock.calls - before == 3 * timed.timing.calls_per_sample
    assert timed.timing.samples_us == pytest.approx([5.0] * 3)


def test_a_graph_that_does_not_do_the_work_is_refused(clock):
    clock.call_us, clock.graphs_work = 5.0, False
    _, timed = prepared(clock)
    assert timed.timing.timer == "events"


def test_a_call_that_cannot_be_captured_is_timed_by_events(clock, monkeypatch):
    @contextlib.contextmanager
    def refuse(graph, stream):
        raise RuntimeError("operation not permitted when stream is capturing")
        yield

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    clock.call_us = 5.0
    _, timed = prepared(clock)
    assert timed.timing.timer == "events"


def test_ceilings_and_memory(clock, monkeypatch):
    for name in ("gemm_tflops", "copy_gbps"):
        monkeypatch.setattr(measure, name, lambda device, *sizes: sizes[-1](lambda: None))
    bench = measure.GpuBench(CPU)
    found = bench.ceilings({"bfloat16"})
    assert set(found) == {"gemm_tflops", "copy_gbps", "timer_floor_us"}
    assert bench.peak_bytes(lambda: None) == 200


def test_calls_whose_inputs_are_small_and_large(clock):
    bench = measure.GpuBench(CPU)
    assert bench.calls_for_cold_inputs(Case.of("layer_norm", M=1, N=32)) == measure.MOST_CALLS_IN_GRAPH
    assert bench.calls_for_cold_inputs(Case.of("layer_norm", M=4096, N=768)) == 2  # memory is what there is least of


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_on_a_gpu(tmp_path):
    import json

    from gptkernels import cli

    path = tmp_path / "bench.json"
    command = ["bench", "--op", "layer_norm", "--shape", "M4096,N1024", "--seconds", "0.05", "--json", str(path)]
    assert cli.main(command) in (0, run.CONTEXT_LOST)
    document = json.loads(path.read_text())
    assert schema.problems(document) == []
    ours = [row for row in document["cases"] if row["contender"] == "triton"]
    assert {row["status"] for row in ours} == {"ok"}
    assert all(not row["suspect"] for row in ours)
    assert {row["timer"] for row in ours} == {"graph"}


@pytest.mark.parametrize("contender", [c for c in peers.CONTENDERS if c.module != "torch"], ids=lambda c: c.name)
def test_absent_libraries_say_so(contender):
    missing = contender.missing()
    if missing is None:
        pytest.skip(f"{contender.module} is installed")
    assert contender.install.startswith("pip install")
    assert contender.module.split(".")[0] in missing
