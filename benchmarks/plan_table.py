"""README's table of the planner against published runs."""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from measured import table

ROOT = Path(__file__).resolve().parent.parent


def planner() -> str:
    sys.path.insert(0, str(ROOT))
    from gptkernels.plan.facts import read
    from gptkernels.plan.published import BOUND, MISSED, runs
    from gptkernels.plan.rates import Constants

    constants = Constants.load()
    errors = {run: run.error(constants) for run in runs()}
    groups: dict[tuple[str, str, str], list] = {}
    for run in errors:
        groups.setdefault((run.source, run.model, run.gpu), []).append(run)
    sources = read("published.json")["sources"]
    rows = []
    for (source, model, gpu), found in groups.items():
        off = sorted((errors[run] for run in found), key=abs)
        rows.append(
            [
                source,
                model,
                f"{spread(found, lambda run: run.gpus)} {gpu}",
                spread(found, lambda run: run.length),
                str(len(found)) if len(found) > 1 else duration(found[0].seconds),
                f"{100 * off[-1]:+.1f}%",
                f"{100 * statistics.mean(map(abs, off)):.1f}%" if len(found) > 1 else "",
                str(sum(run.is_fitted for run in found) or ""),
            ]
        )
    header = [
        "published by",
        "model",
        "GPUs",
        "tokens a sequence",
        "runs, or a step",
        "largest error",
        "mean",
        "fitted",
    ]
    held = [abs(error) for run, error in errors.items() if not run.is_fitted]
    missed = [
        f"{run.model}, {run.length} tokens on {run.gpus} {run.gpu} ({100 * errors[run]:+.0f}%): {MISSED[run.key]}"
        for run in errors
        if run.key in MISSED
    ]
    links = [f"[{name}]({one['figures']})" for name, one in sources.items()]
    within = f"{len(errors) - len(missed)} runs are within {100 * BOUND:.0f}%; those that are not: {'; '.join(missed)}"
    return (
        f"{table(header, rows)}\n\nOf {len(errors)} runs {len(errors) - len(held)} are fitted to; the others are "
        f"{100 * statistics.mean(held):.1f}% off in their step times on average. {within}. "
        f"Published by: {', '.join(links)}."
    )


def spread(found: list, of: Callable) -> str:
    values = sorted({of(run) for run in found})
    return str(values[0]) if len(values) == 1 else f"{values[0]} ... {values[-1]}"


def duration(seconds: float) -> str:
    return f"{seconds:.3g} s"
