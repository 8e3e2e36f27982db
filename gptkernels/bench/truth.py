"""Whether a contender computes the op at all: outputs and gradients of the very call that is timed, against the
reference in float64, on the device.

The reference runs in chunks, so that shapes fit which have no room for all of its float64 intermediates. Attention is
compared in the last head group of the last batch row, whole sequence and every gradient; with sinks, whose gradients
are sums over the batch, it is compared whole, as the other ops are. What is not compared must at least be finite, and
our own kernels write into buffers that start as NaN.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import parity
from .cases import NORMS, Case
from .plain import plain_add_layer_norm, plain_add_rms_norm, plain_layer_norm, plain_rms_norm

# Ours may be twice as far from the truth as plain PyTorch. Others only have to compute the same thing.
OURS_AT_MOST, PEERS_AT_MOST = 1.0, 10.0
ROWS = {
    "layer_norm": ("x",),
    "add_layer_norm": ("x", "residual"),
    "rms_norm": ("x",),
    "add_rms_norm": ("x", "residual"),
    "mlp": ("x",),
    "gated_mlp": ("x",),
    "linear_cross_entropy": ("x", "targets"),
    "linear_log_probs": ("x", "targets"),
    "linear_kl_div": ("x", "teacher_x", "targets"),
}
# What plain PyTorch is, where that is not the reference in the case's dtype.
PLAIN: dict[str, Callable] = {
    "layer_norm": plain_layer_norm,
    "add_layer_norm": plain_add_layer_norm,
    "rms_norm": plain_rms_norm,
    "add_rms_norm": plain_add_rms_norm,
}
WIDEST = {
    **dict.fromkeys(NORMS, "N"),
    **dict.fromkeys(("mlp", "gated_mlp"), "F"),
    **dict.fromkeys(("linear_cross_entropy", "linear_log_probs", "linear_kl_div"), "V"),
}


@dataclass
class Results:
    outputs: list[Tensor]
    grads: dict[str, Tensor]


@dataclass
class Truth:
    """What to compare with, for the part of the call that is compared."""

    exact: Results
    ordinary: Results  # plain PyTorch in the case's dtype
    cotangents: list[Tensor]  # of the whole call
    how: str


def part(case: Case, x: Tensor) -> Tensor:
    """x: an input, output or gradient of the call -> what is compared of it"""
    if not in_part(case):
        return x
    groups = case.shape["G"]
    if x.ndim == 1:  # (H,)
        return x[-(x.shape[0] // groups) :]
    heads = x.shape[1] // groups
    return x[-1:, heads * (groups - 1) :]


def in_part(case: Case) -> bool:
    return case.op == "attention" and not case.shape["S"]


def element_limit(device: torch.device, dtype: torch.dtype) -> int:
    """How many elements the largest intermediate of a chunk may have."""
    if device.type == "cpu":
        return 2**24
    return 2**30 if dtype.itemsize < 8 else 2**27


def chunks(case: Case, tensors: dict[str, Tensor], limit: int) -> Iterator[tuple[slice, dict[str, slice]]]:
    """-> rows of the outputs, and the rows of each input that they are made from (absent: all)"""
    if case.op == "attention":
        tokens, window = case.shape["T"], case.shape["W"] or case.shape["T"]
        heads = tensors["q"].shape[0] * tensors["q"].shape[1]
        step = tokens
        while step > 1 and heads * step * min(tokens, window + step) > limit:
            step //= 2
        for start in range(0, tokens, step):
            stop = min(tokens, start + step)
            keys = slice(max(0, start - window + 1), stop)
            yield slice(start, stop), {"q": slice(start, stop), "k": keys, "v": keys}
        return
    if case.op == "rope":
        tokens, each = case.shape["T"], case.shape["B"] * case.shape["H"] * case.shape["D"]
        step = max(1, limit // each)
        for start in range(0, tokens, step):
            here = slice(start, min(tokens, start + step))
            yield here, dict.fromkeys(tensors, here)
        return
    rows = case.shape["M"]
    step = max(1, limit // case.shape[WIDEST[case.op]])
    for start in range(0, rows, step):
        here = slice(start, min(rows, start + step))
        yield here, dict.fromkeys(ROWS[case.op], here)


def narrowed(x: Tensor, rows: slice | None) -> Tensor:
    """x: (B, H, T, D) or (M, ...) or (T, D)"""
    if rows is None:
        return x
    return x[:, :, rows] if x.ndim == 4 else x[rows]


def reference_results(
    case: Case,
    reference: Callable,
    tensors: dict[str, Tensor],
    cotangents: list[Tensor],
    dtype: torch.dtype,
    gradients: bool,
) -> Results:
    """`reference` on `tensors` (of the part that is compared), chunk by chunk."""

    def converted(x: Tensor) -> Tensor:
        return x.detach().to(dtype) if x.is_floating_point() else x

    loss = case.op == "linear_cross_entropy"
    if case.op == "decode_attention":
        arguments = {name: converted(x) for name, x in tensors.items()}
        return Results([reference(**arguments, **case.kwargs)], {})
    sum_dtype = torch.promote_types(dtype, torch.float32)
    names = [name for name, x in tensors.items() if x.requires_grad] if gradients else []
    sums = {name: torch.zeros_like(tensors[name], dtype=sum_dtype) for name in names}
    outputs: list[list[Tensor]] = [[] for _ in cotangents]
    for out_rows, in_rows in chunks(case, tensors, element_limit(tensors[next(iter(tensors))].device, dtype)):
        arguments = {name: converted(narrowed(x, in_rows.get(name))) for name, x in tensors.items()}
        leaves = [arguments[name].requires_grad_() for name in names]
        options = {"reduction": "sum"} if loss else {}
        found = parity.as_tuple(reference(**arguments, **case.kwargs, **options))
        found = tuple(out / case.shape["M"] for out in found) if loss else found
        if names:
            seen = [
                (c if loss else narrowed(c, out_rows)).to(out.dtype) for c, out in zip(cotangents, found, strict=True)
            ]
            for name, grad in zip(names, torch.autograd.grad(found, leaves, seen), strict=True):
                narrowed(sums[name], in_rows.get(name)).add_(grad)
        for kept, out in zip(outputs, found, strict=True):
            kept.append(out.detach())
    dim = 2 if case.op in ("attention", "rope") else 0
    joined = [torch.stack(kept).sum(0) if loss else torch.cat(kept, dim) for kept in outputs]
    return Results(joined, {name: total.to(dtype) for name, total in sums.items()})


def truth_of(case: Case, tensors: dict[str, Tensor]) -> Truth:
    device = next(iter(tensors.values())).device
    likes = [tensors[name] if name else torch.empty((), device=device) for name in case.outputs_like()]
    likes = [like if like.is_floating_point() else like.float() for like in likes]
    cotangents = [torch.randn_like(like) if like.ndim else torch.ones_like(like) for like in likes]
    gradients = wants_gradients(case)
    parts = {name: part(case, x) for name, x in tensors.items()}
    part_cotangents = [part(case, c) for c in cotangents]
    reference = case.spec.reference
    exact = reference_results(case, reference, parts, part_cotangents, torch.float64, gradients)
    plain = PLAIN.get(case.op, reference)
    ordinary = reference_results(case, plain, parts, part_cotangents, case.torch_dtype, gradients)
    how = "last head group of the last batch row, " if in_part(case) else ""
    return Truth(exact, ordinary, cotangents, how + ("outputs and gradients" if gradients else "outputs"))


def wants_gradients(case: Case) -> bool:
    return case.has_gradients and (case.op != "linear_cross_entropy" or "both" in case.passes)


def check(case: Case, call: Callable, tensors: dict[str, Tensor], truth: Truth, ours: bool) -> float:
    """The share of the error allowed to our own kernels that `call(**tensors)` uses up; ParityError if too much."""
    with parity.guarded_allocations() if ours else nullcontext():
        with nullcontext() if wants_gradients(case) else torch.no_grad():
            outputs = parity.as_tuple(call(**tensors))
        names = list(truth.exact.grads)
        leaves = [tensors[name] for name in names]
        cotangents = [c.to(out.dtype) for c, out in zip(truth.cotangents, outputs, strict=True)]
        grads = torch.autograd.grad(outputs, leaves, cotangents) if names else ()
    compared = [
        (f"output {i}", out, exact, ordinary)
        for i, (out, exact, ordinary) in enumerate(
            zip(outputs, truth.exact.outputs, truth.ordinary.outputs, strict=True)
        )
    ] + [
        (f"gradient of {name}", grad, truth.exact.grads[name], truth.ordinary.grads[name])
        for name, grad in zip(names, grads, strict=True)
    ]
    used = 0.0
    for name, value, exact, ordinary in compared:
        parity.require(bool(value.isfinite().all()), f"{name}: not finite everywhere")
        value = part(case, value)
        # Other libraries return what they like; ours have to have the right dtype.
        value = value if ours else value.to(ordinary.dtype)
        used = max(used, parity.check(name, value, exact, ordinary, OURS_AT_MOST if ours else PEERS_AT_MOST))
    return used
