"""Which cases `gptkernels bench` runs, most important first.

quick: a minute or two. headline: the shapes that the goals are set for. full: every length, width and window.
"""

from collections.abc import Iterator

import torch

from ..failures import UsageError
from .cases import NORMS, OPS, Case

SUITES = ("quick", "headline", "full")
BOTH_WAYS = ("fwd", "bwd")


def suite(name: str, device: torch.device, dtypes: tuple[str, ...] = ()) -> list[Case]:
    """Cases without repetition; in bfloat16 on a GPU and float32 on a CPU unless dtypes are named."""
    make = {
        ("quick", "cpu"): cpu_quick,
        ("headline", "cpu"): cpu_headline,
        ("full", "cpu"): cpu_full,
        ("quick", "cuda"): gpu_quick,
        ("headline", "cuda"): gpu_headline,
        ("full", "cuda"): gpu_full,
    }[name, device.type]
    usual = ("bfloat16",) if device.type == "cuda" else ("float32",)
    cases = [case for dtype in dtypes or usual for case in make(dtype)]
    return list({(case.op, case.label, case.dtype, case.passes): case for case in cases}.values())


def cpu_quick(dtype: str) -> Iterator[Case]:
    yield Case.of("attention", dtype, BOTH_WAYS, B=1, H=2, T=4096, D=64, W=256)
    yield Case.of("attention", dtype, BOTH_WAYS, B=1, H=12, T=1024, D=64)
    yield Case.of("decode_attention", dtype, B=8, H=12, T=4096, D=64, W=256)
    for op in NORMS:
        yield Case.of(op, dtype, BOTH_WAYS, M=4096, N=768)
    yield Case.of("rope", dtype, BOTH_WAYS, B=1, H=12, T=1024, D=64)
    yield Case.of("mlp", dtype, ("both",), M=512, N=768)
    yield Case.of("gated_mlp", dtype, ("both",), M=512, N=768, F=2048)
    yield Case.of("linear_cross_entropy", dtype, ("both",), M=128, N=768)
    yield Case.of("linear_log_probs", dtype, ("both",), M=128, N=768)
    yield Case.of("linear_kl_div", dtype, ("both",), M=128, N=768)


def cpu_headline(dtype: str) -> Iterator[Case]:
    yield Case.of("attention", dtype, ("both",), B=1, H=4, T=8192, D=64, W=256)
    for tokens in (1024, 2048, 4096):
        yield Case.of("attention", dtype, ("both",), B=1, H=4, T=tokens, D=64, W=256)
    yield from cpu_quick(dtype)


def cpu_full(dtype: str) -> Iterator[Case]:
    yield from cpu_headline(dtype)
    for window in (64, 128, 512, 1024):
        yield Case.of("attention", dtype, BOTH_WAYS, B=1, H=4, T=4096, D=64, W=window)
    for tokens in (512, 2048, 4096):
        yield Case.of("attention", dtype, BOTH_WAYS, B=1, H=4, T=tokens, D=64)
    for sinks, cap, alibi in ((1, 0, 0), (0, 50, 0), (0, 0, 1)):
        for window in (0, 128):
            options = {"W": window, "S": sinks, "C": cap, "A": alibi}
            yield Case.of("attention", dtype, BOTH_WAYS, False, B=1, H=8, G=4, T=1024, D=64, **options)
    for page in (0, 64):
        yield Case.of("decode_attention", dtype, B=8, H=16, G=4, T=4096, D=64, S=1, P=page)
    yield Case.of("mlp", dtype, BOTH_WAYS, M=1024, N=1600)
    yield Case.of("linear_cross_entropy", dtype, ("fwd", "both"), M=1024, N=768)


def gpu_quick(dtype: str) -> Iterator[Case]:
    yield Case.of("attention", dtype, BOTH_WAYS, B=2, H=16, T=4096, D=128)
    yield Case.of("attention", dtype, BOTH_WAYS, B=2, H=16, T=4096, D=64)
    yield Case.of("attention", dtype, BOTH_WAYS, B=1, H=16, T=16384, D=64, W=1024)
    yield Case.of("decode_attention", dtype, B=32, H=16, T=4096, D=128)
    for op in NORMS:
        yield Case.of(op, dtype, BOTH_WAYS, M=16384, N=1600)
    yield Case.of("rms_norm", dtype, BOTH_WAYS, M=2**20, N=128)
    yield Case.of("rope", dtype, BOTH_WAYS, B=2, H=32, G=8, T=4096, D=128)
    yield Case.of("mlp", dtype, ("both",), M=8192, N=1600)
    yield Case.of("gated_mlp", dtype, ("both",), M=8192, N=2048, F=5632)
    yield Case.of("linear_cross_entropy", dtype, ("both",), M=8192, N=768)
    yield Case.of("linear_log_probs", dtype, ("both",), M=8192, N=768)
    yield Case.of("linear_kl_div", dtype, ("both",), M=8192, N=768)


def gpu_headline(dtype: str) -> Iterator[Case]:
    """16k tokens and a width of 2048 wherever the goals do not say otherwise."""
    yield Case.of("attention", dtype, BOTH_WAYS, every_peer=True, B=2, H=16, T=8192, D=128)
    yield Case.of("attention", dtype, BOTH_WAYS, every_peer=True, B=1, H=32, T=32768, D=64, W=1024)
    yield Case.of("add_layer_norm", dtype, BOTH_WAYS, every_peer=True, M=16384, N=2048)
    yield Case.of("mlp", dtype, ("both",), every_peer=True, M=16384, N=1600)
    yield Case.of("gated_mlp", dtype, BOTH_WAYS, every_peer=True, M=16384, N=4096, F=14336)
    yield Case.of("linear_cross_entropy", dtype, ("both",), every_peer=True, M=16384, N=768)
    yield Case.of("linear_cross_entropy", dtype, ("both",), M=8192, N=2304, V=256000, C=30)
    yield Case.of("linear_log_probs", dtype, ("both",), every_peer=True, M=8192, N=4096, V=128256)
    yield Case.of("linear_kl_div", dtype, ("both",), every_peer=True, M=8192, N=1600)
    yield from newer_attention(dtype)
    yield Case.of("attention", dtype, BOTH_WAYS, B=2, H=32, T=8192, D=64)
    yield Case.of("attention", dtype, BOTH_WAYS, B=1, H=16, T=32768, D=128, W=1024)
    yield Case.of("attention", dtype, BOTH_WAYS, B=1, H=16, T=16384, D=128)
    yield Case.of("attention", dtype, BOTH_WAYS, B=1, H=32, T=16384, D=64)
    for width in (768, 2048, 4096, 12288):
        yield Case.of("mlp", dtype, ("both",), M=16384 if width < 12288 else 8192, N=width)
    yield Case.of("layer_norm", dtype, BOTH_WAYS, every_peer=True, M=16384, N=2048)
    yield Case.of("rms_norm", dtype, BOTH_WAYS, every_peer=True, M=16384, N=2048)
    yield Case.of("rms_norm", dtype, BOTH_WAYS, every_peer=True, M=2**20, N=128)
    yield Case.of("rope", dtype, BOTH_WAYS, every_peer=True, B=2, H=32, G=8, T=8192, D=128)
    for width in (1600, 4096, 12288):
        for op in NORMS:
            yield Case.of(op, dtype, BOTH_WAYS, M=16384, N=width)
    yield Case.of("decode_attention", dtype, B=32, H=16, T=8192, D=128)
    # Small calls, for the time that the host takes.
    yield Case.of("attention", dtype, BOTH_WAYS, B=1, H=12, T=256, D=64)
    yield Case.of("layer_norm", dtype, BOTH_WAYS, M=256, N=768)
    for tokens in (1024, 2048, 4096):
        yield Case.of("attention", dtype, BOTH_WAYS, B=16384 // tokens, H=16, T=tokens, D=128)
    for window in (256, 512, 2048):
        yield Case.of("attention", dtype, BOTH_WAYS, B=1, H=32, T=32768, D=64, W=window)


def newer_attention(dtype: str) -> Iterator[Case]:
    """As gpt-oss, Gemma 2 and BLOOM have it"""
    yield Case.of("attention", dtype, BOTH_WAYS, every_peer=True, B=1, H=64, G=8, T=8192, D=64, W=128, S=1)
    yield Case.of("attention", dtype, BOTH_WAYS, every_peer=True, B=1, H=8, G=4, T=8192, D=256, C=50)
    yield Case.of("attention", dtype, BOTH_WAYS, every_peer=True, B=1, H=32, T=4096, D=128, A=1)
    for page in (0, 64):
        yield Case.of("decode_attention", dtype, every_peer=True, B=32, H=64, G=8, T=8192, D=64, S=1, P=page)


def gpu_full(dtype: str) -> Iterator[Case]:
    yield from gpu_headline(dtype)
    for head, heads in ((64, 32), (80, 25), (96, 20), (128, 16), (256, 8)):
        for tokens in (512, 1024, 2048, 4096, 8192, 16384):
            yield Case.of("attention", dtype, BOTH_WAYS, B=16384 // tokens, H=heads, T=tokens, D=head)
    for tokens in (2048, 4096, 8192, 16384, 32768):
        yield Case.of("attention", dtype, BOTH_WAYS, B=32768 // tokens, H=32, T=tokens, D=64, W=1024)
        yield Case.of("attention", dtype, BOTH_WAYS, B=2, H=64, G=8, T=tokens, D=64, W=1024)
    for window in (128, 256, 512, 2048, 4096):
        for head, heads in ((64, 32), (128, 16)):
            yield Case.of("attention", dtype, BOTH_WAYS, B=1, H=heads, T=32768, D=head, W=window)
    for width in (768, 1024, 1600, 2048, 2560, 4096, 5120, 12288):
        for op in ("layer_norm", "add_layer_norm"):
            yield Case.of(op, dtype, BOTH_WAYS, M=16384, N=width)
        yield Case.of("mlp", dtype, BOTH_WAYS, M=8192, N=width)
    for width, hidden in ((1024, 2816), (2048, 8192), (3584, 18944), (8192, 28672)):
        yield Case.of("gated_mlp", dtype, BOTH_WAYS, M=8192, N=width, F=hidden)
    for width in (768, 1600, 4096):
        yield Case.of("linear_cross_entropy", dtype, ("fwd", "both"), M=16384, N=width)
    for tokens in (1024, 4096, 16384, 65536):
        yield Case.of("decode_attention", dtype, B=32, H=32, G=8, T=tokens, D=128)
        yield Case.of("decode_attention", dtype, B=32, H=32, G=8, T=tokens, D=128, W=1024)
        for page in (16, 256):
            yield Case.of("decode_attention", dtype, B=32, H=32, G=8, T=tokens, D=128, P=page)
    for tokens in (2048, 8192, 32768):
        for window in (0, 128):
            yield Case.of("attention", dtype, BOTH_WAYS, B=1, H=64, G=8, T=tokens, D=64, W=window, S=1)
        for window in (0, 4096):
            yield Case.of("attention", dtype, BOTH_WAYS, B=1, H=8, G=4, T=tokens, D=256, W=window, C=50)
        yield Case.of("attention", dtype, BOTH_WAYS, B=1, H=32, T=tokens, D=128, A=1)


def of_shape(ops: list[str], shape: dict[str, int], dtypes: tuple[str, ...], passes: tuple[str, ...]) -> list[Case]:
    """One case per op and dtype, at a shape that a user gave."""
    known = [op for op in ops if set(shape) <= set(OPS[op].shape)]
    if not known:
        dimensions = "; ".join(f"{op}: {OPS[op].about}" for op in ops)
        raise UsageError(f"--shape has dimensions that no chosen op has ({dimensions})")
    return [Case.of(op, dtype, passes, every_peer=True, **shape) for op in known for dtype in dtypes]
