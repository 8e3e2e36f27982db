"""`gptkernels tune`: measures every backend and its launch settings on the machine at hand, proved right first. From
then on `auto` takes the fastest."""

import datetime
import json
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..arguments import number
from ..bench import suites
from ..bench.cases import OPS, Case, parse_shape
from ..bench.run import device_of, ops_of
from ..failures import UsageError
from ..files import write_text
from ..progress import Steps
from . import candidates, choices, store
from .candidates import Candidate
from .classes import CallClass
from .model_cases import cases_of_hf, cases_of_model, passes_of
from .workers import Compilers, Workers

# Of a candidate, beyond what its samples take: compiling, the reference in float64, a machine that others use.
LIMIT_S = 60.0
SECONDS = {"cuda": 0.05, "cpu": 0.3, "simulator": 0.0}
# What is this much faster is taken; less is noise.
MATTERS = 0.02


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--op", action="append", help=f"only this op (may be repeated): {', '.join(OPS)}")
    parser.add_argument("--model", metavar="NAME", help="the calls of this GPT, such as gpt2-xl")
    parser.add_argument("--hf", metavar="PATH", help="the calls of this model of transformers, accelerated")
    parser.add_argument("--shape", metavar="DIMS", help="such as B2,H16,T8192,D128,W1024: this shape")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--budget", type=number(above=0), default=120.0, help="seconds in all (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write what was measured there too")
    parser.add_argument("--dry-run", action="store_true", help="list what would be tried, and measure nothing")
    parser.add_argument("--reset", action="store_true", help="forget what was measured before")
    parser.add_argument("--export", metavar="FILE", help="write what is in force there, and measure nothing")
    parser.add_argument("--import", dest="import_", metavar="FILE", help="take over an exported file")


def run(options: Namespace) -> int:
    device = device_of(options)
    console = Console()
    if options.export or options.import_:
        return move(options, device, console)
    cases = cases_of(options, device)
    if options.dry_run:
        print_plan(console, cases, device.type)
        return 0
    with store.writing(device) as writer:
        if options.reset:
            writer.reset()
        tuner = Tuner(writer, device.type, options.budget)
        try:
            tuner.run(cases, console)
        finally:  # what was found stays, whatever ends this
            choices.reload()
            if tuner.done:
                console.print(report(tuner.done))
        if options.json:
            write_text(options.json, json.dumps(store.sealed(writer.facts, tuner.done), indent=1))
    if tuner.left:
        console.print(f"no time was left for {tuner.left} of {len(cases)} cases: --budget allows more", highlight=False)
    console.print(f"`auto` goes by this from now on: {writer.path}", highlight=False, soft_wrap=True)
    return 0


def move(options: Namespace, device: torch.device, console: Console) -> int:
    with store.writing(device) as writer:
        if options.export:
            write_text(options.export, json.dumps(store.sealed(writer.facts, writer.entries), indent=1))
            console.print(f"{len(writer.entries)} classes of calls written to {options.export}", highlight=False)
            return 0
        try:
            document = store.opened(Path(options.import_).read_text())
        except ValueError as error:
            raise UsageError(f"--import {options.import_}: {error}") from None
        if document["facts"]["device"] != writer.facts["device"]:
            raise UsageError(
                f"--import {options.import_} is of a {document['facts']['device']}, this is a {writer.facts['device']}"
            )
        for found, entry in store.entries_of(document).items():
            writer.keep(found, entry)
        choices.reload()
        console.print(f"{len(document['classes'])} classes of calls taken over", highlight=False)
    return 0


def cases_of(options: Namespace, device: torch.device) -> list[Case]:
    ops = ops_of(options)
    usual = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if sum(given is not None for given in (options.model, options.hf, options.shape)) > 1:
        raise UsageError("--model, --hf and --shape are ways to say what to tune: give one")
    if options.model or options.hf:
        found = cases_of_model(options.model, usual) if options.model else cases_of_hf(options.hf, usual)
    elif options.shape:
        found = suites.of_shape(ops, parse_shape(options.shape), (usual,), ())
    else:
        found = suites.suite("quick", device, (usual,))
    return list(dict.fromkeys(case.with_passes(passes_of(case)) for case in found if case.op in ops))


class Tuner:
    """Cases one after the other, each with its share of the time that is left."""

    def __init__(self, writer: store.Writer, where: str, budget_s: float, workers: Callable[[str], Workers] = Workers):
        self.writer, self.where, self.make_workers = writer, where, workers
        self.deadline = time.monotonic() + budget_s
        self.done: dict[CallClass, dict] = {}
        self.left = 0

    def run(self, cases: list[Case], console: Console) -> None:
        with (
            self.make_workers(self.where) as workers,
            Compilers(self.where, self.make_workers) as compilers,
            Steps(console, len(cases), "tuning") as steps,
        ):
            for i, case in enumerate(cases):
                steps.begin(f"{case.op} {case.label}")
                seconds = (self.deadline - time.monotonic()) / (len(cases) - i)
                if seconds <= 0:
                    self.left = len(cases) - i
                    return
                trial = Trial(case, self.where, workers, time.monotonic() + seconds, compilers)
                trial.run()
                if trial.of is not None:
                    self.done[trial.of] = trial.entry()
                    self.writer.keep(trial.of, self.done[trial.of])
                steps.done()


class Trial:
    """What is found out about one case."""

    def __init__(self, case: Case, where: str, workers: Workers, deadline: float, compilers: Compilers | None = None):
        self.case, self.where, self.workers, self.deadline = case, where, workers, deadline
        self.compilers = compilers
        self.of: CallClass | None = None
        self.fastest: dict[str, tuple[Candidate, dict[str, float]]] = {}  # by backend
        self.failed: dict[str, str] = {}
        self.tried = self.pruned = 0

    def run(self) -> None:
        for candidate in candidates.backends(self.case, self.where):
            found = self.measure(candidate)
            if found:
                self.fastest[candidate.backend] = candidate, found
        for setting in candidates.settings(self.case, self.where):
            if setting.backend in self.fastest:
                self.choose(setting)
        # What was timed minutes apart is timed once more in turns.
        finalists = [candidate for candidate, _ in self.fastest.values()]
        if len(finalists) > 1:
            for candidate, us in zip(finalists, self.race(finalists, 2 * SECONDS[self.where]) or (), strict=False):
                self.fastest[candidate.backend] = candidate, us

    def choose(self, setting: candidates.Setting) -> None:
        """Takes the value with which its pass is fastest, the settings before it being what they are."""
        counted = [p for p in self.case.passes if setting.which in (p, "both") or p == "both"]
        best, _ = self.fastest[setting.backend]
        field = [Candidate(best.backend, best.settings | {setting.name: value}) for value in setting.values]
        times = {}
        for candidate in self.compilable(field):
            if time.monotonic() > self.deadline:
                break
            if found := self.measure(candidate):
                times[candidate] = total(found, counted)
        winner = self.winner(sorted(times, key=lambda candidate: times[candidate]), counted)
        final = self.race([best, winner], 2 * SECONDS[self.where]) if winner else None
        if winner and final and total(final[1], counted) < total(final[0], counted) * (1 - MATTERS):
            self.fastest[setting.backend] = winner, final[1]

    def compilable(self, field: list[Candidate]) -> list[Candidate]:
        """Those that compile and spill nothing; all, where all spill. They are compiled side by side, for the worker
        that measures finds them in Triton's cache."""
        if self.compilers is None or not self.compilers.workers or not field or field[0].backend != "triton":
            return field
        jobs = [self.job("compile", candidate=asdict(candidate)) for candidate in field]
        answers = self.compilers.ask_all(jobs, LIMIT_S, self.deadline)
        known = [(candidate, answer) for candidate, answer in zip(field, answers, strict=True) if answer is not None]
        for candidate, answer in known:
            if answer["status"] != "ok":
                self.failed[str(candidate)] = f"{answer['status']}: {answer['detail']}"
        compiled = [(candidate, answer["spilled"]) for candidate, answer in known if answer["status"] == "ok"]
        clean = [candidate for candidate, spilled in compiled if not spilled]
        self.pruned += len(compiled) - len(clean) if clean else 0
        return clean or [candidate for candidate, _ in compiled]

    def winner(self, ranked: list[Candidate], counted: list[str]) -> Candidate | None:
        """Of those ranked by a first look: the faster half runs again, in turns and for twice as long, and so on"""
        seconds = SECONDS[self.where]
        while len(ranked) > 1:
            ranked, seconds = ranked[: (len(ranked) + 1) // 2], 2 * seconds
            us = self.race(ranked, seconds) if len(ranked) > 1 and time.monotonic() < self.deadline else None
            if us is None:
                break
            ranked = [ranked[i] for i in sorted(range(len(us)), key=lambda i: total(us[i], counted))]
        return ranked[0] if ranked else None

    def measure(self, candidate: Candidate) -> dict[str, float] | None:
        """-> microseconds by pass, or None for what does not run, and is noted where that is no wonder"""
        self.tried += 1
        answer = self.ask("measure", LIMIT_S, candidate=asdict(candidate), seconds=SECONDS[self.where])
        if answer["status"] != "ok":
            self.failed[str(candidate)] = f"{answer['status']}: {answer['detail']}"
            return None
        self.of = CallClass(answer["class"]["op"], tuple(answer["class"]["kind"]), answer["class"]["sizes"])
        return answer["us"]

    def race(self, field: list[Candidate], seconds: float) -> list[dict[str, float]] | None:
        """-> microseconds by pass of each, timed in turns; None where that did not end well"""
        answer = self.ask("race", len(field) * LIMIT_S, candidates=[asdict(each) for each in field], seconds=seconds)
        return answer["us"] if answer["status"] == "ok" else None

    def job(self, job: str, **rest) -> dict:
        case = {"op": self.case.op, "dtype": self.case.dtype, "shape": self.case.shape}
        return {"job": job, "case": case, "passes": self.case.passes, **rest}

    def ask(self, job: str, limit_s: float, **rest) -> dict:
        return self.workers.ask(self.job(job, **rest), limit_s)

    def entry(self) -> dict[str, Any]:
        """What is kept: backends by time, their settings, when, and what did not run right"""
        order = sorted(self.fastest.items(), key=lambda item: total(item[1][1], self.case.passes))
        settings: dict[str, Any] = {}
        for candidate, _ in self.fastest.values():
            settings |= candidate.settings
        wrong = {name: why for name, why in self.failed.items() if not why.startswith("unsupported")}
        return {
            "order": [[name, round(total(us, self.case.passes), 2)] for name, (_, us) in order],
            "settings": settings,
            "failed": wrong,
            "tried": self.tried,
            "pruned": self.pruned,
            "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }


def total(us: dict[str, float], passes: Iterable[str]) -> float:
    return sum(us[which] for which in passes)


def report(done: dict[CallClass, dict]) -> Table:
    table = Table("calls", "fastest", "us", "others (us)", "wrong", box=None)
    for found, entry in done.items():
        (name, us), *others = entry["order"]
        rest = ", ".join(f"{other} {time:.0f}" for other, time in others)
        settings = "".join(f"\n{setting}: {value}" for setting, value in entry["settings"].items())
        table.add_row(str(found), name + settings, f"{us:.0f}", rest, "\n".join(entry["failed"]))
    return table


def print_plan(console: Console, cases: list[Case], where: str) -> None:
    table = Table("case", "backends", "settings", box=None)
    for case in cases:
        names = [str(candidate) for candidate in candidates.backends(case, where)]
        found = [f"{setting.name}: {len(setting.values)}" for setting in candidates.settings(case, where)]
        table.add_row(f"{case.op} {case.label}, {case.dtype}", ", ".join(names), "\n".join(found) or "none")
    console.print(table)
    console.print(f"{len(cases)} cases on {where}", highlight=False)
