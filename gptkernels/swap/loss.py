"""The loss of a causal language model from its hidden states, without its logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.linear_cross_entropy import linear_cross_entropy
from .modules import FAMILIES, Family, Foreign, Settings, original, settings_of
from .parts import is_plain
from .probe import TOLERANCE, undisturbed
from .replacing import replace, restore
from .transformers_families import is_a
from .trial import first_line, inputs, without_hooks

# Their logits are lm_head(hidden states), no more.
MODELS = (
    "gpt2.modeling_gpt2.GPT2LMHeadModel",
    "openai.modeling_openai.OpenAIGPTLMHeadModel",
    "gpt_neo.modeling_gpt_neo.GPTNeoForCausalLM",
    "gptj.modeling_gptj.GPTJForCausalLM",
    "gpt_neox.modeling_gpt_neox.GPTNeoXForCausalLM",
    "opt.modeling_opt.OPTForCausalLM",
    "llama.modeling_llama.LlamaForCausalLM",
    "mistral.modeling_mistral.MistralForCausalLM",
    "qwen2.modeling_qwen2.Qwen2ForCausalLM",
    "gemma.modeling_gemma.GemmaForCausalLM",
)
MODEL, HEAD = "causal language model", "language model head"


def matches(model: Foreign) -> bool | str:
    known = any(is_a(model, name, "forward") for name in MODELS)
    if not known and not looks_like_one(model):
        return False
    if not is_plain(model.lm_head):
        return f"its lm_head is a {type(model.lm_head).__name__} with hooks or weights of its own kind"
    return known or difference(model) or True


def looks_like_one(model: nn.Module) -> bool:
    """Whether it is a causal language model of transformers with a head by the usual name."""
    cls = type(model)
    causal = "ForCausalLM" in cls.__name__ or cls.__name__.endswith("LMHeadModel")
    head = model._modules.get("lm_head")
    return causal and cls.__module__.startswith("transformers.models.") and isinstance(head, nn.Linear)


def difference(model: Foreign) -> str | None:
    """Why the loss cannot be made in the head's place, by trying: None where the logits are the head's outputs, the
    loss is transformers' usual one of them, and ours is the same."""
    if model.lm_head.weight.device.type == "meta":
        return "it is on the meta device, where its loss cannot be compared"
    given, seen = inputs(model), []
    labels = given["input_ids"].clone()
    labels[:, 2] = -100
    with torch.no_grad(), undisturbed(model), without_hooks(model):
        hook = model.lm_head.register_forward_hook(lambda head, arguments, out: seen.append(out))
        try:
            before = model.forward(**given, labels=labels, use_cache=False)
            with plain_logits(model) as options:
                plain = model.forward(**given, labels=labels, use_cache=False)
        except Exception as error:
            return f"its loss could not be tried: {type(error).__name__}: {first_line(error)}"
        finally:
            hook.remove()
        if len(seen) != 2 or not torch.equal(plain["logits"].float(), seen[1].float()):
            return "its logits are more than its head's outputs, which gptkernels.linear_cross_entropy does not do"
        if not is_close(scored(seen[0].float(), **options), before["logits"].float(), model.lm_head.weight.dtype):
            return "its logits are not its head's outputs as gptkernels.linear_cross_entropy would scale them"
        for module, family in ((model, MODEL), (model.lm_head, HEAD)):
            replace(module, (family,), Settings())
        try:
            model.training = True  # of this module alone: nothing below it drops out
            after = model.forward(**given, labels=labels, use_cache=False)
        finally:
            for module in (model, model.lm_head):
                restore(module)
    same = is_close(after["loss"].float(), before["loss"].float(), model.lm_head.weight.dtype)
    if after.get("logits") is not None or not same:
        return "its loss is not transformers' usual one of causal language models"
    return None


def is_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    return bool((found - expected).abs().max() <= TOLERANCE.get(dtype, 1e-4) * expected.abs().max())


# What models do to their head's outputs: whose attribute says it, and its value where nothing is done.
SOFTCAP, DIVISOR, FACTOR = ("config", "final_logit_softcapping"), ("config", "logits_scaling"), ("model", "logit_scale")
NEUTRAL = {SOFTCAP: None, DIVISOR: 1.0, FACTOR: 1.0}


@contextmanager
def plain_logits(model: Foreign) -> Iterator[dict[str, Any]]:
    """Inside, the model's logits are its head's outputs. -> what they were more, as the loss takes it"""
    changed: list[tuple[Any, str, Any, float | None]] = []
    options: dict[str, Any] = {}
    for (whose, name), neutral in NEUTRAL.items():
        owner = model.config if whose == "config" else model
        value: Any = getattr(owner, name, neutral)
        if value == neutral or isinstance(value, Tensor):
            continue
        changed.append((owner, name, value, neutral))
        if (whose, name) == SOFTCAP:
            options["softcap"] = value
        else:
            options["temperature"] = value if (whose, name) == DIVISOR else 1 / value
    try:
        for owner, name, _, neutral in changed:
            setattr(owner, name, neutral)
        yield options
    finally:
        for owner, name, value, _ in changed:
            setattr(owner, name, value)


def scored(logits: Tensor, softcap: float | None = None, temperature: float = 1.0) -> Tensor:
    capped = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    return capped / temperature


def model_forward(model: Foreign, *args, labels: Tensor | None = None, **kwargs):
    """In training with labels: outputs with the loss, and with None for the logits. Otherwise as it was."""
    if not takes_loss(model, labels, kwargs):
        return original(model, "forward")(*args, labels=labels, **kwargs)
    names = ("num_items_in_batch", "ignore_index", "shift_labels")
    # The head gives the loss in the place of the logits, so that whatever wraps the head (such as FSDP) still does.
    arguments = {"labels": labels, **{name: kwargs[name] for name in names if name in kwargs}}
    with plain_logits(model) as options:
        model.lm_head.loss_arguments = {**arguments, **options}
        try:
            outputs = original(model, "forward")(*args, **kwargs)
        finally:
            del model.lm_head.loss_arguments
    if isinstance(outputs, tuple):
        return outputs
    return type(outputs)(**{**outputs, "loss": outputs["logits"], "logits": None})


def takes_loss(model: Foreign, labels: Tensor | None, kwargs: dict) -> bool:
    all_logits = kwargs.get("logits_to_keep", 0) in (0, None)
    # Mixtures of experts add the router's own loss where they are asked for its logits.
    router = kwargs.get("output_router_logits")
    if getattr(model.config, "output_router_logits", False) if router is None else router:
        return False
    return labels is not None and model.training and all_logits and has_usual_loss(model) and is_plain(model.lm_head)


def has_usual_loss(model: Foreign) -> bool:
    """Whether model.loss_function is transformers' loss of causal language models, which it also is where the kind of
    model is not known. Asking for it would log that, which cannot be compiled."""
    from transformers.loss.loss_utils import LOSS_MAPPING

    own = vars(model).get("_loss_function")
    return own is LOSS_MAPPING["ForCausalLM"] if own else model.loss_type in ("ForCausalLM", None)


def head_forward(head: Foreign, x: Tensor) -> Tensor:
    """x: (B, T, d) -> (B, T, V), or the loss: ()"""
    arguments = vars(head).get("loss_arguments")
    if arguments is None:
        return original(head, "forward")(x)
    return shifted_loss(x, head.weight, bias=head.bias, backend=settings_of(head).backend, **arguments)


def shifted_loss(
    x: Tensor,
    weight: Tensor,
    *,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **options,
) -> Tensor:
    """transformers' loss of a causal language model. x: (B, T, d), weight: (V, d), labels, shift_labels: (B, T),
    options: of linear_cross_entropy"""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.to(x.device).view(x.shape[:-1])
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = linear_cross_entropy(x, weight, targets, ignore_index=ignore_index, reduction=reduction, **options)
    if num_items_in_batch is None:
        return loss
    return loss / (num_items_in_batch.to(loss.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch)


def add_all() -> None:
    FAMILIES[MODEL] = Family(MODEL, "loss", matches, {"forward": model_forward})
    FAMILIES[HEAD] = Family(HEAD, "loss", lambda module: False, {"forward": head_forward})
