"""How fast a GPU is at what a step is made of, and where that is known from: measured, predicted by the simulator's
clock, or a data sheet's rate times the share of it that published runs were found to reach."""

import json
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from .facts import FOLDER, GPU, GPUS, read

RESULTS = FOLDER.parent.parent / "benchmarks" / "results"  # of a checkout
CLOCK = "clock_predictions.json"
CLOCK_GPU = GPUS["h100"]
REFERENCE = GPUS["a100-80"]  # whose `half` is given
BACKWARD_ATTENTION = 0.9  # its rate beside forward's, where neither was measured


@dataclass(frozen=True)
class Constants:
    """All but `copy` were fitted, by benchmarks/fit_plan.py, to a third of the published runs."""

    product: dict[str, float]  # by family: a large matrix product's share of the peak
    attention: dict[str, float]  # by family: the share of the peak of 2023's flash-attention
    half: float  # the smallest dimension of a product at which REFERENCE has half of its rate
    backward: float  # products' rate in backward beside forward's
    again: float  # time of what backward computes again beside its first time
    link: float  # share of the links' rate
    hidden: float  # share of data-parallel traffic that computation hides
    copy: float  # share of HBM's rate: what the clock gives norms

    @classmethod
    def load(cls) -> "Constants":
        return cls(**read("constants.json")["constants"])


@dataclass(frozen=True)
class Rates:
    """FLOP/s and bytes/s"""

    product: float
    half: float
    copy: float
    dense: tuple[float, float]  # attention, forward and backward
    banded: tuple[float, float]
    constants: Constants
    says: tuple[str, ...] = ()

    def product_seconds(self, rows: float, columns: float, inner: float) -> float:
        """Of (rows, inner) @ (inner, columns). A smallest dimension of `half` means half the rate: tiles begin and end,
        and bytes move, in the time of so many columns."""
        return 2 * rows * columns * inner / self.product * (1 + self.half / min(rows, columns, inner))


def fitted(gpu: GPU, constants: Constants, attention_share: float | None = None) -> Rates:
    share = constants.attention[gpu.family] if attention_share is None else attention_share
    attention = gpu.peak * share, gpu.peak * share * BACKWARD_ATTENTION
    half = constants.half * (gpu.peak / gpu.hbm) / (REFERENCE.peak / REFERENCE.hbm)
    copy = gpu.hbm * constants.copy
    return Rates(gpu.peak * constants.product[gpu.family], half, copy, attention, attention, constants)


def rates_of(gpu: GPU, head_size: int, length: int, window: int | None, results: Path = RESULTS) -> Rates:
    """The best that is known of our kernels. window: of banded layers, if there are any"""
    rates, ceilings = fitted(gpu, Constants.load()), measured(gpu, results)
    if ceilings is None:
        shares = f"{rates.product / gpu.peak:.2f} and {rates.copy / gpu.hbm:.2f}"
        sheet = f"the data sheet's {gpu.peak / 1e12:.0f} TFLOP/s and {gpu.hbm / 1e9:.0f} GB/s"
        says = f"products and copies: {sheet} times {shares}, fitted to published runs of {gpu.family}"
    else:
        rates = replace(rates, product=ceilings["gemm_tflops"]["bfloat16"] * 1e12, copy=ceilings["copy_gbps"] * 1e9)
        says = f"products and copies: {rates.product / 1e12:.0f} TFLOP/s and {rates.copy / 1e9:.0f} GB/s, measured"
    dense = clock_attention(gpu, head_size, length, None, results)
    if dense is None:
        of_attention = (
            f"attention: {rates.dense[0] / gpu.peak:.2f} of the peak, fitted to published runs of {gpu.family}"
        )
        return replace(rates, says=(says, of_attention))
    banded = clock_attention(gpu, head_size, length, window, results) or dense
    of_attention = "attention: predicted by the simulator's clock for an H100, not measured"
    return replace(rates, dense=dense, banded=banded, says=(says, of_attention))


def measured(gpu: GPU, results: Path) -> dict | None:
    """The ceilings of a `gptkernels bench --json` on such a GPU"""
    for path in sorted(results.glob("*-bench.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        ceilings = document["ceilings"]
        if gpu.device in document["device"]["name"] and "bfloat16" in ceilings["gemm_tflops"]:
            return ceilings
    return None


@lru_cache
def clock_rows(results: Path) -> list[dict]:
    path = results / CLOCK
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    return [row for row in rows if row["op"] == "attention" and row["backend"] == "cuda"]


def clock_attention(
    gpu: GPU, head_size: int, length: int, window: int | None, results: Path
) -> tuple[float, float] | None:
    """FLOP/s forward and backward of what was predicted for the nearest head size, then window, then length; None where
    the clock knows nothing of this GPU's tensor cores"""
    rows = [row for row in clock_rows(results) if ("W" in row["shape"]) == (window is not None)]
    if gpu.peak != CLOCK_GPU.peak or not rows:
        return None
    wanted = {"D": head_size, "W": window, "T": length}

    def distance(row: dict) -> list[float]:
        return [abs(math.log(row["shape"][name] / value)) for name, value in wanted.items() if value is not None]

    def rate(which: str) -> float:
        row = min((row for row in rows if row["pass"] == which), key=distance)
        return float(row["rate"].removesuffix(" TFLOP/s")) * 1e12

    return rate("fwd"), rate("bwd")
