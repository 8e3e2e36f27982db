"""`gptkernels compare A.json B.json`: which cases of B are slower or faster than in A, beyond doubt.

The interval is a bootstrap of the ratio of medians, resampling the rounds of turns and then the samples in each, so
that a drift between rounds counts as the noise it is. FASTER and SLOWER: the whole interval is beyond the smallest
change that matters; SAME: all of it is within, or it holds 1 and the ratio itself is within; AMBIGUOUS: anything else,
or too few samples to say.

A machine that others use as well is slower at times, and so is everything on it. How much is known from the ceilings
that each run measured, and from what took turns with a row in the same case, for our kernels only what is not ours. A
row is SLOWER only if it is beyond all of these as well.
"""

import json
import math
import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ..failures import UsageError
from . import schema
from .report import MEMORY_BOUND, duration

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


@dataclass(frozen=True)
class Drift:
    """How much slower the machine itself may have become, at least and at most: ratios of times, B over A"""

    low: float = 1.0
    high: float = 1.0


STEADY = Drift()


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


def judge(before: dict, after: dict, matters: float = MATTERS, drift: Drift = STEADY) -> Verdict:
    """Of two rows with status ok"""
    parts = [rounds_of(row) for row in (before, after)]
    ratio = float(np.median(after["samples_us"]) / np.median(before["samples_us"]))
    if before["samples_us"] == after["samples_us"]:
        return Verdict("SAME", 1.0, 1.0, 1.0)
    if any(len(part) < FEWEST_ROUNDS or sum(map(len, part)) < FEWEST_SAMPLES for part in parts):
        return Verdict("AMBIGUOUS", ratio)
    generator = np.random.default_rng(0)
    medians = [resampled_medians(part, generator) for part in parts]
    tail = (1 - CONFIDENCE) / 2
    low, high = (float(bound) for bound in np.quantile(medians[1] / medians[0], [tail, 1 - tail]))
    smallest, largest = 1 / (1 + matters), 1 + matters
    if low > largest * drift.high:
        name = "SLOWER"
    elif high < smallest * drift.low:
        name = "FASTER"
    elif (smallest <= low and high <= largest) or (low <= 1 <= high and smallest <= ratio <= largest):
        name = "SAME"
    else:
        name = "AMBIGUOUS"
    return Verdict(name, ratio, low, high)


def ceiling_drifts(before: dict, after: dict) -> dict[str, float]:
    """Of what each run measured of its device at the start: by dtype of a large matrix product, and of a copy"""
    rates = [
        {**document["ceilings"].get("gemm_tflops", {}), "copy": document["ceilings"].get("copy_gbps")}
        for document in (before, after)
    ]
    return {name: rate / rates[1][name] for name, rate in rates[0].items() if rate and rates[1].get(name)}


def drift_of(row: dict, ceilings: dict[str, float], case: list[tuple[dict, float]]) -> Drift:
    """case: the rows that took turns with this one, itself included, and the ratios of their times"""
    ceiling = ceilings.get("copy" if row["op"] in MEMORY_BOUND else row["dtype"], 1.0)
    beside = [ratio for other, ratio in case if other is not row and other["kind"] != "ours"]
    if not beside and row["kind"] != "ours":
        beside = [ratio for other, ratio in case if other is not row]
    ratios = [1.0, ceiling, *([statistics.median(beside)] if beside else [])]
    return Drift(min(ratios), max(ratios))


def compare(before: dict, after: dict, matters: float = MATTERS) -> Iterator[tuple[dict, Verdict]]:
    """-> rows of `after` with a verdict; BROKEN: timed before, and now not ok. Rows that only one has are left out."""
    known = {key_of(row): row for row in before["cases"] if row["status"] == "ok"}
    ceilings = ceiling_drifts(before, after)
    cases: dict[tuple, list[tuple[dict, float]]] = {}
    for row in after["cases"]:
        old = known.get(key_of(row))
        if row["status"] == "ok" and old is not None:
            cases.setdefault(key_of(row)[:-1], []).append((row, row["median_us"] / old["median_us"]))
    for row in after["cases"]:
        old = known.get(key_of(row))
        if old is None or row["status"] == "skipped":
            continue
        drift = drift_of(row, ceilings, cases.get(key_of(row)[:-1], []))
        yield row, judge(old, row, matters, drift) if row["status"] == "ok" else Verdict("BROKEN")


def key_of(row: dict) -> tuple:
    return row["op"], row["label"], row["dtype"], row["pass"], row["contender"]


def read(path: str) -> dict:
    """UsageError where it is not a document of this version."""
    try:
        document = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    wrong = schema.problems(document)
    if wrong:
        raise UsageError(f"{path} is no result of gptkernels bench: {wrong[0]}")
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
    before, after = read(options.before), read(options.after)
    console = Console()
    for name in ("device", "versions"):
        for key in before[name]:
            if before[name][key] != after[name].get(key):
                console.print(f"[yellow]{key}: {before[name][key]} before, {after[name].get(key)} after")
    for name, drift in ceiling_drifts(before, after).items():
        if abs(math.log(drift)) > math.log(1 + options.matters / 100):
            what = "a copy" if name == "copy" else f"a large matrix product in {name}"
            console.print(
                f"[yellow]the machine itself: {what} took {drift:.2f} times as long in {options.after} as in "
                f"{options.before}; SLOWER and FASTER are what goes beyond that",
                soft_wrap=True,
                highlight=False,
            )
    found = list(compare(before, after, options.matters / 100))
    if not found:
        raise UsageError("the two have no case in common")
    known = {key_of(row): row for row in before["cases"]}
    shown = [(row, verdict) for row, verdict in found if verdict.name != "SAME" or options.all]
    for (op, label, dtype), rows in groupby(shown, lambda pair: key_of(pair[0])[:3]):
        table = Table(title=f"{op} {label}, {dtype}", title_justify="left", box=None)
        for column in ("pass", "contender", "before", "after", "ratio", "interval", ""):
            numeric = column in ("before", "after", "ratio", "interval")
            table.add_column(column, justify="right" if numeric else "left", no_wrap=True)
        for row, verdict in rows:
            table.add_row(*cells(known[key_of(row)], row, verdict))
        console.print(table)
    names = [verdict.name for _, verdict in found]
    console.print(", ".join(f"{names.count(name)} {name}" for name in COLOURS if name in names))
    return int("SLOWER" in names or "BROKEN" in names)


def cells(before: dict, after: dict, verdict: Verdict) -> list[str]:
    return [
        after["pass"],
        after["contender"],
        duration(before["median_us"]),
        duration(after["median_us"]) or after["status"],
        "" if verdict.ratio is None else f"{verdict.ratio:.3f}",
        "" if verdict.low is None else f"{verdict.low:.3f} - {verdict.high:.3f}",
        f"[{COLOURS[verdict.name]}]{verdict.name}",
    ]
