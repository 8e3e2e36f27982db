"""Finds the tables of gptkernels/ops/mlp/triton_kernels.py on the GPU at hand and prints them.

    python benchmarks/tune_mlp.py [--json FILE]

First every tile of the fused products is timed at GPT-2's and GPT-3's widths, forward and backward; then, with the best
tiles, fused epilogues against cuBLAS and a pointwise pass at each width, which gives FUSED_UP_TO.
"""

import argparse
import json
import math
from unittest import mock

import torch
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from gptkernels import hardware
from gptkernels.ops.mlp import triton_kernels

WIDTHS = (768, 1024, 1600, 2048, 2560, 4096, 5120, 12288)
TUNED_WIDTHS = (768, 1600, 4096)
TILES = [
    (block_m, block_n, block_k, warps, stages)
    for block_m in (64, 128, 256)
    for block_n in (64, 128, 256)
    for block_k in (32, 64, 128)
    for warps in (4, 8)
    for stages in (2, 3, 4, 5)
    if 64 * 64 <= block_m * block_n <= 128 * 256 and block_m * block_n // (32 * warps) <= 128
]


def inputs(rows: int, d: int) -> dict[str, torch.Tensor]:
    shapes = {"x": (rows, d), "fc": (4 * d, d), "fc_bias": (4 * d,), "proj": (d, 4 * d), "proj_bias": (d,)}
    return {name: torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.03 for name, shape in shapes.items()}


def milliseconds(run) -> float:
    """Median; infinite for what does not fit the GPU."""
    try:
        return do_bench(run, return_mode="median")
    except OutOfResources:
        return math.inf


def forward(t: dict[str, torch.Tensor]):
    return triton_kernels.mlp_fwd(t["x"], t["fc"], t["fc_bias"], t["proj"], t["proj_bias"], None, "gelu_tanh", "preact")


def hidden_gradient(t: dict[str, torch.Tensor], preact: torch.Tensor, act: torch.Tensor):
    return triton_kernels.fused_grad_preact(t["x"], t["proj"], preact, "gelu_tanh", act, True)


def backward(t: dict[str, torch.Tensor], preact: torch.Tensor):
    none = preact.new_empty(0)
    options = ("gelu_tanh", "preact", [True] * 5, None, None)
    return triton_kernels.mlp_bwd(t["x"], t["x"], t["fc"], t["fc_bias"], t["proj"], preact, none, *options)


def best_tile(table: str, arch: int, rows: int, found: list[dict]) -> tuple:
    """The tile with the least time over TUNED_WIDTHS, each weighed by its best."""
    times = {tile: [] for tile in TILES}
    for d in TUNED_WIDTHS:
        t = inputs(rows, d)
        preact = torch.randn(rows, 4 * d, device="cuda", dtype=torch.bfloat16)
        act = torch.empty_like(preact)
        for tile in TILES:
            with (
                mock.patch.object(triton_kernels, table, {arch: tile}),
                mock.patch.object(triton_kernels, "FUSED_UP_TO", {arch: d}),
            ):
                if table == "GEMM_LAUNCH":
                    ms = milliseconds(lambda t=t: forward(t))
                else:
                    ms = milliseconds(lambda t=t, preact=preact, act=act: hidden_gradient(t, preact, act))
                times[tile].append(ms)
            found.append({"table": table, "d": d, "tile": tile, "ms": times[tile][-1]})
    least = [min(column) for column in zip(*times.values(), strict=True)]
    return min(TILES, key=lambda tile: sum(ms / best for ms, best in zip(times[tile], least, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--json", help="write every timing there")
    options = parser.parse_args()
    arch = hardware.arch(torch.device("cuda", torch.cuda.current_device()))
    found: list[dict] = []
    tables = {name: best_tile(name, arch, options.rows, found) for name in ("GEMM_LAUNCH", "GEMM_BWD_LAUNCH")}
    for name, tile in tables.items():
        print(f"{name}[{arch}] = {tile}", flush=True)
        getattr(triton_kernels, name)[arch] = tile
    fused_up_to = 0
    for d in WIDTHS:
        t, times = inputs(options.rows, d), {}
        for label, widest in (("fused", d), ("pointwise", 0)):
            with mock.patch.object(triton_kernels, "FUSED_UP_TO", {arch: widest}):
                preact = forward(t)[1]
                times[label] = milliseconds(lambda t=t: forward(t)) + milliseconds(
                    lambda t=t, preact=preact: backward(t, preact)
                )
        found.append({"d": d, "ms": times})
        print(f"d={d}: fused {times['fused']:.3f} ms, pointwise {times['pointwise']:.3f} ms", flush=True)
        fused_up_to = d if times["fused"] < times["pointwise"] else fused_up_to
    print(f"FUSED_UP_TO[{arch}] = {fused_up_to}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"gpu": torch.cuda.get_device_name(), "timings": found}, file, indent=1)


if __name__ == "__main__":
    main()
