"""The command line: `gptkernels` or `python -m gptkernels`."""

import argparse
import sys


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser("gptkernels", description="Fused kernels for GPTs: is all well here, and how fast?")
    commands = main.add_subparsers(dest="command", required=True)

    info = commands.add_parser("info", help="versions, hardware, and which backend of which op runs here")
    info.add_argument("--json", action="store_true", help="machine-readable")

    check = commands.add_parser("check", help="every op and backend against the float64 reference")
    check.add_argument("--op", action="append", metavar="OP", help="only this op (may be repeated)")
    check.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "simulator"))
    check.add_argument("--seed", type=int, help="of the random inputs; a fresh one by default")
    check.add_argument("--json", metavar="FILE", help="also write the results there")

    build = commands.add_parser("build", help="compile the CUDA library for this user")
    build.add_argument("--verbose", action="store_true", help="show the compiler's output")
    return main


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.command == "info":
        from . import info

        return info.run(options.json)
    if options.command == "check":
        from . import check

        unknown = sorted(set(options.op or ()) - set(check.CASES))
        if unknown:
            print(f"gptkernels check: --op must be one of {', '.join(check.CASES)}, not {unknown[0]}", file=sys.stderr)
            return 2
        return check.run(options.op, options.device, options.seed, options.json)
    return build_library(options.verbose)


def build_library(verbose: bool) -> int:
    from . import cuda_build

    try:
        path = cuda_build.build_into_cache(verbose)
    except cuda_build.BuildError as error:
        print(f"gptkernels build: {error}", file=sys.stderr)
        return 1
    print(f"built {path}")
    return 0
