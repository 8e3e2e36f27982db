"""What the host takes for a call, in microseconds, with kernels that are launched and do nothing (no GPU):

    python benchmarks/host_time.py [--flash-attn CHECKOUT] [--json FILE]

Needs the simulator (tests/ptxemu), whose launches then return at once. Beside our ops stand a bare autograd.Function
and, where they are at hand, the Python wrappers of Liger's LayerNorm (its Triton kernels idle in the same way) and of
flash-attn (--flash-attn: a checkout of it; its C++ module is replaced by one that only allocates). Contenders take
turns in one process and one thread; the figure is the median over the turns of CPU time per call, so that other work on
the machine counts little.
"""

import argparse
import functools
import importlib
import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

import gptkernels as gk
from gptkernels import simulator

TURNS, CALLS = 25, 60
GOALS_US = {
    ("layer_norm", "cuda"): 25,
    ("layer_norm", "triton"): 25,
    ("rms_norm", "cuda"): 25,
    ("rms_norm", "triton"): 25,
    ("attention", "cuda"): 40,
    ("attention", "triton"): 60,
    ("mlp", "cuda"): 40,
    ("gated_mlp", "cuda"): 40,
    ("decode_attention", "triton"): 40,
}


class Bare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        return torch.empty_like(grad)


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16).requires_grad_()


def both(call: Callable[..., Tensor], *tensors: Tensor) -> dict[str, Callable]:
    """-> by pass, what is timed"""
    out = call(*tensors)
    grad = torch.randn_like(out)
    return {
        "forward": lambda: call(*tensors),
        "backward": lambda: torch.autograd.grad(out, tensors, grad, retain_graph=True),
    }


def ours() -> Iterator[tuple[str, str, dict[str, Callable]]]:
    """-> op, contender, what is timed by pass"""
    norm = leaf(64, 1024), leaf(1024), leaf(1024)
    heads = [leaf(2, 8, 128, 64) for _ in range(3)]
    layers = leaf(16, 512), leaf(2048, 512), leaf(2048), leaf(512, 2048), leaf(512)
    gated = leaf(16, 512), leaf(2048, 512), leaf(2048, 512), leaf(512, 2048)
    for backend in ("cuda", "triton"):
        named = {"backend": backend}
        yield "layer_norm", backend, both(lambda *t, o=named: gk.layer_norm(*t, **o), *norm)
        yield "rms_norm", backend, both(lambda *t, o=named: gk.rms_norm(*t, **o), *norm[:2])
        yield "attention", backend, both(lambda *t, o=named: gk.attention(*t, **o), *heads)
        forward = both(lambda *t, o=named: gk.mlp(*t, **o), *layers)["forward"]
        yield "mlp", backend, {"forward": forward}  # backward's products are PyTorch's own, and run here
        forward = both(lambda *t, o=named: gk.gated_mlp(*t, **o), *gated)["forward"]
        yield "gated_mlp", backend, {"forward": forward}
    q, cache = torch.randn(2, 8, 1, 64).bfloat16(), torch.randn(2, 2, 512, 64).bfloat16()
    lengths = torch.full((2,), 100, dtype=torch.int32)
    decode = functools.partial(gk.decode_attention, q, cache, cache, lengths, backend="triton")
    yield "decode_attention", "triton", {"forward": decode}


def liger() -> Iterator[tuple[str, str, dict[str, Callable]]]:
    try:
        function = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
    except ImportError:
        return
    yield "layer_norm", "liger", both(lambda *t: function.apply(*t, 1e-5), leaf(64, 1024), leaf(1024), leaf(1024))


def flash_attn(checkout: str) -> Iterator[tuple[str, str, dict[str, Callable]]]:
    idle = ModuleType("flash_attn_2_cuda")
    statistic = torch.empty(2, 8, 128)
    vars(idle)["fwd"] = lambda q, *_: (torch.empty_like(q), statistic.clone(), q.new_empty(0), statistic.new_empty(2))
    vars(idle)["bwd"] = lambda *_: (None, None, None, statistic.clone())  # gradients are written in place
    real = torch.library.custom_op

    def on_cpu(name, function=None, /, *, mutates_args, device_types=None, schema=None):
        return real(name, function, mutates_args=mutates_args, schema=schema)

    path = Path(checkout) / "flash_attn" / "flash_attn_interface.py"
    with mock.patch.dict(sys.modules, flash_attn_2_cuda=idle), mock.patch.object(torch.library, "custom_op", on_cpu):
        spec = importlib.util.spec_from_file_location("flash_attn_interface", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    heads = [leaf(2, 128, 8, 64) for _ in range(3)]
    yield "attention", "flash-attn", both(lambda *t: module.flash_attn_func(*t, causal=True), *heads)


def measure(contenders: list[tuple[str, str, dict[str, Callable]]]) -> list[dict]:
    rows = [
        {"op": op, "contender": contender, "pass": name, "turns_us": [], "call": call}
        for op, contender, passes in contenders
        for name, call in passes.items()
    ]
    for turn in range(TURNS + 2):
        for row in rows:
            start = time.thread_time()
            for _ in range(CALLS):
                row["call"]()
            if turn >= 2:
                row["turns_us"].append((time.thread_time() - start) / CALLS * 1e6)
    for row in rows:
        del row["call"]
        row["turns_us"] = [round(value, 2) for value in row["turns_us"]]
        row["us"] = round(statistics.median(row["turns_us"]), 1)
        row["goal_us"] = GOALS_US.get((row["op"], row["contender"])) if row["pass"] == "forward" else None
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--flash-attn", metavar="CHECKOUT")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with simulator.use(arch=90, idle=True):
        contenders = [("", "a bare autograd.Function", both(Bare.apply, leaf(64, 1024))), *ours(), *liger()]
        if options.flash_attn:
            contenders += flash_attn(options.flash_attn)
        rows = measure(contenders)
    for row in rows:
        goal = f"  goal {row['goal_us']}" if row["goal_us"] else ""
        print(f"{row['op']:18}{row['contender']:26}{row['pass']:10}{row['us']:7.1f} us{goal}")
    if options.json:
        host = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
        document = {**host, "turns": TURNS, "calls": CALLS, "rows": rows}
        Path(options.json).write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
