"""`gptkernels compare A.json B.json`: which cases of B are slower or faster than in A, beyond doubt.

The interval is a bootstrap of the ratio of medians, resampling the rounds of turns and then the samples in each, so
that a drift between rounds counts as the noise it is. FASTER and SLOWER: the whole interval is beyond the smallest
change that matters; SAME: all of it is within; AMBIGUOUS: it crosses over, or there are too few samples to say.
"""

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from . import schema
from .report import duration

MATTERS = 0.03
CONFIDENCE = 0.999  # there are hundreds of cases, and none should be called slower by chance
RESAMPLES = 4000
FEWEST_SAMPLES, FEWEST_ROUNDS = 8, 3
COLOURS = {"SAME": "dim", "FASTER": "green", "SLOWER": "bold red", "BROKEN": "bold red", "AMBIGUOUS": "yellow"}


@dataclass(frozen=True)
class Verdict:
    """low, high: of the ratio of times, B over A"""

    name: str
    ratio: float | None = None
    low: float | None = None
    high: float | None = None


def rounds_of(row: dict) -> list[np.ndarray]:
    """The samples by round; all in one where the rounds are not known."""
    samples = np.asarray(row["samples_us"], dtype=float)
    bounds = np.cumsum(row["rounds"])
    if len(bounds) == 0 or bounds[-1] != len(samples):
        return [samples]
    return [part for part in np.split(samples, bounds[:-1]) if len(part)]


def resampled_medians(rounds: list[np.ndarray], generator: np.random.Generator) -> np.ndarray:
    """-> (RESAMPLES,)"""
    shortest = min(len(part) for part in rounds)
    # (rounds, samples of each)
    grid = np.stack([part[:shortest] for part in rounds])
    which = generator.integers(len(rounds), size=(RESAMPLES, len(rounds), 1))
    inside = generator.integers(shortest, size=(RESAMPLES, len(rounds), shortest))
    return np.median(grid[which, inside].reshape(RESAMPLES, -1), axis=1)


def judge(before: dict, after: dict, matters: float = MATTERS) -> Verdict:
    """Of two rows with status ok"""
    parts = [rounds_of(row) for row in (before, after)]
    ratio = float(np.median(after["samples_us"]) / np.median(before["samples_us"]))
    if any(len(part) < FEWEST_ROUNDS or sum(map(len, part)) < FEWEST_SAMPLES for part in parts):
        return Verdict("AMBIGUOUS", ratio)
    generator = np.random.default_rng(0)
    medians = [resampled_medians(part, generator) for part in parts]
    tail = (1 - CONFIDENCE) / 2
    low, high = (float(bound) for bound in np.quantile(medians[1] / medians[0], [tail, 1 - tail]))
    if low > 1 + matters:
        name = "SLOWER"
    elif high < 1 / (1 + matters):
        name = "FASTER"
    elif low >= 1 / (1 + matters) and high <= 1 + matters:
        name = "SAME"
    else:
        name = "AMBIGUOUS"
    return Verdict(name, ratio, low, high)


def compare(before: dict, after: dict, matters: float = MATTERS) -> Iterator[tuple[dict, Verdict]]:
    """-> rows of `after` with a verdict; BROKEN: timed before, and now not ok. Rows that only one has are left out."""
    known = {key_of(row): row for row in before["cases"] if row["status"] == "ok"}
    for row in after["cases"]:
        old = known.get(key_of(row))
        if old is None or row["status"] == "skipped":
            continue
        yield row, judge(old, row, matters) if row["status"] == "ok" else Verdict("BROKEN")


def key_of(row: dict) -> tuple:
    return row["op"], row["label"], row["dtype"], row["pass"], row["contender"]


def read(path: str) -> dict:
    """ValueError where it is not a document of this version."""
    try:
        document = json.loads(Path(path).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    wrong = schema.problems(document)
    if wrong:
        raise ValueError(f"{path} is no result of gptkernels bench: {wrong[0]}")
    return document


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("before", metavar="A.json")
    parser.add_argument("after", metavar="B.json")
    parser.add_argument(
        "--matters", type=float, default=100 * MATTERS, metavar="PERCENT", help="the smallest change that matters"
    )
    parser.add_argument("--all", action="store_true", help="show also what stayed the same")


def run(options: Namespace) -> int:
    """Returns 1 if anything is SLOWER or BROKEN, 2 if the files cannot be compared."""
    try:
        before, after = read(options.before), read(options.after)
    except ValueError as error:
        print(f"gptkernels compare: {error}", file=sys.stderr)
        return 2
    console = Console()
    for name in ("device", "versions"):
        for key in before[name]:
            if before[name][key] != after[name].get(key):
                console.print(f"[yellow]{key}: {before[name][key]} before, {after[name].get(key)} after")
    found = list(compare(before, after, options.matters / 100))
    if not found:
        print("gptkernels compare: the two have no case in common", file=sys.stderr)
        return 2
    table = Table("op", "shape", "pass", "contender")
    for column in ("before", "after", "ratio", "interval", ""):
        table.add_column(column, justify="right", no_wrap=True)
    known = {key_of(row): row for row in before["cases"]}
    for row, verdict in found:
        if verdict.name != "SAME" or options.all:
            interval = "" if verdict.low is None else f"{verdict.low:.3f} - {verdict.high:.3f}"
            ratio = "" if verdict.ratio is None else f"{verdict.ratio:.3f}"
            table.add_row(
                row["op"],
                f"{row['label']} {row['dtype']}",
                row["pass"],
                row["contender"],
                duration(known[key_of(row)]["median_us"]),
                duration(row["median_us"]) or row["status"],
                ratio,
                interval,
                f"[{COLOURS[verdict.name]}]{verdict.name}",
            )
    if table.row_count:
        console.print(table)
    names = [verdict.name for _, verdict in found]
    console.print(", ".join(f"{names.count(name)} {name}" for name in COLOURS if name in names))
    return int("SLOWER" in names or "BROKEN" in names)
