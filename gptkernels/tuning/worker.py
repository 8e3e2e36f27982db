"""A process of its own that proves and times candidates, so that one that crashes or hangs costs no more than itself.

Reads jobs from its input and answers each on its output, a line of JSON each:
{"case", "candidate", "seconds", "passes"} -> {"status", "detail", "us": {pass: median}, "class"}.
"""

import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast
from unittest import mock

import torch

from .. import cuda_library, dispatch, hardware, simulator
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

    def microseconds(self, call: Callable, case: Case, which: str, sets: list, seconds: float) -> float:
        thunk, counted = measure.make_thunk(call, case, which, sets[0]), 0
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

    def microseconds(self, call: Callable, case: Case, which: str, sets: list, seconds: float) -> float:
        timer = self.bench.prepare(call, case, which, sets)
        count = measure.per_round(timer.sample_costs_us, seconds)
        for _ in range(measure.ROUNDS):
            timer.round(count)
        return statistics.median(timer.timing.samples_us)


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
        candidate = Candidate(**job["candidate"])

        def call(**tensors):
            return case.spec.function(**tensors, **case.kwargs)

        try:
            if self.inputs is None or self.inputs.case != case:
                self.inputs = None  # both may not fit
                self.inputs = Inputs.of(case, self.device)
            inputs = self.inputs
            with choices.trying(candidate.settings), only(candidate.backend):
                ratio = truth.check(case, call, inputs.sets[0], inputs.truth, ours=True)
                us = {
                    which: self.clock.microseconds(call, case, which, inputs.sets, job["seconds"])
                    for which in job["passes"]
                }
        except Exception as error:
            status, detail = explained(error)
            return {"status": status, "detail": detail, "us": {}}
        return {"status": "ok", "detail": "", "error_ratio": ratio, "us": us, "class": class_of(inputs)}


def class_of(inputs: Inputs) -> dict:
    """Of the case's calls"""
    op = cast(Any, inputs.case.spec.function)
    prepared = op.prepare(**inputs.sets[0], **inputs.case.kwargs)
    found = classes.of(prepared.op, prepared.record())
    return {"op": found.op, "kind": found.kind, "sizes": found.sizes}


@contextmanager
def only(backend: str) -> Iterator[None]:
    """`auto` is this backend, which may be PyTorch's own op"""
    with mock.patch.object(dispatch, "candidates", return_value=(backend,)):
        yield


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
