"""How long a kernel takes on an H100, told by the simulator's clock:

    python benchmarks/predict.py --op attention --shape B2,H16,T8192,D128 [--pass bwd] [--backend triton] [--peer PATH]
    python benchmarks/predict.py --op mlp --shape M16384,N16384,K4096 [--pass bwd]
    python benchmarks/predict.py --op gated_mlp --shape M16384,N28672,K4096   (N: gate's and up's columns; bwd: hidden)
    python benchmarks/predict.py --op layer_norm --shape M16384,N4096 [--pass bwd]   (rms_norm likewise)
    python benchmarks/predict.py --op cross_entropy --shape M4096,N50264
    python benchmarks/predict.py --table benchmarks/results/clock_predictions.json [--peer PATH]

In an attention shape W is the window, C a softcap and A1 ALiBi. --peer: a checkout of flash-attention, whose kernels
then go through the same model; --table: everything that the README shows.
"""

import argparse
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass

import clock_stages
from ptxemu.timing import calibrate, tiles
from ptxemu.timing.fa3 import FlashAttention3
from ptxemu.timing.units import HBM_BYTES_PER_S, HBM_EFFICIENCY, MMA_FLOPS_PER_CYCLE, POWER_LIMIT_MHZ, SMS

KEYS = {
    "attention": ("B", "H", "T", "D"),
    "mlp": ("M", "N", "K"),
    "gated_mlp": ("M", "N", "K"),
    "layer_norm": ("M", "N"),
    "rms_norm": ("M", "N"),
    "cross_entropy": ("M", "N"),
}
OPTIONS = ("W", "C", "A")  # of attention

# What the epilogue reads and writes of M x N, forward and backward. Forward, a gated MLP has N columns of gate and up.
PRODUCTS = {"mlp": (2, 3), "gated_mlp": (1.5, 5)}


@dataclass
class Work:
    """One pass of an op at one shape: what it computes and moves at least"""

    op: str
    shape: dict[str, int]
    backward: bool = False
    backend: str = "cuda"

    @property
    def flops(self) -> float:
        s = self.shape
        if self.op in PRODUCTS:
            return 2 * s["M"] * s["N"] * s["K"]
        if self.op != "attention":
            return 0
        window = min(s.get("W", s["T"]), s["T"])
        seen = s["T"] * window - window * (window - 1) / 2
        return (10 if self.backward else 4) * s["D"] * seen * s["B"] * s["H"]

    @property
    def bytes(self) -> float:
        """16-bit tensors, read and written once"""
        s = self.shape
        if self.op == "attention":
            return 2 * s["B"] * s["H"] * s["T"] * s["D"] * (8 if self.backward else 4)
        if self.op in PRODUCTS:
            outer = PRODUCTS[self.op][self.backward] * s["M"] * s["N"]
            return 2 * int(s["M"] * s["K"] + s["K"] * s["N"] + outer)
        return 2 * s["M"] * s["N"] * (3 if self.backward else 2)

    @property
    def limit_us(self) -> float:
        """The tensor cores' time, or the memory's where that is longer"""
        compute = self.flops / (MMA_FLOPS_PER_CYCLE * SMS * POWER_LIMIT_MHZ)
        return max(compute, self.bytes / (HBM_BYTES_PER_S * HBM_EFFICIENCY) * 1e6)

    def stages(self) -> list[tiles.Stage]:
        s = self.shape
        if self.op == "attention":
            make = clock_stages.attention if self.backend == "cuda" else clock_stages.triton_attention
            options = clock_stages.AttentionOptions(window=s.get("W"), softcap=s.get("C"), alibi=bool(s.get("A")))
            return make(s["T"], s["B"] * s["H"], s["D"], options, self.backward)
        if self.op in PRODUCTS:
            gated = self.op == "gated_mlp"
            return clock_stages.product(s["M"], s["N"], s["K"], "gelu_tanh", self.backward, gated)
        if self.op in ("layer_norm", "rms_norm"):
            return clock_stages.norm(self.op, s["M"], s["N"], self.backward)
        return clock_stages.cross_entropy(s["M"], s["N"])

    def peer(self, fa3: calibrate.Fa3Stages | None) -> tuple[str, list[tiles.Stage]] | None:
        s = self.shape
        if self.op in PRODUCTS:
            return "CUTLASS, the product alone", [calibrate.gemm_stage(s["M"], s["N"], s["K"])]
        if self.op != "attention" or fa3 is None or set(OPTIONS) & set(s) or s["D"] not in (64, 128):
            return None
        return "FlashAttention-3", fa3.stages(s["T"], s["B"] * s["H"], s["D"], backward=self.backward)

    def __str__(self) -> str:
        shape = " ".join(f"{name}{value}" for name, value in self.shape.items())
        return f"{self.op} {shape} {'bwd' if self.backward else 'fwd'} {self.backend}"


def predicted_us(stages: list[tiles.Stage]) -> float:
    return sum(stage.microseconds(POWER_LIMIT_MHZ) for stage in stages)


def rate(work: Work, microseconds: float) -> str:
    if work.flops:
        return f"{work.flops / microseconds / 1e6:.0f} TFLOP/s"
    return f"{work.bytes / microseconds / 1e3:.0f} GB/s"


def explain(stage: tiles.Stage) -> None:
    """What the longest of the small launches was busy with, and where its warps waited."""
    recorded = stage.samples[-1][-1]
    timed = stage.timed(POWER_LIMIT_MHZ)[-1]
    busy = sorted(tiles.busy_cycles(recorded, timed).items(), key=lambda item: -item[1])
    shares = ", ".join(f"{unit} {cycles / timed.cycles:.0%}" for unit, cycles in busy)
    print(f"  {stage.name}: busy {shares}")
    waited: Counter[tuple] = Counter()
    for wait in timed.waits:
        waited[wait.source_line or wait.line, wait.reason] += wait.cycles
    total = sum(waited.values())
    ptx = recorded.ptx.split("\n")
    sourced = any(wait.source_line for wait in timed.waits)
    for (line, reason), value in waited.most_common(6):
        where = f"source line {line}" if sourced else f"PTX line {line}: {ptx[line - 1].strip()[:60]}"
        print(f"    {value / total:4.0%} of waiting for a {reason}, {where}")


def show(work: Work, fa3: calibrate.Fa3Stages | None) -> None:
    stages = work.stages()
    ours = predicted_us(stages)
    print(f"{work}: {ours:.1f} us predicted, {rate(work, ours)}, {work.limit_us / ours:.0%} of the limit")
    for stage in stages:
        explain(stage)
    if found := work.peer(fa3):
        name, peer_stages = found
        theirs = predicted_us(peer_stages)
        print(f"  {name} in the same model: {theirs:.1f} us; ours is {theirs / ours:.2f} times as fast")


def parse_shape(op: str, text: str) -> dict[str, int]:
    found = re.findall(r"([A-Z])(\d+)", text)
    shape = {name: int(value) for name, value in found}
    allowed = KEYS[op] + (OPTIONS if op == "attention" else ())
    if "".join(f"{n}{v}" for n, v in found) != text.replace(",", "") or not set(KEYS[op]) <= set(shape) <= set(allowed):
        raise SystemExit(f"--shape of {op} is {','.join(f'{name}<number>' for name in KEYS[op])}, got {text}")
    return shape


def table_works() -> list[Work]:
    works = []
    for head_dim in (64, 128, 256):
        for tokens in (2048, 8192, 16384):
            shape = {"B": 32768 // tokens, "H": 2048 // head_dim, "T": tokens, "D": head_dim}
            works += [Work("attention", shape, backward) for backward in (False, True)]
    for window in (128, 1024):
        for head_dim in (64, 128):
            shape = {"B": 1, "H": 2048 // head_dim, "T": 32768, "D": head_dim, "W": window}
            works += [Work("attention", shape, backward) for backward in (False, True)]
    for head_dim in (64, 128):
        shape = {"B": 4, "H": 2048 // head_dim, "T": 8192, "D": head_dim}
        works += [Work("attention", shape, backward, "triton") for backward in (False, True)]
    for d in (768, 1600, 4096):
        works += [Work("mlp", {"M": 16384, "N": 4 * d, "K": d}), Work("mlp", {"M": 16384, "N": d, "K": 4 * d})]
    for columns in (768, 1600, 4096, 8192):
        works += [Work("layer_norm", {"M": 16384, "N": columns}, backward) for backward in (False, True)]
    for rows, columns in ((2**20, 64), (2**20, 128), (16384, 768), (16384, 1600), (16384, 4096), (16384, 8192)):
        works += [Work("rms_norm", {"M": rows, "N": columns}, backward) for backward in (False, True)]
    return [*works, Work("cross_entropy", {"M": 4096, "N": 50264})]


def write_table(path: str, fa3: calibrate.Fa3Stages | None) -> None:
    rows = []
    for work in table_works():
        ours, found = predicted_us(work.stages()), work.peer(fa3)
        row = {"op": work.op, "shape": work.shape, "pass": "bwd" if work.backward else "fwd", "backend": work.backend}
        row |= {"predicted_us": ours, "rate": rate(work, ours), "limit_us": work.limit_us}
        if found:
            row |= {"peer": found[0], "peer_us": predicted_us(found[1])}
        rows.append(row)
        print(f"{work}: {ours:.1f} us, {row['rate']}" + (f", peer {row['peer_us']:.1f}" if found else ""), flush=True)
    command = f"python benchmarks/predict.py --table {path}" + (" --peer CHECKOUT" if fa3 else "")
    with open(path, "w") as file:
        json.dump({"command": command, "mhz": POWER_LIMIT_MHZ, "rows": rows}, file, indent=1)
        file.write("\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=KEYS)
    parser.add_argument("--shape")
    parser.add_argument("--pass", dest="direction", choices=("fwd", "bwd"), default="fwd")
    parser.add_argument("--backend", choices=("cuda", "triton"), default="cuda")
    parser.add_argument("--peer", metavar="PATH", help="a checkout of Dao-AILab/flash-attention")
    parser.add_argument("--table", metavar="FILE", help="predict everything that the README shows, into this file")
    chosen = parser.parse_args(arguments)
    fa3 = calibrate.Fa3Stages(FlashAttention3(chosen.peer)) if chosen.peer else None
    if chosen.table:
        write_table(chosen.table, fa3)
        return
    if not chosen.op or not chosen.shape:
        parser.error("--op and --shape are needed, or --table")
    if chosen.backend == "triton" and chosen.op != "attention":
        parser.error(f"--backend triton: only attention's Triton kernels go through the clock, not {chosen.op}'s")
    if chosen.direction == "bwd" and chosen.op == "cross_entropy":
        parser.error("--pass bwd: cross_entropy makes its gradient in its forward pass")
    show(Work(chosen.op, parse_shape(chosen.op, chosen.shape), chosen.direction == "bwd", chosen.backend), fa3)


if __name__ == "__main__":
    sys.exit(main())
