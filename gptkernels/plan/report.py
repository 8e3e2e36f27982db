"""What `gptkernels plan` prints, at 80 columns, or gives as data."""

import json
import sys
from argparse import Namespace
from collections import Counter
from dataclasses import asdict, replace

from rich.console import Console
from rich.table import Table

from ..models import cost
from ..models.config import PRESETS
from .batch import cost_of, critical_batch, expected_loss
from .facts import read
from .memory import step_memory
from .model import model_size
from .published import BOUND, MISSED, Run, runs
from .rates import Constants, Rates
from .search import DEFAULT_MODEL, Infeasible, Job, Plan
from .step import step_times

SHOWN = 5
KINDS = {
    "weights": "weights, float32",
    "gradients": "gradients, float32",
    "optimizer": "AdamW's moments",
    "activations": "kept for backward",
    "halo": "halos of banded layers",
    "loss": "the loss, a chunk of logits",
    "workspace": "weights gathered or cast, CUDA, NCCL",
}


def print_plans(job: Job, rates: Rates, plans: list[Plan], others: list[Infeasible], options: Namespace) -> None:
    console = Console()

    def say(text: str = "") -> None:
        console.print(text, soft_wrap=False, highlight=False, markup=False)

    say(f"{title(job)}, on {job.gpus} x {job.gpu.name.upper()}:")
    if plans:
        console.print(table_of(plans if options.all else plans[:SHOWN]))
        details(console, plans[0])
        say(command(plans[0], options))
        say()
        for line in (*savings(plans[0], rates), *batch_lines(job, options.noise_scale)):
            say(line)
    infeasible(say, others, options.all or not plans)
    for line in rates.says:
        say(line)
    say("What else is behind the figures, and how far off they are: --check-published")


def title(job: Job) -> str:
    config, parameters = job.config, model_size(job.config).parameters
    window = f", window {config.window}" if "banded" in config.pattern else ""
    return (
        f"{config.layers} layers of {config.width}, {config.heads} heads{window}, {count(parameters)} parameters, "
        f"{job.length:,} tokens a sequence"
    )


def count(number: float) -> str:
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.3g}{unit}"
    return f"{number:.0f}"


def gigabytes(number: float) -> str:
    return f"{number / 1e9:,.1f}" if number >= 5e7 else f"{number / 1e9:.2g}"


def figure(number: float) -> str:
    """Three digits, or all before the point"""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def duration(seconds: float) -> str:
    return f"{figure(seconds)} s" if seconds >= 1 else f"{figure(1e3 * seconds)} ms"


def table_of(plans: list[Plan]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("parallel", "at once", "GB", "step", "exposed", "tokens/s", "MFU", "days", "cost"):
        table.add_column(column, justify="left" if column == "parallel" else "right", no_wrap=True)
    for plan in plans:
        table.add_row(
            plan.split.parallel,
            f"{plan.step.micro} x {plan.step.times}",
            f"{plan.memory.total / 1e9:.0f}",
            duration(plan.times.total),
            f"{100 * plan.times.exposed / plan.times.total:.0f}%",
            count(plan.tokens_per_second),
            f"{100 * plan.mfu:.1f}%",
            figure(plan.days),
            count(plan.money),
        )
    return table


def details(console: Console, plan: Plan) -> None:
    memory = Table("the best: GB on each GPU", "", box=None, pad_edge=False)
    for kind, size in asdict(plan.memory).items():
        if size:
            memory.add_row(KINDS[kind], gigabytes(size))
    memory.add_row(f"of {plan.job.gpu.memory / 1e9:.0f}", gigabytes(plan.memory.total))
    memory.columns[1].justify = "right"
    traffic = Table("GB to each GPU a step", "NVLink", "network", "when", box=None, pad_edge=False)
    for each in plan.times.transfers:
        traffic.add_row(each.name, gigabytes(each.nvlink), gigabytes(each.network), WHEN[each.when])
    for column in traffic.columns[1:3]:
        column.justify = "right"
    console.print()
    console.print(memory)
    if plan.times.transfers:
        console.print()
        console.print(traffic)
    times = plan.times
    console.print(
        f"\na step of {count(plan.batch)} tokens: computation {duration(times.compute)} (attention "
        f"{duration(times.attention)}), communication beside it {duration(times.exposed)}, optimizer "
        f"{duration(times.optimizer)}",
        highlight=False,
    )


WHEN = {
    "data": "beside computation",
    "step": "once a step",
    "waits": "in its way",
    "attention": "beside attention",
}


def command(plan: Plan, options: Namespace) -> str:
    """For our trainer, which every split that is searched is one of"""
    job, gpus = plan.job, plan.job.gpus
    own = {name: getattr(options, name) for name in ("context", "window", "save")}
    given = {name: value for name, value in own.items() if value is not None}
    name = options.model or DEFAULT_MODEL
    if replace(PRESETS[name], **given) != job.config:
        return f"gptkernels train has no name for this model; with one: --parallel {plan.split.parallel}"
    nodes = -(-gpus // job.gpu.per_node)
    where = f"--nnodes {nodes} " if nodes > 1 else ""
    launch = "" if gpus == 1 else f"torchrun {where}--nproc-per-node {min(gpus, job.gpu.per_node)} -m "
    words = [f"run: {launch}gptkernels train --model {name} --data FILE --batch {plan.sequences}"]
    words += [f"--micro-batch {plan.step.micro}"] * (plan.step.times > 1)
    words += [f"--{option} {value}" for option, value in given.items()]
    return " ".join([*words, *[f"--parallel {plan.split.parallel}"] * (gpus > 1)])


def savings(plan: Plan, rates: Rates) -> list[str]:
    """What bands save beside layers that are all dense."""
    job, step = plan.job, plan.step
    windows = [window for window in step.windows() if window is not None]
    if not windows:
        return []
    lines = []
    if plan.split.context > 1:
        lines.append(
            f"halo: {figure(step.halo(windows[0]) / 1e6)} MB for a banded layer, where all keys and values would be "
            f"{figure(step.gathered / 1e6)} MB"
        )
    dense = replace(step, config=replace(job.config, pattern=("dense",)))
    flops = [cost.training_flops_per_token(each.config, job.length) for each in (step, dense)]
    days = plan.days * step_times(dense, rates).total / plan.times.total
    spared = step_memory(dense).total - plan.memory.total
    lines.append(
        f"bands against all layers dense, split alike: {100 * (1 - flops[0] / flops[1]):.1f}% fewer FLOPs, "
        f"{gigabytes(abs(spared))} GB {'less' if spared >= 0 else 'more'}, "
        f"{figure(plan.days)} days and not {figure(days)}"
    )
    return lines


def batch_lines(job: Job, noise_scale: float | None) -> list[str]:
    """noise_scale: tokens, as training logs it; None for what is expected at the end"""
    critical, why = noise_of(job, noise_scale)
    one, half, twice = (cost_of(scale * job.batch, critical) for scale in (1, 0.5, 2))
    return [
        f"noise scale: {count(critical)} tokens, {why}. A batch of {count(job.batch)} takes {one.steps:.2f} times the "
        f"fewest steps and {one.tokens:.2f} times the fewest tokens; half of it {half.steps:.2f} and "
        f"{half.tokens:.2f}, twice {twice.steps:.2f} and {twice.tokens:.2f}"
    ]


def noise_of(job: Job, noise_scale: float | None) -> tuple[float, str]:
    if noise_scale is not None:
        return noise_scale, "as given"
    loss = expected_loss(job.config, model_size(job.config), job.tokens)
    return critical_batch(loss), f"by Kaplan et al. for a loss of {loss:.2f}, that of {count(job.tokens)} tokens"


def infeasible(say, others: list[Infeasible], all_of_them: bool) -> None:
    if not others:
        return
    if all_of_them:
        for each in others:
            say(f"not {each.split.parallel}: {each.reason}")
        return
    kinds = Counter(each.kind for each in others)
    reasons = ", ".join(f"{number} as {kind}" for kind, number in kinds.items())
    say(f"{len(others)} other splits cannot be (--all lists them): {reasons}")


def document(job: Job, rates: Rates, plans: list[Plan], others: list[Infeasible], noise_scale: float | None) -> dict:
    critical, why = noise_of(job, noise_scale)
    at = cost_of(job.batch, critical)
    return {
        "model": asdict(job.config),
        "gpu": job.gpu.name,
        "gpus": job.gpus,
        "rates": list(rates.says),
        "noise_scale": {"tokens": critical, "from": why},
        "batch": {"tokens": at.batch, "steps_to_fewest": at.steps, "tokens_to_fewest": at.tokens},
        "plans": [one_plan(plan) for plan in plans],
        "infeasible": [{"parallel": each.split.parallel, "reason": each.reason} for each in others],
    }


def one_plan(plan: Plan) -> dict:
    times = asdict(plan.times) | {"total": plan.times.total}
    return {
        "parallel": plan.split.parallel,
        "data": plan.split.data,
        "tensor": plan.split.tensor,
        "context": plan.split.context,
        "sharding": plan.split.sharding,
        "micro_batch": plan.step.micro,
        "micro_batches": plan.step.times,
        "batch_tokens": plan.batch,
        "memory_bytes": asdict(plan.memory) | {"total": plan.memory.total},
        "transfers": times.pop("transfers"),
        "seconds": times,
        "tokens_per_second": plan.tokens_per_second,
        "mfu": plan.mfu,
        "days": plan.days,
        "cost": plan.money,
    }


def print_published(as_json: bool) -> int:
    """-> 0 if every run without a known reason is within the bound"""
    constants = Constants.load()
    found = [(run, run.predicted(constants), run.error(constants)) for run in runs()]
    bad = [run for run, _, error in found if abs(error) > BOUND and run.key not in MISSED]
    if as_json:
        rows = [asdict(run) | {"seconds": run.seconds, "predicted": made, "error": off} for run, made, off in found]
        json.dump({"bound": BOUND, "constants": asdict(constants), "runs": rows}, sys.stdout, indent=1)
        print()
        return int(bool(bad))
    console = Console()
    for name, source in read("published.json")["sources"].items():
        console.print(f"{source['about']}\n{source['figures']}", highlight=False)
        console.print(published_table([row for row in found if row[0].source == name]))
        console.print()
    held = [abs(error) for run, _, error in found if not run.is_fitted]
    console.print(
        f"{len(found)} runs; the constants were fitted to {len(found) - len(held)} of them, those with a *. The others "
        f"are {100 * sum(held) / len(held):.1f}% off on average, {100 * max(held):.1f}% at most. "
        "t, p: tensor and pipeline parallel; else what data parallelism shards.",
        highlight=False,
    )
    for run, _, error in found:
        if run.key in MISSED:
            console.print(f"{' '.join(map(str, run.key))}, {100 * error:+.0f}%: {MISSED[run.key]}", highlight=False)
    return int(bool(bad))


def published_table(found: list[tuple[Run, float, float]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("model", "GPUs", "tokens", "micro", "split", "step", "predicted", "error", ""):
        table.add_column(column, justify="left" if column in ("model", "split", "") else "right", no_wrap=True)
    for run, predicted, error in found:
        cut = f"t{run.tensor} p{run.pipeline}" if run.tensor * run.pipeline > 1 else run.sharding
        table.add_row(
            run.model,
            f"{run.gpus} {run.gpu}",
            str(run.length),
            str(run.micro),
            cut,
            duration(run.seconds),
            duration(predicted),
            f"{100 * error:+.1f}%",
            "*" if run.is_fitted else "",
        )
    return table
