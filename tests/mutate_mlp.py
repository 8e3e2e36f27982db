"""Removes each wait, fence, barrier and arrival from the CUDA MLP kernels, one at a time, and sees that the simulator
catches it: `python tests/mutate_mlp.py`, a few minutes."""

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from kernel_variants import Builder, source
from mlp_build import works

OPS = ("mlp", "gated_mlp")
FILES = ("mlp_kernel.cuh", "mlp_epilogue.cuh")
STATEMENT = re.compile(
    r"(?<!auto )\b(mbarrier_wait|mbarrier_arrive_expect|mbarrier_arrive_remote|wgmma_wait<\d>|wgmma_fence|wgmma_commit|"
    r"fence_async_proxy|fence_mbarrier_init|cluster_sync|named_barrier_sync|named_barrier_arrive|bulk_wait_read(?:<\w+>)?|"
    r"bulk_commit|release|boxes\.(?:template )?wait_stored<[^;>]*>|boxes\.wait_loaded|__syncwarp)\([^;{}]*\);"
)
# What may go without a wrong result, by how the source goes on from there, and why.
ONE_BY_ONE = "the simulator runs a warp's lanes together"
HARMLESS = {
    "fence_mbarrier_init();": "the simulator does not check it",
    "__syncwarp();": ONE_BY_ONE,
    "named_barrier_sync(kGroup + group, kWarpgroup); } };": "the group multiplies together before it writes sums again",
}
TIMEOUT_S = 120


def mutants() -> list[tuple[str, int, str, str | None, str]]:
    """-> file, line number, what was removed, why that may be harmless, the file's text without it"""
    found = []
    for file in FILES:
        text = source("mlp", file)
        for match in STATEMENT.finditer(text):
            rest = " ".join(text[match.start() :][:200].split())
            reason = next((why for start, why in HARMLESS.items() if rest.startswith(start)), None)
            line = text.count("\n", 0, match.start()) + 1
            found.append((file, line, match.group(), reason, f"{text[: match.start()]};{text[match.end() :]}"))
    return found


def survives(library: Path, op: str) -> bool:
    """Whether its kernels pass, in a process of their own: a hang counts as caught."""
    command = [sys.executable, os.path.abspath(__file__), "--run", str(library), "--op", op]
    try:
        return subprocess.run(command, capture_output=True, timeout=TIMEOUT_S).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, metavar="LIBRARY", help=argparse.SUPPRESS)
    parser.add_argument("--op", choices=OPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        return 0 if works(arguments.run, arguments.op) else 1
    caught, harmless, missed = 0, 0, []
    with tempfile.TemporaryDirectory() as name, contextlib.suppress(KeyboardInterrupt):
        builders = {op: Builder(Path(name) / op, op) for op in OPS}
        if not all(survives(builder.build("unchanged", {}), op) for op, builder in builders.items()):
            sys.exit("the kernels fail without any change")
        for file, line, removed, reason, text in mutants():
            edits = {file: text}
            lives = all(survives(builder.build(f"line_{line}", edits), op) for op, builder in builders.items())
            caught, harmless = caught + (not lives), harmless + (lives and reason is not None)
            if lives and not reason:
                missed.append(f"{file}:{line}: {removed}")
            verdict = "caught" if not lives else f"harmless: {reason}" if reason else "MISSED"
            print(f"{file}:{line}: {' '.join(removed.split())}  {verdict}", flush=True)
    print(f"{caught} caught, {harmless} harmless, {len(missed)} missed", *missed, sep="\n")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
