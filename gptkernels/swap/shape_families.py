"""Modules that are recognised by class or by what they are made of: torch's own, and nanoGPT-style blocks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.layer_norm import layer_norm
from . import masks
from .modules import FAMILIES, Family, Foreign, original, settings_of
from .parts import (
    is_conv1d,
    layer_norm_forward,
    mlp_forward,
    mlp_reason,
    packed_attention_forward,
    run_mlp,
)


def is_layer_norm(module: nn.Module) -> bool | str:
    if not isinstance(module, nn.LayerNorm) or type(module).forward is not nn.LayerNorm.forward:
        return False
    if len(module.normalized_shape) != 1:
        return f"it normalises {len(module.normalized_shape)} dimensions, and the kernel the last one"
    return True if module.weight is not None else "it has no weight"


def is_encoder_layer(module: nn.Module) -> bool:
    methods = ("forward", "_sa_block", "_ff_block")
    cls = nn.TransformerEncoderLayer
    return isinstance(module, cls) and all(getattr(type(module), m) is getattr(cls, m) for m in methods)


def has_encoder_attention(module: Foreign) -> bool | str:
    if not is_encoder_layer(module):
        return False
    inner = module.self_attn
    if not inner._qkv_same_embed_dim or inner.bias_k is not None or inner.add_zero_attn:
        return "its attention has keys or values of its own kind"
    return not_plain_attention(inner) or True


def not_plain_attention(inner: nn.MultiheadAttention) -> str | None:
    hooks = inner._forward_hooks or inner._forward_pre_hooks
    out = f"{type(inner.out_proj).__module__}.{type(inner.out_proj).__name__}"
    if type(inner) is not nn.MultiheadAttention or hooks or "NonDynamicallyQuantizableLinear" not in out:
        return "its attention has hooks or weights of its own kind"
    return None


def has_encoder_mlp(module: Foreign) -> bool | str:
    return is_encoder_layer(module) and (mlp_reason(module.linear1, module.activation, module.linear2) or True)


def encoder_layer(
    module,
    src: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """As the original without its shortcut for inference, which would leave our blocks out."""
    if src.is_nested and settings_of(module).window is None:
        return original(module, "forward")(src, src_mask, src_key_padding_mask, is_causal)
    masked = {"attn_mask": src_mask, "key_padding_mask": src_key_padding_mask, "is_causal": is_causal}
    if module.norm_first:
        x = src + module._sa_block(module.norm1(src), **masked)
        return x + module._ff_block(module.norm2(x))
    x = module.norm1(src + module._sa_block(src, **masked))
    return module.norm2(x + module._ff_block(x))


def encoder_attention(module, x: Tensor, attn_mask, key_padding_mask, is_causal: bool = False) -> Tensor:
    """x: (B, T, d) or (T, B, d)"""
    inner, settings = module.self_attn, settings_of(module)
    real = None if key_padding_mask is None else real_tokens(key_padding_mask)
    if x.ndim != 3 or (attn_mask is None) == is_causal or not_plain_attention(inner):
        if settings.window is not None:
            raise NotImplementedError(
                f"accelerate() was asked for a window of {settings.window}, and this call has a mask of its own (or no "
                "batch), which the kernels do not take"
            )
        return original(module, "_sa_block")(x, attn_mask, key_padding_mask, is_causal)
    x = x if inner.batch_first else x.transpose(0, 1)
    q, k, v = (
        part.unflatten(-1, (inner.num_heads, -1)).transpose(1, 2)
        for part in F.linear(x, inner.in_proj_weight, inner.in_proj_bias).chunk(3, dim=-1)
    )
    tokens = x.shape[1]
    if is_causal:
        mask = masks.causal_mask(tokens, tokens, tokens, settings.window, real, x.device)
    else:
        mask = masks.full_mask(tokens, settings.window, real, x.device)
    dropout = inner.dropout if module.training else 0.0
    out = masks.attend(q, k, v, masks.read(mask), scale=None, dropout=dropout, backend=settings.backend)
    out = inner.out_proj(out.transpose(1, 2).flatten(2))
    return module.dropout1(out if inner.batch_first else out.transpose(0, 1))


def real_tokens(padding: Tensor) -> Tensor:
    """padding: (B, T) bool, True for padding, or what to add to scores -> (B, T) bool, True for tokens"""
    if padding.dtype == torch.bool:
        return ~padding
    valid = ((padding == 0) | (padding == -torch.inf)).all()
    if torch.compiler.is_compiling():
        torch._assert_async(valid, "key_padding_mask must be 0 or -inf")
    elif not valid:
        raise masks.Unrepresentable("a key_padding_mask with other values than 0 and -inf")
    return padding == 0


def encoder_mlp(module, x: Tensor) -> Tensor:
    dropped = module.training and module.dropout.p > 0
    out = None if dropped else run_mlp(module, x, module.linear1, module.activation, module.linear2)
    return original(module, "_ff_block")(x) if out is None else module.dropout2(out)


def children_of(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module.named_children() if not isinstance(child, nn.Identity)}


def looks_like_packed_attention(module: nn.Module) -> bool | str:
    children = children_of(module)
    qkv, out = children.pop("c_attn", None), children.pop("c_proj", None)
    heads = getattr(module, "n_head", None)
    if not isinstance(heads, int) or not isinstance(qkv, nn.Linear) or not isinstance(out, nn.Linear):
        return False
    if qkv.out_features != 3 * qkv.in_features:
        return f"c_attn makes {qkv.out_features} features of {qkv.in_features}, not three times as many"
    others = [name for name, child in children.items() if not isinstance(child, nn.Dropout)]
    return f"it also has {', '.join(others)}" if others else True


def looks_like_layer_norm(module: nn.Module) -> bool:
    """nanoGPT's, which may be without a bias."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", ())
    parameters = {name for name, _ in module.named_parameters()}
    if type(module).__module__.startswith(("torch.", "transformers.")) or children_of(module):
        return False
    return (
        "norm" in type(module).__name__.lower()
        and parameters in ({"weight"}, {"weight", "bias"})
        and bias != ()
        and isinstance(weight, Tensor)
        and weight.ndim == 1
    )


def plain_layer_norm(module: Foreign, x: Tensor) -> Tensor:
    eps = getattr(module, "eps", 1e-5)
    return layer_norm(x, module.weight, module.bias, eps=eps, backend=settings_of(module).backend)


def looks_like_cohere_norm(module: nn.Module) -> bool:
    """A LayerNorm of transformers' that has a weight and no bias"""
    parameters = dict(module.named_parameters())
    return (
        type(module).__name__.endswith("LayerNorm")
        and type(module).__module__.startswith("transformers.")
        and parameters.keys() == {"weight"}
        and parameters["weight"].ndim == 1
        and isinstance(getattr(module, "variance_epsilon", None), float)
    )


def cohere_norm(module: Foreign, x: Tensor) -> Tensor:
    return layer_norm(x, module.weight, eps=module.variance_epsilon, backend=settings_of(module).backend)


MLP_NAMES = (
    ("c_fc", "gelu", "c_proj", "dropout"),
    ("c_fc", "act", "c_proj", "dropout"),
    ("c_fc", "activation", "c_proj", "dropout"),
    ("fc1", "act", "fc2", "dropout"),
    ("fc1", "activation", "fc2", "dropout"),
)


# As transformers' models have them that no other family names
TRANSFORMERS_MLP_NAMES = (("c_fc", "act", "c_proj", "dropout"), ("fc1", "activation_fn", "fc2", "dropout"))


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def looks_like_mlp(fc: str, activation: str, proj: str, dropout: str, of_transformers: bool = False):
    def matches(module: nn.Module) -> bool | str:
        children = children_of(module)
        first, between, second, last = (children.pop(name, None) for name in (fc, activation, proj, dropout))
        if type(module).__module__.startswith("transformers.") != of_transformers or between is None:
            return False
        if first is None or second is None or not (is_linear(first) and is_linear(second)):
            return False
        if children and of_transformers:
            return "it is computed in the forward of a whole layer, between other steps"
        if children or not isinstance(last, nn.Dropout | None):
            return f"it also has {', '.join(children) or 'a dropout of its own kind'}"
        return mlp_reason(first, between, second) or True

    return matches


def shaped_mlp(fc: str, activation: str, proj: str, dropout: str):
    with_dropout, without = mlp_forward(fc, activation, proj, dropout), mlp_forward(fc, activation, proj)

    def forward(module: nn.Module, x: Tensor) -> Tensor:
        return (with_dropout if dropout in module._modules else without)(module, x)

    return forward


def add(name, part, matches, probed=False, **methods) -> None:
    FAMILIES[name] = Family(name, part, matches, methods, probed)


def add_last_resorts() -> None:
    """Before all others, which are asked before them"""
    add("transformers LayerNorm without a bias", "norm", looks_like_cohere_norm, True, forward=cohere_norm)
    for names in TRANSFORMERS_MLP_NAMES:
        name = f"transformers MLP of {names[0]}, {names[1]}, {names[2]}"
        add(name, "mlp", looks_like_mlp(*names, of_transformers=True), True, forward=shaped_mlp(*names))


def add_all() -> None:
    add("LayerNorm", "norm", is_layer_norm, forward=layer_norm_forward)
    add(
        "TransformerEncoderLayer attention",
        "attention",
        has_encoder_attention,
        forward=encoder_layer,
        _sa_block=encoder_attention,
    )
    add("TransformerEncoderLayer MLP", "mlp", has_encoder_mlp, forward=encoder_layer, _ff_block=encoder_mlp)
    # Its shortcut for padded input in inference hands the layers nested tensors.
    FAMILIES["TransformerEncoder"] = Family(
        "TransformerEncoder", "container", is_encoder, {"use_nested_tensor": property(lambda self: False)}
    )
    add("nanoGPT attention", "attention", looks_like_packed_attention, True, forward=packed_attention_forward)
    add("nanoGPT LayerNorm", "norm", looks_like_layer_norm, True, forward=plain_layer_norm)
    for names in MLP_NAMES:
        add(
            f"MLP of {names[0]}, {names[1]}, {names[2]}",
            "mlp",
            looks_like_mlp(*names),
            True,
            forward=shaped_mlp(*names),
        )


def is_encoder(module: Foreign) -> bool:
    own = isinstance(module, nn.TransformerEncoder) and type(module).forward is nn.TransformerEncoder.forward
    return own and any(has_encoder_attention(layer) is True for layer in module.layers)
