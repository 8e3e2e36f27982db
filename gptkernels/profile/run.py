"""`gptkernels profile`: a model in plain PyTorch and with our ops, step by step on the same tokens.

The FLOPs are those of gptkernels/models/cost.py, training being three forward passes. MFU is a share of the data
sheet's dense bfloat16 rate where that is known; the share of a large matrix product measured here is given as well.
HFU also counts what backward computes again.
"""

import gc
import json
import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import Callable

import torch
from rich.console import Console

from .. import dispatch, hardware
from ..arguments import number, whole
from ..bench import measure, telemetry
from ..files import write_text
from ..models.config import PRESETS
from ..models.parallel import KINDS, Workers
from ..progress import Steps
from ..tuning import choices
from . import report, shares, workload

SCHEMA = 1
PROFILED_STEPS = 2
# Of the first loss, or of logits, in norm.
ALLOWED_DIFFERENCE = {"bfloat16": 2e-2, "float32": 1e-4}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--model", default="gpt2", help=f"one of {', '.join(PRESETS)} (gpt2)")
    parser.add_argument("--hf", metavar="PATH", help="a model of transformers instead: a folder, or a name on the hub")
    parser.add_argument("--batch", type=whole(1), help="sequences per step and GPU")
    parser.add_argument("--seq", type=whole(1), help="tokens per sequence")
    parser.add_argument("--backend", default="auto", choices=("auto", *dispatch.BACKENDS))
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--train", dest="infer", action="store_false", default=False, help="forward, backward, AdamW (the default)"
    )
    kind.add_argument("--infer", action="store_true", default=False, help="forward to the logits of every token")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16 is autocast (the default on a GPU)")
    parser.add_argument("--dropout", type=number(at_least=0, at_most=0.999), default=0.0)
    parser.add_argument("--steps", type=whole(1), help="to time, after a warm-up")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--parallel", default="none", choices=KINDS, help="under torchrun: one row per GPU and the sum")
    parser.add_argument("--no-plain", action="store_true", help="leave out the model in plain PyTorch")
    parser.add_argument("--trace", metavar="FILE", help="write a Chrome trace of our model's steps")
    parser.add_argument("--json", metavar="FILE", help="also write everything there")


def run(options: Namespace) -> int:
    """Returns 1 if ours does not compute what the plain model does, or failed."""
    workers = Workers(options.parallel, options.device)
    try:
        subject = make_subject(options, workers)
        timed = options.steps * (1 if options.no_plain else 2)
        with Steps(Console(quiet=workers.rank != 0), timed, f"profiling {subject.name}") as steps:
            measured = profile_both(subject, options, workers, steps)
        found = {
            "schema": SCHEMA,
            "model": subject.name,
            "parallel": options.parallel,
            "device": telemetry.device_facts(workers.device),
            "versions": telemetry.versions(),
            "git": telemetry.git_state(),
            "tuned": choices.summary(workers.device),
            **{name: getattr(options, name) for name in ("batch", "seq", "dtype", "dropout", "backend", "infer")},
            **measured,
        }
    finally:
        workers.close()
    if workers.rank == 0:
        report.print_profile(Console(), found)
        if options.json:
            write_text(options.json, json.dumps(found, indent=1))
    return int(found["ours"]["status"] != "ok")


def make_subject(options: Namespace, workers: Workers) -> workload.Subject:
    """Fills in the options that were left open; ValueError for a model or length that cannot be."""
    torch.manual_seed(0)
    if options.hf:
        subject = workload.of_hf(options.hf, options.backend)
    else:
        # What FSDP spreads over several GPUs may not fit one of them.
        where = torch.device("cpu") if options.parallel == "fsdp" else workers.device
        subject = workload.of_preset(options.model, options.backend, options.dropout, options.seq, where)
    on_gpu = workers.device.type == "cuda"
    parameters = sum(p.numel() for p in subject.models["plain"].parameters())
    options.seq = options.seq or (subject.context if on_gpu else min(subject.context, 256))
    tokens = (16384 if parameters < 5e8 else 8192) if on_gpu else 256
    options.batch = options.batch or max(1, tokens // options.seq)
    options.steps = options.steps or (10 if on_gpu else 3)
    options.dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    return subject


def profile_both(subject: workload.Subject, options: Namespace, workers: Workers, steps: Steps) -> dict:
    """-> flops, ceilings, and for `plain` and `ours` what was measured; ours is compared with plain"""
    steps.begin("the device")
    ceilings = measure.bench_for(workers.device).ceilings({options.dtype})
    ceilings["data_sheet_tflops"] = hardware.data_sheet_tflops(workers.device)
    flops = workload.flops_of(subject, options.seq, not options.infer)
    found: dict = {"ceilings": ceilings, "flops_per_token": vars(flops), "plain": None}
    names = ["plain", "ours"]
    if options.no_plain:
        names = ["ours"]
        del subject.models["plain"]
    # A GPU has no room for two large models. On a CPU, which others use as well, they take turns.
    together = workers.device.type == "cpu"
    answers: dict[str, torch.Tensor | None] = {}
    for group in [names] if together else [[name] for name in names]:
        runs = {}
        for name in group:
            runs[name] = Run(subject.models.pop(name), subject, options, workers)
        for name, run in runs.items():
            steps.begin(f"{name}, warm-up")
            run.attempt(run.prepare)
        for step in range(options.steps):
            steps.begin(f"{' and '.join(group)}, step {step + 1} of {options.steps}")
            for run in runs.values():
                run.attempt(run.time_step)
                steps.done()
        for name, run in runs.items():
            steps.begin(f"{name}, by part")
            run.attempt(run.finish, options.trace if name == "ours" else None)
            found[name], answers[name] = run.found(flops, ceilings), run.answer
        del runs, run
        gc.collect()
        if workers.device.type == "cuda":
            torch.cuda.empty_cache()
    plain, ours = answers.get("plain"), answers["ours"]
    if plain is not None and ours is not None:
        difference = ((ours - plain).norm() / plain.norm()).item()
        found["ours"]["difference"] = difference
        if not difference <= ALLOWED_DIFFERENCE[options.dtype]:
            found["ours"].update(status="wrong", detail=f"differs from the plain model by {difference:.1e}")
    return found


class Run:
    """One model being measured; the first failure ends it and becomes its status."""

    work: workload.Workload

    def __init__(self, model: torch.nn.Module, subject: workload.Subject, options: Namespace, workers: Workers):
        self.model, self.subject, self.options, self.workers = model, subject, options, workers
        self.nvml = telemetry.Nvml(workers.device)
        self.failure: str | None = None
        self.answer: torch.Tensor | None = None
        self.seconds: list[float] = []
        self.joules: list[float] = []
        self.reading: dict | None = None

    def attempt(self, phase: Callable, *arguments) -> None:
        if self.failure is None:
            try:
                phase(*arguments)
            except (torch.OutOfMemoryError, dispatch.UnsupportedError) as error:
                self.failure = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                self.__dict__.pop("work", None)  # and its memory

    def prepare(self) -> None:
        self.work = workload.Workload(self.subject, self.model, self.options, self.workers)
        self.answer = self.work.step().flatten()[:100_000].float().cpu()
        for _ in range(2 if self.workers.device.type == "cuda" else 0):
            self.work.step()
        self.peak = measure_peak(self.work)

    def time_step(self) -> None:
        before = self.nvml.energy_joules()
        self.seconds.append(self.work.seconds())
        after = self.nvml.energy_joules()
        if before is not None and after is not None:
            self.joules.append(after - before)
        self.reading = self.nvml.read()

    def finish(self, trace: str | None) -> None:
        self.memory = self.work.memory()
        device = self.workers.device
        self.parts, profiler = shares.profiled(self.work.model, self.work.step, PROFILED_STEPS, device)
        if trace and self.workers.rank == 0:
            profiler.export_chrome_trace(trace)

    def found(self, flops: workload.Flops, ceilings: dict) -> dict:
        if self.failure is not None:
            return {"status": "failed", "detail": self.failure}
        step = statistics.median(self.seconds)
        tokens_per_second = self.options.batch * self.options.seq / step
        watts = sum(self.joules) / sum(self.seconds) if self.joules else None
        mine = {"tokens_per_second": tokens_per_second, "peak_bytes": self.peak, "watts": watts}
        rows = gathered(mine, self.workers)
        return {
            "status": "ok",
            "detail": "",
            "seconds": self.seconds,
            "step_us": step * 1e6,
            "parts_us": self.parts,
            "memory_bytes": self.memory,
            **mine,
            "utilisation": utilisation(tokens_per_second, flops, ceilings, self.options.dtype),
            "telemetry": self.reading,
            "per_gpu": rows,
            "tokens_per_second_of_all": sum(row["tokens_per_second"] for row in rows),
        }


def measure_peak(work: workload.Workload) -> int | None:
    """Bytes of memory at the peak of a step"""
    if work.device.type != "cuda":
        bench = measure.CpuBench(work.device)
        beyond = bench.peak_bytes(work.step)
        return None if beyond is None else beyond + sum(work.lasting().values())
    torch.cuda.reset_peak_memory_stats(work.device)
    work.step()
    work.synchronize()
    return torch.cuda.max_memory_allocated(work.device)


def utilisation(tokens_per_second: float, flops: workload.Flops, ceilings: dict, dtype: str) -> dict:
    """Shares of the data sheet's rate (None where it is not known) and of the measured one"""
    sheet = ceilings["data_sheet_tflops"] if dtype == "bfloat16" else None
    measured = ceilings["gemm_tflops"][dtype]
    rates = {name: tokens_per_second * getattr(flops, name) / 1e12 for name in ("dense", "window_aware", "hardware")}
    return {
        "tflops": rates["window_aware"],
        "mfu_dense": rates["dense"] / sheet if sheet else None,
        "mfu": rates["window_aware"] / sheet if sheet else None,
        "hfu": rates["hardware"] / sheet if sheet else None,
        "of_measured_gemm": rates["window_aware"] / measured,
    }


def gathered(mine: dict, workers: Workers) -> list[dict]:
    if workers.world == 1:
        return [mine]
    rows: list = [None] * workers.world
    torch.distributed.all_gather_object(rows, mine)
    return rows
