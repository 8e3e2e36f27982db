"""Bugs planted in the sources of CUDA kernels: one library holds all of them and has one at a time, and a process tries
them one after another."""

import os
import re
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kernel_variants import Builder, folder_of, source

VARIABLE = "PLANTED_BUG"
# What stands before everything else in each file: which of the bugs is there, on the host and in a kernel.
SWITCH = f"""
#pragma once
#include <cstdlib>
static __device__ int planted_bug;

static __host__ __device__ inline bool planted(int bug) {{
#ifdef __CUDA_ARCH__
    return *const_cast<const volatile int*>(&planted_bug) == bug;
#else
    return std::atoi(std::getenv("{VARIABLE}")) == bug;
#endif
}}

static inline void plant() {{
    const int bug = std::atoi(std::getenv("{VARIABLE}"));
    cudaMemcpyToSymbol(planted_bug, &bug, sizeof(bug));
}}
"""


@dataclass(frozen=True)
class Place:
    """`wrong` instead of `right`, in this file: statements, which end in ";", or else an expression."""

    file: str
    right: str
    wrong: str = ";"
    at: int | None = None  # where in the text; None: there is one

    def found(self, text: str) -> int:
        if self.at is not None:
            return self.at
        assert text.count(self.right) == 1, f"{self.file} has changed: so must the bug in {self.right!r}"
        return text.index(self.right)

    def switched(self, number: int, right: str) -> str:
        if self.right.endswith(";"):
            return f"{{ if (planted({number})) {{ {self.wrong} }} else {{ {right} }} }}"
        return f"(planted({number}) ? ({self.wrong}) : ({right}))"


def removals(
    op: str, files: Iterable[str], statement: re.Pattern, harmless: Mapping[str, str]
) -> tuple[dict[str, Place], dict[str, str]]:
    """-> where statements are removed, by file and line, and why some of them may be. harmless: the reasons, by how the
    source goes on from there"""
    places, reasons = {}, {}
    for file in files:
        text = source(op, file)
        for match in statement.finditer(text):
            line = 1 + text.count("\n", 0, match.start())
            name = f"{file}:{line} {' '.join(match.group().split())}"
            places[name] = Place(file, match.group(), at=match.start())
            rest = " ".join(text[match.start() :][:200].split())
            reason = next((why for start, why in harmless.items() if rest.startswith(start)), None)
            if reason:
                reasons[name] = reason
    return places, reasons


Bugs = Mapping[str, tuple[Place, ...]]


def with_switches(op: str, bugs: Bugs) -> dict[str, str]:
    """-> the files that bugs are in, with a switch at each place: bugs are counted from 1. Places may be the same,
    or in one another."""
    texts = {place.file: source(folder_of(op), place.file) for bug in bugs.values() for place in bug}
    places: dict[tuple[str, int, int], list[tuple[int, Place]]] = {}
    for number, name in enumerate(bugs, 1):
        for place in bugs[name]:
            start = place.found(texts[place.file])
            places.setdefault((place.file, start, start + len(place.right)), []).append((number, place))
    grown: list[tuple[str, int, int]] = []  # file, start, by how much, of what lies further on
    # From the end on, and what lies in a place before it.
    for file, start, end in sorted(places, key=lambda place: (place[0], -place[1], place[2])):
        text = texts[file]
        end_now = end + sum(by for other, at, by in grown if other == file and at < end)
        switched = text[start:end_now]
        for number, place in places[file, start, end]:
            switched = place.switched(number, switched)
        texts[file] = text[:start] + switched + text[end_now:]
        grown.append((file, start, len(switched) - (end_now - start)))
    return texts


@dataclass
class Planted:
    """The kernels of one op with bugs in them. script: what `serve`s the trials."""

    folder: Path
    op: str
    script: str
    bugs: Bugs
    served: subprocess.Popen = field(init=False)

    def __post_init__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        header = self.folder / "planted.cuh"
        header.write_text(SWITCH)
        builder = Builder(self.folder, self.op, before_each_launch="plant();", flags=("-include", str(header)))
        library = builder.build(self.op, with_switches(self.op, self.bugs))
        command = [sys.executable, self.script, "--serve", str(library)]
        self.served = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def survives(self, name: str | None, trial: str) -> bool:
        """Whether the kernels pass a trial with this bug, or with none."""
        number = 0 if name is None else 1 + list(self.bugs).index(name)
        questions, answers = self.served.stdin, self.served.stdout
        assert questions
        assert answers
        print(number, trial, file=questions, flush=True)
        answer = answers.readline()
        assert answer in ("passed\n", "failed\n"), f"no answer to {trial}"
        return answer == "passed\n"

    def __enter__(self) -> "Planted":
        return self

    def __exit__(self, *raised: object) -> None:
        self.served.communicate()


def report(libraries: Iterable[Planted], trials: Mapping[str, str], harmless: Mapping[str, str]) -> int:
    """Prints what became of each bug in its trial, which passes where it does in all libraries. harmless: why some bugs
    may go unnoticed. -> whether another one did"""
    libraries = list(libraries)
    for trial in set(trials.values()):
        if not all(library.survives(None, trial) for library in libraries):
            sys.exit("the kernels fail without any bug")
    verdicts = {}
    for name, trial in trials.items():
        lives = all(library.survives(name, trial) for library in libraries)
        verdicts[name] = "caught" if not lives else "harmless" if name in harmless else "MISSED"
        print(f"{name}  {verdicts[name]}{f': {harmless[name]}' if verdicts[name] == 'harmless' else ''}", flush=True)
    counted = Counter(verdicts.values())
    print(", ".join(f"{counted[verdict]} {verdict}" for verdict in ("caught", "harmless", "MISSED")))
    return bool(counted["MISSED"])


def limit_time(seconds: int) -> None:
    """Of a processor, from now on, whatever else it has to do: beyond that this process is killed."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + seconds, resource.RLIM_INFINITY))


def serve(library: Path, trials: Mapping[str, Callable[[Path], None]]) -> None:
    """Answers each line "number trial" with how that went in a process of its own, which ends where it hangs by what it
    says to `limit_time`."""
    answers = os.fdopen(os.dup(1), "w")
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    for line in sys.stdin:
        number, trial = line.split()
        child = os.fork()
        if child == 0:
            os.environ[VARIABLE] = number
            status = 1
            try:
                trials[trial](library)
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        print("passed" if status == 0 else "failed", file=answers, flush=True)
