"""What the processes of a gang do for the tests of context parallelism."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from wire import counted

import gptkernels as gk
from gptkernels import simulator
from gptkernels.parallel import exchange, layout

# Of a case, what is no argument of attention
SHAPE = {"batch": 2, "heads": 4, "kv_heads": 2, "tokens": 64, "size": 16, "dtype": "float32", "layout": "contiguous"}
SHAPE |= {"method": "auto", "slopes": None, "sinks": False, "seed": 0, "backend": "auto"}


def split_case(case: dict) -> tuple[dict, dict]:
    """-> shape, options of attention"""
    shape = SHAPE | {name: value for name, value in case.items() if name in SHAPE}
    return shape, {name: value for name, value in case.items() if name not in SHAPE}


def tensors_of(case: dict) -> tuple[dict[str, Tensor], dict[str, Any], list[Tensor]]:
    """-> leaves that require gradients, other arguments, and gradients of the output and the lse; of the whole"""
    shape, options = split_case(case)
    generator = torch.Generator().manual_seed(shape["seed"])
    b, h, hkv, t, d = (shape[name] for name in ("batch", "heads", "kv_heads", "tokens", "size"))
    dtype = getattr(torch, shape["dtype"])

    def draw(*size: int, dtype=dtype) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    packed = "cu_seqlens" in options
    sizes = [(t, n, d) if packed else (b, n, t, d) for n in (h, hkv, hkv)]
    leaves = {name: draw(*size) for name, size in zip("qkv", sizes, strict=True)}
    if shape["sinks"]:
        leaves["sinks"] = draw(h, dtype=torch.float32)
    more = {name: torch.tensor(x, dtype=torch.int32) for name, x in options.items() if isinstance(x, list)}
    if shape["slopes"]:
        more["alibi_slopes"] = draw(*shape["slopes"], dtype=torch.float32).abs()
    cotangents = [draw(*sizes[0])]
    if options.get("return_lse"):
        cotangents.append(draw(*((h, t) if packed else (b, h, t)), dtype=torch.float32))
    return leaves, options | more, cotangents


def one_mesh():
    return dist.init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))["cp"]


def attention_of_shards(cases: list[dict]) -> list[dict]:
    """-> of each case: this rank's shard of outputs and gradients, and bytes sent forward and backward; or the error"""
    mesh = one_mesh()
    return [attention_of_shard(mesh, case) for case in cases]


def attention_of_shard(mesh, case: dict) -> dict:
    shape, _ = split_case(case)
    leaves, options, cotangents = tensors_of(case)
    packed = "cu_seqlens" in options
    own = {}
    for name, x in leaves.items():
        part = x if name == "sinks" else gk.parallel.shard_sequence(x, mesh, 0 if packed else 2, shape["layout"])
        own[name] = part.clone().requires_grad_()
    dims = [0 if packed else 2, -1]
    parts = [gk.parallel.shard_sequence(x, mesh, dims[i], shape["layout"]) for i, x in enumerate(cotangents)]
    torch.manual_seed(shape["seed"] + dist.get_rank())  # the first rank's decides what is dropped
    with gk.parallel.context(mesh, shape["layout"], shape["method"]):
        with counted() as forward:
            outputs = gk.attention(**own, **options, backend=shape["backend"])
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        with counted() as backward:
            torch.autograd.backward(outputs, parts)
    found = {f"output {i}": x for i, x in enumerate(outputs)} | {name: x.grad for name, x in own.items()}
    return {
        "tensors": {name: x.detach().float().numpy() for name, x in found.items()},
        "forward": dict(+forward),
        "backward": dict(+backward),
    }


def simulated_attention(cases: list[dict]) -> list[dict]:
    """As attention_of_shards, as kernels run it on compute capability 9.0"""
    with simulator.use(90):
        return attention_of_shards(cases)


def attention_with(fault: str, cases: list[dict]) -> list[dict]:
    """As attention_of_shards, with a bug"""
    with FAULTS[fault]():
        return attention_of_shards(cases)


@contextmanager
def halo_one_short() -> Iterator[None]:
    real = layout.part_of

    def part_of(queries, bounds, left, right):
        short = None if left is None or queries[0] < left else left - 1
        return real(queries, bounds, short, right)

    layout.plan_of.cache_clear()
    with mock.patch.object(layout, "part_of", part_of):
        yield
    layout.plan_of.cache_clear()


@contextmanager
def gradients_to_the_wrong_tokens() -> Iterator[None]:
    real = exchange.Blocks.accumulate

    def accumulate(self, span, dk, dv):
        real(self, span, dk.roll(1, self.dim), dv)

    with mock.patch.object(exchange.Blocks, "accumulate", accumulate):
        yield


FAULTS = {"halo_one_short": halo_one_short, "gradients_to_the_wrong_tokens": gradients_to_the_wrong_tokens}
