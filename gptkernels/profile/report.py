"""What `gptkernels profile` prints."""

from rich.console import Console
from rich.table import Table

from ..bench.report import duration, size

NAMES = {"plain": "plain PyTorch", "ours": "gptkernels"}
MEMORY = {
    "weights": "weights and buffers",
    "gradients": "gradients",
    "optimizer": "optimizer's moments",
    "activations": "kept by forward for backward",
}


def print_profile(console: Console, found: dict) -> None:
    done = [name for name in NAMES if found[name] and found[name]["status"] != "failed"]
    mode = "inference" if found["infer"] else "training"
    console.print(
        f"{mode} of {found['model']}, {found['batch']} x {found['seq']} tokens, {found['dtype']}, "
        f"on {found['device']['name']}" + (f", {found['parallel']}" if found["parallel"] != "none" else ""),
        style="bold",
        soft_wrap=True,
        highlight=False,
    )
    if done:
        console.print(summary(found, done))
        console.print(parts(found, done))
        console.print(memory(found, done))
        for name in done:
            if len(found[name]["per_gpu"]) > 1:
                console.print(per_gpu(found[name], NAMES[name]))
        console.print(legend(found), style="dim", soft_wrap=True, highlight=False)
    for name in NAMES:
        if found[name] and found[name]["status"] != "ok":
            console.print(f"[bold red]{NAMES[name]}: {found[name]['status']}. {found[name]['detail']}", soft_wrap=True)


def summary(found: dict, done: list[str]) -> Table:
    on_gpu = found["device"]["type"] == "cuda"
    shares = {"MFU dense": "mfu_dense", "MFU": "mfu", "HFU": "hfu"} if on_gpu else {"MFU": "mfu"}
    table = Table("")
    for column in ("tokens/s", "", "step", *shares, "of gemm", "peak", *["power"] * on_gpu):
        table.add_column(column, justify="right", no_wrap=True)
    for name in done:
        one, used = found[name], found[name]["utilisation"]
        faster = one["tokens_per_second"] / found[done[0]]["tokens_per_second"]
        table.add_row(
            NAMES[name],
            f"{one['tokens_per_second']:,.0f}",
            f"{faster:.2f} x",
            duration(one["step_us"]),
            *(percent(used[key]) for key in (*shares.values(), "of_measured_gemm")),
            size(one["peak_bytes"]),
            *[watts(one["watts"])] * on_gpu,
        )
    return table


def watts(power: float | None) -> str:
    return "" if power is None else f"{power:.0f} W"


def percent(share: float | None) -> str:
    return "N/A" if share is None else f"{100 * share:.1f}%"


def parts(found: dict, done: list[str]) -> Table:
    table = Table("a step's time", title_justify="left")
    for name in done:
        table.add_column(NAMES[name], justify="right", no_wrap=True)
        table.add_column("", justify="right", no_wrap=True)
    for part in dict.fromkeys(part for name in done for part in found[name]["parts_us"]):
        cells = []
        for name in done:
            here = found[name]["parts_us"]
            cells += [duration(here.get(part, 0.0)), percent(here.get(part, 0.0) / sum(here.values()))]
        table.add_row(part, *cells)
    return table


def memory(found: dict, done: list[str]) -> Table:
    table = Table("memory")
    for name in done:
        table.add_column(NAMES[name], justify="right", no_wrap=True)
    for key, about in MEMORY.items():
        if any(key in found[name]["memory_bytes"] for name in done):
            table.add_row(about, *(size(found[name]["memory_bytes"].get(key)) for name in done))
    if all(found[name]["peak_bytes"] for name in done):
        table.add_row("all at the peak", *(size(found[name]["peak_bytes"]) for name in done))
    return table


def per_gpu(one: dict, title: str) -> Table:
    table = Table(title=title)
    for column in ("GPU", "tokens/s", "peak", "power"):
        table.add_column(column, justify="right")
    for number, row in enumerate(one["per_gpu"]):
        table.add_row(str(number), f"{row['tokens_per_second']:,.0f}", size(row["peak_bytes"]), watts(row["watts"]))
    table.add_row("sum", f"{one['tokens_per_second_of_all']:,.0f}")
    return table


def legend(found: dict) -> str:
    sheet = found["ceilings"]["data_sheet_tflops"]
    peak = f"{sheet:.0f} TFLOP/s of the data sheet" if sheet else "the data sheet's rate, which is not known here"
    times = "" if found["infer"] else "; training is three times that"
    return (
        f"FLOPs: {found['flops_per_token']['formula']}{times}. MFU: of {peak}, with bands counted as bands; "
        "MFU dense: as if they were dense; HFU: with what backward computes again. of gemm: of a large matrix product "
        "measured here. The times of parts are torch.profiler's, which slows a step down."
    )
