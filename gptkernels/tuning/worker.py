"""A process of its own that proves and times candidates, so that one that crashes or hangs costs no more than itself.

Reads jobs from its input and answers each on its output, a line of JSON each, of a {"job", "case", "passes"} with
- "measure", "candidate", "seconds" -> {"status", "detail", "us": {pass: median}, "class"}: proved right, then timed;
- "race", "candidates", "seconds" -> {"status", "detail", "us": [{pass: median}, ...]}: timed in turns;
- "compile", "candidate" -> {"status", "detail", "spilled", "registers", "shared"}: Triton's kernels, which are compiled
  into its cache and not launched; the most bytes, registers to a thread and bytes of shared memory of any of them.
"""

import functools
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from .. import cuda_library, dispatch, hardware, parity, simulator, triton_calls
from ..bench import measure, truth
from ..bench.cases import Case
from ..bench.run import explained
from . import choices, classes
from .candidates import Candidate


class Instructions:
    """Where there is no device but the simulator: warp instructions, as if each took a microsecond"""

    def __init__(self, driver):
        import ptxemu.cuda

        self.driver, self.cuda = driver, ptxemu.cuda.EmulatedDevice(ptxemu.cuda.load_runtime())

    def race(self, candidates: list[Candidate], case: Case, which: str, sets: list, seconds: float) -> list[float]:
        return [self.count(candidate, case, which, sets[0]) for candidate in candidates]

    def count(self, candidate: Candidate, case: Case, which: str, tensors: dict) -> float:
        with in_force(candidate):
            return self.count_in_force(case, which, tensors)

    def count_in_force(self, case: Case, which: str, tensors: dict) -> float:
        thunk, counted = measure.make_thunk(call_of(case), case, which, tensors), 0
        launch, before = cuda_library.Launch.__call__, self.driver.total_stats.warp_instructions

        def counting(prepared, *tensors):
            nonlocal counted
            launch(prepared, *tensors)
            counted += self.cuda.last_stats().warp_instructions

        with mock.patch.object(cuda_library.Launch, "__call__", counting):
            thunk()
        return float(counted + self.driver.total_stats.warp_instructions - before)


class Wall:
    """The device's time, with bench's timers"""

    def __init__(self, device: torch.device):
        self.bench = measure.bench_for(device)

    def race(self, candidates: list[Candidate], case: Case, which: str, sets: list, seconds: float) -> list[float]:
        timers = []
        for candidate in candidates:
            with in_force(candidate):
                timers.append(self.bench.prepare(call_of(case), case, which, sets))
        for _ in range(measure.ROUNDS):
            for candidate, timer in zip(candidates, timers, strict=True):
                with in_force(candidate):
                    timer.round(measure.per_round(timer.sample_costs_us, seconds))
        return [statistics.median(timer.timing.samples_us) for timer in timers]


@dataclass
class Inputs:
    """Of a case, and what is true of them"""

    case: Case
    sets: list[dict[str, torch.Tensor]]
    truth: truth.Truth

    @staticmethod
    def of(case: Case, device: torch.device) -> "Inputs":
        torch.manual_seed(0)
        sets = [case.tensors(device, seed, truth.wants_gradients(case)) for seed in range(2)]
        return Inputs(case, sets, truth.truth_of(case, sets[0]))


class Worker:
    def __init__(self, device: torch.device, clock: Instructions | Wall):
        self.device, self.clock = device, clock
        self.inputs: Inputs | None = None

    def answer(self, job: dict) -> dict:
        case = Case.of(job["case"]["op"], job["case"]["dtype"], tuple(job["passes"]), **job["case"]["shape"])
        try:
            return {"status": "ok", "detail": "", **JOBS[job["job"]](self, case, job)}
        except Exception as error:
            status, detail = explained(error)
            return {"status": status, "detail": detail, "us": {}}

    def inputs_of(self, case: Case) -> Inputs:
        if self.inputs is None or self.inputs.case != case:
            self.inputs = None  # both may not fit
            self.inputs = Inputs.of(case, self.device)
        return self.inputs

    def measure(self, case: Case, job: dict) -> dict:
        inputs, candidate = self.inputs_of(case), Candidate(**job["candidate"])
        with in_force(candidate):
            ratio = truth.check(case, call_of(case), inputs.sets[0], inputs.truth, ours=True)
        times = self.times([candidate], case, job["seconds"])
        return {"error_ratio": ratio, "us": times[0], "class": class_of(inputs)}

    def race(self, case: Case, job: dict) -> dict:
        return {"us": self.times([Candidate(**each) for each in job["candidates"]], case, job["seconds"])}

    def times(self, candidates: list[Candidate], case: Case, seconds: float) -> list[dict[str, float]]:
        """-> of each, microseconds by pass"""
        sets = self.inputs_of(case).sets
        by_pass = {which: self.clock.race(candidates, case, which, sets, seconds) for which in case.passes}
        return [dict(zip(by_pass, us, strict=True)) for us in zip(*by_pass.values(), strict=True)]

    def compile(self, case: Case, job: dict) -> dict:
        tensors = case.tensors(self.device, 0, truth.wants_gradients(case))
        with in_force(Candidate(**job["candidate"])), triton_calls.compiling() as kernels:
            outputs = parity.as_tuple(call_of(case)(**tensors))
            leaves = [x for x in tensors.values() if x is not None and x.requires_grad]
            if leaves:
                torch.autograd.grad(outputs, leaves, [torch.ones_like(out) for out in outputs])
        for kernel in kernels:
            kernel._init_handles()
        return {
            "spilled": max((kernel.n_spills for kernel in kernels), default=0),
            "registers": max((kernel.n_regs for kernel in kernels), default=0),
            "shared": max((kernel.metadata.shared for kernel in kernels), default=0),
        }


JOBS = {"measure": Worker.measure, "race": Worker.race, "compile": Worker.compile}


def call_of(case: Case) -> Callable:
    return functools.partial(case.spec.function, **case.kwargs)


@contextmanager
def in_force(candidate: Candidate) -> Iterator[None]:
    """`auto` is this backend, which may be PyTorch's own op, with these settings"""
    with (
        choices.trying(candidate.settings),
        mock.patch.object(dispatch, "candidates", return_value=(candidate.backend,)),
    ):
        yield


def class_of(inputs: Inputs) -> dict:
    """Of the case's calls"""
    prepared = inputs.case.prepared(inputs.sets[0])
    found = classes.of(prepared.op, prepared.record())
    return {"op": found.op, "kind": found.kind, "sizes": found.sizes}


def main() -> int:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else is printed is no answer
    first = json.loads(sys.stdin.readline())
    simulated = first["device"] == "simulator"
    device = torch.device("cpu" if simulated else first["device"])
    with simulator.use(arch=90) if simulated else nullcontext() as driver:
        clock: Any = Instructions(driver) if simulated else Wall(device)
        worker = Worker(device, clock)
        answers.write(json.dumps({"status": "ready", "device": str(device), "arch": hardware.arch(device)}) + "\n")
        for line in sys.stdin:
            answers.write(json.dumps(worker.answer(json.loads(line))) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
