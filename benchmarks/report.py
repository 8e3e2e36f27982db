"""Writes the tables of README.md from benchmarks/results/, so that no number there is typed by hand.

    python benchmarks/report.py [--check | --draw]

A table goes between <!-- begin NAME --> and <!-- end NAME -->. --check: exit 1 if README.md is not up to date. --draw:
draw the pictures of results/*-bench.json again.
"""

import argparse
import json
import re
import statistics
from pathlib import Path

from clock_tables import calibration, predictions
from measured import bench_tables, draw, profile_tables, table
from plan_table import planner

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def cpu_attention() -> str:
    """From bench_attention_cpu.py: time against masked attention, and memory as T grows."""
    found = [json.loads(line) for line in (RESULTS / "cpu_attention.jsonl").read_text().splitlines()]
    timed = next(row for row in found if "ratio" in row)
    speed = (
        f"Forward and backward at B=1, H=12, D=64, T={timed['T']}, window {timed['window']}, float32, "
        f"{timed['threads']} thread(s), torch {timed['torch']}: {timed['banded']:.2f} s, against "
        f"{timed['masked']:.2f} s of `F.scaled_dot_product_attention` with a boolean mask: "
        f"**{timed['ratio']:.1f} times** as fast. Memory:"
    )
    rows = [
        [str(row["T"]), f"{row['banded']:.0f} MiB", f"{row['one dense mask of float32']:.0f} MiB"]
        for row in found
        if "ratio" not in row
    ]
    return f"{speed}\n\n" + table(["T", "peak beyond the inputs", "one dense float32 mask alone"], rows)


def cpu_mlp() -> str:
    """From bench_mlp_cpu.py."""
    found = json.loads((RESULTS / "cpu_mlp.json").read_text())
    rows = [
        [*name.split(": "), f"{statistics.median(result['seconds']):.2f} s", f"{result['peak_mib']:.0f} MiB"]
        for name, result in found.items()
    ]
    return table(["forward and backward, float32, one thread", "", "time", "peak beyond the inputs"], rows)


def families() -> str:
    """From tests/test_swap_families.py."""
    found = json.loads((RESULTS / "families.json").read_text())
    columns = {"mlp": "MLP"}
    notes: list[str] = []

    def cell(text: str) -> str:
        if text == "exact":
            return text
        short, _, reason = text.partition(": ")
        if reason and reason not in notes:
            notes.append(reason)
        return f"{short} ({notes.index(reason) + 1})" if reason else text

    features = list(next(iter(found.values())))
    rows = [[name, *(cell(row[feature]) for feature in features)] for name, row in found.items()]
    made = table(["accelerate()", *(columns.get(feature, feature) for feature in features)], rows)
    numbered = "; ".join(f"({number}) {note}" for number, note in enumerate(notes, 1))
    meaning = (
        "Exact: as the untouched model in float32 to 1e-5, every parameter's gradient and 20 steps of training "
        "included, and in bfloat16 at most twice as far from the truth; generated tokens are the same."
    )
    return f"{made}\n\n{meaning} Left: {numbered}."


def host_time() -> str:
    """From host_time.py"""
    found = json.loads((RESULTS / "host_time.json").read_text())
    us: dict[tuple[str, str], dict[str, float]] = {}
    for row in found["rows"]:
        us.setdefault((row["op"], row["contender"]), {})[row["pass"]] = row["us"]
    rows = [
        [op, contender, *(f"{times[which]:.0f} us" if which in times else "" for which in ("forward", "backward"))]
        for (op, contender), times in sorted(us.items())
    ]
    where = f"torch {found['torch']}, Python {found['python']}, one thread of {found['machine']}"
    return f"{where}; kernels are launched and do nothing:\n\n" + table(["", "", "forward", "backward"], rows)


TABLES = {
    "cpu-attention": cpu_attention,
    "cpu-mlp": cpu_mlp,
    "families": families,
    "bench": bench_tables,
    "profile": profile_tables,
    "host-time": host_time,
    "planner": planner,
    "clock-predictions": predictions,
    "clock-calibration": calibration,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--draw", action="store_true")
    options = parser.parse_args()
    if options.draw:
        draw()
    readme = ROOT / "README.md"
    text = before = readme.read_text()
    for name, make in TABLES.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        filled = f"{begin}\n{make()}\n{end}"
        text, count = re.subn(f"{begin}.*?{end}", lambda _, filled=filled: filled, text, flags=re.S)
        if count != 1:
            raise SystemExit(f"README.md must have one {begin} ... {end}, not {count}")
    if options.check:
        return int(text != before)
    readme.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
