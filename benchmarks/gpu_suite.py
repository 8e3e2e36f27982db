"""Everything that is to be known about a GPU, in one command on a bare host:

    python benchmarks/gpu_suite.py --out results_here [--budget-s 540] [--only build,check,bench,profile] [--dry-run]

The host needs Python, torch, triton and nvcc (with ninja and pybind11 for the CUDA kernels); neither this package nor
a package index. Other libraries to compare with are found on PYTHONPATH.

Each step is a process of its own, so that a crash or a hang costs no more than what it was at, and what is known is
written after every case. A second run into the same folder does what the first had no time for.
    suite.json          the steps, their commands, exit status, seconds
    check.json          every op, backend and dtype against the float64 reference
    tune.json           gptkernels tune, where --only has `tune`: bench and profile after it go by what it found
    bench.json          gptkernels bench --suite headline
    profile-MODEL.json  gptkernels profile
    log.txt             what the steps printed
"""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GPTKERNELS = [sys.executable, "-m", "gptkernels"]
MODELS = ("gpt2", "gpt2-xl", "gpt3-1.3b")
STALL_S = 100  # nothing new in the file for so long, compiling included: it hangs
MOST_RESTARTS = 8
CONTEXT_LOST = 3


@dataclass
class Step:
    name: str
    command: list[str]
    expected_s: float
    limit_s: float  # at most so long, and no longer than what is left
    file: str | None = None  # grows while the step works, and lets it resume
    group: str = ""
    reserves: list[str] = field(default_factory=list)  # later steps that must have their expected time left


def plan(out: Path, device: str) -> list[Step]:
    """Most important first, but for the build, which all depends on."""
    worker = [sys.executable, __file__, "--worker", "check", "--out", str(out), "--device", device]
    bench = [*GPTKERNELS, "bench", "--suite", "headline", "--device", device, "--resume"]
    profiles = [f"profile-{model}" for model in MODELS]
    steps = [
        Step("build", [*GPTKERNELS, "build", "--verbose"], 90, 240, group="build"),
        Step("check", worker, 75, 90, "check.json", "check", profiles),
        Step("bench", [*bench, "--json", str(out / "bench.json")], 260, 600, "bench.json", "bench", profiles),
    ]
    tune = [*GPTKERNELS, "tune", "--device", device, "--budget", "180", "--json", str(out / "tune.json")]
    steps.append(Step("tune", tune, 240, 480, group="tune"))
    for model, name in zip(MODELS, profiles, strict=True):
        command = [*GPTKERNELS, "profile", "--model", model, "--device", device, "--json", str(out / f"{name}.json")]
        steps.append(Step(name, command, 30 if model == "gpt2" else 40, 90, group="profile"))
    return steps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget-s", type=float, default=540)
    parser.add_argument("--only", default="build,check,bench,profile", help="which parts, and in which order")
    parser.add_argument("--cache", type=Path, help="for what is compiled (OUT/cache)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu tries the suite itself out")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--worker", choices=("check",), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out = options.out.resolve()
    if options.worker:
        return check_worker(options)
    groups = options.only.split(",")
    known = plan(options.out, options.device)
    unknown = sorted(set(groups) - {step.group for step in known})
    if unknown:
        parser.error(f"--only must be of build, check, tune, bench, profile, not {unknown[0]!r}")
    steps = [step for group in groups for step in known if step.group == group]
    if options.dry_run:
        print_plan(steps, options.budget_s)
        return 0
    return Suite(options, steps).run()


def print_plan(steps: list[Step], budget_s: float) -> None:
    total = 0.0
    for step in steps:
        total += step.expected_s
        late = "" if total <= budget_s else "   (no time for it, if the others take what they should)"
        print(f"{step.name:20} {step.expected_s:4.0f} s, until {total:4.0f} s{late}")
        print(f"    {' '.join(step.command)}")
    print(f"about {total:.0f} s of {budget_s:.0f} s")
    for step in steps:
        if step.name == "bench":
            print(flush=True)
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160"}
            subprocess.run([*step.command, "--dry-run"], env=environment, check=True)


def write(path: Path, document) -> None:
    """A reader sees the old one or the new one, never half of one."""
    staged = path.with_name(f"{path.name}.{os.getpid()}")
    staged.write_text(json.dumps(document, indent=1))
    os.replace(staged, path)


class Suite:
    def __init__(self, options: argparse.Namespace, steps: list[Step]):
        self.out, self.steps = options.out, steps
        self.out.mkdir(parents=True, exist_ok=True)
        self.deadline = time.monotonic() + options.budget_s
        cache = (options.cache or self.out / "cache").resolve()
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.environment = {
            **os.environ,
            "PYTHONPATH": path,
            "PYTHONUNBUFFERED": "1",
            "GPTKERNELS_CACHE": str(cache),
            "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", str(cache / "triton")),
        }
        arch = arch_of_gpu()
        if arch:
            self.environment.setdefault("GPTKERNELS_CUDA_ARCHS", arch)
        self.path = self.out / "suite.json"
        self.document = json.loads(self.path.read_text()) if self.path.exists() else {"steps": {}}

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def run(self) -> int:
        """Returns 1 if a step failed."""
        for number, step in enumerate(self.steps):
            if self.document["steps"].get(step.name, {}).get("status", "").startswith("done"):
                print(f"{step.name}: done before")
                continue
            later = [other for other in self.steps[number + 1 :] if other.name in step.reserves]
            allowed = min(step.limit_s, self.left() - sum(other.expected_s for other in later))
            if allowed < min(step.expected_s, 30) / 2:
                self.record(step, "skipped", f"{self.left():.0f} s are left", 0.0)
                continue
            started = time.monotonic()
            status, detail = self.run_step(step, started + allowed)
            self.record(step, status, detail, time.monotonic() - started)
        return int(any(step["status"] in ("failed", "done, with failures") for step in self.document["steps"].values()))

    def record(self, step: Step, status: str, detail: str, seconds: float) -> None:
        found = {"command": step.command, "status": status, "detail": detail, "seconds": round(seconds, 1)}
        self.document["steps"][step.name] = found
        write(self.path, self.document)
        print(f"{step.name}: {status} in {seconds:.0f} s {detail}", flush=True)

    def run_step(self, step: Step, until: float) -> tuple[str, str]:
        """-> status, detail. A step that can resume is started again after a crash or hang, if it gets further."""
        size = -1
        for _ in range(MOST_RESTARTS if step.file else 1):
            code, why = self.run_once(step, until)
            if why == "time is up" or (code in (0, 1) and self.unfinished(step)):
                return "cut off", "another run into the same folder does the rest" if step.file else why
            if code == 0:
                return "done", ""
            if code == 1:
                return ("done, with failures" if step.file else "failed"), "see log.txt"
            grown = (self.out / step.file).stat().st_size if step.file and (self.out / step.file).exists() else -1
            if grown == size:
                break
            size = grown
        return "failed", why or f"exit status {code}, see log.txt"

    def unfinished(self, step: Step) -> bool:
        """Whether its own time was up before it had done everything"""
        if not step.file or not (self.out / step.file).exists():
            return False
        document = json.loads((self.out / step.file).read_text())
        return any(row["status"] == "skipped" for row in document.get("cases", ())) or not document.get(
            "complete", True
        )

    def run_once(self, step: Step, until: float) -> tuple[int | None, str]:
        """-> exit status, or None and why the process was stopped"""
        command = list(step.command)
        if step.name in ("bench", "check"):
            # Some seconds less than there are, for the case that is begun last.
            command += ["--budget-s", f"{max(1.0, (until - time.monotonic()) * 0.93 - 5):.0f}"]
        with open(self.out / "log.txt", "a") as log:
            log.write(f"\n$ {' '.join(command)}\n")
            log.flush()
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=self.environment, cwd=ROOT, start_new_session=True
            )
            changed, stamp = time.monotonic(), None
            while process.poll() is None:
                time.sleep(0.2)
                if step.file and (self.out / step.file).exists():
                    newest = (self.out / step.file).stat().st_mtime_ns
                    changed, stamp = (time.monotonic(), newest) if newest != stamp else (changed, stamp)
                over, stalled = time.monotonic() > until, step.file and time.monotonic() - changed > STALL_S
                if over or stalled:
                    os.killpg(process.pid, signal.SIGKILL)  # compilers that it started as well
                    process.wait()
                    if over:
                        self.pardon(step)
                    return None, "time is up" if over else f"nothing new for {STALL_S} s"
        return process.returncode, ""

    def pardon(self, step: Step) -> None:
        """What was running when the time was up has neither crashed nor hung: the next run tries it again."""
        if not step.file or not (self.out / step.file).exists():
            return
        document = json.loads((self.out / step.file).read_text())
        for row in document.get("cases", ()):
            if row["status"] == "started":
                row["status"] = "skipped"
        if "results" in document:
            document["results"] = [result for result in document["results"] if result["status"] != "started"]
        write(self.out / step.file, document)


def arch_of_gpu() -> str:
    """What to build for: this GPU alone, which takes half the time; "" where it cannot be told."""
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        capability = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return ""
    number = capability.replace(".", "")
    return f"{number}a" if int(number) >= 90 else "80"


def check_worker(options: argparse.Namespace) -> int:
    """`gptkernels check` in an order of importance, written down after every case: first small cases of every op, then
    the large ones as far as the time goes."""
    sys.path.insert(0, str(ROOT))
    import torch

    from gptkernels import check, dispatch

    path = options.out / "check.json"
    results = json.loads(path.read_text())["results"] if path.exists() else []
    for result in results:
        if result["status"] == "started":
            result.update(status="WRONG", detail="did not return: the process crashed or hung")
    done = {(r["op"], r["case"], r["backend"], r["dtype"]) for r in results}
    deadline = time.monotonic() + options.budget_s
    device = torch.device(options.device)
    backends = dispatch.BACKENDS if options.device == "cuda" else ("eager",)
    jobs = [job for small in (True, False) for job in in_turns(check.CASES, small)]
    jobs = [(*job, backend, dtype) for job in jobs for backend in backends for dtype in check.DTYPES]
    for name, case, backend, dtype in jobs:
        if (name, case.label, backend, dtype) in done:
            continue
        if time.monotonic() > deadline:
            write(path, {"complete": False, "results": results})
            return 0
        started = {"op": name, "case": case.label, "backend": backend, "dtype": dtype, "status": "started"}
        write(path, {"complete": False, "results": [*results, started]})
        torch.manual_seed(len(results))
        results.append(vars(check.check_case(name, case, backend, dtype, device)))
        if results[-1]["status"] == "WRONG":
            print(f"{name} ({case.label}, {backend}, {dtype}): {results[-1]['detail']}", flush=True)
            if options.device == "cuda" and not context_lives():
                write(path, {"complete": False, "results": results})
                return CONTEXT_LOST
    write(path, {"complete": True, "results": results})
    return int(any(result["status"] == "WRONG" for result in results))


def in_turns(cases: dict, small: bool) -> list[tuple]:
    """(op, case), one of each op after the other, so that a lack of time takes a share of each"""
    columns = [[(name, case) for case in make(small=small)] for name, make in cases.items()]
    return [job for row in itertools.zip_longest(*columns) for job in row if job is not None]


def context_lives() -> bool:
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    raise SystemExit(main())
