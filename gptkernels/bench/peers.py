"""Who is measured: our backends, what PyTorch offers, and other libraries where they are installed.

A contender makes, for a case, a function that is called like the op: q, k, v as (B, H, T, D), and so on. Conversions
that are not free are part of what is timed. `naive` is what people write first, in the case's dtype.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from .cases import NORMS, OPS, Case
from .plain import mask_of, plain

ATTENTION = ("attention",)
SDPA = ("attention", "decode_attention")
GELU = "gelu_tanh"  # gk.mlp's default, which every MLP here computes


# What a shape may ask for beyond the op itself, by dimension
EXTRAS = {"S": "sinks", "C": "softcap", "A": "ALiBi by slopes", "P": "paged caches"}


class UnfitError(RuntimeError):
    """This contender does not do this case; the message says why."""


def has_only(case: Case, able: str = "") -> None:
    """able: the dimensions of EXTRAS that this contender takes"""
    for name, what in EXTRAS.items():
        if case.shape.get(name) and name not in able:
            raise UnfitError(f"it has no {what}")


@dataclass(frozen=True)
class Contender:
    name: str
    kind: str  # ours, peer, or yardstick: work of the same size, not the same function
    ops: tuple[str, ...]
    make: Callable[[Case, torch.device], Callable]
    module: str = "torch"
    install: str = ""
    devices: tuple[str, ...] = ("cuda",)
    only_if_asked: bool = False  # compiles for seconds, or is never the fastest: for cases that ask for every peer

    def missing(self) -> str | None:
        """Why it cannot be called here, or None."""
        package = self.module.split(".")[0]
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
        try:
            importlib.import_module(self.module)
        except Exception as error:  # broken installations fail in many ways
            return f"{self.module} does not import: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
        return None


def ours(backend: str) -> Contender:
    def make(case: Case, device: torch.device) -> Callable:
        return lambda **tensors: case.spec.function(**tensors, **case.kwargs, backend=backend)

    return Contender(backend, "ours", tuple(OPS), make, devices=("cuda", "cpu") if backend == "eager" else ("cuda",))


def keep_buffers() -> None:
    """What a compiled backward pass reads has to be there still when it is timed a second time."""
    from torch._functorch import config

    config.donated_buffer = False


def compiled(case: Case, device: torch.device) -> Callable:
    torch.compiler.reset()
    keep_buffers()
    return torch.compile(plain(case, device), dynamic=False)


def sdpa(backend: str) -> Callable:
    def make(case: Case, device: torch.device) -> Callable:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        has_only(case)
        decoding, pinned = case.op == "decode_attention", getattr(SDPBackend, backend)
        dense = case.kwargs["window"] is None
        mask = None if dense else mask_of(case, device, queries=1 if decoding else 0)
        causal, grouped_heads = dense and not decoding, case.shape["G"] != case.shape["H"]

        def call(q, k, v):
            with sdpa_kernel(pinned):
                return F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped_heads
                )

        return (lambda q, k_cache, v_cache, lengths: call(q, k_cache, v_cache)) if decoding else call

    return make


def flex(case: Case, device: torch.device) -> Callable:
    torch.compiler.reset()
    keep_buffers()
    return torch.compile(flex_call(case, device), dynamic=False)


def flex_call(case: Case, device: torch.device) -> Callable:
    """To be compiled"""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    tokens, window, cap = case.shape["T"], case.kwargs["window"] or case.shape["T"], case.kwargs.get("softcap")

    def seen(batch, head, query, key):
        return (key <= query) & (query - key < window)

    blocks = create_block_mask(seen, None, None, tokens, tokens, device=str(device))
    options: dict[str, Any] = {"block_mask": blocks, "enable_gqa": case.shape["G"] != case.shape["H"]}

    def call(q, k, v, sinks=None, alibi_slopes=None):
        def bent(score, batch, head, query, key):
            score = score if cap is None else cap * torch.tanh(score / cap)
            return score if alibi_slopes is None else score - alibi_slopes[head] * (query - key)

        bend = None if cap is None and alibi_slopes is None else bent
        if sinks is None:
            return flex_attention(q, k, v, bend, **options)
        out, aux = flex_attention(q, k, v, bend, **options, return_aux=AuxRequest(lse=True))
        # The share of the weights that the sinks leave
        return out * torch.sigmoid(aux.lse - sinks[:, None]).unsqueeze(-1).to(out.dtype)

    return call


def flash_attn(case: Case, device: torch.device, module: str = "flash_attn", able: str = "CA") -> Callable:
    has_only(case, able)
    function = importlib.import_module(module).flash_attn_func
    # Counts the keys to the left of a query's own.
    options = {} if case.kwargs["window"] is None else {"window_size": (case.kwargs["window"] - 1, 0)}
    if case.shape["C"]:
        options["softcap"] = case.kwargs["softcap"]

    def call(q, k, v, **slopes):
        out = function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=True, **options, **slopes)
        return first_of(out).transpose(1, 2)

    return call


def flash_attn_cute(case: Case, device: torch.device) -> Callable:
    # It takes sinks too, and has no gradient for them.
    return flash_attn(case, device, "flash_attn.cute", able="C")


def first_of(out) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def flash_attn_decode(case: Case, device: torch.device) -> Callable:
    has_only(case, "P")
    if case.shape["P"] % 256:
        raise UnfitError("its pages have to be multiples of 256 tokens")
    from flash_attn import flash_attn_with_kvcache

    options: dict[str, Any] = {"causal": True}
    if case.kwargs["window"] is not None:
        options["window_size"] = case.kwargs["window"] - 1, 0

    def call(q, k_cache, v_cache, lengths, **pages):
        caches = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
        out = flash_attn_with_kvcache(q.transpose(1, 2), *caches, cache_seqlens=lengths, **options, **pages)
        return out.transpose(1, 2)

    return call


def xformers(case: Case, device: torch.device) -> Callable:
    has_only(case)
    from xformers.ops import fmha

    if case.shape["G"] != case.shape["H"]:
        raise UnfitError("grouped heads need another layout there")
    bias = fmha.attn_bias.LowerTriangularMask()
    if case.kwargs["window"] is not None:
        bias = fmha.attn_bias.LowerTriangularFromBottomRightMask().make_local_attention(case.kwargs["window"])

    def call(q, k, v):
        out = fmha.memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_bias=bias)
        return out.transpose(1, 2)

    return call


def liger(case: Case, device: torch.device) -> Callable:
    from liger_kernel.transformers import functional

    def layer_norm(x, weight, bias):
        return functional.liger_layer_norm(x, weight, bias, 1e-5)

    def add_layer_norm(x, residual, weight, bias):
        h = x + residual
        return functional.liger_layer_norm(h, weight, bias, 1e-5), h

    def rms_norm(x, weight):
        return functional.liger_rms_norm(x, weight, 1e-6, in_place=False)

    def add_rms_norm(x, residual, weight):
        return functional.liger_fused_add_rms_norm(x, residual, weight, 1e-6, in_place=False)

    def loss(x, weight, targets):
        options = {"accum_dtype": torch.float32, **case.kwargs}
        found = functional.liger_fused_linear_cross_entropy(x, weight, targets, **options)
        return first_of(found)

    def gated_mlp(x, gate_weight, up_weight, down_weight):
        return F.linear(functional.liger_swiglu(F.linear(x, gate_weight), F.linear(x, up_weight)), down_weight)

    ops: dict[str, Callable] = {
        "layer_norm": layer_norm,
        "add_layer_norm": add_layer_norm,
        "rms_norm": rms_norm,
        "add_rms_norm": add_rms_norm,
        "gated_mlp": gated_mlp,
        "linear_cross_entropy": loss,
    }
    return ops[case.op]


def quack(case: Case, device: torch.device) -> Callable:
    """Without its tuner, which would take longer than everything else here."""
    if case.op == "mlp":
        from quack.mlp import mlp_func

        def mlp(x, fc_weight, fc_bias, proj_weight, proj_bias):
            return mlp_func(x, fc_weight, proj_weight, "gelu_tanh_approx", fc_bias, proj_bias, tuned=False)

        return mlp
    if case.op == "linear_cross_entropy":
        has_only(case)
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        return lambda x, weight, targets: chunked_linear_cross_entropy(x, weight, targets, tuned=False)
    if case.op == "rms_norm":
        from quack.rmsnorm import rmsnorm

        return lambda x, weight: rmsnorm(x, weight, eps=1e-6)
    from quack.rmsnorm import layernorm_bwd, layernorm_fwd

    class QuackLayerNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias):
            # Its parameters have to be float32.
            y, rstd, mean = layernorm_fwd(x, weight.float(), bias.float(), 1e-5, return_rstd=True, return_mean=True)
            ctx.save_for_backward(x, weight, rstd, mean)
            return y

        @staticmethod
        def backward(ctx, dy):
            x, weight, rstd, mean = ctx.saved_tensors
            dx, dweight, dbias = layernorm_bwd(x, weight.float(), dy, rstd, mean)
            return dx, dweight.to(weight.dtype), dbias.to(weight.dtype)

    return lambda x, weight, bias: QuackLayerNorm.apply(x, weight, bias)


class ProductsOnly(torch.autograd.Function):
    """The MLP's matrix products and nothing else: what no MLP can be faster than with these products."""

    @staticmethod
    def forward(ctx, x, fc_weight, fc_bias, proj_weight, proj_bias):
        hidden = x @ fc_weight.mT
        ctx.save_for_backward(x, fc_weight, proj_weight, hidden)
        return hidden @ proj_weight.mT

    @staticmethod
    def backward(ctx, dout):
        x, fc_weight, proj_weight, hidden = ctx.saved_tensors
        dhidden = dout @ proj_weight
        no_sums = dout.new_zeros(fc_weight.shape[0]), dout.new_zeros(proj_weight.shape[0])
        return dhidden @ fc_weight, dhidden.mT @ x, no_sums[0], dout.mT @ hidden, no_sums[1]


class GatedProductsOnly(torch.autograd.Function):
    """Likewise of the gated MLP."""

    @staticmethod
    def forward(ctx, x, gate_weight, up_weight, down_weight):
        gate, up = x @ gate_weight.mT, x @ up_weight.mT
        ctx.save_for_backward(x, gate_weight, up_weight, down_weight, gate, up)
        return gate @ down_weight.mT

    @staticmethod
    def backward(ctx, dout):
        x, gate_weight, up_weight, down_weight, gate, up = ctx.saved_tensors
        dhidden = dout @ down_weight
        dx = torch.addmm(dhidden @ gate_weight, up, up_weight)
        return dx, dhidden.mT @ x, up.mT @ x, dout.mT @ gate


def products_only(case: Case, device: torch.device) -> Callable:
    function = ProductsOnly if case.op == "mlp" else GatedProductsOnly
    return lambda **tensors: function.apply(*tensors.values())


def torch_loss(case: Case, device: torch.device) -> Callable:
    if not hasattr(F, "linear_cross_entropy"):
        raise UnfitError("F.linear_cross_entropy came with torch 2.13")
    has_only(case)
    return lambda x, weight, targets: F.linear_cross_entropy(x, weight, targets)


def torch_rms_norm(case: Case, device: torch.device) -> Callable:
    return lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-6)


ANY_DEVICE = ("cuda", "cpu")
FA2, FA2_INSTALL = "flash_attn.flash_attn_interface", "pip install flash-attn --no-build-isolation"
CONTENDERS = [
    *(ours(backend) for backend in dispatch.BACKENDS),
    Contender("naive", "peer", tuple(OPS), plain, devices=ANY_DEVICE),
    Contender("sdpa-cudnn", "peer", SDPA, sdpa("CUDNN_ATTENTION")),
    Contender("sdpa-flash", "peer", SDPA, sdpa("FLASH_ATTENTION"), devices=ANY_DEVICE),
    Contender(
        "sdpa-efficient", "peer", ("attention", "decode_attention"), sdpa("EFFICIENT_ATTENTION"), only_if_asked=True
    ),
    Contender("sdpa-math", "peer", SDPA, sdpa("MATH"), only_if_asked=True),
    Contender(
        "flash-attn-4",
        "peer",
        ATTENTION,
        flash_attn_cute,
        module="flash_attn.cute",
        install="pip install --pre flash-attn-4",
    ),
    Contender("flash-attn-2", "peer", ATTENTION, flash_attn, FA2, FA2_INSTALL),
    Contender("flash-attn-2", "peer", ("decode_attention",), flash_attn_decode, FA2, FA2_INSTALL),
    Contender("xformers", "peer", ATTENTION, xformers, module="xformers.ops", install="pip install xformers"),
    Contender(
        "liger",
        "peer",
        (*NORMS, "gated_mlp", "linear_cross_entropy"),
        liger,
        module="liger_kernel.transformers.functional",
        install="pip install liger-kernel",
    ),
    Contender(
        "quack",
        "peer",
        ("layer_norm", "rms_norm", "mlp", "linear_cross_entropy"),
        quack,
        module="quack",
        install="pip install quack-kernels",
    ),
    Contender("torch-loss", "peer", ("linear_cross_entropy",), torch_loss, devices=ANY_DEVICE),
    Contender("torch-rms-norm", "peer", ("rms_norm",), torch_rms_norm, devices=ANY_DEVICE),
    Contender("flex", "peer", ATTENTION, flex, only_if_asked=True),
    Contender("compile", "peer", tuple(OPS), compiled, devices=ANY_DEVICE, only_if_asked=True),
    Contender("products-only", "yardstick", ("mlp", "gated_mlp"), products_only, devices=ANY_DEVICE),
]
NAMES = tuple(dict.fromkeys(contender.name for contender in CONTENDERS))


def chosen(
    case: Case, device: torch.device, backends: tuple[str, ...], peers: tuple[str, ...] | None
) -> list[Contender]:
    """Who competes in a case. peers: names, or None for all but those that only come where a case asks for
    every peer, on a GPU."""
    found = []
    for contender in CONTENDERS:
        if case.op not in contender.ops or device.type not in contender.devices:
            continue
        if contender.kind == "ours":
            wanted = not backends or contender.name in backends
        elif peers is None:
            wanted = not contender.only_if_asked or (case.every_peer and device.type == "cuda")
        else:
            wanted = contender.name in peers
        if wanted:
            found.append(contender)
    return found


def survey(device: torch.device) -> dict[str, dict]:
    """Every peer that could run on such a device: whether it is here, in which version, or how to install it."""
    from importlib.metadata import packages_distributions, version

    distributions = packages_distributions()
    found = {}
    for contender in CONTENDERS:
        if contender.kind != "peer" or device.type not in contender.devices:
            continue
        missing = contender.missing()
        package = contender.module.split(".")[0]
        versions = [f"{name} {version(name)}" for name in sorted(set(distributions.get(package, ())))]
        found[contender.name] = {
            "status": "missing" if missing else "available",
            "version": ", ".join(versions) or None,
            "detail": missing or "",
            "install": contender.install if missing else "",
        }
    return found
