"""Attention of a sequence that is cut between ranks: each has the queries, keys and values of its shard.

A banded layer's queries see only the keys next to their shard, which neighbours send while the queries that need none
of them are computed. A dense layer's see all, which are gathered, or go around in a ring (ring.py) where they would be
too many to hold. Every query is then one of the usual kernels' own: their last query is at their last key.
"""

import inspect
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary

from ..ops.attention import attention
from ..ops.attention.op import padded_heads
from ..ops.attention.outputs import empty_in_order_of
from ..ops.attention.sinks import add_sinks, delta_of, sinks_grad
from ..ops.attention.visibility import sides
from ..ops.autocast import autocast
from ..ops.checks import check_bounds
from ..ops.dropout import draw_seed
from . import calls, gather, ring
from .calls import Options, PartCall
from .exchange import Blocks, return_gradients, send_keys, zeros
from .layout import Plan, plan_of
from .shards import Shard

SIGNATURE = inspect.signature(attention)
# Of all ranks' keys and values of one layer: more than this is not held for its backward pass.
RING_BYTES = 256 << 20
_documents = WeakIdKeyDictionary()


def shard_attention(shard: Shard, *args, **kwargs) -> Any:
    """As gptkernels.attention of the whole sequence, of which q, k, v and the result are this rank's shard. key_start,
    cu_seqlens and alibi_slopes are those of the whole."""
    call = SIGNATURE.bind(*args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    given["q"], given["k"], given["v"] = q, k, v = autocast(given["q"], given["k"], given["v"])
    attention.prepare(**given).check()
    bounds, slopes, scale = given["cu_seqlens"], given["alibi_slopes"], given["scale"]
    tokens = q.shape[2 if bounds is None else 0]
    check_inside(shard, k, tokens, given)
    whole = tokens * shard.size
    window = sides(given["causal"], given["window"])
    left, right = (None if side is None or side >= whole - 1 else side for side in window)
    options = Options(
        causal=given["causal"],
        window=(left, right),
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        softcap=given["softcap"],
        dropout=float(given["dropout"]),
        key_start=given["key_start"],
        slopes=slopes if slopes is None else slopes.contiguous(),
        packed=bounds is not None,
        tokens=whole,
        deterministic=given["deterministic"],
        backend=given["backend"],
    )
    documents = (0, whole) if bounds is None else documents_of(bounds, whole)
    plan = plan_of(shard.layout, shard.rank, tokens, documents, left, right)
    method = method_of(shard, options, k)
    job = Job(shard, plan, calls.calls_of(plan.parts, plan.spans, options), options, method)
    out, lse = ShardAttentionFunction.apply(job, *padded_heads(q, k, v), given["sinks"])
    out = out[..., : q.shape[-1]]
    return (out, lse) if given["return_lse"] else out


def documents_of(bounds: Tensor, whole: int) -> tuple[int, ...]:
    """bounds: cu_seqlens. All layers have the same, and a GPU is waited for only once."""
    version = None if bounds.is_inference() else bounds._version
    known = _documents.get(bounds)
    if version is None or known is None or known[:2] != (version, whole):
        known = _documents[bounds] = version, whole, tuple(check_bounds(bounds, whole))
    return known[2]


def check_inside(shard: Shard, k: Tensor, tokens: int, given: dict[str, Any]) -> None:
    """tokens: of q; given: arguments of attention, each of which is one that it takes"""
    where = "inside gptkernels.parallel.context"
    if given["cu_seqlens_k"] is not None:
        raise ValueError(f"cu_seqlens_k must be None {where}: queries and keys are cut alike")
    if k.shape[0 if k.ndim == 3 else 2] != tokens:
        raise ValueError(
            f"k must have q's {tokens} tokens {where}, where both are a shard of one sequence, not {k.shape[-2]}"
        )
    if tokens % (shard.layout.pieces // shard.size):
        raise ValueError(f"q must have an even number of tokens {where} with layout='zigzag', not {tokens}")


def method_of(shard: Shard, options: Options, k: Tensor) -> str:
    """How the other ranks' keys come here. k: of this rank"""
    left, right = options.window
    banded = left is not None and right is not None
    if banded or options.packed or shard.size == 1:
        return "near"  # of documents, nobody needs all that a gather would bring
    rings = options.window in ((None, 0), (None, None)) and options.slopes is None
    if shard.method == "ring" and not rings:
        raise ValueError(
            "method must be auto or gather for attention with alibi_slopes or a window on one side, not ring"
        )
    if shard.method == "gather" or not rings:
        return "gather"
    held = 2 * k.numel() * k.element_size() * shard.size
    return "ring" if shard.method == "ring" or held > RING_BYTES else "gather"


class Job(NamedTuple):
    shard: Shard
    plan: Plan
    calls: list[PartCall]
    options: Options
    method: str  # of METHODS

    def own(self, k: Tensor, v: Tensor) -> Blocks:
        blocks = Blocks(self.options.dim)
        blocks.add(self.plan.spans, k, v)
        return blocks

    def whole(self) -> tuple[int, int]:
        return 0, self.shard.size * sum(stop - start for start, stop in self.plan.spans)

    def is_here(self, call: PartCall) -> bool:
        """Whether this rank has every key of it itself"""
        a, b = call.part.keys
        return any(start <= a and b <= stop for start, stop in self.plan.spans)


class ShardAttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, job, q, k, v, sinks):
        seed = shared_seed(job.shard, q.device) if job.options.dropout else None
        out = empty_in_order_of(q)
        shape = q.shape[:-1] if q.ndim == 4 else (q.shape[1], q.shape[0])
        lse = torch.empty(shape, dtype=torch.float32, device=q.device)
        others = METHODS[job.method][0](job, q, k, v, sinks, seed, out, lse)
        ctx.save_for_backward(q, k, v, sinks, seed, out, lse, *others)
        ctx.job = job
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, sinks, seed, out, lse, *others = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        with torch.autocast(q.device.type, enabled=False):
            run = Backward(ctx.job, dout, dlse, q, sinks, seed, out, lse)
            dk, dv = METHODS[ctx.job.method][1](run, k, v, others)
        return None, run.dq, dk, dv, run.dsinks


def shared_seed(shard: Shard, device: torch.device) -> Tensor:
    """Every rank draws one, as it would without the others, and all take the first one's."""
    seed = draw_seed(device)
    with shard.talking():
        dist.broadcast(seed, group=shard.group, group_src=0)
    return seed


def forward_near(job: Job, q, k, v, sinks, seed, out, lse) -> list[Tensor]:
    """Keys come from the ranks that have them, and only those that are seen. -> what arrived"""
    blocks = job.own(k, v)
    messages = send_keys(job.shard, job.plan, blocks, k)
    for call in job.calls:
        if job.is_here(call):
            fill_in(call, calls.forward(call, q, blocks.read(call.part.keys), sinks, seed), out, lse)
    arrived = messages.finish()
    for spans, message in arrived:
        blocks.add(spans, *message)
    for call in job.calls:
        if not job.is_here(call):
            fill_in(call, calls.forward(call, q, blocks.read(call.part.keys), sinks, seed), out, lse)
    return [message for _, message in arrived]


def forward_gather(job: Job, q, k, v, sinks, seed, out, lse) -> list[Tensor]:
    """All keys come to everybody. -> them: (2, ...)"""
    keys = gather.gathered(job.shard, torch.stack((k, v)), job.options.dim + 1)
    blocks = Blocks(job.options.dim)
    blocks.add((job.whole(),), *keys)
    for call in job.calls:
        fill_in(call, calls.forward(call, q, blocks.read(call.part.keys), sinks, seed), out, lse)
    return [keys]


def fill_in(call: PartCall, found: tuple[Tensor, Tensor], out: Tensor, lse: Tensor) -> None:
    """found: out and lse of the part, whose rows of the shard's they become"""
    call.queries(out).copy_(found[0])
    lse.narrow(-1, call.first, call.count).copy_(found[1])


class Backward:
    """What the parts of a backward pass share, and add to"""

    def __init__(self, job: Job, dout, dlse, q, sinks, seed, out, lse):
        self.job, self.given = job, (dout, dlse, q)
        self.sinks, self.seed, self.out, self.lse = sinks, seed, out, lse
        self.dq = empty_in_order_of(q)
        self.dsinks = None if sinks is None else torch.zeros_like(sinks, dtype=torch.float32)

    def part(self, call: PartCall, blocks: Blocks, sums: Blocks) -> None:
        dout, dlse, q = self.given
        keys = blocks.read(call.part.keys)
        dq, dk, dv, dsinks = calls.backward(call, dout, dlse, q, keys, self.sinks, self.seed, self.out, self.lse)
        call.queries(self.dq).copy_(dq)
        sums.accumulate(call.part.keys, dk, dv)
        if self.dsinks is not None and dsinks is not None:
            self.dsinks += dsinks


def backward_near(run: Backward, k: Tensor, v: Tensor, arrived: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The parts with keys of others first: their gradients travel while the rest is computed"""
    job, dim = run.job, run.job.options.dim
    blocks, sums = job.own(k, v), Blocks(dim)
    dk, dv = zeros(job.plan.spans, k, dim)
    sums.add(job.plan.spans, dk, dv)
    for (_, spans), message in zip(job.plan.receives, arrived, strict=True):
        blocks.add(spans, *message)
        sums.add(spans, *zeros(spans, k, dim))
    for call in job.calls:
        if not job.is_here(call):
            run.part(call, blocks, sums)
    messages = return_gradients(job.shard, job.plan, sums, k)
    for call in job.calls:
        if job.is_here(call):
            run.part(call, blocks, sums)
    for spans, message in messages.finish():
        at = 0
        for span in spans:
            n = span[1] - span[0]
            sums.accumulate(span, message[0].narrow(dim, at, n), message[1].narrow(dim, at, n))
            at += n
    return dk.to(k.dtype), dv.to(v.dtype)


def backward_gather(run: Backward, k: Tensor, v: Tensor, gathered: list[Tensor]) -> tuple[Tensor, Tensor]:
    job, dim = run.job, run.job.options.dim
    blocks, sums = Blocks(dim), Blocks(dim)
    blocks.add((job.whole(),), *gathered[0])
    total = torch.zeros_like(gathered[0], dtype=torch.float32)
    sums.add((job.whole(),), *total)
    for call in job.calls:
        run.part(call, blocks, sums)
    own = gather.summed(job.shard, total, dim + 1, k.dtype)
    return own[0].to(k.dtype), own[1].to(v.dtype)


def backward_ring(run: Backward, k: Tensor, v: Tensor, _: list[Tensor]) -> tuple[Tensor, Tensor]:
    job, (dout, dlse, q) = run.job, run.given
    if run.dsinks is not None:
        run.dsinks += sinks_grad(run.sinks, run.lse, delta_of(dout, run.out, dlse))
    dq, dk, dv = ring.backward(job.shard, job.options, dout, dlse, q, k, v, run.seed, run.out, run.lse)
    run.dq.copy_(dq)
    return dk.to(k.dtype), dv.to(v.dtype)


def forward_ring(job: Job, q, k, v, sinks, seed, out, lse) -> list[Tensor]:
    """Keys go around, one rank's at a time; nothing of them is kept"""
    found, found_lse = ring.forward(job.shard, job.options, q, k, v, seed)
    out.copy_(found), lse.copy_(found_lse)
    if sinks is not None:
        add_sinks(out, lse, sinks)
    return []


METHODS = {
    "near": (forward_near, backward_near),
    "gather": (forward_gather, backward_gather),
    "ring": (forward_ring, backward_ring),
}
