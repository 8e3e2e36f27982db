"""python -m ptxemu.timing calibrate [--json F] [--peer PATH]"""

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ptxemu.timing")
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "calibrate", help="predicted beside published times"
    )
    command.add_argument("--json", metavar="F", help="write the rows there too")
    command.add_argument("--peer", metavar="PATH", help="a checkout of Dao-AILab/flash-attention")
    chosen = parser.parse_args(arguments)
    from .. import cuda

    cuda.load_runtime()  # before any library can bring its own
    from . import calibrate

    rows, left = calibrate.calibrate(chosen.peer)
    calibrate.print_rows(rows, left)
    if chosen.json:
        shown = "python -m ptxemu.timing calibrate" + (" --peer CHECKOUT" if chosen.peer else "")
        calibrate.write_json(chosen.json, rows, shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
