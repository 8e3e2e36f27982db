"""What the clock predicts beside what was measured and published: `python -m ptxemu.timing calibrate [--json F] [--peer P]`.

One parameter is fitted, to one column: FlashAttention-3's causal forward pass at head size 128. HBM's efficiency is that of
a copy. Everything else is held out. Which parameter to fit was chosen with the causal forward pass at head size 64 in sight;
the forward pass without a mask, the backward pass and the product were not used to choose or fit it.
"""

import ctypes
import functools
import json
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .. import cuda
from . import Recorded, recording, tiles
from .fa3 import FlashAttention3, cutlass_headers
from .units import CALIBRATION_MHZ, PARAMETERS, POWER_LIMIT_MHZ, SMS

FITTED = "register_reads_tensor"
CANDIDATES = (1.0, 0.9, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)

# FlashGPU-Sim, docs/sass-frontend.md: NCU on an H100 at 1,500 MHz, cold, float16, causal; heads * head size = 2048,
# 32k tokens. tokens -> microseconds
FORWARD = {
    128: {512: 244.06, 1024: 305.12, 2048: 470.14, 4096: 841.18, 8192: 1590.0},
    64: {512: 336.45, 1024: 515.30, 2048: 734.40, 4096: 1300.0, 8192: 2330.0},
}
# The same without a mask.
FORWARD_FULL = {128: {512: 268.26, 1024: 457.60, 2048: 842.72, 4096: 1610.0, 8192: 3110.0}}
# The FlashAttention-3 paper: backward without a mask, float16, heads * head size = 2048, 16k tokens, clocks not locked.
# tokens -> TFLOP/s
BACKWARD = {128: {1024: 424, 4096: 542, 16384: 561}, 64: {1024: 363, 4096: 453, 16384: 474}}
GEMM_TFLOPS = 798  # cuBLAS and CUTLASS at large bfloat16 shapes under the power limit
COPY_BYTES_PER_S = 3.0e12


@dataclass
class Row:
    kernel: str
    shape: str
    predicted_us: float
    published_us: float
    held_out: bool

    @property
    def error(self) -> float:
        return self.predicted_us / self.published_us - 1


def fa3_tile(head_dim: int, causal: bool, backward: bool) -> tuple[int, int]:
    """Rows that a tile owns, rows of the blocks it visits"""
    if backward:
        return 128, 128 if head_dim == 64 else 64 if causal else 80
    if head_dim == 64:
        return 192, 128
    return 128, 80 if head_dim == 256 else 128 if causal else 176


class Fa3Stages:
    """FlashAttention-3's kernels as stages; launches are recorded once."""

    def __init__(self, peer: FlashAttention3):
        self.record = functools.lru_cache(maxsize=None)(peer.record)

    def stages(
        self, tokens: int, heads: int, head_dim: int, causal: bool = True, backward: bool = False
    ) -> list[tiles.Stage]:
        own, other = fa3_tile(head_dim, causal, backward)

        def record(tokens: int, heads: int, launch: int = 1 if backward else 0) -> Recorded:
            return self.record(1, heads, tokens, head_dim, causal=causal, backward=backward)[launch]

        options = {"causal": causal, "backward": backward}
        main = tiles.attention_stage("main", record, tokens, heads, head_dim, own, other, **options)
        if not backward:
            return [main]
        rows = ((4 * own, 2), (4 * own, 4))
        around = [
            tiles.streaming(name, [(t * h // 64, record(t, h, launch)) for t, h in rows], tokens * heads // 64)
            for name, launch in (("before", 0), ("after", 2))
        ]
        return [around[0], main, around[1]]

    def microseconds(self, *shape, mhz: float, causal: bool = True, backward: bool = False, **changes: float) -> float:
        return sum(
            stage.microseconds(mhz, **changes) for stage in self.stages(*shape, causal=causal, backward=backward)
        )


def forward_rows(peer: Fa3Stages, head_dim: int, causal: bool, **changes: float) -> list[Row]:
    published = FORWARD[head_dim] if causal else FORWARD_FULL[head_dim]
    return [
        Row(
            f"FlashAttention-3 forward, {'causal' if causal else 'full'}, D={head_dim}",
            f"32k tokens, T={tokens}",
            peer.microseconds(
                tokens, 2048 // head_dim * 32768 // tokens, head_dim, mhz=CALIBRATION_MHZ, causal=causal, **changes
            ),
            microseconds,
            held_out=head_dim != 128 or not causal,
        )
        for tokens, microseconds in published.items()
    ]


def backward_rows(peer: Fa3Stages, **changes: float) -> list[Row]:
    rows = []
    for head_dim, table in BACKWARD.items():
        for tokens, tflops in table.items():
            heads = 2048 // head_dim * 16384 // tokens
            predicted = peer.microseconds(
                tokens, heads, head_dim, mhz=POWER_LIMIT_MHZ, causal=False, backward=True, **changes
            )
            flops = 10 * head_dim * tokens * tokens * heads
            name = f"FlashAttention-3 backward, full, D={head_dim}"
            rows.append(Row(name, f"16k tokens, T={tokens}", predicted, flops / tflops / 1e6, held_out=True))
    return rows


def build(source: str, *flags: str) -> Path:
    output = Path(tempfile.mkdtemp(), "library.so")
    command = ["nvcc", "-std=c++17", "-O3", "-cudart", "shared", "-shared", "-Xcompiler", "-fPIC", *flags]
    command += [
        "-gencode",
        "arch=compute_90a,code=compute_90a",
        str(Path(__file__).with_name(source)),
        "-o",
        str(output),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return output


def copy_row(**changes: float) -> Row:
    """2 GiB there and back. units.py has HBM's efficiency from this figure, so it is not held out."""
    samples = []
    with cuda.use(seed=0) as device:
        library = device.load(build("copy.cu"))
        for ctas in (64, 256):
            x = torch.randn(ctas * 1024)
            out = torch.empty_like(x)
            with recording() as launches:
                device.check(library.copy_run(device.pointer(x), device.pointer(out), ctypes.c_int(x.numel())))
            assert torch.equal(x, out)
            samples.append((ctas, launches[0]))
    amount = (2 << 30) // 4096
    predicted = tiles.streaming("copy", samples, amount).microseconds(POWER_LIMIT_MHZ, **changes)
    return Row("copy", "2 GiB", predicted, 2 * (2 << 30) / COPY_BYTES_PER_S * 1e6, held_out=False)


GEMM_TILE = 128, 256, 64


@functools.cache
def gemm_samples() -> list[tuple[int, int, Recorded]]:
    """Launches of CUTLASS's cooperative kernel, 128 x 256 x 64, on one cluster of two CTAs"""
    tile_m, tile_n, tile_k = GEMM_TILE
    library = build(
        "cutlass_gemm.cu", "--expt-relaxed-constexpr", "-DNDEBUG", f"-I{cutlass_headers()}",
        f"-I{cutlass_headers().parent / 'tools' / 'util' / 'include'}", f"-DTILE_M={tile_m}", f"-DTILE_N={tile_n}",
        f"-DTILE_K={tile_k}", "-DKERNEL=KernelTmaWarpSpecializedCooperative", "-DEPILOGUE=TmaWarpSpecializedCooperative",
    )  # fmt: skip
    samples = []
    with cuda.use(seed=0) as device:
        functions = device.load(library)
        for m, n, k in ((512, 512, 512), (1024, 512, 512), (512, 512, 2048)):
            a, b = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
            c = torch.empty(m, n, dtype=torch.bfloat16)
            with recording() as launches:
                device.check(functions.gemm_run(*map(device.pointer, (a, b, c)), m, n, k, 2))
            count = m * n // (2 * tile_m * tile_n)
            samples.append((count, count * k // tile_k, launches[0]))
    return samples


def gemm_stage(m: int, n: int, k: int) -> tiles.Stage:
    tile_m, tile_n, tile_k = GEMM_TILE
    lengths = [-(-k // tile_k)] * (-(-m // (2 * tile_m)) * -(-n // tile_n))
    return tiles.Stage("gemm", gemm_samples(), lengths, gemm_shares(m, n, k, tile_m, tile_n), slots=SMS // 2)


def gemm_row(**changes: float) -> Row:
    size = 8192
    published = 2 * size**3 / GEMM_TFLOPS / 1e6
    predicted = gemm_stage(size, size, size).microseconds(POWER_LIMIT_MHZ, **changes)
    return Row("CUTLASS GEMM, bfloat16", "8192 x 8192 x 8192", predicted, published, held_out=True)


def gemm_shares(m: int, n: int, k: int, tile_m: int, tile_n: int) -> dict[str, float]:
    """How much of the operands' loads goes to HBM when tiles that run together, 8 high and the rest wide, share theirs.
    Two CTAs, one below the other, load the right operand once for both."""
    loaded = m * n * k * 2 * (1 / tile_n + 1 / (2 * tile_m))
    high = min(m, 16 * tile_m)
    wide = min(n, max(tile_n, SMS * tile_m * tile_n // high))
    once = m * n * k * 2 * (1 / wide + 1 / high)
    return {"dram_read_share": min(1.0, once / loaded), "dram_write_share": 1.0}


def fit(peer: Fa3Stages) -> float:
    """The candidate with the least squared error on FlashAttention-3's causal forward pass at head size 128."""
    return min(CANDIDATES, key=lambda value: sum(r.error**2 for r in forward_rows(peer, 128, True, **{FITTED: value})))


def calibrate(peer: str | None) -> tuple[list[Row], list[str]]:
    """-> rows, and what was left out and why"""
    rows, left = [copy_row()], []
    try:
        rows.append(gemm_row())
    except FileNotFoundError as error:
        left.append(f"GEMM: {error}")
    if peer is None:
        left.append("FlashAttention-3: --peer names no checkout")
        return rows, left
    stages = Fa3Stages(FlashAttention3(peer))
    best = fit(stages)
    if best != PARAMETERS[FITTED]:
        left.append(f"units.py has {FITTED} = {PARAMETERS[FITTED]}, the fit says {best}")
    rows += forward_rows(stages, 128, True) + forward_rows(stages, 64, True) + forward_rows(stages, 128, False)
    return rows + backward_rows(stages), left


def summary(rows: list[Row]) -> dict[str, dict[str, float]]:
    out = {}
    for name, held_out in (("fitted", False), ("held out", True)):
        errors = [abs(row.error) for row in rows if row.held_out == held_out]
        if errors:
            out[name] = {"rows": len(errors), "mean": sum(errors) / len(errors), "worst": max(errors)}
    return out


def print_rows(rows: list[Row], left: list[str]) -> None:
    for held_out in (False, True):
        chosen = [row for row in rows if row.held_out == held_out]
        if chosen:
            print("held out:" if held_out else "fitted to:")
        for row in chosen:
            print(
                f"  {row.kernel:42} {row.shape:22} {row.predicted_us:9.1f} us, published {row.published_us:9.1f}  {row.error:+7.1%}"
            )
    for name, numbers in summary(rows).items():
        print(f"{name}: {numbers['mean']:.1%} on average, {numbers['worst']:.1%} at most, {numbers['rows']} rows")
    for line in left:
        print(f"left out: {line}")


def write_json(path: str, rows: list[Row], command: str) -> None:
    document = {
        "command": command,
        "summary": summary(rows),
        "rows": [{**asdict(row), "error": row.error} for row in rows],
    }
    Path(path).write_text(json.dumps(document, indent=1) + "\n")
