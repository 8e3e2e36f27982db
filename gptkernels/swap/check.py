"""`gptkernels check --hf PATH`: that accelerate() does not change your model, and what it gains on this machine."""

import copy
import inspect
import json
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..bench.memory import kept_for_backward, storage_bytes
from ..files import write_text
from .accelerate import accelerate
from .modules import Foreign

ROWS, TOKENS, PADDING, NEW_TOKENS = 2, 64, 9, 40
# What is timed: rows, and tokens where the model takes as many.
TIMED = {"cpu": (1, 512), "cuda": (8, 1024)}
REPEATS = 3
# In float32, of the values themselves; in bfloat16, of the error of plain PyTorch in bfloat16.
FLOAT32, RATIO = 1e-5, 2.0


@dataclass
class Finding:
    """One comparison. share: of the allowed error; more than 1 is wrong."""

    dtype: str
    what: str
    share: float


@dataclass
class Cost:
    """Of a forward and backward pass of the model in training."""

    milliseconds: float
    kept_mib: float  # for backward, beside parameters
    peak_mib: float | None  # on a GPU


def run(options: Namespace) -> int:
    """Prints what was compared and what it costs; returns 1 if anything was wrong."""
    console = Console()
    device = torch.device("cuda" if options.device in ("auto", "cuda") and torch.cuda.is_available() else "cpu")
    torch.manual_seed(torch.seed() % 2**31 if options.seed is None else options.seed)
    try:
        model = load(options.hf).to(device).eval()
        fast = copy.deepcopy(model)
        console.print(accelerate(fast))
    except (OSError, ValueError, ImportError) as error:
        print(f"gptkernels check: --hf {options.hf}: {error}", file=sys.stderr)
        return 2
    findings = list(compare(model, fast))
    print_findings(console, findings)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    costs = {name: cost(each.to(dtype)) for name, each in (("before", model), ("after", fast))}
    print_costs(console, costs, f"{device.type}, {name_of(dtype)}, {shape_of(model)}")
    if options.json:
        result = {"findings": [asdict(f) for f in findings], "costs": {name: asdict(c) for name, c in costs.items()}}
        write_text(options.json, json.dumps(result, indent=1) + "\n")
    return int(any(finding.share > 1 for finding in findings))


def load(path: str) -> nn.Module:
    """path: a folder with a model, or a configuration alone (its folder, or config.json), which gets random weights."""
    import transformers

    folder = Path(path).parent if path.endswith(".json") else Path(path)
    config = transformers.AutoConfig.from_pretrained(path if path.endswith(".json") else str(path))
    cls = getattr(transformers, (config.architectures or [""])[0], None)
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    has_weights = not folder.is_dir() or any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
    if has_weights and not path.endswith(".json"):
        return (cls or transformers.AutoModel).from_pretrained(path, **options)
    config._attn_implementation = "eager"
    return cls(config) if cls else transformers.AutoModel.from_config(config, **options)


def compare(model: Foreign, fast: Foreign) -> Iterator[Finding]:
    """Both in evaluation, in float32."""
    arguments = inputs(model)
    masks: dict[str, slice | None] = {"": None}
    if "input_ids" in arguments:
        masks |= {", left padding": slice(0, PADDING), ", right padding": slice(-PADDING, None)}
    for dtype in (torch.float32, torch.bfloat16):
        plain, ours = copy.deepcopy(model).to(dtype), copy.deepcopy(fast).to(dtype)
        truth = copy.deepcopy(plain).float()
        for label, hidden in masks.items():
            if hidden is not None:
                mask = torch.ones_like(arguments["input_ids"])
                mask[1:, hidden] = 0
                arguments["attention_mask"] = mask
            results = [gradients(each, arguments) for each in (truth, plain, ours)]
            shares = {name: share(*(result[name] for result in results)) for name in results[0]}
            yield Finding(name_of(dtype), f"logits{label}", shares.pop("logits"))
            yield Finding(name_of(dtype), f"gradients, the worst of {len(shares)}{label}", max(shares.values()))
        arguments.pop("attention_mask", None)
    if "input_ids" in arguments and model.can_generate():
        options: dict = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
        options["attention_mask"] = torch.ones_like(arguments["input_ids"])
        tokens = [each.generate(arguments["input_ids"], **options) for each in (model, fast)]
        same = torch.equal(*tokens)
        yield Finding("float32", f"greedy generation of {NEW_TOKENS} tokens", 0.0 if same else torch.inf)


def inputs(model: Foreign, rows: int = ROWS, tokens: int = TOKENS, room: int = NEW_TOKENS) -> dict[str, Tensor]:
    """tokens: at most, with room for as many more"""
    config, device = model.config, model.device
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(rows, config.num_channels, config.image_size, config.image_size).to(device)}
    text = config.get_text_config()
    tokens = min(tokens, getattr(text, "max_position_embeddings", tokens + room) - room)
    if tokens <= PADDING:
        raise ValueError(f"the model takes {tokens + room} tokens, and the comparison needs more")
    return {"input_ids": torch.randint(1, text.vocab_size, (rows, tokens)).to(device)}


def timed_inputs(model: Foreign) -> dict[str, Tensor]:
    rows, tokens = TIMED[model.device.type]
    return inputs(model, rows, tokens, room=0)


def shape_of(model: nn.Module) -> str:
    ((name, value),) = timed_inputs(model).items()
    return " x ".join(map(str, value.shape)) + (" tokens" if name == "input_ids" else " pixels")


def gradients(model: nn.Module, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits of real tokens and the gradients that they give to every layer: weight and bias together, because the
    true gradient of a key's bias is zero, which is no measure of anybody's error."""
    dtype = next(model.parameters()).dtype
    model.zero_grad()
    out = first_output(model, {n: x.to(dtype) if x.is_floating_point() else x for n, x in arguments.items()})
    real = arguments.get("attention_mask")
    out = out if real is None else out[real.bool()]
    generator = torch.Generator().manual_seed(0)
    out.backward(torch.randn(out.shape, generator=generator).to(torch.bfloat16).to(out))
    layers: dict[str, list[Tensor]] = {"logits": [out.detach().flatten()]}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            layers.setdefault(name.rpartition(".")[0], []).append(parameter.grad.flatten())
    return {name: torch.cat(values).double() for name, values in layers.items()}


def first_output(model: nn.Module, arguments: dict[str, Tensor]) -> Tensor:
    out = model(**arguments)
    return out.logits if "logits" in out else out[0]


def share(truth: Tensor, plain: Tensor, ours: Tensor) -> float:
    """The root mean square error of ours over what is allowed."""
    error, ordinary, size = (x.square().mean().sqrt().item() for x in (ours - truth, plain - truth, truth))
    return error / max(RATIO * ordinary, FLOAT32 * size, 1e-30) if ours.isfinite().all() else torch.inf


def cost(model: Foreign) -> Cost:
    dtype, device = next(model.parameters()).dtype, model.device
    arguments = timed_inputs(model)
    arguments = {name: x.to(dtype) if x.is_floating_point() else x for name, x in arguments.items()}
    if "labels" in inspect.signature(model.forward).parameters and "input_ids" in arguments and model.can_generate():
        arguments["labels"] = arguments["input_ids"]
    model.train()

    def step() -> None:
        loss = model(**arguments).loss if "labels" in arguments else first_output(model, arguments).square().mean()
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with kept_for_backward(model.parameters()) as kept:
        step()
    kept_mib = storage_bytes(kept) / 2**20
    kept.clear()
    seconds = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(REPEATS):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    return Cost(min(seconds) * 1e3, kept_mib, peak)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def print_findings(console: Console, findings: list[Finding]) -> None:
    table = Table(title="error over allowed error (must be at most 1)", title_justify="left")
    for column in ("dtype", "what"):
        table.add_column(column)
    table.add_column("share", justify="right")
    for finding in findings:
        right = finding.share <= 1
        table.add_row(finding.dtype, finding.what, f"[green]{finding.share:.2f}" if right else "[bold red]WRONG")
    console.print(table)


def print_costs(console: Console, costs: dict[str, Cost], title: str) -> None:
    table = Table(title=f"forward and backward ({title})", title_justify="left")
    for column in ("", "time", "kept for backward", "peak on the GPU"):
        table.add_column(column, justify="right" if column else "left")
    for name, each in costs.items():
        peak = "-" if each.peak_mib is None else f"{each.peak_mib:.1f} MiB"
        table.add_row(name, f"{each.milliseconds:.1f} ms", f"{each.kept_mib:.1f} MiB", peak)
    console.print(table)
