"""The one check that every op has to pass, in the tests and in `gptkernels check`: forward and every gradient against
the float64 reference.

An op may be at most twice as far from the float64 result as plain PyTorch is in the op's own dtypes, and has to have
NaN and Inf in the same places.
"""

import math
from collections.abc import Callable
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.nn import Parameter

ALLOWED_RATIO = 2.0
# Of the largest value: what float32 accumulation in another order may differ by where the reference has no error.
FLOOR = 1e-6
MARGIN = 64


class ParityError(AssertionError):
    """An op differs from its reference by more than it may."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ParityError(message)


def as_tuple(outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def run(op: Callable, tensors: dict[str, Tensor], cotangents: list[Tensor], **kwargs):
    """-> outputs, {name: gradient} for the tensors that require one. cotangents: as many as there are outputs."""
    outputs = as_tuple(op(**tensors, **kwargs))
    wanted = {name: tensor for name, tensor in tensors.items() if tensor is not None and tensor.requires_grad}
    if not wanted:
        return outputs, {}
    cotangents = [c.to(device=o.device, dtype=o.dtype) for o, c in zip(outputs, cotangents, strict=True)]
    pairs = [(out, cotangent) for out, cotangent in zip(outputs, cotangents, strict=True) if out.requires_grad]
    grads = torch.autograd.grad([out for out, _ in pairs], list(wanted.values()), [cotangent for _, cotangent in pairs])
    return outputs, dict(zip(wanted, grads, strict=True))


def converted(tensors: dict[str, Tensor], dtype: torch.dtype | None, device: torch.device | str) -> dict[str, Tensor]:
    """Fresh leaves on the device, in `dtype` where it is given and the tensor is floating point."""

    def convert(tensor):
        if tensor is None:
            return None
        floating = tensor.is_floating_point()
        copy = tensor.detach().to(device, dtype if dtype and floating else tensor.dtype, copy=True)
        return copy.requires_grad_(tensor.requires_grad)

    return {name: convert(tensor) for name, tensor in tensors.items()}


def error(value: Tensor, truth: Tensor) -> float:
    """The largest distance where the truth is finite."""
    distance = (value.detach().to(truth.device).double() - truth.detach().double()).abs()[truth.isfinite()]
    return distance.max().item() if distance.numel() else 0.0


def same_places(value: Tensor, truth: Tensor) -> bool:
    value, truth = value.detach().to(truth.device).double(), truth.detach().double()
    places = value.isnan() == truth.isnan()
    return bool((places & ((value == truth) | ~(value.isinf() | truth.isinf()))).all())


def check(name: str, value: Tensor, truth: Tensor, ordinary: Tensor, at_most: float = 1.0) -> float:
    """The share of the allowed error that `value` uses up; ParityError above `at_most`. ordinary: PyTorch's own result.
    Compares on truth's device."""
    require(value.shape == truth.shape, f"{name}: shape {tuple(value.shape)}, expected {tuple(truth.shape)}")
    require(value.dtype == ordinary.dtype, f"{name}: {value.dtype}, expected {ordinary.dtype}")
    # What overflows in this dtype is infinite in both; what does not is compared with the truth.
    rounded = truth.to(value.dtype).double()
    require(same_places(value, rounded), f"{name}: NaN or Inf in other places than in the reference")
    finite = truth[truth.isfinite()]
    largest = max(1.0, finite.abs().max().item() if finite.numel() else 0.0)
    # Where PyTorch was lucky, a correctly rounded result (half a unit in the last place off) must still pass.
    half_unit = torch.finfo(value.dtype).eps / 2 * 2.0 ** math.floor(math.log2(largest))
    allowed = max(ALLOWED_RATIO * error(ordinary, truth) + FLOOR * largest, half_unit)
    used = error(value, truth) / allowed
    require(used <= at_most, f"{name}: error {used * allowed:.3e} is {used:.2f} times the allowed {allowed:.3e}")
    return used


def assert_parity(
    op: Callable,
    reference: Callable,
    tensors: dict[str, Tensor],
    *,
    kwargs: dict | None = None,
    reference_kwargs: dict | None = None,
    ordinary: Callable | None = None,
    cotangents: list[Tensor] | None = None,
    device: torch.device | str = "cpu",
) -> float:
    """Runs op(**tensors, **kwargs) and its backward pass, both with NaN-filled allocations, and compares.

    ordinary: what people would write in PyTorch, called like the reference; its error is the measure of the allowed
    one (by default the reference's own). device: where the reference runs; its kwargs have to be there. Returns the
    largest share of the allowed error that was used up.
    """
    reference_kwargs = (kwargs or {}) if reference_kwargs is None else reference_kwargs
    truth_inputs = converted(tensors, torch.float64, device)
    truths = as_tuple(reference(**truth_inputs, **reference_kwargs))
    if cotangents is None:
        cotangents = [torch.randn(out.shape) for out in truths]
    with guarded_allocations():
        outputs, grads = run(op, tensors, cotangents, **(kwargs or {}))
    # Everything gets the cotangents as the op saw them, rounded to its outputs' dtypes.
    seen = [c.to(o.dtype) for c, o in zip(cotangents, outputs, strict=True)]
    truths, truth_grads = run(reference, truth_inputs, seen, **reference_kwargs)
    ordinaries, ordinary_grads = run(ordinary or reference, converted(tensors, None, device), seen, **reference_kwargs)
    used = [
        check(f"output {i}", output, truth, ordinary)
        for i, (output, truth, ordinary) in enumerate(zip(outputs, truths, ordinaries, strict=True))
    ]
    used += [check(f"gradient of {name}", grads[name], truth_grads[name], ordinary_grads[name]) for name in grads]
    return max(used)


@contextmanager
def guarded_allocations():
    """torch.empty, empty_like and empty_strided give NaNs (bytes of 0xFF) between margins of the same, which must be
    untouched at the end."""
    buffers = []
    real_empty, real_empty_like, real_empty_strided = torch.empty, torch.empty_like, torch.empty_strided

    def guarded_empty(*size, **options):
        size = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        out = real_empty(size, **options)
        if out.is_meta or type(out) is not Tensor or out.numel() == 0:
            return out
        return guarded(out)

    def guarded_empty_like(x, **options):
        out = real_empty_like(x, **options)
        return out if out.is_meta or type(x) not in (Tensor, Parameter) or out.numel() == 0 else guarded(out)

    def guarded_empty_strided(size, stride, **options):
        out = real_empty_strided(size, stride, **options)
        return out if out.is_meta or type(out) is not Tensor or out.numel() == 0 else guarded(out)

    def guarded(out):
        buffer = real_empty((out.numel() + 2 * MARGIN,), dtype=out.dtype, device=out.device)
        buffer.view(torch.uint8).fill_(0xFF)
        buffers.append(buffer)
        return buffer.as_strided(out.shape, out.stride(), MARGIN)

    with (
        mock.patch.object(torch, "empty", guarded_empty),
        mock.patch.object(torch, "empty_like", guarded_empty_like),
        mock.patch.object(torch, "empty_strided", guarded_empty_strided),
    ):
        yield
    for buffer in buffers:
        for margin in (buffer[:MARGIN], buffer[-MARGIN:]):
            require(bool((margin.view(torch.uint8) == 0xFF).all()), "a kernel wrote outside of its output")
