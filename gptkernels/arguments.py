"""Types of command-line arguments: a value out of range is an error that names the flag."""

import math
from argparse import ArgumentTypeError
from collections.abc import Callable

SEEDS = 2**32


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """An int of low ... high"""
    accepted = f"a whole number of {low} ... {high}" if high is not None else f"a whole number, at least {low}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ArgumentTypeError(f"must be {accepted}, not {text!r}") from None
        if value < low or (high is not None and value > high):
            raise ArgumentTypeError(f"must be {accepted}, not {text}")
        return value

    return parse


seed = whole(0, SEEDS - 1)


def number(*, above: float | None = None, at_least: float | None = None, at_most: float | None = None):
    """A finite float within the bounds"""
    bounds = [
        f"{sign} {bound}" for sign, bound in ((">", above), (">=", at_least), ("<=", at_most)) if bound is not None
    ]
    accepted = " ".join(["a finite number", " and ".join(bounds)]).strip()

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        inside = (
            math.isfinite(value)
            and (above is None or value > above)
            and (at_least is None or value >= at_least)
            and (at_most is None or value <= at_most)
        )
        if not inside:
            raise ArgumentTypeError(f"must be {accepted}, not {text!r}")
        return value

    return parse
