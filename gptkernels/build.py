"""`gptkernels build`: compiles the CUDA library for this user."""

import sys
from argparse import ArgumentParser, Namespace

from rich.console import Console

from . import cuda_build
from .progress import Steps


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--verbose", action="store_true", help="show the compiler's output")


def run(options: Namespace) -> int:
    try:
        with Steps(Console(), 1, "compiling") as steps:
            path = cuda_build.build_into_cache(options.verbose, progress=steps.at)
    except cuda_build.BuildError as error:
        print(f"gptkernels build: {error}", file=sys.stderr)
        return 1
    print(f"built {path}")
    return 0
