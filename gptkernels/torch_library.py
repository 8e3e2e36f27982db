"""Launchers as torch.library ops: opaque to torch.compile, and at no cost when nothing is compiling."""

import functools
import inspect
from collections.abc import Callable
from types import GenericAlias
from typing import get_args, get_type_hints

import torch
from torch import Tensor

from .dispatch import UnsupportedError


def torch_op(fake: Callable, mutates: tuple[str, ...] = ()) -> Callable:
    """Makes `<op>_fwd` in `<backend>_kernels.py` the op `gptkernels::<op>_fwd_<backend>`.

    The launcher takes a record of the call first, and what else it needs after it; the op takes the record's fields one
    by one in its place. fake: takes the launcher's arguments and returns its outputs, allocated and not filled in.
    mutates: arguments that the launcher writes to.
    Under torch.compile and on tensor subclasses (fake, functional, ...) calls go through the dispatcher; plain tensors
    reach the launcher directly, because the dispatcher costs more than a small kernel takes.
    """

    def wrap(launcher: Callable) -> Callable:
        backend = launcher.__module__.rsplit(".", 1)[-1].removesuffix("_kernels")
        op = torch.library.custom_op(
            f"gptkernels::{launcher.__name__}_{backend}", flattened(launcher, launcher), mutates_args=mutates
        )
        op.register_fake(flattened(fake, launcher))

        @functools.wraps(launcher)
        def call(record, *rest):
            first = record.first
            if torch.compiler.is_compiling() or type(first) not in (Tensor, torch.nn.Parameter):
                return op(*record.flat(), *rest)
            if first.is_meta:
                return fake(record, *rest)
            if torch.is_grad_enabled():  # as in a backward pass with create_graph=True
                with torch.no_grad():
                    return launcher(record, *rest)
            return launcher(record, *rest)

        vars(call)["torch_op"] = op
        return call

    return wrap


def flattened(function: Callable, launcher: Callable) -> Callable:
    """`function`, which takes what `launcher` does, as torch.library wants it: with the fields of the record as
    parameters of their own, and empty tensors for results that a call does not have"""
    hints = get_type_hints(launcher)
    first, *rest = inspect.signature(launcher).parameters
    record = hints[first]
    fields = get_type_hints(record)
    annotated = {name: fields[name] for name in record.__slots__} | {name: hints[name] for name in rest}

    def flat(*values):
        call = record(*values[: len(record.__slots__)])
        results = function(call, *values[len(record.__slots__) :])
        if isinstance(results, Tensor):
            return results
        return tuple(call.first.new_empty(0) if result is None else result for result in results)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind, annotation=hint) for name, hint in annotated.items()]
    found = hints["return"]
    if found is not Tensor:
        found = GenericAlias(tuple, (Tensor,) * len(get_args(found)))
    vars(flat)["__signature__"] = inspect.Signature(parameters, return_annotation=found)
    return flat


def apply(function: type[torch.autograd.Function], *arguments):
    """function.apply(*arguments) without what that does for the transforms of torch.func, which no op takes: it costs
    as much as the rest of it"""
    if torch.compiler.is_compiling():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


class _OnceDifferentiable(torch.autograd.Function):
    """Passes gradients on, tied to what they came from, so that differentiating them again is an error."""

    @staticmethod
    def forward(ctx, op, count, *tensors):
        ctx.op = op
        return tuple(t if t is None else t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx, *grads):
        raise UnsupportedError(f"{ctx.op}: double backward is not supported (backend='eager' neither)")


def first_order_only(op: str, grads: tuple[Tensor | None, ...], sources: tuple[Tensor | None, ...]) -> tuple:
    """The gradients of `op` computed from `sources` outside of autograd's sight. Under create_graph=True they would
    look like constants, and second derivatives would silently miss them: this makes those an error instead."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return grads
    return _OnceDifferentiable.apply(op, len(grads), *grads, *sources)
