"""What is measured: each op at a shape, with its inputs and the work that it cannot avoid.

Useful work, per pass, whatever a kernel really does (s = bytes per element):
    attention       4 D nnz FLOPs forward, 10 D nnz backward, per head; nnz = T (T + 1) / 2, or T W - W (W - 1) / 2
    decode          4 D FLOPs per head and key seen; the keys and values seen are read once
    layer_norm      7 FLOPs per element forward, 13 backward; 2 M N s bytes forward, 3 M N s backward
    add_layer_norm  8 and 14 FLOPs per element; 4 M N s bytes each way
    rms_norm        4 FLOPs per element forward, 9 backward; add_rms_norm 5 and 10; bytes as of LayerNorm
    rope            3 FLOPs per element each way; queries and keys read and written once, their tables read once
    mlp             4 M N F FLOPs forward, 8 M N F backward; gated_mlp 6 and 12
    loss            2 M N V FLOPs without gradients, 6 M N V with (they are made in the same pass)
    kl_div          as log_probs, and 2 M N V for the teacher's logits forward
    log_probs       2 M N V FLOPs forward, 4 M N V backward; nothing of the size of the logits is kept between them
Bytes: each input is read once, each output and each tensor kept for backward is written once, and read once there.
"""

import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from ..dispatch import Call
from ..failures import UsageError
from ..ops.attention import attention, decode_attention
from ..ops.attention import reference as attention_reference
from ..ops.gated_mlp import gated_mlp
from ..ops.gated_mlp import reference as gated_mlp_reference
from ..ops.layer_norm import add_layer_norm, layer_norm
from ..ops.layer_norm import reference as layer_norm_reference
from ..ops.linear_cross_entropy import linear_cross_entropy, linear_log_probs
from ..ops.linear_cross_entropy import reference as loss_reference
from ..ops.linear_kl_div import linear_kl_div
from ..ops.linear_kl_div import reference as distillation_reference
from ..ops.mlp import mlp
from ..ops.mlp import reference as mlp_reference
from ..ops.rms_norm import add_rms_norm, rms_norm
from ..ops.rms_norm import reference as rms_norm_reference
from ..ops.rope import reference as rope_reference
from ..ops.rope import rope

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PASSES = ("fwd", "bwd", "both")


@dataclass(frozen=True)
class Op:
    """An op as it is benchmarked. `shape`: its dimensions with what they are by default; 0: see Case.of."""

    function: Callable
    reference: Callable
    shape: dict[str, int]
    about: str
    passes: tuple[str, ...] = PASSES


OPS = {
    "attention": Op(
        attention,
        attention_reference.attention,
        {"B": 1, "H": 12, "G": 0, "T": 2048, "D": 64, "W": 0, "S": 0, "C": 0, "A": 0},
        "B batch, H heads, G key/value heads (H), T tokens, D head size, W window (none), S1 sinks, C softcap (none), "
        "A1 ALiBi",
    ),
    "decode_attention": Op(
        decode_attention,
        attention_reference.decode_attention,
        {"B": 8, "H": 12, "G": 0, "T": 4096, "D": 64, "W": 0, "S": 0, "P": 0},
        "B batch, H heads, G key/value heads (H), T keys in the cache, D head size, W window (none), S1 sinks, "
        "P page size (no pages)",
        ("fwd",),
    ),
    "layer_norm": Op(layer_norm, layer_norm_reference.layer_norm, {"M": 4096, "N": 768}, "M rows, N columns"),
    "add_layer_norm": Op(
        add_layer_norm, layer_norm_reference.add_layer_norm, {"M": 4096, "N": 768}, "M rows, N columns"
    ),
    "rms_norm": Op(rms_norm, rms_norm_reference.rms_norm, {"M": 4096, "N": 768}, "M rows, N columns"),
    "add_rms_norm": Op(add_rms_norm, rms_norm_reference.add_rms_norm, {"M": 4096, "N": 768}, "M rows, N columns"),
    "rope": Op(
        rope,
        rope_reference.rope,
        {"B": 1, "H": 12, "G": 0, "T": 2048, "D": 64},
        "B batch, H heads, G key/value heads (H), T tokens, D head size",
    ),
    "mlp": Op(mlp, mlp_reference.mlp, {"M": 4096, "N": 768, "F": 0}, "M rows, N width, F hidden width (4 N)"),
    "gated_mlp": Op(
        gated_mlp,
        gated_mlp_reference.gated_mlp,
        {"M": 4096, "N": 768, "F": 0},
        "M rows, N width, F hidden width (4 N)",
    ),
    "linear_cross_entropy": Op(
        linear_cross_entropy,
        loss_reference.linear_cross_entropy,
        {"M": 4096, "N": 768, "V": 50257, "C": 0},
        "M rows, N width, V vocabulary, C softcap (none)",
        ("fwd", "both"),
    ),
    "linear_log_probs": Op(
        linear_log_probs,
        loss_reference.linear_log_probs,
        {"M": 4096, "N": 768, "V": 50257},
        "M rows, N width, V vocabulary",
    ),
    "linear_kl_div": Op(
        linear_kl_div,
        distillation_reference.linear_kl_div,
        {"M": 4096, "N": 768, "V": 50257},
        "M rows, N width of student and teacher, V vocabulary",
    ),
}


# Dimensions that may be 0, and those of them that are only there or not
OPTIONAL, SWITCHES = "GWFCSAP", "SA"
# Linear layers; each but the last keeps its output
LAYERS = {"mlp": 2, "gated_mlp": 3}
# FLOPs per element, forward and backward
NORMS = {"layer_norm": (7, 13), "add_layer_norm": (8, 14), "rms_norm": (4, 9), "add_rms_norm": (5, 10)}


@dataclass(frozen=True)
class Case:
    op: str
    shape: dict[str, int] = field(hash=False)
    dtype: str
    passes: tuple[str, ...]
    every_peer: bool = False  # also those that take long to compile

    @staticmethod
    def of(op: str, dtype: str = "float32", passes: tuple[str, ...] = (), every_peer: bool = False, **shape: int):
        """Dimensions that are not given are the op's defaults; passes that the op does not have are left out."""
        spec = OPS[op]
        unknown = sorted(set(shape) - set(spec.shape))
        if unknown:
            raise UsageError(f"--shape {unknown[0]} means nothing to {op}, whose dimensions are: {spec.about}")
        full = {**spec.shape, **shape}
        for name, size in full.items():
            if size < (0 if name in OPTIONAL else 1):
                raise UsageError(f"--shape must have a {name} of at least 1, not {size}")
            if name in SWITCHES and size > 1:
                raise UsageError(f"--shape must have a {name} of 0 or 1, not {size}")
        if "G" in full:
            full["G"] = full["G"] or full["H"]
            if full["H"] % full["G"]:
                raise UsageError(f"--shape must have a G that divides H={full['H']}, not {full['G']}")
        if "F" in full:
            full["F"] = full["F"] or 4 * full["N"]
        if full.get("W", 0) >= full.get("T", 1):
            full["W"] = 0
        wanted = tuple(name for name in (passes or spec.passes) if name in spec.passes)
        return Case(op, full, dtype, wanted, every_peer)

    @property
    def spec(self) -> Op:
        return OPS[self.op]

    @property
    def label(self) -> str:
        return label_of(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def kwargs(self) -> dict:
        """What of the shape is an option, not a tensor"""
        window = {"window": self.shape["W"] or None} if "W" in self.shape else {}
        by_row = {"reduction": "none"} if self.op == "linear_kl_div" else {}
        return window | by_row | ({"softcap": float(self.shape["C"])} if self.shape.get("C") else {})

    @property
    def has_gradients(self) -> bool:
        return self.op != "decode_attention"

    def resized(self, **shape: int) -> "Case":
        return Case.of(self.op, self.dtype, self.passes, self.every_peer, **{**self.shape, **shape})

    def with_passes(self, passes: tuple[str, ...]) -> "Case":
        return replace(self, passes=passes)

    def tensors(self, device: torch.device, seed: int, gradients: bool = True) -> dict[str, Tensor]:
        """Fresh random inputs of the op, the same for the same seed on the same device."""
        generator = torch.Generator(device).manual_seed(seed ^ zlib.crc32(f"{self.op} {self.label}".encode()))
        gradients = gradients and self.has_gradients

        def random(*shape: int, scale: float = 1.0, heads_inside: bool = False) -> Tensor:
            values = torch.randn(shape, device=device, generator=generator) * scale
            # (B, T, H, D) in memory, as the projection of a GPT leaves them, seen as (B, H, T, D)
            values = values.to(self.torch_dtype).transpose(1, 2) if heads_inside else values.to(self.torch_dtype)
            return values.detach().requires_grad_(gradients)

        s = self.shape
        if self.op == "attention":
            sizes = {"q": s["H"], "k": s["G"], "v": s["G"]}
            heads = {n: random(s["B"], s["T"], h, s["D"], heads_inside=True) for n, h in sizes.items()}
            sinks = {"sinks": random(s["H"])} if s["S"] else {}
            # From steep to flat, as models have them
            slopes = {"alibi_slopes": 2 ** -torch.linspace(0.5, 8, s["H"], device=device)} if s["A"] else {}
            return heads | sinks | slopes
        if self.op == "rope":
            angles = torch.rand(s["T"], s["D"], device=device, generator=generator) * 2 * math.pi
            heads = {n: random(s["B"], s["T"], s[h], s["D"], heads_inside=True) for n, h in (("q", "H"), ("k", "G"))}
            return {**heads, "cos": angles.cos().to(self.torch_dtype), "sin": angles.sin().to(self.torch_dtype)}
        if self.op == "decode_attention":
            # With pages, the last one of a row may not be full.
            pages, slots = (s["B"] * -(-s["T"] // s["P"]), s["P"]) if s["P"] else (s["B"], s["T"])
            caches = {name: random(pages, s["G"], slots, s["D"]) for name in ("k_cache", "v_cache")}
            lengths = torch.full((s["B"],), s["T"], dtype=torch.int32, device=device)
            tensors = {"q": random(s["B"], s["H"], 1, s["D"]), **caches, "lengths": lengths}
            if s["S"]:
                tensors["sinks"] = random(s["H"])
            if s["P"]:
                order = torch.randperm(pages, device=device, generator=generator)
                tensors["block_table"] = order.to(torch.int32).view(s["B"], -1)
            return tensors
        rows, width = s["M"], s["N"]
        if self.op in NORMS:
            inputs = ("x", "residual") if self.op.startswith("add_") else ("x",)
            parameters = ("weight",) if "rms" in self.op else ("weight", "bias")
            return {name: random(rows, width) for name in inputs} | {name: random(width) for name in parameters}
        if self.op == "mlp":
            hidden = s["F"]
            return {
                "x": random(rows, width),
                "fc_weight": random(hidden, width, scale=width**-0.5),
                "fc_bias": random(hidden),
                "proj_weight": random(width, hidden, scale=hidden**-0.5),
                "proj_bias": random(width),
            }
        if self.op == "gated_mlp":
            first = {name: random(s["F"], width, scale=width**-0.5) for name in ("gate_weight", "up_weight")}
            return {"x": random(rows, width), **first, "down_weight": random(width, s["F"], scale=s["F"] ** -0.5)}
        targets = torch.randint(0, s["V"], (rows,), device=device, generator=generator)
        model = {"x": random(rows, width), "weight": random(s["V"], width, scale=width**-0.5)}
        if self.op == "linear_kl_div":
            teacher = random(rows, width).detach(), random(s["V"], width, scale=width**-0.5).detach()
            model |= {"teacher_x": teacher[0], "teacher_weight": teacher[1]}
        return {**model, "targets": targets}

    def prepared(self, tensors: dict[str, Tensor]) -> Call:
        """The op's call on these inputs, not run"""
        return cast(Any, self.spec.function).prepare(**tensors, **self.kwargs)

    def outputs_like(self) -> tuple[str, ...]:
        """The input that each output has the shape and dtype of, but for integers': those are float32; "": a float32
        number."""
        return {
            "attention": ("q",),
            "decode_attention": ("q",),
            "layer_norm": ("x",),
            "add_layer_norm": ("x", "residual"),
            "rms_norm": ("x",),
            "add_rms_norm": ("x", "residual"),
            "rope": ("q", "k"),
            "mlp": ("x",),
            "gated_mlp": ("x",),
            "linear_cross_entropy": ("",),
            "linear_log_probs": ("targets",),
            "linear_kl_div": ("targets",),
        }[self.op]

    def seen(self) -> int:
        """Pairs of a query and a key that it sees, in one head of one sequence"""
        tokens, window = self.shape["T"], self.shape["W"] or self.shape["T"]
        if self.op == "decode_attention":
            return window
        return tokens * window - window * (window - 1) // 2

    def flops(self, which: str) -> int:
        s = self.shape
        if self.op in ("attention", "decode_attention"):
            return {"fwd": 4, "bwd": 10, "both": 14}[which] * s["D"] * self.seen() * s["B"] * s["H"]
        if self.op == "rope":
            return (6 if which == "both" else 3) * s["B"] * s["T"] * (s["H"] + s["G"]) * s["D"]
        if self.op in LAYERS:
            return LAYERS[self.op] * {"fwd": 2, "bwd": 4, "both": 6}[which] * s["M"] * s["N"] * s["F"]
        if self.op == "linear_cross_entropy":
            return {"fwd": 2, "both": 6}[which] * s["M"] * s["N"] * s["V"]
        if self.op in ("linear_log_probs", "linear_kl_div"):
            forward = 4 if self.op == "linear_kl_div" else 2  # of the teacher's product as well
            return {"fwd": forward, "bwd": 4, "both": forward + 4}[which] * s["M"] * s["N"] * s["V"]
        forward, backward = NORMS[self.op]
        return {"fwd": forward, "bwd": backward, "both": forward + backward}[which] * s["M"] * s["N"]

    def bytes(self, which: str) -> int:
        """Least traffic with device memory"""
        if which == "both" and self.op != "linear_cross_entropy":
            return self.bytes("fwd") + self.bytes("bwd")
        s, forward, size = self.shape, which == "fwd", self.torch_dtype.itemsize
        if self.op == "decode_attention":
            return s["B"] * s["D"] * (2 * s["G"] * self.seen() + 2 * s["H"]) * size
        if self.op == "attention":
            # q, k, v, out and the log-sum-exp; backward also dout, dq, dk, dv
            tensors = s["B"] * s["T"] * s["D"] * (2 * s["H"] + 2 * s["G"]) * size
            return (1 if forward else 2) * tensors + 4 * s["B"] * s["H"] * s["T"]
        if self.op == "rope":
            return 2 * (s["B"] * (s["H"] + s["G"]) + 1) * s["T"] * s["D"] * size
        matrix = s["M"] * s["N"] * size
        if self.op in NORMS:
            # mean and rstd in float32; weight and bias, or weight and both gradients. RMSNorm has no mean and no bias.
            if "rms" in self.op:
                small = 4 * s["M"] + (1 if forward else 2) * s["N"] * size
            else:
                small = 8 * s["M"] + (2 if forward else 3) * s["N"] * size
            return (4 if self.op.startswith("add_") else 2 if forward else 3) * matrix + small
        if self.op in LAYERS:
            layers = LAYERS[self.op]
            weights, kept = layers * s["N"] * s["F"] * size, (layers - 1) * s["M"] * s["F"] * size
            # x, out and what is kept; backward: x, dout, dx, what was kept, and the weights' gradients
            return (2 * matrix + weights if forward else 3 * matrix + 2 * weights) + kept
        return (1 if forward else 2) * (matrix + s["V"] * s["N"] * size) + 8 * s["M"]


def label_of(shape: dict[str, int], without: tuple[str, ...] = ()) -> str:
    """Such as B1 H12 T2048 D64 W256: what is as it usually is stays out, and so does `without`."""
    usual = {**dict.fromkeys(OPTIONAL, 0), "G": shape.get("H"), "F": 4 * shape.get("N", 0)}
    return " ".join(f"{name}{n}" for name, n in shape.items() if name not in without and usual.get(name) != n)


def parse_shape(text: str) -> dict[str, int]:
    """ "B2,H16,T8192" -> {"B": 2, "H": 16, "T": 8192}"""
    found = {}
    for part in re.split(r"[,\s]+", text.strip()):
        match = re.fullmatch(r"([A-Z])=?(\d+)", part)
        if not match:
            raise UsageError(f"--shape must look like B2,H16,T8192,D128, not {text!r}")
        found[match[1]] = int(match[2])
    return found
