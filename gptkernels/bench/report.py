"""Numbers made from samples, and the tables that people read."""

import statistics

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from .cases import NORMS, Case
from .measure import ROUNDS, Timing
from .peers import Contender

SHOWN = {"fwd": "forward", "bwd": "backward", "both": "forward + backward"}
MEMORY_BOUND = (*NORMS, "decode_attention")
LEGEND = (
    "time: median. spread: half of p20 to p80. to ours: of our fastest. of gemm, of copy: of the rates above. "
    "error: of what our kernels are allowed. memory: peak beyond what is there before."
)
# Rough rates for the plan of a dry run: an H100, and a core or two.
PLANNED = {"cuda": (400e12, 2e12), "cpu": (5e10, 8e9)}
# What compiling takes before a contender has run once: guesses for the plan as well.
START_S = {
    "cuda": {"triton": 4, "flash-attn-4": 8, "quack": 4, "liger": 2, "flex": 15, "compile": 15},
    "cpu": {"flex": 40, "compile": 30},
}


def summary(samples: list[float]) -> dict:
    """median, p20 and p80; of few samples the nearest ones"""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return {
        "median_us": statistics.median(ordered),
        "p20_us": ordered[round(0.2 * last)],
        "p80_us": ordered[round(0.8 * last)],
    }


def figures(timing: Timing, row: dict, ceilings: dict) -> dict:
    """Everything in a row that follows from its samples."""
    found = summary(timing.samples_us)
    tflops, gbps = (row[work] / found["median_us"] / scale for work, scale in (("flops", 1e6), ("bytes", 1e3)))
    gemm, copy = 100 * tflops / ceilings["gemm_tflops"][row["dtype"]], 100 * gbps / ceilings["copy_gbps"]
    return found | {
        "status": "ok",
        "detail": "",
        "timer": timing.timer,
        "calls_per_sample": timing.calls_per_sample,
        "cold": timing.cold,
        "samples_us": timing.samples_us,
        "host_us": statistics.median(timing.host_us) if timing.host_us else None,
        "tflops": tflops,
        "gbps": gbps,
        "percent_of_gemm": gemm,
        "percent_of_copy": copy,
        "suspect": max(gemm, copy) > 100,
        "sm_mhz": statistics.median(timing.sm_mhz) if timing.sm_mhz else None,
        "throttle": sorted(timing.throttle),
    }


def expected_seconds(case: Case, contenders: list[Contender], device_type: str) -> float:
    flops_rate, bytes_rate = PLANNED[device_type]
    seconds = 2.0 if device_type == "cuda" else 0.3  # inputs, and the reference
    for contender in contenders:
        seconds += START_S[device_type].get(contender.name, 0.5)
        for which in case.passes:
            call = max(case.flops(which) / flops_rate, case.bytes(which) / bytes_rate)
            if contender.name in ("naive", "compile", "sdpa-math") and case.shape.get("W"):
                call *= case.shape["T"] / case.shape["W"] / 2
            seconds += max(0.5 if device_type == "cuda" else 1.0, (ROUNDS + 4) * call)
    return seconds


def print_plan(console: Console, plan: list[tuple[Case, list[Contender]]], device: torch.device) -> None:
    table = Table(box=None)
    for column in ("case", "passes", "contenders"):
        table.add_column(column, overflow="fold")
    table.add_column("expected", justify="right", no_wrap=True)
    total = 0.0
    for case, contenders in plan:
        seconds = expected_seconds(case, contenders, device.type)
        total += seconds
        names = ", ".join(contender.name for contender in contenders)
        shape = f"{case.op} {case.label}, {case.dtype}"
        table.add_row(shape, " ".join(case.passes), names, f"{seconds:.0f} s")
    console.print(table)
    console.print(f"{len(plan)} cases on {device.type}, about {total:.0f} s")


def duration(microseconds: float | None) -> str:
    """In four digits"""
    if microseconds is None:
        return ""
    for unit, scale in (("us", 1.0), ("ms", 1e3)):
        if microseconds < 999.95 * scale:
            return f"{microseconds / scale:.4g} {unit}"
    return f"{microseconds / 1e6:.4g} s"


def size(count: float | None) -> str:
    if count is None:
        return ""
    return f"{count / 2**20:.0f} MiB" if count < 10 * 2**30 else f"{count / 2**30:.1f} GiB"


def print_document(console: Console, document: dict) -> None:
    ceilings, device = document["ceilings"], document["device"]
    rates = ", ".join(f"{rate:.3g} TFLOP/s in {dtype}" for dtype, rate in ceilings.get("gemm_tflops", {}).items())
    if rates:
        console.print(
            f"{device['name']}: a large matrix product reaches {rates}; a copy {ceilings['copy_gbps']:.4g} GB/s",
            soft_wrap=True,
        )
    on_gpu = device["type"] == "cuda"
    groups: dict[tuple, list[dict]] = {}
    for row in document["cases"]:
        groups.setdefault((row["op"], row["label"], row["dtype"], row["pass"]), []).append(row)
    for (op, label, dtype, which), rows in groups.items():
        print_group(console, f"{op}, {SHOWN[which]}: {label}, {dtype}", rows, on_gpu)
    if groups:
        console.print(LEGEND, style="dim", soft_wrap=True)
    missing = {name: peer for name, peer in document["peers"].items() if peer["status"] == "missing"}
    for name, peer in missing.items():
        console.print(f"[dim]{name}: {peer['detail']}. {peer['install']}", soft_wrap=True, highlight=False)


def print_group(console: Console, title: str, rows: list[dict], on_gpu: bool) -> None:
    """The contenders of one case, fastest first; how many times the time of our fastest each takes."""
    flops_bound = rows[0]["op"] not in MEMORY_BOUND
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    columns = ("time", "spread", *["host"] * on_gpu, "to ours", *rate_columns(flops_bound, on_gpu), "error", "memory")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    timed = sorted((row for row in rows if row["status"] == "ok"), key=lambda row: row["median_us"])
    best = min((row["median_us"] for row in timed if row["kind"] == "ours"), default=None)
    for row in timed:
        name = f"[bold]{row['contender']}" if row["kind"] == "ours" else row["contender"]
        table.add_row(name, *cells(row, best, flops_bound, on_gpu))
    console.print(table)
    for row in timed:
        notes = ["above 100% of what was measured: suspect"] * row["suspect"] + row["throttle"]
        if notes:
            console.print(f"[yellow]  {row['contender']}: {'; '.join(notes)}", soft_wrap=True, highlight=False)
    for row in rows:
        if row["status"] != "ok":
            colour = "bold red" if row["kind"] == "ours" and row["status"] in ("wrong", "failed") else "dim"
            text = f"[{colour}]  {row['contender']}: {row['status']}. {row['detail']}"
            console.print(text, soft_wrap=True, highlight=False)


def rate_columns(flops_bound: bool, on_gpu: bool) -> tuple[str, str]:
    if flops_bound:
        return ("TFLOP/s" if on_gpu else "GFLOP/s"), "of gemm"
    return "GB/s", "of copy"


def cells(row: dict, best: float | None, flops_bound: bool, on_gpu: bool) -> list[str]:
    spread = 50 * (row["p80_us"] - row["p20_us"]) / row["median_us"]
    rate = row["tflops"] * (1 if on_gpu else 1000) if flops_bound else row["gbps"]
    return [
        duration(row["median_us"]),
        f"{spread:.0f}%",
        *[duration(row["host_us"])] * on_gpu,
        f"{row['median_us'] / best:.2f} x" if best else "",
        f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}",
        f"{row['percent_of_gemm' if flops_bound else 'percent_of_copy']:.0f}%",
        "" if row["error_ratio"] is None else f"{row['error_ratio']:.2f}",
        size(row["peak_bytes"]),
    ]
