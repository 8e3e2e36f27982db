"""The computations that replaced modules run, written once for all families that have them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.attention import attention
from ..ops.attention.op import HEAD_SIZES
from ..ops.layer_norm import layer_norm
from ..ops.mlp import mlp
from .modules import Foreign, original, settings_of

# What activation modules and functions are called, in torch, transformers and models written by hand.
ACTIVATIONS = {
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "BloomGelu": "gelu_tanh",
    "NewGELU": "gelu_tanh",
    "GELUActivation": "gelu",
    "ReLU": "relu",
    "relu": "relu",
    "ReLUSquaredActivation": "relu2",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "silu": "silu",
}


def activation_of(function) -> str | None:
    """What gptkernels.mlp calls it, None where it has no such."""
    if isinstance(function, nn.GELU):
        return "gelu_tanh" if function.approximate == "tanh" else "gelu"
    if function is F.gelu:
        return "gelu"
    name = getattr(function, "__name__", type(function).__name__)
    return ACTIVATIONS.get(name)


# What a forward has that tensor parallelism has given to a layer: it computes the same
CUT = "gptkernels_cut"


def is_conv1d(module: nn.Module) -> bool:
    """transformers' linear layer with weights (in, out)."""
    return f"{type(module).__module__}.{type(module).__name__}" == "transformers.pytorch_utils.Conv1D"


def is_plain(linear: nn.Module) -> bool:
    """Whether the linear layer is no more than its weight and bias: no adapter, quantisation, hook or offloading."""
    hooks = linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks
    cls = getattr(type(linear), "gptkernels_original", type(linear))
    known = cls is nn.Linear or is_conv1d(linear)
    own = vars(linear).get("forward")
    return known and not hooks and (own is None or hasattr(own, CUT))


def not_plain(*linears: nn.Module) -> str | None:
    for linear in linears:
        if not is_plain(linear):
            return f"has a {type(linear).__name__} with hooks or weights of its own kind"
    return None


def weight_of(linear: Foreign) -> Tensor:
    """(out, in)"""
    return linear.weight.mT if is_conv1d(linear) else linear.weight


def layer_norm_forward(module: Foreign, x: Tensor) -> Tensor:
    return layer_norm(x, module.weight, module.bias, eps=module.eps, backend=settings_of(module).backend)


def run_mlp(
    module: nn.Module, x: Tensor, fc: Foreign, activation, proj: Foreign, residual: Tensor | None = None
) -> Tensor | None:
    """None where the layers have become something that has to be called."""
    if not (is_plain(fc) and is_plain(proj)):
        return None
    name = activation_of(activation)
    assert name is not None, "mlp_reason looks at this before anything is replaced"
    weights = weight_of(fc), fc.bias, weight_of(proj), proj.bias
    return mlp(x, *weights, activation=name, residual=residual, backend=settings_of(module).backend)


def mlp_forward(fc: str, activation: str, proj: str, dropout: str | None = None) -> Callable:
    """The forward of a module dropout(proj(activation(fc(x)))), by the names of its attributes."""

    def forward(module: nn.Module, x: Tensor) -> Tensor:
        layers = (getattr(module, name) for name in (fc, activation, proj))
        out = run_mlp(module, x, *layers)
        if out is None:
            return original(module, "forward")(x)
        return getattr(module, dropout)(out) if dropout else out

    return forward


def mlp_reason(fc: nn.Module, activation, proj: nn.Module) -> str | None:
    """Why an MLP of these cannot be replaced."""
    if activation_of(activation) is None:
        return f"gptkernels.mlp has no activation {getattr(activation, '__name__', type(activation).__name__)}"
    return not_plain(fc, proj)


def packed_attention_forward(module: Foreign, x: Tensor) -> Tensor:
    """nanoGPT's: x: (B, T, d) -> (B, T, d), one linear layer before the heads and one after"""
    settings = settings_of(module)
    heads = module.n_head
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in module.c_attn(x).chunk(3, dim=-1))
    dropout = float(probability(module)) if module.training else 0.0
    out = attention(q, k, v, window=settings.window, dropout=dropout, backend=settings.backend)
    out = module.c_proj(out.transpose(1, 2).flatten(2))
    last = getattr(module, "resid_dropout", None)
    return out if last is None else last(out)


def probability(module: nn.Module) -> float:
    inner = getattr(module, "attn_dropout", None)
    return inner.p if isinstance(inner, nn.Dropout) else getattr(module, "dropout", 0.0)


def is_float64(module: nn.Module) -> bool:
    return any(p.dtype == torch.float64 for p in module.parameters(recurse=False))


def head_size(module: nn.Module) -> int | None:
    """Of an attention; None where it does not tell."""
    module = getattr(module, "self_attn", module)
    for name in ("qk_head_dim", "head_dim", "head_size", "attention_head_size"):
        if isinstance(getattr(module, name, None), int):
            return getattr(module, name)
    heads, projection = getattr(module, "n_head", None), getattr(module, "c_proj", None)
    return projection.weight.shape[0] // heads if isinstance(heads, int) and projection is not None else None


def head_reason(module: nn.Module) -> str | None:
    """Why gptkernels.attention does not take the heads of an attention."""
    size = head_size(module)
    if size is not None and size not in HEAD_SIZES:
        return f"its heads have a size of {size}, and gptkernels.attention takes {HEAD_SIZES[0]} ... {HEAD_SIZES[-1]}"
    if getattr(module, "v_head_dim", size) != size:
        return f"its values have a head size of {module.v_head_dim} and its keys one of {size}"
    return None
