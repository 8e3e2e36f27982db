"""The command line: `gptkernels` or `python -m gptkernels`."""

import os
import sys
from argparse import ArgumentParser
from importlib import import_module

from . import __version__
from .failures import UsageError, one_line

# Each module has add_arguments(parser) and run(options) -> exit status, and is imported when its command is called.
COMMANDS = {
    "info": (".info", "versions, hardware, and which backend of which op runs here"),
    "check": (".check", "every op and backend against the float64 reference"),
    "bench": (".bench.run", "speed of each op against PyTorch and other libraries, proved right first"),
    "tune": (".tuning.tune", "measure this machine: from then on `auto` is the fastest that was proved right here"),
    "compare": (".bench.compare", "two results of bench: SAME, FASTER, SLOWER or AMBIGUOUS"),
    "train": (".models.train", "train or fine-tune a GPT"),
    "generate": (".models.generate", "continue a prompt with a trained GPT"),
    "few-shot": (".models.few_shot_command", "how often a trained GPT picks the right answer of a few"),
    "profile": (".profile.run", "tokens per second of a whole model, and where its time and memory go"),
    "plan": (".plan.command", "how to split a training run over GPUs: memory, traffic, time and money"),
    "build": (".build", "compile the CUDA library for this user"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: gptkernels COMMAND [options]    (COMMAND --help tells the options)",
            "",
            "Fused kernels for GPTs: is all well here, and how fast?",
            "",
            *lines,
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """-> 0, 1 for a failure, 2 for options that make no sense, 130 after Ctrl-C"""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"gptkernels {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        print(f"gptkernels: no command {name!r}, only {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        return run_command(name, rest)
    except BrokenPipeError:
        # Whoever read our output has gone; what Python still has for it must not fail at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def run_command(name: str, rest: list[str]) -> int:
    module, about = COMMANDS[name]
    try:
        command = import_module(module, __package__)
        parser = ArgumentParser(f"gptkernels {name}", description=about)
        command.add_arguments(parser)
        for word in rest:
            if word.startswith("--") and word.endswith("=--"):  # argparse would lose it, and give an empty list
                parser.error(f"argument {word.removesuffix('=--')}: must have a value, not --")
        return command.run(parser.parse_args(rest))
    except KeyboardInterrupt:
        print(f"\ngptkernels {name}: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except Exception as error:
        reason = one_line(error)
        if reason is None:
            raise
        print(f"gptkernels {name}: {reason}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
