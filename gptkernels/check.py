"""`gptkernels check`: every op, backend and dtype against the float64 reference, on fresh random inputs."""

import itertools
import json
import math
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from . import arguments, dispatch, simulator
from .failures import UsageError
from .files import write_text
from .ops.attention import attention, decode_attention
from .ops.attention import reference as attention_reference
from .ops.dropout import draw_seed
from .ops.gated_mlp import gated_mlp
from .ops.gated_mlp import reference as gated_mlp_reference
from .ops.layer_norm import add_layer_norm, layer_norm
from .ops.layer_norm import reference as layer_norm_reference
from .ops.linear_cross_entropy import linear_cross_entropy, linear_log_probs
from .ops.linear_cross_entropy import reference as loss_reference
from .ops.linear_kl_div import linear_kl_div
from .ops.linear_kl_div import reference as distillation_reference
from .ops.mlp import mlp
from .ops.mlp import reference as mlp_reference
from .ops.rms_norm import add_rms_norm, rms_norm
from .ops.rms_norm import reference as rms_norm_reference
from .ops.rope import reference as rope_reference
from .ops.rope import rope
from .parity import assert_parity
from .progress import Steps

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
INTEGER_DTYPES = {name: torch.int32 for name in ("cu_seqlens", "cu_seqlens_k", "lengths")} | {"targets": torch.int64}


Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Case:
    """One call: what to make, what to run, what to compare with."""

    label: str
    op: Callable
    reference: Callable
    shapes: Shapes  # of the random tensors, by argument name
    kwargs: dict = field(default_factory=dict)
    integers: dict[str, list[int]] = field(default_factory=dict)  # such as cu_seqlens (int32) and targets (int64)
    has_gradients: bool = True

    def tensors(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        def leaf(name, shape):
            # Matrices of weights as they are initialised, so that what comes out is of the size of what goes in.
            scale = shape[-1] ** -0.5 if name.endswith("weight") and len(shape) == 2 else 1.0
            return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_(self.has_gradients)

        return {name: leaf(name, shape) for name, shape in self.shapes.items()}

    def run(self, backend: str, dtype: torch.dtype, device: torch.device) -> float:
        """The share of the allowed error that was used up; ParityError above 1."""
        tensors = self.tensors(dtype, device)
        seed = int(torch.randint(2**31, ()))  # of dropout and cotangents: from the run's own seed, so that it repeats
        reference_kwargs = dict(self.kwargs)
        if self.kwargs.get("dropout"):
            torch.manual_seed(seed)
            reference_kwargs["seed"] = draw_seed(device)
        integers = {
            name: torch.tensor(value, dtype=INTEGER_DTYPES[name], device=device)
            for name, value in self.integers.items()
        }

        def op(**arguments):
            torch.manual_seed(seed)
            return self.op(**arguments, **integers, **self.kwargs, backend=backend)

        def reference(**arguments):
            return self.reference(**arguments, **integers, **reference_kwargs)

        # On a GPU the reference is there too: in float64 a CPU would take minutes for it.
        return assert_parity(op, reference, tensors, device=device)


def layer_norm_cases(small: bool) -> Iterator[Case]:
    sizes = [(5, 63), (3, 1600), (2, 4096)] if small else [(7, 63), (4096, 768), (1000, 1600), (333, 12288), (9, 65536)]
    for rows, columns in sizes:
        shapes = {"x": (rows, columns), "weight": (columns,), "bias": (columns,)}
        yield Case(f"{rows} x {columns}", layer_norm, layer_norm_reference.layer_norm, shapes)


def add_layer_norm_cases(small: bool) -> Iterator[Case]:
    sizes = [(5, 111), (3, 1600)] if small else [(7, 111), (4096, 768), (1000, 1600), (333, 12288)]
    for rows, columns in sizes:
        shapes = {"x": (rows, columns), "residual": (rows, columns), "weight": (columns,), "bias": (columns,)}
        for dropout in (0.0, 0.1):
            label = f"{rows} x {columns}" + (f", dropout {dropout}" if dropout else "")
            yield Case(
                label,
                add_layer_norm,
                layer_norm_reference.add_layer_norm,
                shapes,
                {"dropout": dropout} if dropout else {},
            )


def rms_norm_cases(small: bool) -> Iterator[Case]:
    sizes = [(20, 64), (5, 63), (2, 4096)] if small else [(9999, 128), (4096, 768), (333, 12288), (9, 65536)]
    for (rows, columns), cast in zip(sizes, ("llama", "gemma", "gpt_oss", "llama"), strict=False):
        shapes = {"x": (rows, columns), "weight": (columns,)}
        options = {"cast": cast, "offset": 1.0 if cast == "gemma" else 0.0}
        yield Case(f"{rows} x {columns}, {cast}", rms_norm, rms_norm_reference.rms_norm, shapes, options)


def add_rms_norm_cases(small: bool) -> Iterator[Case]:
    for rows, columns in [(5, 111)] if small else [(4096, 768), (333, 12288)]:
        shapes = {"x": (rows, columns), "residual": (rows, columns), "weight": (columns,)}
        for dropout in (0.0, 0.1):
            label = f"{rows} x {columns}" + (f", dropout {dropout}" if dropout else "")
            options = {"dropout": dropout} if dropout else {}
            yield Case(label, add_rms_norm, rms_norm_reference.add_rms_norm, shapes, options)


def attention_cases(small: bool) -> Iterator[Case]:
    batch, heads, kv_heads = (1, 2, 1) if small else (2, 8, 2)
    lengths = [(63, 63), (70, 133)] if small else [(1, 1), (111, 111), (1000, 1000), (63, 1024), (2049, 2049)]
    head_sizes = [64, 80] if small else [40, 64, 80, 96, 128, 256]
    for head_size in head_sizes:
        for queries, keys in lengths:
            shapes: Shapes = {
                "q": (batch, heads, queries, head_size),
                "k": (batch, kv_heads, keys, head_size),
                "v": (batch, kv_heads, keys, head_size),
            }
            label = f"B{batch} H{heads}/{kv_heads} T{queries}/{keys} D{head_size}"
            variants: dict[str, dict] = {"causal": {}, "window 17": {"window": 17}}
            if head_size == 64:
                variants |= {"full": {"causal": False}, "dropout": {"dropout": 0.1}}
            for name, kwargs in variants.items():
                yield Case(f"{label}, {name}", attention, attention_reference.attention, shapes, kwargs)
    total = 100 if small else 1500
    documents = {"cu_seqlens": [0, 1, total // 3, total // 3, total]}
    packed: Shapes = {"q": (total, heads, 64), "k": (total, kv_heads, 64), "v": (total, kv_heads, 64)}
    for kwargs in ({}, {"window": 20}):
        label = f"4 documents, T{total} D64" + (", window 20" if kwargs else "")
        yield Case(label, attention, attention_reference.attention, packed, kwargs, documents)
    # What gpt-oss has, and what Gemma 2 has, and BLOOM.
    tokens = lengths[-1][0]
    some: Shapes = {"q": (batch, heads, tokens, 64), **{name: (batch, kv_heads, tokens, 64) for name in "kv"}}
    sinks = {"window": (16, 0), "return_lse": True}
    # As many heads as make PyTorch's largest error in so few gradients one to go by.
    with_sinks = {**some, "q": (batch, 16, tokens, 64), "sinks": (16,)}
    yield Case(f"T{tokens} D64, sinks, lse", attention, attention_reference.attention, with_sinks, sinks)
    yield Case(f"T{tokens} D64, softcap 50", attention, attention_reference.attention, some, {"softcap": 50.0})
    ops = with_slopes(attention), with_slopes(attention_reference.attention)
    yield Case(f"T{tokens} D64, ALiBi", *ops, some, {"causal": False, "window": (30, 5)})
    own_keys = {**documents, "cu_seqlens_k": [0, total // 2, total // 2, total - 1, total]}
    label = f"4 documents, T{total} D64, keys of their own"
    yield Case(label, attention, attention_reference.attention, packed, {}, own_keys)


def with_slopes(op: Callable) -> Callable:
    """attention with ALiBi, whose slopes have no gradients"""

    def run(q: Tensor, **others):
        slopes = 0.5 ** torch.arange(1, q.shape[1] + 1, device=q.device, dtype=torch.float32)
        return op(q=q, alibi_slopes=slopes, **others)

    return run


def decode_attention_cases(small: bool) -> Iterator[Case]:
    capacity = 160 if small else 4096
    for tokens, window in ((1, None), (1, 50), (5, None)):
        shapes: Shapes = {"q": (2, 4, tokens, 64), "k_cache": (2, 2, capacity, 64), "v_cache": (2, 2, capacity, 64)}
        yield Case(
            f"{tokens} of {capacity}" + (f", window {window}" if window else ""),
            decode_attention,
            attention_reference.decode_attention,
            shapes,
            {"window": window},
            {"lengths": [capacity, capacity // 3]},
            has_gradients=False,
        )


def mlp_cases(small: bool) -> Iterator[Case]:
    sizes = [(40, 64, 256), (33, 72, 200)] if small else [(1000, 768, 3072), (4096, 1600, 6400), (333, 4096, 16384)]
    for rows, d, hidden in sizes:
        shapes = {
            "x": (rows, d),
            "fc_weight": (hidden, d),
            "fc_bias": (hidden,),
            "proj_weight": (d, hidden),
            "proj_bias": (d,),
        }
        for activation in ("gelu_tanh", "silu"):
            label = f"{rows} x {d} x {hidden}, {activation}"
            yield Case(label, mlp, mlp_reference.mlp, shapes, {"activation": activation})


def gated_mlp_cases(small: bool) -> Iterator[Case]:
    sizes = [(40, 64, 136), (33, 72, 200)] if small else [(1000, 768, 2048), (4096, 2048, 5632), (333, 4096, 14336)]
    for (rows, d, hidden), activation in itertools.product(sizes, ("silu", "gelu_tanh")):
        shapes: Shapes = {"x": (rows, d), "gate_weight": (hidden, d), "up_weight": (hidden, d), "gate_bias": (hidden,)}
        shapes |= {"up_bias": (hidden,), "down_weight": (d, hidden), "residual": (rows, d)}
        label = f"{rows} x {d} x {hidden}, {activation}"
        yield Case(label, gated_mlp, gated_mlp_reference.gated_mlp, shapes, {"activation": activation})


def linear_cross_entropy_cases(small: bool) -> Iterator[Case]:
    sizes = [(40, 64, 1003), (7, 48, 5001)] if small else [(1000, 768, 50257), (4096, 1024, 30000)]
    for rows, d, vocabulary in sizes:
        targets = torch.randint(0, vocabulary, (rows,)).index_fill(0, torch.arange(0, rows, 5), -100).tolist()
        for reduction in ("mean", "none"):
            yield Case(
                f"{rows} x {d} x {vocabulary}, {reduction}",
                linear_cross_entropy,
                loss_reference.linear_cross_entropy,
                {"x": (rows, d), "weight": (vocabulary, d)},
                {"reduction": reduction},
                {"targets": targets},
            )

        options = {"label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0}
        shapes: Shapes = {"x": (rows, d), "weight": (vocabulary, d), "bias": (vocabulary,)}
        label = f"{rows} x {d} x {vocabulary}, smoothed, capped, with bias and z-loss"
        yield Case(
            label, linear_cross_entropy, loss_reference.linear_cross_entropy, shapes, options, {"targets": targets}
        )


def linear_log_probs_cases(small: bool) -> Iterator[Case]:
    for rows, d, vocabulary in [(40, 64, 1003)] if small else [(1000, 768, 50257)]:
        targets = torch.randint(0, vocabulary, (rows,)).tolist()
        shapes: Shapes = {"x": (rows, d), "weight": (vocabulary, d)}
        label, options = f"{rows} x {d} x {vocabulary}", {"temperature": 0.7}
        yield Case(label, linear_log_probs, loss_reference.linear_log_probs, shapes, options, {"targets": targets})


def linear_kl_div_cases(small: bool) -> Iterator[Case]:
    for rows, d, vocabulary in [(40, 64, 1003)] if small else [(1000, 768, 50257)]:
        targets = torch.randint(0, vocabulary, (rows,)).index_fill(0, torch.arange(0, rows, 5), -100).tolist()
        shapes: Shapes = {"x": (rows, d), "weight": (vocabulary, d)}
        for reduction in ("mean", "none"):
            ops = taught(linear_kl_div), taught(distillation_reference.linear_kl_div)
            options = {"temperature": 2.0, "reduction": reduction}
            label = f"{rows} x {d} x {vocabulary}, {reduction}"
            yield Case(label, *ops, shapes, options, {"targets": targets})


def taught(op: Callable) -> Callable:
    """linear_kl_div with a teacher made of the student, which takes no gradient"""

    def call(x, weight, **others):
        teacher_x, teacher_weight = (torch.cat((each, each.roll(1, 0)), 1).detach() for each in (x, weight))
        return op(x, weight, teacher_x, teacher_weight, **others)

    return call


def rope_cases(small: bool) -> Iterator[Case]:
    batch, heads, kv_heads, tokens = (2, 3, 1, 9) if small else (2, 32, 8, 4097)
    for size, rotated, interleaved in ((64, 64, False), (128, 32, False), (80, 80, True)):
        shapes: Shapes = {"q": (batch, heads, tokens, size), "k": (batch, kv_heads, tokens, size)}
        label = f"B{batch} H{heads}/{kv_heads} T{tokens} D{size}, {rotated} rotated" + ", neighbours" * interleaved
        options = {"interleaved": interleaved, "rotary_dim": rotated}
        yield Case(label, by_position(rope), by_position(rope_reference.rope), shapes, options)


def by_position(op: Callable) -> Callable:
    """rope with the usual tables, which take no gradient"""

    def call(q, k, *, rotary_dim, **options):
        pair = torch.arange(rotary_dim // 2, device=q.device)
        angles = torch.arange(q.shape[2], device=q.device).unsqueeze(1) * 1e4 ** (-2 * pair / rotary_dim)
        return op(q, k, angles.cos(), angles.sin(), rotary_dim=rotary_dim, **options)

    return call


CASES = {
    "layer_norm": layer_norm_cases,
    "add_layer_norm": add_layer_norm_cases,
    "rms_norm": rms_norm_cases,
    "add_rms_norm": add_rms_norm_cases,
    "attention": attention_cases,
    "decode_attention": decode_attention_cases,
    "rope": rope_cases,
    "mlp": mlp_cases,
    "gated_mlp": gated_mlp_cases,
    "linear_cross_entropy": linear_cross_entropy_cases,
    "linear_log_probs": linear_log_probs_cases,
    "linear_kl_div": linear_kl_div_cases,
}


@dataclass
class Result:
    op: str
    case: str
    backend: str
    dtype: str
    status: str  # right, WRONG, unsupported
    share: float | None  # of the allowed error
    detail: str
    seconds: float


def check_case(name: str, case: Case, backend: str, dtype: str, device: torch.device) -> Result:
    started = time.perf_counter()
    share, detail = None, ""
    try:
        share = case.run(backend, DTYPES[dtype], device)
        status = "right" if math.isfinite(share) else "WRONG"
    except dispatch.UnsupportedError as error:
        status, detail = "unsupported", str(error).splitlines()[-1].strip()
    except Exception as error:  # a launch that fails is a finding, and the rest is still to be checked
        status, detail = "WRONG", f"{type(error).__name__}: {error}"
    return Result(name, case.label, backend, dtype, status, share, detail, time.perf_counter() - started)


def resolve_device(name: str) -> tuple[str, torch.device]:
    """auto: a GPU, else the simulator where it is installed, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu" if simulator.unavailable() else "simulator"
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU (try --device simulator, or cpu)")
    if name == "simulator" and simulator.unavailable():
        raise UsageError(f"--device simulator: {simulator.unavailable()}")
    return name, torch.device("cuda" if name == "cuda" else "cpu")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--op", action="append", metavar="OP", help="only this op (may be repeated)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "simulator"))
    parser.add_argument("--seed", type=arguments.seed, help="of the random inputs; a fresh one by default")
    parser.add_argument("--json", metavar="FILE", help="also write the results there")
    parser.add_argument(
        "--hf",
        metavar="PATH",
        help="instead: prove accelerate() on this model of transformers and measure what it gains; a folder, or a "
        "config.json for random weights",
    )


def run(options: Namespace) -> int:
    """Prints a table; returns 1 if anything was wrong."""
    if options.hf:
        from .swap.check import run as check_model

        return check_model(options)
    unknown = sorted(set(options.op or ()) - set(CASES))
    if unknown:
        raise UsageError(f"--op must be one of {', '.join(CASES)}, not {unknown[0]}")
    device_name, device = resolve_device(options.device)
    seed = torch.seed() % 2**31 if options.seed is None else options.seed
    console = Console()
    torch.manual_seed(seed)  # some cases draw their integers when they are made
    jobs = [
        (name, case, backend, dtype)
        for name in options.op or CASES
        for case in CASES[name](small=device_name != "cuda")
        for backend in (dispatch.BACKENDS if device_name != "cpu" else ("eager",))
        for dtype in DTYPES
    ]
    results = []
    place = simulator.use(arch=90, seed=seed) if device_name == "simulator" else nullcontext()
    with place, Steps(console, len(jobs), f"checking on {device_name}") as steps:
        for index, job in enumerate(jobs):
            steps.begin(f"{job[0]}, {job[2]}")
            torch.manual_seed(seed + index)
            results.append(check_case(*job, device))
            steps.done()
    print_results(console, results)
    wrong = sum(result.status == "WRONG" for result in results)
    right = sum(result.status == "right" for result in results)
    console.print(
        f"{right} right, {wrong} wrong, {len(results) - right - wrong} unsupported "
        f"on {torch.cuda.get_device_name() if device.type == 'cuda' else device_name} (--seed {seed})"
    )
    if options.json:
        found = {"device": device_name, "seed": seed, "results": [asdict(r) for r in results]}
        write_text(options.json, json.dumps(found, indent=1))
    return 1 if wrong or not right else 0


def print_results(console: Console, results: list[Result]) -> None:
    """A table per op, a row per case and backend, a column per dtype with the error over the allowed error."""
    console.print("largest error over allowed error (must be at most 1):")
    rows: dict[str, dict[tuple, dict[str, Result]]] = {}
    for result in results:
        rows.setdefault(result.op, {}).setdefault((result.case, result.backend), {})[result.dtype] = result
    for op, cases in rows.items():
        table = Table(box=None)
        table.add_column(op, overflow="fold")
        table.add_column("backend", no_wrap=True)
        for dtype in DTYPES:
            table.add_column(dtype, justify="right", no_wrap=True)
        for key, found in cases.items():
            table.add_row(*key, *(cell(result) for result in found.values()))
        console.print(table)
    for result in results:
        if result.status == "WRONG":
            console.print(f"[red]{result.op} ({result.case}, {result.backend}, {result.dtype}): {result.detail}")
    for op, backend, reason in dict.fromkeys((r.op, r.backend, r.detail) for r in results if r.status == "unsupported"):
        console.print(f"[dim]{op}: {reason if reason.startswith(backend) else f'{backend}: {reason}'}")


def cell(result: Result) -> str:
    if result.status == "unsupported":
        return "[dim]-"
    return f"[green]{result.share:.2f}" if result.status == "right" else "[bold red]WRONG"
