"""`gptkernels bench`: proves each contender right, times it, and writes down both."""

import datetime
import gc
import json
import random
import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch
from rich.console import Console

from .. import arguments, dispatch, parity
from ..arguments import number
from ..check import resolve_device
from ..failures import UsageError, is_out_of_memory
from ..files import write_text
from ..progress import Steps
from ..tuning import choices
from . import measure, peers, report, schema, suites, telemetry, truth
from .cases import DTYPES, OPS, PASSES, Case, parse_shape

SECONDS = {"cuda": 0.4, "cpu": 0.6}  # of samples per contender and pass
CONTEXT_LOST = 3
PENDING = "skipped"  # what a row stays at if it is never reached


class ContextLostError(RuntimeError):
    """The GPU reported an error that makes every later call in this process fail."""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--suite", default="quick", choices=suites.SUITES)
    parser.add_argument("--op", action="append", metavar="OP", help=f"only this op (may be repeated): {', '.join(OPS)}")
    parser.add_argument("--backend", action="append", choices=dispatch.BACKENDS, help="of ours (may be repeated)")
    parser.add_argument("--pass", dest="passes", metavar="LIST", help="fwd,bwd,both: only these")
    parser.add_argument(
        "--shape", metavar="DIMS", help="such as B2,H16,T8192,D128,W1024: this shape instead of a suite"
    )
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="(may be repeated)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--peers", metavar="LIST", help=f"none, all, or a list of: {', '.join(peer_names())}")
    parser.add_argument("--seed", type=arguments.seed, default=0, help="of the random inputs")
    parser.add_argument("--seconds", type=number(above=0), help="of samples per contender and pass")
    parser.add_argument("--budget-s", type=number(at_least=0), help="begin nothing new after this many seconds")
    parser.add_argument("--json", metavar="FILE", help="write everything there, after every case")
    parser.add_argument("--resume", action="store_true", help="keep what the --json file has, and do the rest")
    parser.add_argument("--plot", metavar="DIR", help="draw the pictures there")
    parser.add_argument("--dry-run", action="store_true", help="list the cases, and run nothing")


def peer_names() -> list[str]:
    return [name for name in peers.NAMES if name not in dispatch.BACKENDS]


def run(options: Namespace) -> int:
    """Returns 1 if any of our own results was wrong or failed, 3 if the GPU's context was lost on the way."""
    device, cases, chosen_peers = selection(options)
    plan = [(case, peers.chosen(case, device, tuple(options.backend or ()), chosen_peers)) for case in cases]
    console = Console()
    if options.dry_run:
        report.print_plan(console, plan, device)
        return 0
    session = Session(options, device)
    lost = None
    try:
        session.run(plan, console)
    except ContextLostError as error:
        lost = error
    report.print_document(console, session.document)
    if options.plot:
        from . import plots

        for path in plots.draw(session.document, Path(options.plot)):
            console.print(f"drew {path}")
    if lost:
        console.print(f"[bold red]{lost}; --json FILE --resume does the rest in a new process")
        return CONTEXT_LOST
    ours = [row for row in session.document["cases"] if row["kind"] == "ours"]
    return int(any(row["status"] in ("wrong", "failed") for row in ours))


def selection(options: Namespace) -> tuple[torch.device, list[Case], tuple[str, ...] | None]:
    """What the options ask for; UsageError where they make no sense."""
    device, ops = device_of(options), ops_of(options)
    passes = tuple(options.passes.split(",")) if options.passes else ()
    for which in passes:
        if which not in PASSES:
            raise UsageError(f"--pass must be of {', '.join(PASSES)}, not {which!r}")
    chosen_peers = None
    if options.peers:
        chosen_peers = tuple(peer_names()) if options.peers == "all" else tuple(options.peers.split(","))
        chosen_peers = () if options.peers == "none" else chosen_peers
        for peer in chosen_peers:
            if peer not in peer_names():
                raise UsageError(f"--peers must be none, all or of {', '.join(peer_names())}, not {peer!r}")
    dtypes = tuple(options.dtype or ())
    if options.shape:
        usual = "bfloat16" if device.type == "cuda" else "float32"
        cases = suites.of_shape(ops, parse_shape(options.shape), dtypes or (usual,), passes)
    else:
        cases = [case for case in suites.suite(options.suite, device, dtypes) if case.op in ops]
    if passes:
        cases = [case.with_passes(tuple(p for p in passes if p in case.spec.passes)) for case in cases]
        cases = [case for case in dict.fromkeys(cases) if case.passes]
    if not cases:
        raise UsageError("nothing to measure: no chosen op has such passes")
    return device, cases, chosen_peers


def device_of(options: Namespace) -> torch.device:
    """--device; auto: a GPU, else the CPU"""
    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    # What would run on a GPU can be listed without one.
    return torch.device(name) if options.dry_run else resolve_device(name)[1]


def ops_of(options: Namespace) -> list[str]:
    """--op; all of them where none is named"""
    for op in options.op or ():
        if op not in OPS:
            raise UsageError(f"--op must be one of {', '.join(OPS)}, not {op}")
    return options.op or list(OPS)


class Session:
    """One run: its document, and the cases one after the other."""

    def __init__(self, options: Namespace, device: torch.device):
        self.options, self.device = options, device
        self.deadline = time.monotonic() + (options.budget_s or float("inf"))
        self.seconds = options.seconds or SECONDS[device.type]
        self.bench = measure.bench_for(device)
        self.nvml = telemetry.Nvml(device)
        self.path = Path(options.json) if options.json else None
        self.document = self.resumed() or self.new_document()

    def new_document(self) -> dict:
        return {
            "schema": schema.VERSION,
            "argv": sys.argv[1:],
            "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "suite": None if self.options.shape else self.options.suite,
            "seed": self.options.seed,
            "git": telemetry.git_state(),
            "versions": telemetry.versions(),
            "device": telemetry.device_facts(self.device),
            "ceilings": {},
            "telemetry": {"before": self.nvml.read(), "after": {}},
            "tuned": choices.summary(self.device),
            "peers": peers.survey(self.device),
            "cases": [],
        }

    def resumed(self) -> dict | None:
        """The document of a run that was cut off. What it was in the middle of is not tried again."""
        if not self.options.resume or self.path is None or not self.path.exists():
            return None
        document = json.loads(self.path.read_text())
        wrong = schema.problems(document)
        if wrong:
            raise UsageError(f"--json {self.path} is not from this version: {wrong[0]}")
        for row in document["cases"]:
            if row["status"] == "started":
                row.update(status="failed", detail="did not return: the process crashed or hung")
        document["cases"] = [row for row in document["cases"] if row["status"] != "skipped"]
        return document

    def save(self) -> None:
        if self.path is not None:
            write_text(self.path, json.dumps(self.document, indent=1))

    def run(self, plan: list[tuple[Case, list[peers.Contender]]], console: Console) -> None:
        dtypes = {case.dtype for case, _ in plan}
        with Steps(console, 1 + len(plan), "measuring") as steps:
            steps.begin("the device")
            if not self.document["ceilings"]:
                self.document["ceilings"] = self.bench.ceilings(dtypes)
            self.save()
            steps.done()
            for case, contenders in plan:
                steps.begin(f"{case.op} {case.label}")
                self.run_case(case, contenders)
                steps.done()
        self.document["telemetry"]["after"] = self.nvml.read()
        self.save()

    def run_case(self, case: Case, contenders: list[peers.Contender]) -> None:
        done = {self.key(row) for row in self.document["cases"]}
        rows = {}
        for contender in contenders:
            missing = contender.kind == "peer" and self.document["peers"][contender.name]["status"] == "missing"
            for which in case.passes:
                row = self.new_row(case, contender, which)
                if not missing and self.key(row) not in done:
                    rows[contender, which] = row
        if not rows:
            return
        self.document["cases"] += rows.values()
        if time.monotonic() > self.deadline:
            for row in rows.values():
                row.update(status="skipped", detail="no time was left")
            return
        facts, calls = None, {}
        with self.recorded(list(rows.values())):
            torch.manual_seed(self.options.seed)
            sets = self.bench.input_sets(case, self.options.seed)
            facts = truth.truth_of(case, sets[0])
        if facts is None:
            return
        for contender in dict.fromkeys(contender for contender, _ in rows):
            mine = [row for (other, _), row in rows.items() if other is contender]
            with self.recorded(mine):
                call = contender.make(case, self.device)
                if contender.kind == "ours":
                    prepared = case.prepared(sets[0])
                    for row in mine:
                        row["in_force"] = choices.in_force(prepared.op, prepared.record())
                if contender.kind != "yardstick":
                    ratio = truth.check(case, call, sets[0], facts, contender.kind == "ours")
                    for row in mine:
                        row.update(error_ratio=ratio, checked=facts.how)
                calls[contender] = call
        del facts
        for which in case.passes:
            self.time_pass(case, which, {c: rows[c, which] for c in calls if (c, which) in rows}, calls, sets)
        self.save()

    def time_pass(self, case: Case, which: str, rows: dict, calls: dict, sets: list) -> None:
        """Contenders take turns for a few rounds, in another order each time."""
        timed = {}
        for contender, row in rows.items():
            with self.recorded([row]):
                timer = self.bench.prepare(calls[contender], case, which, sets)
                thunk = measure.make_thunk(calls[contender], case, which, sets[0])
                row["peak_bytes"] = self.bench.peak_bytes(thunk)
                timed[contender] = timer
                del thunk
        counts = {c: measure.per_round(timer.sample_costs_us, self.seconds) for c, timer in timed.items()}
        for _ in range(measure.ROUNDS):
            for contender in random.sample(list(timed), len(timed)):
                if rows[contender]["status"] != PENDING:
                    continue
                with self.recorded([rows[contender]]):
                    timed[contender].round(counts[contender])
                    rows[contender]["rounds"].append(counts[contender])
        for contender, timer in timed.items():
            if rows[contender]["status"] == PENDING:
                rows[contender].update(report.figures(timer.timing, rows[contender], self.document["ceilings"]))
        timed.clear()
        self.free()

    def recorded(self, rows: list[dict]) -> "Recorded":
        """Rows are "started" in the file while they are worked on, and whatever goes wrong becomes their status."""
        return Recorded(self, rows)

    def free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def new_row(self, case: Case, contender: peers.Contender, which: str) -> dict:
        empty = dict.fromkeys(schema.ROW)
        return empty | {
            "op": case.op,
            "label": case.label,
            "shape": case.shape,
            "window": case.kwargs.get("window"),
            "dtype": case.dtype,
            "pass": which,
            "contender": contender.name,
            "kind": contender.kind,
            "seed": self.options.seed,
            "status": PENDING,
            "detail": "not reached",
            "checked": "",
            "samples_us": [],
            "rounds": [],
            "flops": case.flops(which),
            "bytes": case.bytes(which),
            "suspect": False,
            "throttle": [],
        }

    @staticmethod
    def key(row: dict) -> tuple:
        return row["op"], row["label"], row["dtype"], row["pass"], row["contender"]


class Recorded:
    def __init__(self, session: Session, rows: list[dict]):
        self.session, self.rows = session, rows

    def __enter__(self) -> None:
        for row in self.rows:
            row["status"] = "started"
        self.session.save()

    def __exit__(self, kind, error, trace) -> bool:
        if error is None:
            for row in self.rows:
                row["status"] = PENDING
        if not isinstance(error, Exception):
            return False
        status, detail = explained(error)
        for row in self.rows:
            row.update(status=status, detail=detail)
        self.session.save()
        if context_is_lost(error):
            raise ContextLostError(f"the GPU's context was lost in {self.rows[0]['contender']}: {detail}") from error
        error.__traceback__ = None  # it holds tensors
        self.session.free()
        return True


def explained(error: Exception) -> tuple[str, str]:
    """-> status, detail"""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if isinstance(error, (dispatch.UnsupportedError, peers.UnfitError)):
        return "unsupported", lines[-1] if lines else ""
    if isinstance(error, parity.ParityError):
        return "wrong", lines[0]
    detail = f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
    return "out of memory" if is_out_of_memory(error) else "failed", detail


def context_is_lost(error: Exception) -> bool:
    """Errors of the device itself stay for the rest of the process."""
    if isinstance(error, torch.OutOfMemoryError) or not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
