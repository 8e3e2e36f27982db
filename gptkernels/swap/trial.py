"""Whether a whole model of transformers still computes what it did on our kernels: decided by trying, on a few tokens
with the model's own weights."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch import UnsupportedError
from .probe import TOLERANCE, undisturbed

LENGTH = 6


def disagreement(model: nn.Module, ours: Callable[[], AbstractContextManager]) -> str | None:
    """Why `ours`, a context in which the model runs on our kernels, must not be; None where both give the same. A model
    that cannot be called with what is known of it proves nothing, which is a reason too."""
    weight = next(model.parameters())
    if weight.device.type == "meta":
        return "it is on the meta device, where what it computes cannot be compared"
    with torch.no_grad(), undisturbed(model), without_hooks(model):
        try:
            before = list(results(model))
        except Exception as error:
            return f"it could not be tried: {type(error).__name__}: {first_line(error)}"
        with ours():
            try:
                after = list(results(model))
            except Exception as error:
                return f"the kernels do not take what it works with: {first_line(error)}"
    if len(before) != len(after) or not before:
        return "its outputs are not the same tensors"
    tolerance = TOLERANCE.get(weight.dtype, 1e-4)
    for x, y in zip(before, after, strict=True):
        if x.shape != y.shape or (y - x).abs().max() > tolerance * x.abs().max().clamp(min=1e-30):
            return "it computes something else with other attentions than its own"
    return None


def refusal(model: nn.Module, ours: Callable[[], AbstractContextManager]) -> str | None:
    """Why our kernels refuse what the model asks of them, None if they do not, or if nobody knows how to ask it."""
    if next(model.parameters()).device.type == "meta":
        return None
    with torch.no_grad(), undisturbed(model), without_hooks(model), ours():
        try:
            model.forward(**inputs(model))
        except (NotImplementedError, ValueError, TypeError, UnsupportedError) as error:
            if is_of_our_own(error):
                return f"the kernels do not take what it works with: {first_line(error)}"
        except Exception:
            return None
    return None


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """In evaluation, and what listens to the model's modules does not notice."""
    names = ("_forward_hooks", "_forward_pre_hooks")
    saved = [(module, name, vars(module)[name]) for module in model.modules() for name in names]
    model.eval()
    try:
        for module, name, _ in saved:
            vars(module)[name] = OrderedDict()
        yield
    finally:
        for module, name, hooks in saved:
            vars(module)[name] = hooks


def is_of_our_own(error: BaseException) -> bool:
    """Whether it was raised in this package"""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and frame.tb_frame.f_globals.get("__name__", "").startswith("gptkernels.")


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def results(model: nn.Module) -> Iterator[Tensor]:
    outputs = model.forward(**inputs(model))
    for value in outputs.values():
        if isinstance(value, Tensor) and value.is_floating_point():
            yield value


def inputs(model: Any) -> dict[str, Tensor]:
    """Random tokens, or features for a model that takes those, without padding."""
    config, weight = model.config, next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    vocabulary = getattr(config.get_text_config(), "vocab_size", None) or 1
    tokens = torch.randint(0, vocabulary, (2, LENGTH), generator=generator).to(weight.device)
    name = model.main_input_name
    given = {"input_ids": tokens}
    if name == "input_features":
        shape = (2, config.num_mel_bins, 2 * config.max_source_positions)
        given = {name: torch.randn(shape, generator=generator).to(weight)}
    elif name == "pixel_values":
        given = {name: torch.randn((2, 3, config.image_size, config.image_size), generator=generator).to(weight)}
    if config.is_encoder_decoder:
        given["decoder_input_ids"] = tokens
    return given
