"""What is tried for a class of calls: every backend, and for each of them its launch settings, one at a time."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .. import dispatch
from ..bench.cases import LAYERS, NORMS, Case

TILES = (128, 64, 32)
# Ops that are one of PyTorch's, or a few; on a CPU eager is made of these
WITH_NATIVE = ("attention", *NORMS, *LAYERS)


@dataclass(frozen=True)
class Candidate:
    backend: str
    settings: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self):
        changed = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        return f"{self.backend} ({changed})" if changed else self.backend


def backends(case: Case, where: str) -> list[Candidate]:
    """In their usual order, PyTorch's own op last"""
    named = dispatch.BACKENDS if where != "cpu" else ("eager",)
    native = ("torch",) if case.op in WITH_NATIVE and where != "cpu" else ()
    return [Candidate(name) for name in (*named, *native)]


@dataclass(frozen=True)
class Setting:
    """A launch setting of a backend that one pass depends on; values: the most promising first"""

    name: str
    backend: str
    which: str
    values: tuple


def settings(case: Case, where: str) -> Iterator[Setting]:
    """What there is to choose for this case's op. where: cpu, cuda or simulator"""
    if where == "cpu":
        if case.op == "attention":
            yield Setting("eager_rows", "eager", "both", (64, 128, 512, 1024))
        if case.op == "linear_cross_entropy":
            yield Setting("loss_rows", "eager", "both", (56, 224, 448, 1024))
        return
    yield from OF_OP[case.op](case)


def of_attention(case: Case) -> Iterator[Setting]:
    size = case.torch_dtype.itemsize
    for kernel, which in (("fwd", "fwd"), ("dq", "bwd"), ("dkdv", "bwd")):
        # Keys stay for dkdv, and queries pass by; else queries stay.
        pairs = [(m, n) for m, n in itertools.product(TILES, TILES) if (n >= m if kernel == "dkdv" else m >= n)]
        rows = [
            (m, n, warps, stages)
            for m, n in sorted(pairs, key=lambda pair: -pair[0] * pair[1])
            if m * n * size <= 128 * 128 * 2
            for warps in (8, 4)
            for stages in (2, 3)
        ]
        for suffix in ("", "_tma"):
            yield Setting(f"attention_{kernel}{suffix}", "triton", which, tuple(rows))


def of_norm(case: Case) -> Iterator[Setting]:
    columns = case.shape["N"]
    several = (1, 2, 4, 8, 16, 32) if columns <= 256 else (1, 2, 4)
    whole = [(rows, 0, warps) for rows in several for warps in (4, 8, 16)] if columns <= 16384 else []
    parts = [(1, block, warps) for block in (2048, 4096, 8192) for warps in (8, 16) if block < columns]
    op = case.op.removeprefix("add_")
    yield Setting(f"{op}_fwd", "triton", "fwd", (*whole, *parts))
    yield Setting(f"{op}_bwd", "triton", "bwd", (*whole, *parts))


def of_mlp(case: Case) -> Iterator[Setting]:
    yield Setting("mlp_fused", "triton", "both", (True, False))
    tiles = [
        (m, n, k, warps, stages)
        for m, n in ((128, 256), (128, 128), (256, 128), (64, 256), (64, 128))
        for k in (64, 32)
        for warps in (8, 4)
        for stages in (3, 4)
    ]
    yield Setting("mlp_fwd_tile", "triton", "fwd", tuple(tiles))
    yield Setting("mlp_bwd_tile", "triton", "bwd", tuple(tiles))


def of_loss(case: Case) -> Iterator[Setting]:
    yield Setting("loss_rows", "triton", "both", (56, 224, 448, 1024))


def of_decode(case: Case) -> Iterator[Setting]:
    rows = itertools.product((128, 64, 32), (4, 8), (2, 3, 4))
    yield Setting("decode_row", "triton", "fwd", tuple(rows))


OF_OP = {
    "attention": of_attention,
    **dict.fromkeys(NORMS, of_norm),
    **dict.fromkeys(("rope", "linear_log_probs", "linear_kl_div"), lambda case: iter(())),
    **dict.fromkeys(LAYERS, of_mlp),
    "linear_cross_entropy": of_loss,
    "decode_attention": of_decode,
}
