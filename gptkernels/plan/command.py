"""`gptkernels plan`: splits of a training run over GPUs, best first."""

import json
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import replace

from ..arguments import number, whole
from ..failures import UsageError
from ..models.config import PRESETS, GPTConfig
from .facts import GPUS
from .rates import rates_of
from .search import DEFAULT_MODEL, Job, search

__all__ = ["add_arguments", "run"]

DIMENSIONS = ("layers", "width", "heads", "vocabulary")
BATCH = 2**19


def add_arguments(parser: ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=PRESETS, metavar="NAME", help=f"{', '.join(PRESETS)} ({DEFAULT_MODEL})")
    for name in DIMENSIONS:
        model.add_argument(f"--{name}", type=whole(1), help="of a model of your own, or in place of the preset's")
    model.add_argument("--context", type=whole(2), help="tokens of a sequence; the model's own by default")
    model.add_argument("--window", type=whole(1), help="of banded layers, every other one of a model of your own")
    model.add_argument("--save", choices=("all", "preact", "input"), help="what the MLP keeps for backward")

    run_group = parser.add_argument_group("run")
    run_group.add_argument("--gpu", choices=GPUS, default="h100", help="(h100)")
    run_group.add_argument("--gpus", type=whole(1, 65536), default=8, help="how many (8)")
    run_group.add_argument("--tokens", type=number(above=0), default=300e9, help="of the whole run (300e9)")
    run_group.add_argument("--batch", type=number(above=0), help=f"tokens of a step ({BATCH:,}, or a sequence per GPU)")
    run_group.add_argument("--price", type=number(at_least=0), default=2.5, help="of a GPU for an hour (2.5)")
    run_group.add_argument(
        "--noise-scale", type=number(above=0), help="tokens; by default what Kaplan et al. give for the final loss"
    )

    output = parser.add_argument_group("output")
    output.add_argument("--all", action="store_true", help="every split, and why each of the others cannot be")
    output.add_argument("--json", action="store_true", help="the same as data")
    output.add_argument("--check-published", action="store_true", help="the model against published runs, and stop")


def run(options: Namespace) -> int:
    from . import report

    if options.check_published:
        return report.print_published(options.json)
    job = job_of(options)
    window = job.config.window if "banded" in job.config.pattern else None
    rates = rates_of(job.gpu, job.config.head_size, job.length, window)
    plans, others = search(job, rates)
    if options.json:
        json.dump(report.document(job, rates, plans, others, options.noise_scale), sys.stdout, indent=1)
        print()
    else:
        report.print_plans(job, rates, plans, others, options)
    return 0 if plans else 1


def job_of(options: Namespace) -> Job:
    config = config_of(options)
    length = config.context
    batch = options.batch or float(max(BATCH, options.gpus * length))
    if batch < length:
        raise UsageError(f"--batch must be at least the {length} tokens of a sequence, not {batch:g}")
    return Job(config, length, GPUS[options.gpu], options.gpus, batch, options.tokens, options.price)


def config_of(options: Namespace) -> GPTConfig:
    given = {name: getattr(options, name) for name in (*DIMENSIONS, "context", "window", "save")}
    given = {name: value for name, value in given.items() if value is not None}
    own = options.model is None and any(name in given for name in DIMENSIONS)
    if own:
        missing = [f"--{name}" for name in DIMENSIONS[:3] if name not in given]
        if missing:
            raise UsageError(f"a model of your own needs {', '.join(missing)} as well; --model names a published one")
        base = GPTConfig()
        given |= {"pattern": ("dense", "banded")} if "window" in given else {}
    else:
        base = PRESETS[options.model or DEFAULT_MODEL]
        if "window" in given and "banded" not in base.pattern:
            given["pattern"] = ("dense", "banded")
    try:
        return replace(base, **given)
    except ValueError as error:
        name, rest = str(error).split(" ", 1)
        raise UsageError(f"--{name.replace('_', '-')} {rest}") from None
